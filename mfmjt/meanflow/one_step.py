"""From noise to data in one step, prepared once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mfmjt.cuda_graph import Captured
from mfmjt.meanflow._network import Network
from mfmjt.meanflow.guidance import GuidanceMode, check_mode, check_negative
from mfmjt.meanflow.sampling import sample

__all__ = ["OneStep"]


class OneStep:
    """One guided step of a multimodal network, both passes in one batch.

    A network with a method `frozen(r, t)`, such as `mfmjt.MFMJT`, is prepared for the interval of
    one step at construction: what does not depend on the latent is computed here. Make another
    `OneStep` after changing the network's weights. On a CUDA device the step is one graph for each
    combination of shapes.

    Args:
        net: net(z, r, t, video=, sync=, text=, pooled=, video_mask=, text_mask=) -> u.
        guidance: Scale w; 1 needs no second pass. A call may give another.
        mode: See `guide`. A call may give another.
        compile: False calls the network itself, neither prepared nor as a graph.

    Raises:
        InputError: Unknown mode.
    """

    def __init__(
        self,
        net: Network,
        guidance: float = 1.5,
        mode: GuidanceMode = "cfg_scaled",
        compile: bool = True,
    ) -> None:
        check_mode(mode)
        self.net = net
        self.guidance = guidance
        self.mode: GuidanceMode = mode
        self._step: Callable[..., Tensor] = self._sample
        if compile:
            frozen = getattr(net, "frozen", None)
            prepared = None if frozen is None else frozen(0.0, 1.0)
            step = self._sample if prepared is None else prepared.step
            self._step = Captured(step, getattr(prepared, "reads", None))

    @torch.no_grad()
    def __call__(
        self,
        z: Tensor,
        video: Tensor | None = None,
        sync: Tensor | None = None,
        text: Tensor | None = None,
        video_mask: Tensor | None = None,
        text_mask: Tensor | None = None,
        guidance: float | Tensor | None = None,
        mode: Any = None,  # or `**features`, a dictionary of tensors, would fail type checks
        pooled: Tensor | None = None,
        negative_text: Tensor | None = None,
        negative_pooled: Tensor | None = None,
    ) -> Tensor:
        """Turn noise into data.

        Args:
            z: Noise (B, N, C).
            video: Video features (B, N_video, C_video), or None for the network's null tokens.
            sync: Synchronization features (B, N_sync, C_sync), or None.
            text: Text features (B, N_text, C_text), or None.
            video_mask: (B,) bool; samples that are False have no video.
            text_mask: (B,) bool; samples that are False have no text.
            guidance: Scale w, a number or a tensor of one element; None for that of the
                construction.
            mode: See `guide`; None for that of the construction.
            pooled: Features of the whole text (B, C_pooled), for networks that take them, or None.
            negative_text: Features (B, N_text, C_text) of what guidance leads away from; None
                for the network's null text.
            negative_pooled: Features (B, C_pooled) of the whole of it, likewise.

        Returns:
            Data, in the shape and dtype of z.

        Raises:
            InputError: Unknown mode, or a negative text without guidance.
        """
        guidance = self.guidance if guidance is None else guidance
        mode = self.mode if mode is None else mode
        check_mode(mode)
        if negative_text is not None:
            check_negative(guidance, mode)
        features: dict[str, Any] = {
            "video": video,
            "sync": sync,
            "text": text,
            "pooled": pooled,
            "video_mask": video_mask,
            "text_mask": text_mask,
            "negative_text": negative_text,
            "negative_pooled": negative_pooled,
        }
        given = {name: value for name, value in features.items() if value is not None}
        return self._step(z, **given, guidance=guidance, mode=mode)

    def _sample(
        self,
        z: Tensor,
        *,
        guidance: float | Tensor,
        mode: GuidanceMode,
        video_mask: Tensor | None = None,
        text_mask: Tensor | None = None,
        negative_text: Tensor | None = None,
        negative_pooled: Tensor | None = None,
        **features: Tensor,
    ) -> Tensor:
        keep = torch.ones(z.shape[0], dtype=torch.bool, device=z.device)
        cond = {
            "video_mask": keep if video_mask is None else video_mask,
            "text_mask": keep if text_mask is None else text_mask,
        }
        null: dict[str, Any] = {**features, "video_mask": ~keep, "text_mask": ~keep}
        if negative_text is not None:
            null |= {"text": negative_text, "text_mask": keep}
            if "pooled" in features or negative_pooled is not None:
                null["pooled"] = negative_pooled
        return sample(
            self.net,
            z,
            cond={**features, **cond},
            null=null,
            guidance=guidance,
            mode=mode,
        )
