"""Damages files of weights and loads them: `python -m tests.checkpoints.loaders FOLDER COUNT`.

In a process of its own, since memory that is mapped from a damaged file may end it.
"""

from __future__ import annotations

import functools
import json
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from mfmjt.checkpoints import read_content
from mfmjt.codec import NanoCodec
from mfmjt.codec.bigvgan import BigVGAN, BigVGANConfig
from mfmjt.codec.nano import NanoCodecConfig
from mfmjt.codec.vae import VAE, VAEConfig
from mfmjt.convert import from_mmaudio, to_mmaudio
from mfmjt.encoders import CLIP, CLIPConfig, NanoEncoders, Synchformer, SynchformerConfig
from mfmjt.encoders.nano import NanoEncodersConfig
from mfmjt.errors import MfmjtError
from mfmjt.evaluate.classifier import Classifier, ClassifierConfig
from mfmjt.model import MFMJT, config_for, load_mmaudio, to_mmaudio_state_dict
from mfmjt.model.lora import FORMAT, merge_adapter
from mfmjt.train.checkpoint import CheckpointFolder
from tests.support.damage import mutate

SIZES = {
    "hidden_dim": 16, "num_heads": 1, "depth": 2, "fused_depth": 1, "video_dim": 8, "sync_dim": 8,
    "text_dim": 8, "mlp_ratio": 1.0,
}  # fmt: skip
CLIP_SIZES = CLIPConfig(8, 28, 14, 8, 1, 2, 8, 1, 2, vocabulary=64)
SYNC_SIZES = SynchformerConfig(dim=8, depth=1, heads=2, size=32)
VAE_SIZES = VAEConfig(80, 20, 4)
VOCODER_SIZES = BigVGANConfig(80, 8, (16, 16), (32, 32), tanh=True, bias=True)
CODEC_SIZES = NanoCodecConfig(20, 8, 2, (8, 8, 8), (1, 1, 1))
ENCODER_SIZES = NanoEncodersConfig(8, (4, 4, 4, 8), (4, 4, 4, 8), 32, 4, 1, 2)
CLASSIFIER_SIZES = ClassifierConfig(("a", "b"), bands=16, widths=(4, 4, 4, 4), embedding=4)

Load = Callable[[Path], object]


def network() -> MFMJT:
    torch.manual_seed(0)
    return MFMJT(config_for("small_16k", **SIZES))


def published(content: dict[str, Any], folder: Path, name: str, load: Load) -> dict[Path, Load]:
    """The same content in every format that there is."""
    flat = {key: value for key, value in content.items() if isinstance(value, torch.Tensor)}
    paths = [folder / f"{name}{end}" for end in (".pth", "_old.pth", ".safetensors")]
    torch.save({"state_dict": content, "best": np.float64(0.5)}, paths[0])
    torch.save(content, paths[1], _use_new_zipfile_serialization=False)
    save_file({key: value.contiguous() for key, value in flat.items()}, paths[2])
    return dict.fromkeys(paths, load)


def cases(folder: Path) -> dict[Path, Load]:
    """Whole files, and what loads each."""
    net = network()
    state = to_mmaudio_state_dict(net)
    found = published(state, folder, "network", load_mmaudio)
    for (name, part), mark in zip(
        {
            "clip": CLIP(CLIP_SIZES),
            "sync": Synchformer(SYNC_SIZES),
            "vae": VAE(VAE_SIZES),
            "vocoder": BigVGAN(VOCODER_SIZES),
        }.items(),
        (
            lambda path: CLIP.from_state_dict(read_content(path), CLIP_SIZES),
            lambda path: Synchformer.from_state_dict(read_content(path), SYNC_SIZES),
            lambda path: VAE.from_mmaudio(read_content(path), VAE_SIZES),
            lambda path: BigVGAN.from_state_dict(read_content(path), VOCODER_SIZES),
        ),
        strict=True,
    ):
        content = dict(part.state_dict())
        if name == "vae":
            gains = ("encoder.learnable_gain", "decoder.learnable_gain")
            content |= {gain: torch.zeros(()) for gain in gains}
        found |= published(content, folder, name, mark)
    names = list(state)
    parts = {"part-1.safetensors": names[::2], "part-2.safetensors": names[1::2]}
    for name, inner in parts.items():
        save_file({key: state[key] for key in inner}, folder / name)
    index = {"weight_map": {key: name for name, inner in parts.items() for key in inner}}
    (folder / "network.safetensors.index.json").write_text(json.dumps(index))
    found[folder / "network.safetensors.index.json"] = load_mmaudio
    net.save(folder / "ours.safetensors")
    found[folder / "ours.safetensors"] = MFMJT.load
    NanoCodec(CODEC_SIZES).save(folder / "codec.safetensors")
    found[folder / "codec.safetensors"] = NanoCodec.load
    NanoEncoders(ENCODER_SIZES).save(folder / "encoders.safetensors")
    found[folder / "encoders.safetensors"] = NanoEncoders.load
    Classifier(CLASSIFIER_SIZES).save(folder / "classifier.safetensors")
    found[folder / "classifier.safetensors"] = Classifier.load
    weight = "fused_blocks.0.attn.qkv"
    lora = {"rank": 1, "alpha": 1.0, "targets": ["attn.qkv"]}
    save_file(
        {
            f"{weight}.lora_A.weight": torch.ones(1, 16),
            f"{weight}.lora_B.weight": torch.ones(48, 1),
        },
        folder / "adapter.safetensors",
        {"format": FORMAT, "lora": json.dumps(lora)},
    )
    found[folder / "adapter.safetensors"] = lambda path: merge_adapter(network(), path)
    states = CheckpointFolder(folder / "states")
    states.save(1, {"a": torch.ones(2)}, {"step": 1})
    states.wait()
    for path in (folder / "states" / "step-000000001").iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
        found[folder / path.name] = functools.partial(resume, path)
    return found


