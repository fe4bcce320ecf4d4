"""The names that users build on. Names may be added; one that goes breaks somebody's code."""

from __future__ import annotations

import inspect

import pytest

import mfmjt
from mfmjt import cli
from mfmjt.errors import InputError, MfmjtError, RunError

NAMES = {
    "MFMJT": "from_config load save conditions forward",
    "Pipeline": "from_pretrained from_mmaudio __call__",
    "kernels": "adaln gated_residual_adaln qk_norm_rope joint_attention swiglu linear conv1d snake "
    "swiglu_product reference accelerate_jvp jvp_rows streams vocoder",
    "kernels.vocoder": "activate arrange convolve suits upsample",
    "kernels.streams": "gated_residual_norm guide pack pool project project_norm project_qkv "
    "silu_conditions",
    "meanflow": "loss sample guide OneStep mean_velocity improved_mean_velocity alpha_flow "
    "finite_difference guided_velocity control_variate teacher_rollout teacher_velocity",
    "model": "MFMJT ModelConfig load_mmaudio",
    "codec": "MelSpectrogram NanoCodec",
    "encoders": "NanoEncoders",
    "data": "foley",
    "evaluate": "score statistics networks",
    "evaluate.statistics": "frechet kl_softmax inception_score kernel_distance",
    "evaluate.networks": "VGGish Cnn14 PaSST Synchformer CLAP ImageBind",
    "testing": "check_op check_compiled Truth draw runner poisoned",
}
PARAMETERS = {
    "MFMJT.forward": "z r t video sync text",
    "meanflow.loss": "f x ratio noise r t",
    "meanflow.sample": "f noise steps cond null guidance mode",
    "meanflow.OneStep": "net guidance mode",
    "meanflow.OneStep.__call__": "z video sync text",
    "Pipeline.__call__": "video prompt steps guidance mode seed duration count progress cache",
    "kernels.adaln": "x shift scale eps",
    "kernels.gated_residual_adaln": "x h gate shift scale eps",
    "kernels.qk_norm_rope": "qkv q_weight k_weight rope eps",
    "kernels.joint_attention": "q k v scale lengths mask causal",
    "kernels.swiglu": "gate up",
    "kernels.swiglu_product": "x gate_weight up_weight",
    "kernels.linear": "x weight bias",
    "kernels.conv1d": "x weight bias dilation",
    "kernels.snake": "x alpha beta",
    "evaluate.score": "generated reference captions videos metrics weights protocol",
    "evaluate.statistics.inception_score": "logits splits seed",
    "testing.check_op": "op reference inputs moving dtype terms fused repeat",
    "testing.check_compiled": "op inputs moving terms backend",
}


def find(path: str) -> object:
    found: object = mfmjt
    for name in path.split("."):
        found = getattr(found, name)
    return found


@pytest.mark.parametrize("owner", NAMES)
def test_names_are_there(owner: str) -> None:
    assert owner.partition(".")[0] in mfmjt.__all__
    for name in NAMES[owner].split():
        assert hasattr(find(owner), name), f"{owner}.{name}"


@pytest.mark.parametrize("path", PARAMETERS)
def test_parameters_keep_their_names(path: str) -> None:
    parameters = inspect.signature(find(path)).parameters  # type: ignore[arg-type]
    assert [p for p in PARAMETERS[path].split() if p not in parameters] == []


def test_configurations() -> None:
    published = ("small_16k", "small_44k", "medium_44k", "large_44k", "large_44k_v2")
    assert {"nano", *published} <= set(mfmjt.model.CONFIGS)
    config = mfmjt.model.CONFIGS["small_16k"]
    assert (config.latent_length, config.latent_dim) == (250, 20)


def test_commands() -> None:
    commands = {c.name or c.callback.__name__ for c in cli.app.registered_commands if c.callback}
    assert {"generate", "train", "evaluate", "info", "score"} <= commands


def test_errors() -> None:
    assert (InputError.exit_code, RunError.exit_code) == (2, 1)
    assert issubclass(InputError, (MfmjtError, ValueError))
    assert issubclass(RunError, (MfmjtError, RuntimeError))


def test_unknown_names_are_refused() -> None:
    with pytest.raises(AttributeError, match="nonsense"):
        _ = mfmjt.nonsense
