"""Requests and answers, and the schema that is published of them."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, TypeAdapter

from mfmjt.serve.settings import MAX_COUNT, MAX_PROMPT, MAX_STEPS, Settings

__all__ = ["Asked", "Container", "Fault", "Health", "JobState", "Models", "Sound", "asked_schema"]

Mode = Literal["cfg_scaled", "cfg", "none"]
Container = Literal["mp4", "webm", "mov", "mkv"]
"""Formats of a video with its sound, the one that most players know first."""


def _whole(value: object) -> object:
    """Convert 2.0 to 2: it is an integer in JSON."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


MAX_SEED = 2**53 - 1024
"""Largest seed: every number up to it is exact in JavaScript."""


class Asked(BaseModel):
    """A request: what `mfmjt generate` takes."""

    model_config = ConfigDict(extra="forbid", strict=True)

    prompt: Annotated[
        str | None,
        Field(max_length=MAX_PROMPT, description="What is to be heard, in words."),
    ] = None
    negative_prompt: Annotated[
        str | None,
        Field(
            max_length=MAX_PROMPT,
            description="What is not to be heard, in words; it needs guidance above 1.",
        ),
    ] = None
    steps: Annotated[
        int | None,
        Field(ge=1, le=MAX_STEPS, description="Evaluations of the network; null: the model's own."),
        BeforeValidator(_whole),
    ] = None
    guidance: Annotated[
        float | None,
        Field(
            ge=0,
            le=100,
            allow_inf_nan=False,
            description="Strength of guidance, 1 is none; null: the model's own.",
        ),
    ] = None
    guidance_mode: Annotated[
        list[Mode] | None,
        Field(
            min_length=1,
            max_length=3,
            json_schema_extra={"uniqueItems": True},
            description="Ways of guidance to compare; each makes all sounds; null: one.",
        ),
    ] = None
    seed: Annotated[
        int,
        Field(ge=0, le=MAX_SEED, description="Sound number i is made from seed + i."),
        BeforeValidator(_whole),
    ] = 0
    count: Annotated[
        int,
        Field(ge=1, le=MAX_COUNT, description="Sounds of each way of guidance."),
        BeforeValidator(_whole),
    ] = 1
    duration: Annotated[
        float | None,
        Field(
            gt=0,
            allow_inf_nan=False,
            description="Seconds from the start; null: the whole video, or 8 without one.",
        ),
    ] = None


class Sound(BaseModel):
    """One sound that was made; its files are `sounds/{number}.wav` and so on under the job."""

    number: int
    seed: int
    guidance_mode: Mode
    duration: float
    sample_rate: int
    onsets: int


class JobState(BaseModel):
    """How far a job is."""

    id: str
    status: Literal["queued", "running", "done", "failed", "cancelled"]
    stage: str
    progress: float
    ahead: Annotated[int, Field(description="Jobs before it in the queue.")]
    error: str | None
    video: bool
    containers: Annotated[
        list[Container],
        Field(
            description="Kinds of files that the video can be saved in, the best first: "
            "`sounds/{number}.{container}` is the video with a sound."
        ),
    ]
    sounds: list[Sound]
    timings: Annotated[dict[str, float], Field(description="Seconds of each stage.")]
    notes: Annotated[
        list[str],
        Field(
            description="What was odd about the request and its video, and what files with the "
            "video that were asked for do not hold of it."
        ),
    ]


class Fault(BaseModel):
    """Why a request was not answered: what, why, what to do."""

    detail: str


class Health(BaseModel):
    """That the server works, and how busy it is."""

    status: Literal["ok"]
    busy: int


class Model(BaseModel):
    """The model that is loaded, its defaults and the server's limits."""

    name: str
    device: str
    sample_rate: int
    steps: int
    guidance: float
    guidance_mode: Mode
    max_duration: float
    max_upload: int
    max_count: int
    max_steps: int


class Models(BaseModel):
    """The models that are served: one."""

    models: list[Model]


def asked_schema(settings: Settings, video: bool, form: bool) -> dict[str, Any]:
    """Return the JSON schema of a request with or without a video, with this server's limits.

    Args:
        settings: Has the limits.
        video: Whether there is one.
        form: Whether fields are text, of which one that is left out stands for null.
    """
    schema = TypeAdapter(Asked).json_schema()
    properties = schema["properties"]
    for option in properties["duration"]["anyOf"]:
        if option.get("type") == "number":
            option["maximum"] = settings.max_duration
    # Each choice of `type | null` keeps its title and description at the top.
    if video:
        properties["video"] = {
            "type": "string",
            "format": "binary",
            "description": "An .mp4, .mov, .webm, .mkv, .avi or .ts file.",
        }
        schema["required"] = ["video"]
    else:
        properties["prompt"] = {
            "type": "string",
            "minLength": 1,
            "maxLength": MAX_PROMPT,
            "pattern": r"\S",
            "description": properties["prompt"]["description"],
        }
        schema["required"] = ["prompt"]
    if form:
        for name, value in properties.items():
            if "anyOf" in value:
                (kept,) = (o for o in value.pop("anyOf") if o.get("type") != "null")
                value.pop("default", None)
                properties[name] = kept | value
    schema["title"] = "VideoRequest" if video else "TextRequest"
    return schema
