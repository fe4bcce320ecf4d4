"""Every message is one short line, whatever it is told about."""

from __future__ import annotations

import ast
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import mfmjt
from mfmjt.checkpoints import PublishedFile, find_all, read_content
from mfmjt.codec import NanoCodec
from mfmjt.convert import from_mmaudio, to_mmaudio
from mfmjt.encoders import CLIP, MMAudioEncoders, NanoEncoders
from mfmjt.errors import InputError, MfmjtError, RunError, reason, short, some
from mfmjt.evaluate.classifier import Classifier
from mfmjt.media import read_video
from mfmjt.model import MFMJT, config_for, load_mmaudio
from mfmjt.pipeline import Pipeline
from mfmjt.train.recipe import NetworkTraining, load_config

PACKAGE = Path(mfmjt.__file__).parent
LONG = "x" * 240
DEEP = Path("/", *[LONG] * 15)
LINES = "one\ntwo\r\nthree\u2028four\x1b[2Jfive\udcff"
ADVICE = """Weights only load failed. This file can still be loaded, to do so you have two \
options, \x1b[1mdo those steps only if you trust the source of the checkpoint\x1b[0m.
\t(1) Re-running `torch.load` with `weights_only` set to `False` will likely succeed, but it can \
result in arbitrary code execution.
\tPlease use `torch.serialization.add_safe_globals([os.system])` to allowlist this global."""
UNSAFE = ("weights_only", "add_safe_globals", "allow_pickle", "trust the source", "arbitrary code")


def good(message: str) -> bool:
    return message.isprintable() and len(message) <= 600


