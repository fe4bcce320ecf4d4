"""The object that a user holds: a network, a codec and encoders that belong together."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mfmjt.checkpoints import Check, find_all
from mfmjt.codec import MMAudioCodec, NanoCodec
from mfmjt.codec.bigvgan import BigVGANConfig
from mfmjt.codec.mmaudio import codec_files
from mfmjt.codec.vae import VAEConfig
from mfmjt.devices import choose_device
from mfmjt.encoders import CLIPConfig, MMAudioEncoders, NanoEncoders, SynchformerConfig
from mfmjt.encoders.mmaudio import ENCODER_FILES
from mfmjt.errors import InputError, RunError, some
from mfmjt.meanflow import sample
from mfmjt.meanflow.capture import Captured
from mfmjt.meanflow.guidance import GuidanceMode, check_mode
from mfmjt.media import Pictures, Video, as_source
from mfmjt.model import MFMJT, load_mmaudio
from mfmjt.model.checkpoint import NETWORK_FILES, is_ours
from mfmjt.model.conditioning import Conditions
from mfmjt.pipeline.audio import STAGES, Audio
from mfmjt.pipeline.cache import entry, identity
from mfmjt.pipeline.features import Encoders, VideoFeatures, lengths
from mfmjt.pipeline.prompt import prompt_notes
from mfmjt.pipeline.published import (
    mode_in,
    mode_of,
    mode_there,
    name_of,
    networks_there,
    no_network,
    root_of,
)
from mfmjt.pipeline.windows import OVERLAP, Noise, Window, decoded, expected, joined, plan

__all__ = ["MAX_DURATION", "Pipeline"]

MAX_DURATION = 86_400.0
"""Longest sound of one call, in seconds: a day, beyond which a number is a mistake."""
TEXT_DURATION = 8.0
"""Seconds of sound for a prompt alone, unless asked otherwise: the length of training clips."""
NOT_FINITE = (
    "The network gave samples that are not finite. Use float32, less guidance, or another "
    "checkpoint."
)
PRETRAINED = Path(__file__).parents[1] / "pretrained"

Progress = Callable[[str, float], None]
"""Called with a stage's name and how much of it is done, from 0 to 1."""


