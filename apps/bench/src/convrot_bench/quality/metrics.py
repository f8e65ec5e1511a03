"""Figures of pictures against reference pictures: added up batch by batch, and over the processes of a run.

torchmetrics holds the sums and gathers them in compute(), so that several processes give one figure.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics import MeanMetric, Metric
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.utilities.distributed import gather_all_tensors

from mini_flux.judge import Judge

EQUAL_DB = 100.0  # the PSNR of equal pictures is infinite, which no mean can hold
AT_ONCE = 64  # pictures in one call of a metric


@dataclass(frozen=True)
class Batch:
    """images and reference: uint8 (B, 3, H, W) of the same prompts and noise; prompts: the B captions."""

    images: Tensor
    reference: Tensor
    prompts: Sequence[str]


@dataclass
class Running:
    """One figure. `feed` adds a batch to the metric; `paired`: the figure compares with the 16-bit pictures."""

    case: str
    metric: Any
    feed: Callable[[Any, Batch], None]
    paired: bool = True


class Metrics:
    """All figures of one method at one step count: reset, update with every batch, compute."""

    def __init__(self, running: Sequence[Running], device: str) -> None:
        self.running = list(running)
        for one in self.running:
            one.metric.to(device)
            one.metric.dist_sync_fn = _gather

    def reset(self) -> None:
        """Forget the last method's pictures."""
        for one in self.running:
            one.metric.reset()

    @torch.inference_mode()
    def update(self, batch: Batch, *, paired: bool = True) -> None:
        """Add a batch; `paired=False`: pictures of the 16-bit model itself, which nothing compares with themselves."""
        for start in range(0, len(batch.images), AT_ONCE):
            part = slice(start, start + AT_ONCE)
            some = Batch(batch.images[part], batch.reference[part], batch.prompts[part])
            for one in self.running:
                if paired or not one.paired:
                    one.feed(one.metric, some)

    def compute(self, *, paired: bool = True) -> dict[str, float]:
        """{case: figure} over the pictures of all processes, each of which has to call it."""
        return {one.case: float(one.metric.compute()) for one in self.running if paired or not one.paired}


def _gather(value: Tensor, group: Any = None) -> list[Tensor]:
    """Every process's value of a sum, exchanged between CPUs: processes of a run share no NCCL (see replicas.py)."""
    return [other.to(value.device) for other in gather_all_tensors(value.cpu(), group)]


def unit(images: Tensor) -> Tensor:
    """uint8 (...) -> fp32 (...) in 0..1."""
    return images.float() / 255


def psnr_db(images: Tensor, reference: Tensor) -> Tensor:
    """Two of (B, 3, H, W) in 0..1 -> (B,) decibels, equal pictures at EQUAL_DB."""
    value = peak_signal_noise_ratio(images, reference, data_range=1.0, reduction="none", dim=(1, 2, 3))
    return value.clamp_max(EQUAL_DB)


def ssim(images: Tensor, reference: Tensor) -> Tensor:
    """Two of (B, 3, H, W) in 0..1 -> (B,)."""
    value = structural_similarity_index_measure(images, reference, data_range=1.0, reduction="none")
    assert isinstance(value, Tensor), "a tuple comes only with return_full_image or return_contrast_sensitivity"
    return value


def mean_of(case: str, value: Callable[[Tensor, Tensor], Tensor]) -> Running:
    """The mean over pictures of a value of (images, reference), each (B, 3, H, W) in 0..1."""

    def feed(metric: Metric, batch: Batch) -> None:
        metric.update(value(unit(batch.images), unit(batch.reference)))

    return Running(case, MeanMetric(), feed)


def plain() -> list[Running]:
    """What needs no network: PSNR and SSIM."""
    return [mean_of("psnr_db", psnr_db), mean_of("ssim", ssim)]


class JudgeFeatures(nn.Module):
    """uint8 (B, 3, 128, 128) -> (B, 160): what the judge's last layer reads its answers from."""

    def __init__(self, judge: Judge) -> None:
        super().__init__()
        self.judge = judge
        last = judge.head[-1]
        assert isinstance(last, nn.Linear), "the judge's head ends in a linear layer"
        self.num_features = last.in_features

    def forward(self, images: Tensor) -> Tensor:
        maps = F.relu(self.judge.pool(self.judge.features(unit(images) * 2 - 1)))
        return self.judge.head[:-1](maps)


class FeatureDistance(FrechetInceptionDistance):
    """The Frechet distance of features; its last step by symmetric matrices, which GPUs and small sets take as well."""

    def compute(self) -> Tensor:
        """-> fp64 scalar: |m - n|^2 + tr C + tr D - 2 tr (C^1/2 D C^1/2)^1/2."""
        m, c = _gaussian(self.real_features_sum, self.real_features_cov_sum, self.real_features_num_samples)
        n, d = _gaussian(self.fake_features_sum, self.fake_features_cov_sum, self.fake_features_num_samples)
        values, vectors = torch.linalg.eigh(c)
        root = (vectors * values.clamp_min(0).sqrt()) @ vectors.T
        both = torch.linalg.eigvalsh(root @ d @ root).clamp_min(0).sqrt().sum()
        return (m - n).square().sum() + c.trace() + d.trace() - 2 * both


def _gaussian(total: Tensor, products: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
    """Sums of F features and of their products, fp64 -> their mean (F,) and covariance (F, F)."""
    mean = total / count
    return mean, (products - count * mean.outer(mean)) / (count - 1)


def feature_distance(features: nn.Module | int) -> Running:
    """The Frechet distance of features between a method's pictures and the 16-bit ones."""

    def feed(metric: FeatureDistance, batch: Batch) -> None:
        metric.update(batch.reference, real=True)
        metric.update(batch.images, real=False)

    return Running("fid", FeatureDistance(features), feed)
