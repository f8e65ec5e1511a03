"""Preview: what the image will be, from the latents of a running generation, small enough to cost next to nothing.

A flow-matching step goes from x along a velocity v: two successive latents give v, and x - sigma v is where the model
is heading, a clear picture long before the noise is gone. It is decoded at no more than SIDE x SIDE latents.
"""

from __future__ import annotations

import time
from typing import Any

import torch
from PIL.Image import Image
from torch import Tensor
from torch.nn import functional

SIDE = 32
SHARE = 0.2  # of a side's time that previews may take


class Preview:
    """Ask picture(latents, step) after each step; None where a preview is not due, or not known how to make."""

    def __init__(self, pipe: Any, height: int, width: int) -> None:
        self._pipe, self._size = pipe, (height, width)
        self._last: Tensor | None = None
        self._started = time.perf_counter()
        self.seconds = 0.0  # spent in here so far

    @torch.no_grad()
    def picture(self, latents: Tensor, step: int) -> Image | None:
        """Latents as a step left them -> a small picture of where they lead."""
        last, self._last = self._last, latents
        started = time.perf_counter()
        ran = started - self._started - self.seconds
        sigmas = getattr(self._pipe.scheduler, "sigmas", None)
        if last is None or sigmas is None or len(sigmas) <= step + 1 or self.seconds > SHARE * ran:
            return None
        after, before = float(sigmas[step + 1]), float(sigmas[step])
        if after == before or last.shape != latents.shape:
            return None
        velocity = (latents.float() - last.float()) / (after - before)
        image = self._decoded(latents.float() - after * velocity)
        self.seconds += time.perf_counter() - started
        return image

    def _decoded(self, latents: Tensor) -> Image | None:
        pipe, config = self._pipe, self._pipe.vae.config
        if latents.ndim == 3 and hasattr(pipe, "_unpack_latents"):  # FLUX keeps 2 x 2 patches as tokens
            latents = pipe._unpack_latents(latents, *self._size, pipe.vae_scale_factor)
        if latents.ndim != 4 or getattr(config, "scaling_factor", None) is None:
            return None
        shrink = max(latents.shape[-2:]) / SIDE
        if shrink > 1:
            size = [max(round(side / shrink), 1) for side in latents.shape[-2:]]
            latents = functional.interpolate(latents, size, mode="area")
        values = latents / config.scaling_factor + (getattr(config, "shift_factor", None) or 0.0)
        decoded = pipe.vae.decode(values.to(pipe.vae.dtype), return_dict=False)[0]
        image: Image = pipe.image_processor.postprocess(decoded, output_type="pil")[0]
        return image