class Pipeline:
    """Makes sound with a network, a codec and encoders that belong together.

    Args:
        network: Predicts average velocities of latents.
        codec: Turns latents into waveforms.
        encoders: Turn frames and text into the network's conditions.
        device: Such as "cpu" or "cuda"; None takes CUDA where there is one.
        dtype: Of the network's weights and arithmetic; codec and encoders stay as they are.
        window: Whole seconds, 2 or more, that the network makes in one go; longer sounds are made
            of several that overlap. None takes the length that it was trained on.
        compile: Prepare the network for one step (`mfmjt.model.prepared`), which keeps most of its
            weights a second time, and on a CUDA device replay that and the codec as graphs, whose
            first use with new lengths takes seconds. For many sounds in one process.

    Attributes:
        flow_matching: The network ignores the end of its interval, as one imported from MMAudio
            does until it is trained further: it needs many steps.
        one_step: Noise and features to latents in one step, where it is compiled; else None.
        notes: One line each on what was odd about the files that its parts were read from.

    Raises:
        InputError: The parts do not belong together, or the device or dtype cannot be used.
    """

    def __init__(
        self,
        network: MFMJT,
        codec: NanoCodec | MMAudioCodec,
        encoders: Encoders,
        device: str | torch.device | None = None,
        dtype: torch.dtype = torch.float32,
        window: int | None = None,
        compile: bool = False,
    ) -> None:
        config = network.config
        made, heard = config.latent_dim, codec.latent_dim
        if (made, config.sample_rate) != (heard, codec.sample_rate):
            raise InputError(
                f"The network makes {made} latent channels for {config.sample_rate} Hz, and the "
                f"codec takes {heard} for {codec.sample_rate} Hz. Give parts of one model."
            )
        self.device = choose_device(device)
        if dtype == torch.float16 and self.device.type == "cpu":
            raise InputError(
                "float16 has no fast arithmetic on the CPU. Use bfloat16 or float32 there."
            )
        if dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise InputError(f"The network cannot run in {dtype}. Use float32 or bfloat16.")
        if window is not None and window < 2:
            raise InputError(f"window is {window}. Give 2 seconds or more.")
        self.dtype = dtype
        self.network = network.to(self.device, dtype).eval().requires_grad_(False)
        self.codec = codec.to(self.device).eval().requires_grad_(False)
        self.encoders = encoders.to(self.device).eval().requires_grad_(False)
        self.window = window or max(2, round(config.latent_length / config.latent_rate))
        self.flow_matching = not any(bool(p.any()) for p in network.r_embed.mlp[2].parameters())
        self.notes: tuple[str, ...] = tuple(
            note
            for part in (self.network, self.codec, self.encoders)
            for module in part.modules()
            for note in getattr(module, "notes", ())
        )
        self._identity = ""
        self._captured: Captured | None = None
        self.one_step: Callable[..., Tensor] | None = None
        if compile:
            self._captured = Captured(self.codec.decode)
            if not self.flow_matching:
                frozen = self.network.frozen(0.0, 1.0)
                self.one_step = Captured(frozen.step, frozen.reads)

    @classmethod
    def from_pretrained(
        cls,
        name: str | os.PathLike[str] = "nano",
        device: str | torch.device | None = None,
        dtype: torch.dtype = torch.float32,
        compile: bool = False,
    ) -> Pipeline:
        """Load a model that ships, by name, or any other from its folder.

        Args:
            name: "nano", or a folder with `network.safetensors`, `codec.safetensors` and
                `encoders.safetensors`, or one with MMAudio's published files (see `from_mmaudio`)
                and either a published network or a `network.safetensors` of ours, or the file of a
                network in such a folder, published or ours, under any name.
            device: As for `Pipeline`.
            dtype: As for `Pipeline`.
            compile: As for `Pipeline`.

        Raises:
            InputError: There is no such model, or its files are not what they should be.
        """
        folder = Path(name)
        if os.path.isfile(folder):  # which, unlike a Path's, takes a name of any length
            network, folder = folder, root_of(folder)
            if not is_ours(network):
                model = name_of(network, folder) or network
                return cls.from_mmaudio(folder, model, device, dtype, compile=compile)
        else:
            if not os.path.isdir(folder):
                shipped = sorted(p.name for p in PRETRAINED.iterdir() if p.is_dir())
                if str(name) not in shipped:
                    raise InputError(
                        f"There is no model {name}: it is neither a file, nor a folder, nor one "
                        f"that ships ({', '.join(shipped)}). Give one of these."
                    )
                folder = PRETRAINED / name
            network = folder / "network.safetensors"
            if not network.exists():
                if not networks_there(folder):
                    raise no_network(folder)
                return cls.from_mmaudio(folder, None, device, dtype, compile=compile)
        if not (folder / "codec.safetensors").exists():
            mode = mode_there(folder)
            if mode:  # one of ours, trained further from MMAudio's, on its codec and encoders
                find_all(folder, [*codec_files(mode), *ENCODER_FILES])
                return cls(
                    MFMJT.load(network),
                    MMAudioCodec.from_folder(folder, mode),
                    MMAudioEncoders.from_folder(folder),
                    device,
                    dtype,
                    compile=compile,
                )
        return cls(
            MFMJT.load(network),
            NanoCodec.load(folder / "codec.safetensors"),
            NanoEncoders.load(folder / "encoders.safetensors"),
            device,
            dtype,
            compile=compile,
        )

    @classmethod
    def from_mmaudio(
        cls,
        folder: str | os.PathLike[str],
        model: str | os.PathLike[str] | None = None,
        device: str | torch.device | None = None,
        dtype: torch.dtype = torch.float32,
        check: Check = "size",
        *,
        ends_dtype: torch.dtype = torch.float32,
        vae: VAEConfig | None = None,
        vocoder: BigVGANConfig | None = None,
        clip: CLIPConfig | None = None,
        synchformer: SynchformerConfig | None = None,
        compile: bool = False,
    ) -> Pipeline:
        """Load MMAudio from the files that its publishers keep.

        It is a flow-matching network: by default it takes 25 steps with guidance 4.5, as MMAudio
        does. docs/mmaudio.md lists the files.

        Args:
            folder: Holds the files, itself or in folders inside it, such as MMAudio's `weights`
                and `ext_weights`.
            model: "small_16k", "small_44k", "medium_44k", "large_44k" or "large_44k_v2", or the
                file of a network of that kind, wherever it is; None takes the only one there.
            device: As for `Pipeline`.
            dtype: As for `Pipeline`.
            check: "name" takes files of these names, such as weights of your own; "size" also
                compares their sizes with the published ones; "md5" the digests too, which reads
                all files once more.
            ends_dtype: Of the codec's and encoders' arithmetic; bfloat16, in which MMAudio's own
                demo runs them, is faster and rounds samples to about half a percent.
            vae: Sizes of an autoencoder of your own under the published name.
            vocoder: The same of a vocoder.
            clip: The same of CLIP.
            synchformer: The same of Synchformer.
            compile: As for `Pipeline`.

        Raises:
            InputError: Files are missing, damaged or others; the message names all of them and
                says where their publishers keep them.
        """
        if model is None:
            there = networks_there(Path(folder))
            if len(there) > 1:
                files = some(path.name for path in there.values())
                raise InputError(f"{folder} holds several networks: {files}. Choose one of them.")
            model = next(iter(there), "small_16k")
        # All that is missing is said at once, before the first gigabyte is read.
        config = None
        if model in NETWORK_FILES:
            mode = mode_of(str(model))
            needed = [NETWORK_FILES[str(model)], *codec_files(mode), *ENCODER_FILES]
            network, *_ = find_all(folder, needed, check)
            if check != "name" and (vae, vocoder, clip, synchformer) == (None,) * 4:
                config = str(model)
        elif os.path.isfile(network := Path(model)):
            mode = mode_in(network)
            find_all(folder, [*codec_files(mode), *ENCODER_FILES], check)
        else:
            raise InputError(
                f"MMAudio has no network {str(model)!r}: there are {', '.join(NETWORK_FILES)}. "
                "Choose one, or give a file."
            )
        return cls(
            load_mmaudio(network, config),
            MMAudioCodec.from_folder(folder, mode, "name", vae, vocoder).cast(ends_dtype),
            MMAudioEncoders.from_folder(folder, "name", clip, synchformer).cast(ends_dtype),
            device,
            dtype,
            compile=compile,
        )

    @torch.inference_mode()
    def __call__(
        self,
        video: Any = None,
        prompt: str | None = None,
        steps: int | None = None,
        guidance: float | None = None,
        mode: GuidanceMode | None = None,
        seed: int = 0,
        duration: float | None = None,
        count: int = 1,
        progress: Progress | None = None,
        cache: str | os.PathLike[str] | None = None,
        fps: Any = None,
    ) -> Audio | list[Audio]:
        """Make sound for a video, a prompt, or both, of any duration.

        Args:
            video: A file that PyAV can read; a folder of pictures, in the natural order of their
                names, or a pattern such as "frames/%04d.png"; a pair (frames, fps) of uint8
                pictures `(T, H, W, 3)`, as an array or a tensor on any device, and their rate; or
                what `mfmjt.media.read_video` made of one of these at the rates and in the size of
                `encoders`.
            prompt: What is to be heard, in words.
            steps: Evaluations of the network; by default 1, or 25 for one of flow matching.
            guidance: Strength of guidance; 1 follows the conditions as they are. By default 1.5,
                or 4.5 for a network of flow matching.
            mode: "cfg_scaled" (the paper's, and the default), "cfg" (the default for a network of
                flow matching), or "none", which takes half the time.
            seed: Sound number i is made from seed + i; the same seed gives the same sound.
            duration: Seconds of sound, from the video's start; None takes the whole video, or
                8 s where there is none.
            count: Number of different sounds to make, all at once.
            progress: Called as (stage, fraction done) at the beginning and end of each stage and
                after each step; where there are several windows, after each step of them.
            cache: Folder in which a video's features are kept, and looked for next time.
            fps: Pictures per second of a folder, a pattern or an array, which have no times of
                their own. Folders and patterns are taken at 25 where it is not given.

        Returns:
            An `Audio`, or a list of `count` of them if `count` is above 1.

        Raises:
            InputError: Neither a video nor a prompt, an argument out of range, or a video that
                cannot be used.
            RunError: The network's output is not finite, or the cache cannot be written.
        """
        steps, guidance, mode = self.settled(steps, guidance, mode)
        check_call(video, prompt, steps, guidance, mode, seed, duration, count)
        clock = _Clock(progress)
        notes = self.notes + prompt_notes(self.encoders, prompt)
        config, rate = self.network.config, self.codec.sample_rate
        source = None if video is None else self._video(video, duration, cache, fps)
        noise = Noise(seed, count, config.latent_dim)
        end = 0.0

        def windows() -> Iterator[tuple[Window, dict[str, Tensor]]]:
            if source is not None:
                yield from source.windows(clock.stage)
                return
            with clock.stage("read"):
                pass
            whole = TEXT_DURATION if duration is None else duration
            for window in plan(self.window, lambda reach: whole if whole <= reach else None):
                yield window, {}

        def latents() -> Generator[tuple[int, Tensor], None, None]:
            nonlocal end
            text: dict[str, Tensor] | None = None
            for number, (window, features) in enumerate(windows()):
                if text is None:
                    with clock.stage("encode"):
                        text = self._text(prompt)
                if not window.last:
                    known = duration if source is None else source.declared
                    of = 0 if known is None else expected(self.window, known)
                    clock.windows = number, max(of, number + 2)
                start = round(window.start * config.latent_rate)
                length, _, _ = lengths(self.encoders, config, window.duration)
                if window.last:
                    end = window.end
                    if clock.windows is not None:
                        clock.windows = number, number + 1
                    # Windows begin at the nearest latent: the last one reaches to the end.
                    length = max(length, math.ceil(end * config.latent_rate - 1e-6) - start)
                with clock.stage("generate"):
                    latent = self._generate(
                        noise(start, length).to(self.device),
                        features | text,
                        steps,
                        guidance,
                        mode,
                        clock,
                    )
                yield start, latent

        def decode(latent: Tensor) -> Tensor:
            with clock.stage("decode"):
                waveform = self.decode(latent).float().cpu()
            if not bool(torch.isfinite(waveform).all()):
                raise RunError(NOT_FINITE)
            return waveform

        fade = round(OVERLAP * config.latent_rate)
        made = latents()
        try:
            parts = list(decoded(decode, joined(made, fade), self.codec.hop))
        finally:
            made.close()  # an error leaves no thread behind that reads
        clock.finish()
        waveform = torch.cat(parts, dim=1)[:, : max(1, round(end * rate))]
        notes += () if source is None else source.notes
        sounds = [
            Audio(w[None], rate, seed + i, clock.seconds, count, notes)
            for i, w in enumerate(waveform)
        ]
        return sounds[0] if count == 1 else sounds

    def settled(
        self,
        steps: int | None = None,
        guidance: float | None = None,
        mode: GuidanceMode | None = None,
    ) -> tuple[int, float, GuidanceMode]:
        """Steps, guidance and mode of a call, where None takes the network's own."""
        many = self.flow_matching
        return (
            (25 if many else 1) if steps is None else steps,
            (4.5 if many else 1.5) if guidance is None else guidance,
            ("cfg" if many else "cfg_scaled") if mode is None else mode,
        )

    def decode(self, latent: Tensor) -> Tensor:
        """Latents (B, n, C) to samples (B, n·hop), as a graph where that is compiled."""
        return (self._captured or self.codec.decode)(latent)

    def _video(
        self,
        video: Any,
        duration: float | None,
        cache: str | os.PathLike[str] | None,
        fps: Any = None,
    ) -> VideoFeatures:
        cached = None
        source: Path | Pictures | Video
        source = video if isinstance(video, Video) and fps is None else as_source(video, fps)
        if cache is not None and not isinstance(source, Video):
            self._identity = self._identity or identity(self.encoders)
            asked = (duration, self.window, self.encoders.frame_size)
            cached = entry(cache, source, self._identity, asked)
        return VideoFeatures(
            source,
            duration,
            MAX_DURATION,
            self.window,
            self.encoders,
            self.network.config,
            self.device,
            cached,
        )

    def _text(self, prompt: str | None) -> dict[str, Tensor]:
        """Features `(1, tokens, dim)` of the prompt, where there is one."""
        if not (prompt and prompt.strip()):
            return {}
        return {"text": self.encoders.encode_text([prompt])}

    def _generate(
        self,
        noise: Tensor,
        features: dict[str, Tensor],
        steps: int,
        guidance: float,
        mode: GuidanceMode,
        clock: _Clock,
    ) -> Tensor:
        """Latents `(count, length, C)` in the codec's space."""
        count, length = noise.shape[:2]
        if self.one_step is not None and steps == 1:
            made = self.one_step(noise, **features, guidance=guidance, mode=mode)
            clock.report(1.0)
            return self.network.unnormalize(made)
        done = 0

        def velocity(z: Tensor, r: Tensor, t: Tensor, cond: Conditions) -> Tensor:
            nonlocal done
            u = self.network(z, r, t, cond=cond)
            done += 1
            clock.report(done / steps)
            return u

        def encoded(keep: bool) -> dict[str, Conditions]:
            mask = torch.tensor([keep], device=self.device)
            once = self.network.conditions(
                **features, video_mask=mask, text_mask=mask, latent_length=length
            )
            return {"cond": Conditions(*(part.expand(count, *part.shape[1:]) for part in once))}

        latent = sample(
            velocity,
            noise,
            steps,
            encoded(True),
            encoded(False),
            guidance,
            mode,
            instantaneous=self.flow_matching,
        )
        return self.network.unnormalize(latent)