def resume(place: Path, damaged: Path) -> dict[str, Any]:
    """Go on from a training state with another file in the place of one of its own."""
    whole = {path: path.read_bytes() for path in place.parent.iterdir()}
    place.write_bytes(damaged.read_bytes())
    record = place.parent / "state.json"
    if place != record:  # damage that is not seen by its size
        state = json.loads(whole[record])
        state["files"][place.name] = damaged.stat().st_size
        record.write_text(json.dumps(state))
    try:
        states = CheckpointFolder(place.parents[1])
        found = states.read(place.parent)
        states.load(place.parent, {"a": torch.zeros(2)}, 1)
        return found
    finally:
        for path, content in whole.items():
            path.write_bytes(content)


def damaged(content: bytes, others: list[bytes], seed: int) -> bytes:
    """`content` with bits flipped and parts lost, or the beginning of one file on another's end."""
    rng = np.random.default_rng(seed)
    kind = rng.integers(5)
    if kind == 0:
        return content[: int(rng.integers(len(content)))]
    if kind == 1:
        other = others[int(rng.integers(len(others)))]
        at = int(rng.integers(min(len(content), len(other), 4000)))
        return other[:at] + content[at:]
    if kind == 2:  # digits in headers and in JSON, where sizes are
        data = bytearray(content)
        digits = [i for i, byte in enumerate(data[:20_000]) if 48 <= byte < 58]
        for at in rng.choice(digits, int(rng.integers(1, 4))) if digits else []:
            data[at] = 48 + int(rng.integers(10))
        return bytes(data)
    if kind == 3:  # one bit, in the header as often as anywhere
        data = bytearray(content)
        reach = min(len(data), 4000) if rng.random() < 0.5 else len(data)
        data[int(rng.integers(reach))] ^= 1 << int(rng.integers(8))
        return bytes(data)
    return mutate(content, seed)


def main(folder: Path, count: int) -> None:
    """Load `count` damaged files of each kind; tell the ends and the slowest, in seconds."""
    warnings.simplefilter("error")
    whole = cases(folder)
    contents = {path: path.read_bytes() for path in whole}
    for path, load in whole.items():
        load(path)  # what is whole loads
    ends: Counter[str] = Counter()
    wrong, slowest, out = [], 0.0, folder / "out"
    out.mkdir()
    for path, load in whole.items():
        for seed in range(count):
            # Beside the parts that an index names.
            file = folder / f"damaged-{path.name}"
            file.write_bytes(damaged(contents[path], list(contents.values()), seed))
            began = time.perf_counter()
            for way in (load, convert):
                if way is convert and not ("network" in path.name or "ours" in path.name):
                    continue
                try:
                    way(file) if way is load else convert(file, out)
                    ends["used"] += 1
                except MfmjtError as error:
                    ends["refused"] += 1
                    message = str(error)
                    if "\n" in message or len(message) > 600 or "weights_only" in message:
                        wrong.append(f"{path.name} {seed}: {message}")
                    if any(out.iterdir()):
                        wrong.append(f"{path.name} {seed}: left {list(out.iterdir())}")
                except Exception as error:
                    wrong.append(f"{path.name} {seed}: {type(error).__name__}: {error}")
                for left in out.iterdir():
                    left.unlink()
            slowest = max(slowest, time.perf_counter() - began)
            file.unlink()
    sys.stdout.write(
        json.dumps({"ends": ends, "wrong": wrong, "slowest": slowest, "kinds": len(whole)})
    )


def convert(path: Path, out: Path) -> None:
    if "ours" in path.name:
        to_mmaudio(path, out / "made.pth")
    else:
        from_mmaudio(path, out / "made.safetensors")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
