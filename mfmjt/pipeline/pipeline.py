"""The object that a user holds: a model that is called."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch

from mfmjt.checkpoints import Check
from mfmjt.codec import BigVGANConfig, Codec, VAEConfig
from mfmjt.devices import choose_device
from mfmjt.encoders import CLIPConfig, Encoders, SynchformerConfig
from mfmjt.errors import InputError, MfmjtError
from mfmjt.families import Bundle, open_bundle
from mfmjt.families.mmaudio import Sizes, open_published
from mfmjt.kernels.precision import fast_dtype
from mfmjt.meanflow.guidance import GuidanceMode
from mfmjt.model import MFMJT
from mfmjt.pipeline.audio import Audio
from mfmjt.pipeline.request import Request
from mfmjt.pipeline.together import generate
from mfmjt.progress import Progress

__all__ = ["Pipeline", "generate_together"]


class Pipeline:
    """Makes sound with a network, a codec and encoders that belong together.

    Args:
        network: Predicts average velocities of latents.
        codec: Turns latents into waveforms.
        encoders: Turn frames and text into the network's conditions.
        device: Such as "cpu" or "cuda"; None takes CUDA where there is one.
        dtype: Of the network's weights and arithmetic; codec and encoders stay as they are. None
            takes bfloat16 where the CPU or GPU has instructions for it, else float32. On a CPU that
            has none, 16-bit weights take half of the memory, and float32 is computed in.
        window: Whole seconds, 2 or more, that the network makes in one go; longer sounds are made
            of several that overlap. None takes the length that it was trained on.
        compile: Prepare the network for one step (`mfmjt.model.prepared`), which keeps most of its
            weights a second time, and on a CUDA device replay that and the codec as graphs, whose
            first use with new lengths takes seconds. For many sounds in one process.
        low_memory: Have one part at a time on the device: encoders, then network, then codec. With
            `from_pretrained` and `from_mmaudio`, each is read from its files when it is needed and
            freed after; parts that are given here stay on the CPU meanwhile. Each call takes longer
            by reading.

    Attributes:
        bundle: Network, codec and encoders, which are also attributes of this.
        sampling: How sounds are made unless a call says otherwise: one step, or 25 steps for a
            network of flow matching, such as one imported from MMAudio.
        notes: One line each on what was odd about the files that its parts were read from.

    Raises:
        InputError: The parts do not belong together, the device or dtype cannot be used, or
            `low_memory` comes with `compile`.
    """

    def __init__(
        self,
        network: MFMJT,
        codec: Codec,
        encoders: Encoders,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
        window: int | None = None,
        compile: bool = False,
        low_memory: bool = False,
    ) -> None:
        bundle = Bundle(network, codec, encoders)
        if low_memory:
            bundle.save_memory()
        self._open(bundle, device, dtype, window, compile)

    @classmethod
    def from_bundle(
        cls,
        bundle: Bundle,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
        window: int | None = None,
        compile: bool = False,
    ) -> Pipeline:
        """Take a `Bundle`, as `mfmjt.families.open_bundle` gives one; the rest is as above.

        One that was opened with low memory is used with it.
        """
        pipeline = cls.__new__(cls)
        pipeline._open(bundle, device, dtype, window, compile)
        return pipeline

    def _open(
        self,
        bundle: Bundle,
        device: str | torch.device | None,
        dtype: torch.dtype | None,
        window: int | None,
        compile: bool,
    ) -> None:
        config, codec = bundle.network.config, bundle.codec
        made = config.latent_dim, config.sample_rate
        if made != (codec.latent_dim, codec.sample_rate):
            raise InputError(
                f"The network makes {made[0]} latent channels for {made[1]} Hz, and the codec "
                f"takes {codec.latent_dim} for {codec.sample_rate} Hz. Give parts of one model."
            )
        self.device = choose_device(device)
        dtype = fast_dtype(self.device) if dtype is None else dtype
        if dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise InputError(f"The network cannot run in {dtype}. Use float32 or bfloat16.")
        if window is not None and window < 2:
            raise InputError(f"window is {window}. Give 2 seconds or more.")
        if compile and bundle.low_memory:
            raise InputError(
                "compile keeps prepared weights on the device, and low_memory frees them after "
                "each use. Choose one of them."
            )
        self.bundle, self.dtype = bundle.to(self.device, dtype), dtype
        self.network, self.codec, self.encoders = bundle.network, bundle.codec, bundle.encoders
        self.sampling, self.notes = bundle.sampling, bundle.notes
        bundle.window = window or bundle.window
        if compile:
            bundle.compile()

    @classmethod
    def from_pretrained(
        cls,
        name: str | os.PathLike[str] = "nano",
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
        compile: bool = False,
        low_memory: bool = False,
    ) -> Pipeline:
        """Load a model that ships, by name, or any other from its folder.

        Args:
            name: "nano", or a folder with `network.safetensors`, `codec.safetensors` and
                `encoders.safetensors`, or one with MMAudio's published files (see `from_mmaudio`)
                and either a published network or a `network.safetensors` of ours, or the file of a
                network in such a folder, published or ours, under any name; or such a repository of
                Hugging Face's hub, as owner/name.
            device: As for `Pipeline`.
            dtype: As for `Pipeline`.
            compile: As for `Pipeline`.
            low_memory: As for `Pipeline`.

        Raises:
            InputError: There is no such model, or its files are not what they should be.
        """
        bundle = open_bundle(name, low_memory=low_memory)
        return cls.from_bundle(bundle, device, dtype, compile=compile)

    @classmethod
    def from_mmaudio(
        cls,
        folder: str | os.PathLike[str],
        model: str | os.PathLike[str] | None = None,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
        check: Check = "size",
        *,
        ends_dtype: torch.dtype = torch.float32,
        vae: VAEConfig | None = None,
        vocoder: BigVGANConfig | None = None,
        clip: CLIPConfig | None = None,
        synchformer: SynchformerConfig | None = None,
        compile: bool = False,
        low_memory: bool = False,
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
            low_memory: As for `Pipeline`.

        Raises:
            InputError: Files are missing, damaged or others; the message names all of them and
                says where their publishers keep them.
        """
        sizes = Sizes(vae, vocoder, clip, synchformer)
        bundle = open_published(folder, model, check, ends_dtype, sizes, low_memory)
        return cls.from_bundle(bundle, device, dtype, compile=compile)

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
        negative_prompt: str | None = None,
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
            negative_prompt: What is not to be heard, in words: it takes the place of no text in
                the evaluation that guidance leads away from. It needs a guidance above 1.

        Returns:
            An `Audio`, or a list of `count` of them if `count` is above 1.

        Raises:
            InputError: Neither a video nor a prompt, an argument out of range, or a video that
                cannot be used.
            RunError: The network's output is not finite, or the cache cannot be written.
        """
        modes = () if mode is None else (mode,)
        request = Request(
            video,
            prompt,
            steps,
            guidance,
            modes,
            seed,
            duration,
            count,
            cache,
            fps,
            negative_prompt,
        )
        (made,) = generate(self.bundle, [request], progress)
        if isinstance(made, MfmjtError):
            raise made
        sounds = [sound.noted(self.notes) for sound in made]
        return sounds[0] if count == 1 else sounds


def generate_together(
    pipeline: Pipeline,
    requests: Sequence[Request],
    progress: Progress | None = None,
    most: int = 16,
) -> list[list[Audio] | MfmjtError]:
    """Make sound for several requests, those of one shape in one batch.

    A request's sounds are those that the pipeline makes for it alone.

    Args:
        pipeline: Makes the sounds.
        requests: What is asked.
        progress: As for `Pipeline`, of all requests; what it raises ends all of them.
        most: Sounds in a batch.

    Returns:
        For each request its sounds, all of the first mode first, or the error that it ended with.
    """
    return generate(pipeline.bundle, requests, progress, most)
