from __future__ import annotations

import pytest

from mfmjt.train.__main__ import main
from mfmjt.train.stages import STAGES


def test_the_module_explains_itself(capsys):
    assert main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert "torchrun" in shown
    assert all(stage in shown for stage in STAGES)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "--help"),
        (["network"], "--help"),
        (["nonsense", "nano"], "codec, teacher, text, encoders, features, network, classifier"),
        (["network", "nano", "stepz=3"], "Did you mean steps"),
    ],
)
def test_misuse_is_one_line_and_status_2(arguments, words, capsys):
    assert main(arguments) == 2
    shown = capsys.readouterr().err
    assert shown.startswith("Error: ")
    assert shown.count("\n") == 1
    assert words in shown


@pytest.mark.parametrize("stage", ["codec", "teacher", "text", "encoders", "classifier"])
def test_what_one_process_makes_is_not_shared(stage, monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main([stage, "nano"]) == 2
    assert "[process 1] Error: The stage" in capsys.readouterr().err
