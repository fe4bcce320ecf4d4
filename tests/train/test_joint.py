"""Training on videos and on sounds with captions together."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mfmjt.errors import InputError
from mfmjt.features.format import write_part
from mfmjt.features.store import FeatureStore
from mfmjt.model import MFMJT
from mfmjt.train.recipe import DataSource, NetworkTraining, load_config
from mfmjt.train.tasks.network import train_network
from mfmjt.train.tasks.step import Step, draw
from tests.train.states import curve, load_state, same_state, undo


@pytest.fixture(scope="module")
def sounds(store, tmp_path_factory) -> Path:
    """The training clips without their pictures, one of them without its caption."""
    folder = tmp_path_factory.mktemp("sounds")
    (folder / "train").mkdir()
    index = json.loads((store / "train" / "index.json").read_text())
    for name in index["shards"]:
        tensors = load_file(store / "train" / name)
        write_part(folder / "train" / name, {k: tensors[k] for k in ("mean", "logvar")}, {})
    index["captions"] = ["", *index["captions"][1:]]
    (folder / "train" / "index.json").write_text(json.dumps(index))
    return folder


@pytest.fixture
def joint(recipe, store, sounds):
    """joint(**changes) is a training on both, three rows of sounds to one of videos."""

    def make(**changes) -> NetworkTraining:
        data = (DataSource(str(store), 1.0), DataSource(str(sounds), 3.0))
        return recipe(**({"data": data, "store": "nowhere", "batch": 6} | changes))

    return make


def test_it_trains_and_resumes_bit_for_bit(joint, tmp_path):
    whole, part = (joint(out=str(tmp_path / name), steps=5) for name in ("whole", "part"))
    assert train_network(whole).finished
    # As if it had been killed after its fourth step.
    shutil.copytree(whole.out, part.out)
    undo(part.out, 4)
    assert load_state(part.out)[1]["step"] == 4
    assert train_network(part).finished
    assert curve(part.out) == curve(whole.out)
    assert len(curve(part.out)) == 5
    assert same_state(part.out, whole.out)
    alone = joint(out=str(tmp_path / "alone"), data=joint().data[:1], steps=5)
    train_network(alone)
    assert curve(alone.out) != curve(whole.out)


def test_processes_train_on_the_same_rows(ranks, joint, tmp_path):
    one, two = (joint(out=str(tmp_path / name), steps=2, full_every=0) for name in ("one", "two"))
    for world, config in ((1, one), (2, two)):
        ranks.train(world, config)
    for (_, *ours), (_, *theirs) in zip(curve(two.out), curve(one.out), strict=True):
        # Losses of two steps; sums in another order.
        assert ours == pytest.approx(theirs, rel=256 * torch.finfo().eps)


def test_what_is_missing_is_what_was_dropped(joint, recipe, ends):
    """The loss of clips without pictures or caption is that of whole clips without conditions."""
    config = joint(p=0.0, drop_video=0.0, drop_text=0.0, drop_all=0.0)
    both = FeatureStore([(s.store, s.weight) for s in config.data])
    both.encode_text(ends.encoders)
    torch.manual_seed(0)
    net = MFMJT.from_config("nano", **config.overrides)
    for p in net.parameters():  # a fresh network gives zero, whatever its conditions
        torch.nn.init.normal_(p, std=0.05)
    step = Step(net, config)
    generator = torch.Generator().manual_seed(1)
    draws = draw(config, both, 4, 20, 2, generator)
    sounds = draws._replace(clips=torch.tensor([4, 5, 6, 7]))  # of the second store
    videos = draws._replace(clips=torch.tensor([0, 1, 2, 3]))  # the same in the first
    dropped = videos._replace(
        video_mask=torch.zeros(4, dtype=torch.bool),
        text_mask=torch.tensor([False, True, True, True]),
    )
    features = [both.rows(d.clips, d.starts, d.latent_noise) for d in (sounds, dropped)]
    lacking, found = (step(f, d, 2) for f, d in zip(features, (sounds, dropped), strict=True))
    assert torch.equal(lacking[0], found[0])
    seen, _ = step(both.rows(videos.clips, videos.starts, videos.latent_noise), videos, 2)
    assert not torch.equal(seen, found[0])


def test_sounds_alone(recipe, sounds, tmp_path):
    """A store without pictures and without a split for validation."""
    config = recipe(store=str(sounds), steps=3, omega=0.5, kappa=0.25)
    assert train_network(config).finished
    assert all(torch.isfinite(torch.tensor(values[1:])).all() for values in curve(config.out))
    with pytest.raises(InputError, match="validation"):
        train_network(recipe(store=str(sounds), out=str(tmp_path / "v"), validate_every=1))


def test_validation_and_previews_of_clips_without_conditions(joint, sounds, store, tmp_path):
    folder = tmp_path / "sounds"
    folder.mkdir()
    (folder / "train").symlink_to(sounds / "train")
    (folder / "validation").symlink_to(sounds / "train")
    config = joint(
        data=(DataSource(str(folder)), DataSource(str(store))),
        steps=1, validate_every=1, preview_every=1, preview_clips=2,
    )  # fmt: skip
    assert train_network(config).finished
    assert list((Path(config.out) / "previews").glob("*.wav"))


def test_recipes_name_several_stores(tmp_path):
    path = tmp_path / "recipe.json"
    data = [{"store": "a", "weight": 2}, {"store": "b"}]
    path.write_text(json.dumps({"network": {"data": data}}))
    config = load_config(NetworkTraining, str(path), "network")
    assert config.data == (DataSource("a", 2.0), DataSource("b", 1.0))
    again = load_config(NetworkTraining, str(path), "network", ['data=[{"store": "c"}]'])
    assert again.data == (DataSource("c", 1.0),)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ('[{"store": "a", "weight": 0}]', "must be positive"),
        ('[{"store": "a", "wieght": 1}]', "Did you mean weight"),
        ('[{"weight": 1}]', "has no store"),
        ('"a"', "expected"),
    ],
)
def test_wrong_stores_say_what_to_do(data, words):
    with pytest.raises(InputError, match=words):
        load_config(NetworkTraining, "nano", "network", [f"data={data}"])
