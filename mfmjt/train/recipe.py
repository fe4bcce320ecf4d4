"""Recipes: one JSON file with a section for each stage, read into a dataclass, with overrides.

`load_config(NetworkTraining, "nano", "network", ["steps=100", "lr=1e-3"])` reads the section
`network` of the recipe `nano` that ships with the package, and changes two values.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import types
import typing
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar, cast

from mfmjt.errors import InputError, reason
from mfmjt.evaluate.metrics import METRICS, PUBLISHED, Metric, choose_metrics
from mfmjt.meanflow.targets import load_target
from mfmjt.model.lora import LoRA

__all__ = ["DataSource", "Loop", "NetworkTraining", "as_json", "load_config"]

C = TypeVar("C")
RECIPES = Path(__file__).parent / "configs"


@dataclass(frozen=True)
class Loop:
    """How long a training runs, how fast it learns, and what it writes down how often.

    Attributes:
        out: Folder of the log, the training states and what is exported.
        device: `cpu`, `cuda` or `cuda:N`; under torchrun `cuda` is each process's own GPU.
        threads: Threads on the CPU; 0 leaves torch's choice.
        resume: The state to go on from: `latest`, or one of those in `checkpoints`, such as
            `step-000000500`; null begins again.
        steps: Optimizer steps.
        max_minutes: End the run, learning rate decayed, after so much time, earlier runs of the
            same folder counted in; 0 for no limit. The schedule then follows the larger of
            steps done and time spent, so that such a run does not resume bit for bit.
        lr: Peak learning rate of AdamW.
        betas: Its two decays.
        weight_decay: Its decoupled weight decay.
        warmup: Steps over which the learning rate rises from 0.
        schedule: How it then falls to 0: `cosine`, `linear`, or `constant` where it does not.
        clip: Largest norm of the gradient; 0 for no limit.
        ema: Decays of the averages of the weights; the first is validated and exported.
        log_every: Steps between records in the log.
        checkpoint_every: Steps between saved training states.
        validate_every: Steps between validations; 0 for none.
        preview_every: Steps between previews; 0 for none.
        tensorboard: Write TensorBoard files where it is installed.
        cuda_graph: Record a whole step, optimizer and averages with it, and replay it: one launch
            in place of thousands. Of one process with one GPU.
    """

    out: str = "output"
    device: str = "cpu"
    threads: int = 0
    resume: str | None = "latest"
    steps: int = 10000
    max_minutes: float = 0.0
    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 1e-6
    warmup: int = 200
    schedule: str = "cosine"
    clip: float = 1.0
    ema: tuple[float, ...] = (0.999,)
    log_every: int = 20
    checkpoint_every: int = 500
    validate_every: int = 500
    preview_every: int = 0
    tensorboard: bool = True
    cuda_graph: bool = False

    def __post_init__(self) -> None:
        """Refuse values that could not train, before anything is loaded."""
        _at_least_one(self, "steps", "log_every", "checkpoint_every")
        _one_of("schedule", self.schedule, ("cosine", "linear", "constant"))


@dataclass(frozen=True)
class DataSource:
    """One of several feature stores that a network is trained on.

    Attributes:
        store: Its folder; it must be given.
        weight: The share of rows that come from it is its weight over the sum of all.
    """

    store: str = ""
    weight: float = 1.0


@dataclass(frozen=True)
class NetworkTraining(Loop):
    """How a network is trained; the defaults are nano's recipe, less its length.

    Attributes:
        store: Feature store, from the stage `features` or from `mfmjt extract`.
        data: Several stores instead, such as one of videos and one of sounds with captions, each
            with a weight. What a clip lacks, frames or a caption, is replaced by the null tokens.
            Latents are normalized as the first one's, which also gives the validation clips.
        clips: Train on the first so many clips of each store; 0 for all.
        codec: Codec that decodes the previews: weights from the stage `codec`, or a model's folder,
            such as that of MMAudio's files; null for none.
        encoders: Encoders that turn captions into text features, likewise; not used where the store
            has these.
        model: Name of the network's configuration, or `auto` for that of `init_from`.
        overrides: Fields of that configuration to change.
        init_from: A network file to start from: one of ours, or a published one of MMAudio's,
            MeanAudio's or FoleyDash's. Its normalization of latents and its null text are kept. A
            network of text becomes one of video with `overrides.video=gated`: at first it gives
            what it gave.
        lora: Adapters to train in place of all weights, such as `{"rank": 16}`; see
            `mfmjt.model.lora`. Needs `peft`.
        frozen: Beginnings of names of weights that are not trained, such as `fused_blocks`.
        seed: Seed of the initial weights and of every draw.
        parallel: How processes that torchrun started share the work: `ddp` copies the weights to
            each, `fsdp` shards them, `auto` takes `fsdp` where they would fill half of a GPU, and
            `none` is one process.
        accumulate: Passes that a step's batch is divided into, to fit in memory.
        checkpointing: Keep only the inputs of each block for the backward pass, and compute their
            inside again: less memory, more time.
        dtype: `float32`, or `bfloat16` for autocast with fp32 weights.
        compile: Put the loss, forward mode inside it, through `torch.compile`: a minute or more at
            the start for every shape of batch.
        batch: Clips a step, of all processes and passes, each a window of `window` latents.
        window: Latents in a window, a multiple of 10; 0 for whole clips.
        full_every: Every so many steps the clips are whole instead; 0 for never.
        full_batch: Clips a step when they are whole.
        drop_video: Share of rows whose video and sync features are replaced by the null tokens.
        drop_text: Share of rows whose text is.
        drop_all: Share of rows that lose both, in addition.
        ratio: Share of rows with r != t.
        flow_steps: First steps with ratio 0: plain flow matching.
        one_step: Share of the rows with r != t that have r = 0 and t = 1, as one-step generation
            does; the sampler of times seldom draws that.
        time_mean: Mean of the logit-normal distribution of times.
        time_std: Its standard deviation.
        target: What rows with r != t are regressed to: `mean_velocity`, `improved_mean_velocity`,
            `alpha_flow`, `finite_difference`, `control_variate`, `lsd` or `teacher_rollout` of
            `mfmjt.meanflow`, or a function of your own, `package.module:function`, called as
            `mfmjt.meanflow.mean_velocity` is.
        alpha: Of `alpha_flow`.
        target_options: Parameters of a target that takes some, such as `{"h": 1e-3}` of
            `finite_difference`, `{"share": 0.9}` of `control_variate`, `{"steps": 8}` of
            `teacher_rollout`.
        teacher: Network file: `teacher_rollout` is led by it, and every other target has its
            velocity in place of the clip's (`mfmjt.meanflow.teacher_velocity`).
        reflow: Steps of Euler's method in which the teacher leads from each row's noise to the data
            that is then paired with it: a rectified flow (arXiv 2209.03003); 0 for clips.
        balance: Scale the errors of rows with r != t to those of the others; with p=0.
        to_data: Share of the rows with r != t that have r = 0, and t as drawn.
        omega: Guidance inside the target: the share of the clip's own velocity; 1 with kappa=0 for
            none.
        kappa: Its share of the conditional prediction; the scale is omega / (1 - kappa).
        p: Exponent of the adaptive weight; 0 for the plain mean square.
        c: Its offset.
        preview_every: Steps between previews: audio and spectrograms of validation clips.
        preview_clips: Clips in a preview.
        metrics: What to measure at each validation of the sound that the network then makes, such
            as `onsets,classes`: names of `mfmjt.evaluate.metrics`, or metrics of your own,
            `package.module:name`. Nothing by default.
        metric_clips: The first so many validation clips that they are measured on.
        metric_weights: Folder of the published weights that some of them need; see docs/score.md.
    """

    out: str = "output/nano/network"
    store: str = "output/nano/features"
    data: tuple[DataSource, ...] = ()
    clips: int = 0
    codec: str | None = "output/nano/codec/codec.safetensors"
    encoders: str | None = "output/nano/encoders/encoders.safetensors"
    model: str = "nano"
    overrides: dict[str, Any] = field(default_factory=dict)
    init_from: str | None = None
    lora: LoRA | None = None
    frozen: tuple[str, ...] = ()
    seed: int = 0
    parallel: str = "auto"
    accumulate: int = 1
    checkpointing: bool = False
    dtype: str = "float32"
    compile: bool = False
    batch: int = 64
    window: int = 80
    full_every: int = 6
    full_batch: int = 20
    drop_video: float = 0.1
    drop_text: float = 0.1
    drop_all: float = 0.1
    ratio: float = 0.1
    flow_steps: int = 0
    one_step: float = 0.0
    time_mean: float = -2.0
    time_std: float = 2.0
    target: str = "mean_velocity"
    alpha: float = 0.1
    target_options: dict[str, Any] = field(default_factory=dict)
    teacher: str | None = None
    reflow: int = 0
    balance: bool = False
    to_data: float = 0.0
    omega: float = 1.0
    kappa: float = 0.0
    p: float = 1.0
    c: float = 1e-2
    preview_every: int = 2000
    preview_clips: int = 4
    metrics: tuple[str, ...] = ()
    metric_clips: int = 32
    metric_weights: str | None = None

    def __post_init__(self) -> None:
        """Refuse values that could not train, before anything is loaded."""
        super().__post_init__()
        _at_least_one(self, "batch", "full_batch", "accumulate")
        if self.window < 0 or self.window % 10:
            raise InputError(
                f"window={self.window}: windows begin and end where latents and sync frames meet, "
                "every 10 latents. Give a multiple of 10."
            )
        for name in ("drop_video", "drop_text", "drop_all", "ratio", "one_step", "to_data"):
            if not 0 <= getattr(self, name) <= 1:
                raise InputError(f"{name}={getattr(self, name)}: a share lies between 0 and 1.")
        _one_of("parallel", self.parallel, ("auto", "none", "ddp", "fsdp"))
        _one_of("dtype", self.dtype, ("float32", "bfloat16"))
        if self.target == "teacher_rollout":
            if self.teacher is None:
                raise InputError(
                    "target=teacher_rollout needs the network that leads. Give teacher=FILE."
                )
        else:
            load_target(self.target, **self.target_options)  # refused before anything is loaded
        if self.reflow and (self.teacher is None or self.target == "teacher_rollout"):
            raise InputError(
                f"reflow={self.reflow} pairs noise with what the teacher makes of it. Give "
                "teacher=FILE, and a target other than teacher_rollout."
            )
        if self.balance and self.p:
            raise InputError(
                f"balance=true and p={self.p}: the adaptive weight has already evened out the "
                "errors. Give p=0, or balance=false."
            )
        for source in self.data:
            if not source.store:
                raise InputError('data: an entry has no store. Give [{"store": "FOLDER"}, ...].')
            if not 0 < source.weight < math.inf:
                raise InputError(
                    f"The weight of {source.store} is {source.weight}: it must be positive."
                )
        if self.compile and self.checkpointing:
            raise InputError(
                "compile=true and checkpointing=true exclude one another: what is computed again "
                "is found while running, and a compiled step is fixed before. Give one of them."
            )
        if self.cuda_graph and self.accumulate > 1:
            raise InputError(
                f"cuda_graph=true records a step of one pass, and accumulate={self.accumulate}. "
                "Give accumulate=1 and a smaller batch, or leave out cuda_graph."
            )
        if self.preview_every and self.codec is None:
            raise InputError(
                f"preview_every={self.preview_every} and codec=null: previews are sound, which the "
                "codec decodes. Give preview_every=0, or a codec."
            )
        self.chosen_metrics()  # refused before anything is loaded
        if self.metrics and (self.codec is None or not self.validate_every):
            raise InputError(
                f"metrics={','.join(self.metrics)} with codec={self.codec or 'null'} and "
                f"validate_every={self.validate_every}: sound is measured, at validations, and the "
                "codec decodes it. Give a codec and validate_every=500, or leave out metrics."
            )
        if not self.ema:
            raise InputError("ema=[]: give at least one decay, such as ema=[0.999].")

    def chosen_metrics(self) -> list[Metric]:
        """Return what `metrics` names.

        Raises:
            InputError: There is no such metric.
        """
        return choose_metrics(self.metrics, tuple(dict.fromkeys((*METRICS, *PUBLISHED))))


def load_config(kind: type[C], recipe: str, section: str, overrides: Sequence[str] = ()) -> C:
    """Read `section` of a recipe into the dataclass `kind`.

    Args:
        kind: A dataclass whose fields have defaults.
        recipe: A JSON file, or the name of a recipe that ships with the package.
        section: The stage's name; a recipe without it gives the defaults.
        overrides: `key=value` each; the value is JSON, or text where it is no JSON. A key
            `a.b` sets the entry `b` of the field `a`.

    Raises:
        InputError: No such recipe, no such key, or a value of another type.
    """
    values = _read(recipe).get(section, {})
    if not isinstance(values, dict):
        raise InputError(f"{recipe}: section {section!r} must be an object of settings.")
    values = dict(values)
    for override in overrides:
        key, sign, text = override.partition("=")
        if not sign:
            raise InputError(f"Override {override!r} has no value. Write it as {key}=VALUE.")
        try:
            value = json.loads(text)
        except json.JSONDecodeError:
            value = text
        name, _, entry = key.strip().partition(".")
        if entry:
            value = {**(values.get(name) or {}), entry: value}
        values[name] = value
    return _build(kind, values, section)


def _build(kind: type[C], values: dict[str, Any], section: str) -> C:
    hints = typing.get_type_hints(kind)
    for name in values:
        if name not in hints:
            near = difflib.get_close_matches(name, hints, n=3, cutoff=0.5)
            hint = f"Did you mean {' or '.join(near)}?" if near else f"Known: {', '.join(hints)}."
            raise InputError(f"{section} has no setting {name!r}. {hint}")
    return kind(**{name: _convert(value, hints[name], name) for name, value in values.items()})


def _read(recipe: str) -> dict[str, Any]:
    path = Path(recipe)
    if not path.suffix and not path.is_file():
        path = RECIPES / f"{recipe}.json"
    try:
        content = json.loads(path.read_text())
    except OSError as error:
        shipped = ", ".join(sorted(p.stem for p in RECIPES.glob("*.json")))
        raise InputError(
            f"Cannot read the recipe {recipe}: {error.strerror}. "
            f"Give a JSON file, or one that ships: {shipped}."
        ) from error
    except json.JSONDecodeError as error:
        raise InputError(
            f"Cannot read the recipe {recipe}: {reason(error)}. Correct the JSON."
        ) from error
    if not isinstance(content, dict):
        raise InputError(f"{recipe} is no recipe: it must be a JSON object with a section a stage.")
    return content


def _convert(value: Any, hint: Any, name: str) -> Any:
    """Return `value` as the type `hint`: int as float, a list or names with commas as tuple."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        if value is None and type(None) in arguments:
            return None
        hint = next(a for a in arguments if a is not type(None))
        return _convert(value, hint, name)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if hint is Path and isinstance(value, str):
        return Path(value)
    if dataclasses.is_dataclass(hint) and isinstance(value, dict):
        return _build(cast("type[Any]", hint), value, name)
    if origin is tuple and arguments[0] is str and isinstance(value, str):
        value = [part.strip() for part in value.split(",") if part.strip()]
    if origin is tuple and isinstance(value, list | tuple):
        kinds = arguments[:1] * len(value) if arguments[-1] is Ellipsis else arguments
        if len(kinds) == len(value):
            return tuple(_convert(v, k, name) for v, k in zip(value, kinds, strict=True))
    elif hint is str and not isinstance(value, str | dict | list):
        return str(value)
    elif type(value) is (origin or hint):
        return value
    wanted = getattr(hint, "__name__", str(hint)) if origin is None else str(hint)
    raise InputError(f"{name}={value!r}: expected {wanted}, such as {_example(hint)}.")


def _example(hint: Any) -> str:
    examples = {bool: "true", int: "100", float: "1e-3", str: "text"}
    return examples.get(hint, "[0.9, 0.95]" if typing.get_origin(hint) is tuple else '{"a": 1}')


def _at_least_one(config: Any, *names: str) -> None:
    for name in names:
        if getattr(config, name) < 1:
            raise InputError(f"{name}={getattr(config, name)}: it must be at least 1.")


def _one_of(name: str, value: str, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise InputError(f"{name}={value}: choose one of {', '.join(allowed)}.")


def as_json(config: Any) -> dict[str, Any]:
    """Return a recipe dataclass as plain JSON values."""
    text = json.dumps(dataclasses.asdict(config), default=str)
    return cast("dict[str, Any]", json.loads(text))
