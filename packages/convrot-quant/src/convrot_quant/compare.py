"""Quantized models against their 16-bit original on the same prompts and seeds: images, error figures, sizes, times."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import mean, median
from typing import Any

import numpy
import torch
from PIL.Image import Image
from torch import Tensor, nn

from convrot_quant.generation import Picture, Settings, generate, seconds_per_image
from convrot_quant.patch import model_bytes
from convrot_quant.plans import Plan
from convrot_quant.probe import LayerProbe


@dataclass(frozen=True)
class Variant:
    """A quantized model to compare: its name, its plan, and how to make it (called once the 16-bit one is gone)."""

    name: str
    plan: Plan
    make: Callable[[], nn.Module]


@dataclass(frozen=True)
class Result:
    """One model's pictures, size and time; for a quantized one also its errors against the 16-bit pictures."""

    name: str
    pictures: Sequence[Picture]
    transformer_bytes: int
    psnr_db: Sequence[float] = ()
    ssim: Sequence[float] = ()
    layer_l2: dict[str, float] | None = None

    @property
    def seconds(self) -> float:
        """Median seconds per image."""
        return seconds_per_image(self.pictures)

    @property
    def layer_l2_median(self) -> float:
        """Median over the quantized layers of the relative L2 error on captured 16-bit inputs."""
        return median(self.layer_l2.values()) if self.layer_l2 else math.nan

    def to_dict(self, baseline: Result) -> dict[str, Any]:
        """The figures, ready for JSON (infinite and undefined ones are null); `baseline` is the 16-bit result."""
        figures: dict[str, Any] = {
            "name": self.name,
            "transformer_bytes": self.transformer_bytes,
            "times_smaller": baseline.transformer_bytes / self.transformer_bytes,
            "seconds_per_image": self.seconds,
        }
        if self is not baseline:
            figures["psnr_db"] = [_finite(value) for value in self.psnr_db]
            figures["psnr_db_mean"] = _finite(mean(self.psnr_db))
            figures["ssim"] = [_finite(value) for value in self.ssim]
            figures["ssim_mean"] = _finite(mean(self.ssim))
            figures["layer_l2_median"] = _finite(self.layer_l2_median)
            figures["layer_l2"] = self.layer_l2 or {}
        return figures


def compare(
    pipe: Any, variants: Sequence[Variant], prompts: Sequence[str], settings: Settings, *, progress: bool = True
) -> list[Result]:
    """The 16-bit result of `pipe`, then one result per variant. Afterwards the pipe holds the last variant.

    The 16-bit transformer is let go before a variant is made, so that one model at a time is in memory.
    """
    names = dict.fromkeys(name for variant in variants for name in variant.plan)
    calls = settings.steps * settings.num_images * len(prompts)
    label = dtype_name(pipe.transformer)
    with LayerProbe(pipe.transformer, names, calls) as probe:
        pictures = generate(pipe, prompts, settings, progress=progress, label=label)
    results = [Result(label, pictures, model_bytes(pipe.transformer))]
    device = pipe.device
    for variant in variants:
        pipe.register_modules(transformer=None)
        model = variant.make()
        errors = probe.errors(model, variant.plan)
        pipe.register_modules(transformer=model.to(device))
        made = generate(pipe, prompts, settings, progress=progress, label=variant.name)
        pairs = [(a.image, b.image) for a, b in zip(pictures, made, strict=True)]
        figures = [psnr_db(a, b) for a, b in pairs], [ssim(a, b) for a, b in pairs]
        results.append(Result(variant.name, made, model_bytes(model), *figures, errors))
        del model
    return results


def dtype_name(model: nn.Module) -> str:
    """BF16, FP16 or FP32: the dtype of most of a model's values."""
    counts: dict[torch.dtype, int] = {}
    for parameter in model.parameters():
        counts[parameter.dtype] = counts.get(parameter.dtype, 0) + parameter.numel()
    names = {torch.bfloat16: "BF16", torch.float16: "FP16", torch.float32: "FP32"}
    return names.get(max(counts, key=lambda dtype: counts[dtype]), "16-bit")


def psnr_db(image: Image, reference: Image) -> float:
    """Peak signal-to-noise ratio of two RGB images in dB; infinite for equal images."""
    from torchmetrics.functional.image import peak_signal_noise_ratio

    a, b = _tensor(image), _tensor(reference)
    return math.inf if torch.equal(a, b) else float(peak_signal_noise_ratio(a, b, data_range=1.0))


def ssim(image: Image, reference: Image) -> float:
    """Structural similarity of two RGB images: 1 for equal images."""
    from torchmetrics.functional.image import structural_similarity_index_measure

    value = structural_similarity_index_measure(_tensor(image), _tensor(reference), data_range=1.0)
    assert isinstance(value, Tensor), "a tuple comes only with return_full_image or return_contrast_sensitivity"
    return float(value)


def _tensor(image: Image) -> Tensor:
    """RGB image -> fp64 (1, 3, H, W) in [0, 1]."""
    pixels = torch.from_numpy(numpy.array(image.convert("RGB")))
    return pixels.permute(2, 0, 1)[None].double() / 255


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
