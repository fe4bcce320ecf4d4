from __future__ import annotations

import json
from pathlib import Path

import pytest

from mfmjt.errors import InputError
from mfmjt.features.procedural import FeatureExtraction
from mfmjt.train.recipe import RECIPES, NetworkTraining, load_config
from mfmjt.train.stages import STAGES


def test_overrides_are_typed():
    config = load_config(
        NetworkTraining,
        "nano",
        "network",
        ["steps=7", "lr=2", "betas=[0.5, 0.6]", "ema=[0.9]", "out=a=b", "overrides.depth=3"],
    )
    assert (config.steps, config.lr, config.betas, config.ema) == (7, 2.0, (0.5, 0.6), (0.9,))
    assert isinstance(config.lr, float)
    assert config.out == "a=b"
    assert config.overrides == {"depth": 3}


def test_recipe_file_and_override_order(tmp_path):
    path = tmp_path / "mine.json"
    path.write_text(json.dumps({"network": {"steps": 5, "batch": 3}}))
    config = load_config(NetworkTraining, str(path), "network", ["steps=6", "steps=8"])
    assert (config.steps, config.batch) == (8, 3)
    assert load_config(FeatureExtraction, str(path), "features") == FeatureExtraction()


def test_nested_settings():
    config = load_config(STAGES["classifier"][0], "nano", "classifier", ["training.steps=3"])
    assert config.training.steps == 3
    assert config.training.clips == STAGES["classifier"][0]().training.clips
    assert load_config(STAGES["codec"][0], "nano", "codec", ["out=x"]).out == Path("x")


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("stpes=5", "Did you mean steps"),
        ("zzzz=5", "Known: "),
        ("steps", "has no value"),
        ("steps=1.5", "expected int"),
        ("steps=true", "expected int"),
        ("lr=fast", "expected float"),
        ("betas=[0.9]", "expected tuple"),
        ("betas=0.9", "expected tuple"),
        ("tensorboard=1", "expected bool"),
        ("overrides=4", "expected dict"),
        ("window=15", "multiple of 10"),
        ("steps=0", "at least 1"),
        ("ratio=1.5", "between 0 and 1"),
        ("schedule=step", "cosine, linear, constant"),
        ("dtype=float16", "float32, bfloat16"),
        ("ema=[]", "at least one decay"),
        ("accumulate=0", "at least 1"),
        ("parallel=dp", "auto, none, ddp, fsdp"),
    ],
)
def test_wrong_overrides_say_what_to_do(override, words):
    with pytest.raises(InputError, match=words):
        load_config(NetworkTraining, "nano", "network", [override])


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "Give a JSON file, or one that ships: .*nano"),
        ("{", "Correct the JSON"),
        ("[]", "JSON object"),
        ('{"network": 3}', "must be an object"),
    ],
)
def test_wrong_recipes_say_what_to_do(tmp_path, content, words):
    path = tmp_path / "recipe.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(InputError, match=words):
        load_config(NetworkTraining, str(path), "network")


@pytest.mark.parametrize("recipe", sorted(RECIPES.glob("*.json")), ids=lambda path: path.stem)
def test_shipped_recipes_are_whole(recipe):
    content = json.loads(recipe.read_text())
    assert set(content) <= set(STAGES)
    configs = {stage: load_config(STAGES[stage][0], recipe.stem, stage) for stage in STAGES}
    if set(content) != set(STAGES):
        return
    # Each stage finds what the ones before it wrote.
    features, network = configs["features"], configs["network"]
    assert Path(features.codec).parent == Path(configs["codec"].out)
    assert Path(features.encoders).parent == Path(configs["encoders"].out)
    assert (network.store, network.codec) == (features.out, features.codec)
    assert network.encoders == features.encoders
