"""Figures that need a network's weights, which not every machine can get: LPIPS, Inception's FID, CLIP, ImageReward."""

import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity
from torchmetrics import MeanMetric
from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

from convrot_bench.quality.metrics import Batch, FeatureDistance, Running, feature_distance, unit
from convrot_bench.quality.pictures import to_pil

CLIP_MODEL = "openai/clip-vit-large-patch14"
# no package, no network, no such file, a file of something else
ERRORS = (ImportError, OSError, RuntimeError, ValueError, KeyError)


@dataclass(frozen=True)
class Networks:
    """Where weights come from. None: where the library itself gets them, by download or from its cache."""

    lpips_weights: Path | None = None
    clip_model: str = CLIP_MODEL
    reference_images: Path | None = None


def available(makers: Iterable[tuple[str, Callable[[], Running]]]) -> tuple[list[Running], dict[str, str]]:
    """(the figures that can be made here, {case: why not} of the others)."""
    made, missing = [], {}
    for case, make in makers:
        try:
            made.append(make())
        except ERRORS as error:
            said = " ".join(str(error).split())
            missing[case] = f"{type(error).__name__}: {said[:200]}"
    return made, missing


def lpips(weights: Path | None) -> Running:
    """LPIPS with AlexNet. `weights`: torchvision's file of AlexNet, where it cannot be downloaded."""
    metric = LearnedPerceptualImagePatchSimilarity("alex", normalize=True) if weights is None else _local_lpips(weights)

    def feed(metric: LearnedPerceptualImagePatchSimilarity, batch: Batch) -> None:
        metric.update(unit(batch.images), unit(batch.reference))

    return Running("lpips", metric, feed)


def _local_lpips(weights: Path) -> LearnedPerceptualImagePatchSimilarity:
    """torchvision looks into torch.hub's folder before it downloads: the file is shown to it there."""
    if not weights.is_file():
        raise FileNotFoundError(f"--lpips-weights: no such file {weights}")
    url = import_module("torchvision.models").AlexNet_Weights.DEFAULT.url
    before = torch.hub.get_dir()
    with tempfile.TemporaryDirectory() as folder:
        shown = Path(folder, "checkpoints", Path(url).name)
        shown.parent.mkdir()
        shown.symlink_to(weights.resolve())
        torch.hub.set_dir(folder)
        try:
            return LearnedPerceptualImagePatchSimilarity("alex", normalize=True)
        finally:
            torch.hub.set_dir(before)


def inception_distance(reference: Iterable[Tensor] | None) -> Running:
    """FID with Inception's features: against batches of uint8 (B, 3, H, W), or where None, the 16-bit pictures."""
    if reference is None:
        return feature_distance(2048)
    metric = FeatureDistance(2048, reset_real_features=False)
    for images in reference:
        metric.update(images, real=True)

    def feed(metric: FeatureDistance, batch: Batch) -> None:
        metric.update(batch.images, real=False)

    return Running("fid", metric, feed, paired=False)


class ClipCosines(MeanMetric):
    """100 times the cosine of CLIP's embeddings of picture and prompt, as torchmetrics' CLIPScore defines it.

    That one does not run on transformers 5 (torchmetrics 1.9: get_image_features gives an object there).
    """

    def __init__(self, model: str) -> None:
        from transformers import CLIPModel, CLIPProcessor

        super().__init__()
        self.clip, self.processor = CLIPModel.from_pretrained(model).eval(), CLIPProcessor.from_pretrained(model)

    def add(self, images: Tensor, prompts: Sequence[str]) -> None:
        """uint8 (B, 3, H, W) and their prompts, which CLIP cuts after 77 tokens."""
        inputs = self.processor(
            text=list(prompts), images=list(images.cpu()), return_tensors="pt", padding=True, truncation=True
        )
        out = self.clip(**inputs.to(images.device))
        self.update(100 * cosine_similarity(out.image_embeds, out.text_embeds))


def clip_score(model: str) -> Running:
    """The CLIP score by a model of transformers. `model`: a folder or hub id."""
    return Running("clip_score", ClipCosines(model), lambda m, b: m.add(b.images, b.prompts), paired=False)


def image_reward() -> Running:
    """The mean ImageReward, by the package image-reward."""
    model: Any = import_module("ImageReward").load("ImageReward-v1.0")

    def feed(metric: MeanMetric, batch: Batch) -> None:
        for image, prompt in zip(batch.images, batch.prompts, strict=True):
            metric.update(model.score(prompt, to_pil(image)))

    return Running("image_reward", MeanMetric(), feed, paired=False)


def for_any_model(networks: Networks, reference: Iterable[Tensor] | None) -> tuple[list[Running], dict[str, str]]:
    """All four, those that can be made here; the others with the reason."""
    return available(
        [
            ("lpips", lambda: lpips(networks.lpips_weights)),
            ("fid", lambda: inception_distance(reference)),
            ("clip_score", lambda: clip_score(networks.clip_model)),
            ("image_reward", image_reward),
        ]
    )
