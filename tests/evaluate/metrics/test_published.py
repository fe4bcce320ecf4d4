from __future__ import annotations

import numpy as np
import pytest
import torch

from mfmjt.errors import InputError
from mfmjt.evaluate import statistics
from mfmjt.evaluate.classifier import load_classifier
from mfmjt.evaluate.listening import LISTENERS, Networks, Unheard
from mfmjt.evaluate.metrics import PUBLISHED, Score
from mfmjt.evaluate.scoring.sounds import Given
from mfmjt.evaluate.sounds import Sounds

METRIC = {metric.name: metric for metric in PUBLISHED}
NOTHING = Given([], [], None, np.empty(0, dtype=np.int64))


class Features(Sounds):
    """Sounds of which nothing but features is there."""

    def __init__(self, **features: np.ndarray) -> None:
        self.features = features
        self.rng = np.random.default_rng(0)

    def heard(self, network: str, output: str, purpose: str = "") -> list[np.ndarray]:
        return list(self.features[output])

    def told(self, network: str, captions: list[str]) -> list[np.ndarray]:
        return list(self.features["text"])

    def seen(self, network: str) -> list[np.ndarray] | None:
        return list(self.features["video"])

    def offsets(self) -> np.ndarray | None:
        return self.features["offsets"]


def measured(name: str, made: Features, real: Features) -> Score:
    found = METRIC[name].score(made, real, NOTHING)
    assert found is not None
    keys = {figure.key for figure in METRIC[name].figures}
    assert found.figures.keys() <= keys
    assert found.interval.keys() <= found.figures.keys()
    assert found.per_clip.keys() <= found.figures.keys()
    return found


@pytest.mark.parametrize("name", ["fd_panns", "fd_passt", "fd_vggish", "fd_yamnet"])
def test_the_frechet_distance_of_two_gaussians(name: str) -> None:
    rng = np.random.default_rng(0)
    count, width, shift, scale = 2000, 6, 1.5, 2.0
    shape = (count, 4, width) if name in ("fd_vggish", "fd_yamnet") else (count, width)
    real = Features(embedding=rng.standard_normal(shape))
    made = Features(embedding=shift + scale * rng.standard_normal(shape))
    found = measured(name, made, real)
    truth = width * shift**2 + width * (1 - scale) ** 2
    low, high = found.interval[f"{name}_unbiased"]
    assert low < truth < high
    # Four standard errors of the mean's part alone, which is the larger one.
    rows = count * (4 if name in ("fd_vggish", "fd_yamnet") else 1)
    error = 2 * shift * np.sqrt(width * (1 + scale**2) / rows)
    assert abs(found.figures[name] - truth) < 4 * error + width * (1 + scale**2) / rows * 2
    assert found.figures[f"{name}_half_real"] < 0.05 < found.figures[f"{name}_half"]
    assert abs(found.figures[f"{name}_unbiased_real"]) < found.figures[f"{name}_half_real"]


def test_a_few_clips_have_a_distance_and_nothing_that_needs_more() -> None:
    rng = np.random.default_rng(1)
    made, real = (Features(embedding=rng.standard_normal((7, 30))) for _ in range(2))
    assert measured("fd_passt", made, real).figures.keys() == {"fd_passt"}
    one = Features(embedding=rng.standard_normal((1, 30)))
    with pytest.raises(InputError, match="at least 2"):
        METRIC["fd_passt"].score(one, one, NOTHING)


@pytest.mark.parametrize("name", ["kad_panns", "kad_passt", "kad_vggish", "kad_yamnet"])
def test_the_kernel_distance_of_equal_and_of_other_sets(name: str) -> None:
    rng = np.random.default_rng(2)
    shape = (60, 3, 5) if name in ("kad_vggish", "kad_yamnet") else (60, 5)
    real = Features(embedding=rng.standard_normal(shape))
    same = Features(embedding=rng.standard_normal(shape))
    other = Features(embedding=1 + rng.standard_normal(shape))
    found = measured(name, same, real)
    low, high = found.interval[name]
    assert low < 0 < high
    far = measured(name, other, real)
    assert far.interval[name][0] > high
    assert far.figures[f"{name}_real"] == found.figures[f"{name}_real"]