texts = st.one_of(
    st.text(),
    st.text(alphabet=st.characters(categories=["Cc", "Cs", "Zl", "Zp", "Zs", "Lu"])),
    st.integers(0, 60_000).map(lambda n: "word " * (n // 5)),
    st.sampled_from([LINES, ADVICE, str(DEEP), "\n", "."]),
)


@given(texts, st.sampled_from([InputError, RunError]))
def test_any_message_becomes_one_short_line(text: str, kind: type[MfmjtError]) -> None:
    error = kind(text)
    assert good(str(error))
    assert str(kind(str(error))) == str(error)
    again = pickle.loads(pickle.dumps(error))
    assert (type(again), str(again)) == (kind, str(error))


@given(st.text("ab ", max_size=500))
def test_a_short_message_is_left_as_it_is(text: str) -> None:
    assert str(InputError(text)) == text.strip()


def test_of_a_long_message_the_middle_is_left_out() -> None:
    message = str(InputError(f"Cannot read {DEEP}. Correct the path."))
    assert message.startswith("Cannot read /xxx")
    assert message.endswith("xxx. Correct the path.")
    assert " … " in message
    assert short("abcdefghij" * 5, 20) == "abcdefghi … cdefghij"


@given(texts, st.sampled_from([ValueError, OSError, KeyError, torch.OutOfMemoryError]))
def test_what_another_library_says_is_short_and_never_its_unsafe_advice(
    text: str, kind: type[Exception]
) -> None:
    for told in (reason(kind(text)), reason(kind(text), whole=True)):
        assert told
        assert told.isprintable()
        assert len(told) <= 200
        assert not any(advice in told for advice in UNSAFE)


def test_what_is_told_of_another_library() -> None:
    assert reason(RuntimeError(ADVICE)) == "Weights only load failed"
    assert reason(ValueError("Object arrays cannot be loaded when allow_pickle=False")) == (
        "ValueError"
    )
    assert reason(FileNotFoundError(2, "No such file or directory", LONG)) == (
        "No such file or directory"
    )
    assert reason(KeyError("config")) == "no 'config'"
    assert reason(ValueError("\n\n first\nsecond.\n")) == "first"
    assert reason(ValueError("first\nsecond."), whole=True) == "first second"
    assert reason(MemoryError()) == "MemoryError"
    assert reason(InputError("Ours. " * 80)) == ("Ours. " * 80).strip(" .")


def test_lists_are_the_first_five_and_a_count() -> None:
    assert some("abc") == "a, b, c"
    assert some(range(5), "; ") == "0; 1; 2; 3; 4"
    assert some(range(2000)) == "0, 1, 2, 3, 4 and 1,995 more"
    assert len(some([LONG * 5] * 9)) < 600


# --- bad input ---------------------------------------------------------------------------------

WRONG = {f"{LONG}.{i}": torch.zeros(1) for i in range(3000)}
BAD: dict[str, Callable[[Path], object]] = {
    "no such model": lambda _: Pipeline.from_pretrained(DEEP),
    "a long name": lambda _: Pipeline.from_pretrained(LONG * 20),
    "a long file": lambda _: load_mmaudio(LONG * 20),
    "a long network": lambda _: MFMJT.load(LONG * 20),
    "a long codec": lambda _: NanoCodec.load(LONG * 20),
    "no such folder": lambda _: Pipeline.from_mmaudio(DEEP, "small_16k"),
    "no such network": lambda _: Pipeline.from_mmaudio(".", LONG * 20),
    "network": lambda path: MFMJT.load(path),
    "published": lambda path: load_mmaudio(path),
    "named": lambda path: load_mmaudio(path, "large_44k"),
    "encoders": lambda path: NanoEncoders.load(path),
    "classifier": lambda path: Classifier.load(path),
    "to ours": lambda path: from_mmaudio(path, path.with_name("out.safetensors")),
    "to theirs": lambda path: to_mmaudio(path, path.with_name("out.pth")),
    "to nowhere": lambda path: from_mmaudio(path, DEEP.with_suffix(".safetensors")),
    "keys": lambda _: CLIP.from_state_dict(WRONG),
    "keys of a network": lambda _: load_mmaudio(WRONG),
    "keys in keys": lambda _: load_mmaudio({LONG: {LONG: {LONG: WRONG}}}),
    "many files": lambda _: find_all(
        ".", [PublishedFile(f"{i}{LONG[:200]}", f"https://{i}.example/{LONG}") for i in range(99)]
    ),
    "encoders of a folder": lambda _: MMAudioEncoders.from_folder(DEEP),
    "fields": lambda _: config_for("nano", **{f"{LONG}{i}": 1 for i in range(3000)}),
    "recipe": lambda _: load_config(NetworkTraining, str(DEEP), "network", []),
    "settings": lambda _: load_config(NetworkTraining, "nano", "network", [f"{LONG * 9}=1"]),
    "video": lambda _: read_video(DEEP),
    "index": lambda path: read_content(path.rename(path.with_name("w.index.json"))),
}


@pytest.mark.parametrize("what", BAD)
@pytest.mark.parametrize(
    "content",
    [b"", LINES.encode(errors="ignore"), b"<html>" + b"y" * 5000, bytes(5000), b"\x80\x02" * 500],
    ids=["empty", "lines", "page", "zeros", "pickle"],
)
def test_bad_input_is_told_in_one_short_line(tmp_path: Path, what: str, content: bytes) -> None:
    path = tmp_path / f"{'long' * 40} name\n.safetensors"
    path.write_bytes(content)
    with pytest.raises(MfmjtError) as caught:
        BAD[what](path)
    assert good(str(caught.value))


# --- where messages are written ----------------------------------------------------------------


def quoted(tree: ast.AST) -> list[int]:
    """Lines that put another library's error into a message of ours as it is."""
    found = []
    for handler in ast.walk(tree):
        if not isinstance(handler, ast.ExceptHandler) or handler.type is None or not handler.name:
            continue
        if any(kind in ast.unparse(handler.type) for kind in ("InputError", "RunError", "Mfmjt")):
            continue
        for node in ast.walk(handler):
            if not isinstance(node, ast.Raise) or not isinstance(node.exc, ast.Call):
                continue
            if ast.unparse(node.exc.func) not in ("InputError", "RunError"):
                continue
            for part in ast.walk(node.exc):
                formatted = isinstance(part, ast.FormattedValue) and ast.unparse(part.value)
                as_text = isinstance(part, ast.Call) and ast.unparse(part)
                if formatted == handler.name or as_text == f"str({handler.name})":
                    found.append(part.lineno)
    return found


@pytest.mark.parametrize(
    "path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE))
)
def test_other_libraries_are_quoted_by_reason_only(path: Path) -> None:
    assert quoted(ast.parse(path.read_text())) == []
