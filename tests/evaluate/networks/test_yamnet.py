from __future__ import annotations

import sys
import types
from typing import Any

import numpy as np
import pytest
import torch

from mfmjt.errors import InputError
from mfmjt.evaluate.classifier import load_classifier
from mfmjt.evaluate.networks import YAMNet
from mfmjt.families import PRETRAINED


@pytest.fixture(scope="module")
def network() -> YAMNet:
    torch.manual_seed(0)
    return YAMNet().eval().requires_grad_(False)


def test_a_piece_every_half_of_one(network: YAMNet) -> None:
    wave = torch.rand(3, 16000 * 8) - 0.5  # more pieces than are embedded at once
    found = network(wave)
    assert found.shape == (3, 15, 1024)
    assert torch.isfinite(found).all()
    for clip, piece in ((0, 0), (2, 14)):
        own = network(wave[clip : clip + 1, 7680 * piece :][:, :15600])
        assert own.shape == (1, 1, 1024)
        assert torch.allclose(found[clip, piece], own[0, 0], rtol=1e-4, atol=1e-5)
    with pytest.raises(InputError, match="15,600 samples"):
        network(wave[:, :15599])


def test_the_layers_halve_as_tensorflow_does(network: YAMNet) -> None:
    shapes: list[tuple[int, ...]] = []
    hooks = [
        layer.register_forward_hook(lambda _, __, out: shapes.append(tuple(out.shape[1:])))
        for layer in (network.first, *network.pointwise)
    ]
    network(torch.rand(1, 15600) - 0.5)
    for hook in hooks:
        hook.remove()
    assert shapes == [
        (32, 48, 32), (64, 48, 32), (128, 24, 16), (128, 24, 16), (256, 12, 8), (256, 12, 8),
        (512, 6, 4), (512, 6, 4), (512, 6, 4), (512, 6, 4), (512, 6, 4), (512, 6, 4),
        (1024, 3, 2), (1024, 3, 2),
    ]  # fmt: skip


class Interpreter:
    """What the published file's tensors look like, with the weights of a network of ours."""

    def __init__(self, path: str) -> None:
        if path != "yamnet.tflite":
            raise ValueError(f"could not open {path}")
        torch.manual_seed(1)
        network = YAMNet()
        self.network, self.tensors = network, list[tuple[str, np.ndarray[Any, Any], float]]()
        self._add("layer1/conv/Conv2D", network.first.weight.permute(0, 2, 3, 1))
        self._add("layer1/conv/bn/FusedBatchNormV3", network.first.bias)
        for i, (depth, point) in enumerate(zip(network.depthwise, network.pointwise, strict=True)):
            at, steps = f"layer{i + 2}/", 2.0**-9
            # Weights that 8 bits hold.
            for layer in (depth, point):
                layer.weight.data = (layer.weight / steps).round().clamp(-127, 127) * steps
            self._add(f"{at}depthwise_conv/bn/FusedBatchNormV3", depth.bias)
            self._add(f"{at}pointwise_conv/bn/FusedBatchNormV3", point.bias)
            self._add(f"{at}pointwise_conv/Conv2D", point.weight.permute(0, 2, 3, 1), steps)
            self._add(
                f"{at}depthwise_conv/bn/FusedBatchNormV3;yamnet_frames/{at}depthwise_con",
                depth.weight.permute(1, 2, 3, 0),
                steps,
            )
            self._add(f"{at}depthwise_conv/relu/Relu;yamnet_frames/{at}", torch.zeros(1, 3, 2, 512))

    def _add(self, name: str, value: torch.Tensor, steps: float = 0.0) -> None:
        array = value.detach().numpy()
        stored = np.round(array / steps).astype(np.int8) if steps else array
        self.tensors.append((f"yamnet_frames/{name}", stored, steps))

    def get_tensor_details(self) -> list[dict[str, Any]]:
        return [
            {"index": i, "name": name, "shape": value.shape, "quantization": (steps, 0)}
            for i, (name, value, steps) in enumerate(self.tensors)
        ]

    def get_tensor(self, index: int) -> np.ndarray[Any, Any]:
        return self.tensors[index][1]


def test_the_published_file_is_read_by_its_names(monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = types.ModuleType("ai_edge_litert.interpreter")
    runtime.Interpreter = Interpreter  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "ai_edge_litert", types.ModuleType("ai_edge_litert"))
    monkeypatch.setitem(sys.modules, "ai_edge_litert.interpreter", runtime)
    read = YAMNet.from_tflite("yamnet.tflite").state_dict()
    for name, value in Interpreter("yamnet.tflite").network.state_dict().items():
        assert torch.equal(read[name], value), name
    with pytest.raises(InputError, match="is not YAMNet's TensorFlow Lite file: could not open"):
        YAMNet.from_tflite("other.tflite")


def test_the_package_that_reads_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ai_edge_litert", None)
    with pytest.raises(InputError, match="pip install ai-edge-litert"):
        YAMNet.from_tflite("yamnet.tflite")


def test_the_shipped_weights_hear_what_the_published_file_hears() -> None:
    rng, t = np.random.default_rng(0), np.arange(15600) / 16000
    bursts = 0.2 * rng.standard_normal(15600) * (0.2 + np.exp(-((t * 4) % 1) * 6))
    # The largest of the embedding, by TensorFlow Lite.
    published = {
        297: 4.465, 33: 3.767, 836: 3.633, 916: 3.36, 847: 3.292, 696: 2.793, 331: 2.532,
        364: 2.386, 170: 2.295, 538: 2.267, 684: 1.968, 877: 1.934, 610: 1.888, 1008: 1.595,
        891: 1.463, 712: 1.415, 612: 1.412, 1013: 1.158, 909: 1.155, 468: 1.143,
    }  # fmt: skip
    yamnet = load_classifier(PRETRAINED / "foley").yamnet
    found = yamnet(torch.from_numpy(bursts.astype(np.float32))[None])[0, 0, list(published)]
    truth = torch.tensor(list(published.values()))
    # The runtime rounds the input of each of 27 layers to 8 bits of its largest value, which is
    # some four times the others: 4 / 127 / 12**0.5 of each, added as noise is.
    assert float((found - truth).norm() / truth.norm()) <= 27**0.5 * 4 / 127 / 12**0.5