def test_the_divergence_of_known_logits() -> None:
    # p = (3/4, 1/4) against q = (1/4, 3/4): ln 3 / 2.
    p = np.log(np.array([0.75, 0.25]))
    real, made = (Features(logits=np.stack([rows] * 30)) for rows in (p, p[::-1]))
    found = measured("kl_panns", made, real)
    assert found.figures["kl_panns"] == pytest.approx(np.log(3) / 2)
    assert np.allclose(found.per_clip["kl_panns"], np.log(3) / 2)
    assert found.interval["kl_panns"] == pytest.approx((np.log(3) / 2,) * 2)
    assert measured("kl_passt", real, real).figures["kl_passt"] == 0


def test_the_inception_score_of_sure_and_of_unsure_taggers() -> None:
    classes, count = 8, 160
    sure = np.full((count, classes), -100.0)
    sure[np.arange(count), np.arange(count) % classes] = 100.0
    made, real = Features(logits=sure), Features(logits=np.zeros((count, classes)))
    found = measured("is_panns", made, real).figures
    assert found["is_panns_whole"] == pytest.approx(classes)
    assert 1 < found["is_panns"] < classes  # splits of 16 clips rarely hold all classes equally
    assert found["is_panns"] == pytest.approx(statistics.inception_score(sure)[0])
    assert found["is_panns_whole_real"] == pytest.approx(1)
    few = measured("is_passt", Features(logits=sure[:9]), real).figures
    assert "is_passt" not in few
    assert few["is_passt_whole"] > 1


@pytest.mark.parametrize(("name", "wanted"), [("ib", "video"), ("clap", "text")])
def test_cosines_of_known_vectors(name: str, wanted: str) -> None:
    angles = np.linspace(0, 1, 30)
    target = np.stack([np.ones(30), np.zeros(30)], axis=1)
    turned = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    made = Features(**{"embedding": turned, wanted: target})
    real = Features(embedding=2 * target)
    found = measured(name, made, real)
    assert found.figures[name] == pytest.approx(np.cos(angles).mean())
    assert np.allclose(found.per_clip[name], np.cos(angles))
    assert found.figures[f"{name}_real"] == pytest.approx(1)


def test_desync_of_known_offsets() -> None:
    made = Features(offsets=np.array([[0.0, 0.2], [2.0, 1.0]] * 10))
    real = Features(offsets=np.zeros((20, 2)))
    found = measured("desync", made, real)
    assert found.figures["desync"] == pytest.approx(0.8)
    assert found.figures["desync_near"] == 0.5
    assert found.figures["desync_real"] == 0
    assert np.allclose(found.per_clip["desync"][:2], [0.1, 1.5])


def test_waveforms_in_memory_say_which_weights_are_missing() -> None:
    sounds = Sounds(torch.randn(2, 16000), 16000, load_classifier(), networks=Networks())
    with pytest.raises(Unheard, match=r"Cnn14_16k_mAP=0\.438\.pth is missing"):
        METRIC["fd_panns"].score(sounds, sounds, NOTHING)
    heard = sounds.heard("classifier", "embedding")
    judge = load_classifier()
    with torch.inference_mode():
        alone = np.stack([judge.embedding(w[None] - w.mean())[0].numpy() for w in sounds.waves])
    # The mean of a wave is summed in another order: float32 through four layers.
    rounding = 512 * np.finfo(np.float32).eps * np.abs(alone).max()
    assert np.abs(np.stack(heard) - alone).max() <= rounding
    assert METRIC["ib"].score(sounds, sounds, NOTHING) is None
    assert METRIC["desync"].score(sounds, sounds, NOTHING) is None


def test_every_network_that_a_metric_needs_is_known() -> None:
    assert {name for metric in PUBLISHED for name in metric.needs} <= LISTENERS.keys()
    keys = [figure.key for metric in PUBLISHED for figure in metric.figures]
    assert len(keys) == len(set(keys))