class _Clock:
    """Seconds of each stage, and its progress.

    Attributes:
        windows: Number of the window that is worked at and how many there will be; None for one.
            Progress is then that of generating alone, over all windows.
    """

    def __init__(self, progress: Progress | None) -> None:
        self.seconds = dict.fromkeys(STAGES, 0.0)
        self.windows: tuple[int, int] | None = None
        self._progress = progress
        self._stage = STAGES[0]
        self._reached = 0

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        self._stage = name
        self.report(0.0)
        begin = time.perf_counter()
        yield
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.seconds[name] += time.perf_counter() - begin
        self.report(1.0)

    def report(self, fraction: float) -> None:
        if self._progress is None:
            return
        if self.windows is None:
            # Reading and encoding take turns; what is told only goes forward.
            if STAGES.index(self._stage) >= self._reached:
                self._reached = STAGES.index(self._stage)
                self._progress(self._stage, fraction)
        elif self._stage == "generate":
            done, of = self.windows
            self._progress(self._stage, (done + fraction) / of)

    def finish(self) -> None:
        """Report the end of what several windows left unsaid."""
        if self._progress is not None and self.windows is not None:
            self._progress(STAGES[-1], 1.0)


def check_call(
    video: Any,
    prompt: str | None,
    steps: int,
    guidance: float,
    mode: str,
    seed: int,
    duration: float | None,
    count: int,
) -> None:
    """Raise InputError unless these arguments of a pipeline can be used."""
    check_mode(mode)
    if video is None and not (prompt and prompt.strip()):
        raise InputError("There is nothing to make sound for. Give a video, a prompt, or both.")
    if not 1 <= steps <= 1000:
        raise InputError(f"steps is {steps}. Give 1 to 1000; one is what the network is made for.")
    if not 0 <= guidance <= 100:
        raise InputError(f"guidance is {guidance}. Give 0 to 100, such as 1.5.")
    if not 0 <= seed < 2**63 - 1024:
        raise InputError(f"seed is {seed}. Give a whole number from 0 up.")
    if not 1 <= count <= 64:
        raise InputError(f"count is {count}. Give 1 to 64, and another seed for more.")
    if duration is not None and not 0 < duration <= MAX_DURATION:
        raise InputError(
            f"duration is {duration:g} s. Give more than 0 and at most {MAX_DURATION:g} seconds."
        )
