"""Figures of pictures: against their formulas, in any batches; networks from files, fakes where there are none."""

import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch import nn

from convrot_bench.quality import networks
from convrot_bench.quality.metrics import (
    EQUAL_DB,
    Batch,
    JudgeFeatures,
    Metrics,
    Running,
    feature_distance,
    plain,
    psnr_db,
    unit,
)
from mini_flux.judge import Judge


def pictures(count, size=32, seed=0):
    return torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8, generator=torch.manual_seed(seed))


def measured(running, images, reference, batches=(None,), prompts=None):
    metrics = Metrics([running] if isinstance(running, Running) else running, "cpu")
    prompts = prompts or ["a prompt"] * len(images)
    start = 0
    for size in batches:
        part = slice(start, None if size is None else start + size)
        metrics.update(Batch(images[part], reference[part], prompts[part]))
        start += size or 0
    return metrics.compute()


def test_psnr_is_its_formula_a_picture_and_equal_pictures_have_a_finite_one():
    a, b = unit(pictures(3)), unit(pictures(3, seed=1))
    expected = -10 * (a - b).square().mean((1, 2, 3)).log10()
    torch.testing.assert_close(psnr_db(a, b), expected)
    assert psnr_db(a, a).tolist() == [EQUAL_DB] * 3


def test_figures_are_means_over_pictures_in_any_batches():
    images = pictures(7)
    reference = (images.int() + torch.randint(-9, 10, images.shape)).clamp(0, 255).to(torch.uint8)
    one, several = measured(plain(), images, reference), measured(plain(), images, reference, (3, 1, 3))
    assert one["psnr_db"] == pytest.approx(float(psnr_db(unit(images), unit(reference)).mean()), rel=1e-6)
    assert several == pytest.approx(one, rel=1e-6)
    assert 0.9 < one["ssim"] < 1


def test_reset_forgets_the_last_method():
    metrics, images = Metrics(plain(), "cpu"), pictures(2)
    metrics.update(Batch(images, pictures(2, seed=1), ["", ""]))
    metrics.reset()
    metrics.update(Batch(images, images, ["", ""]))
    assert metrics.compute() == {"psnr_db": EQUAL_DB, "ssim": pytest.approx(1)}


def test_judge_features_are_what_its_last_layer_reads():
    judge, images = Judge().eval(), pictures(2, 128)
    with torch.inference_mode():
        features = JudgeFeatures(judge)(images)
        assert features.shape == (2, JudgeFeatures(judge).num_features)
        torch.testing.assert_close(judge.head[-1](features), judge(unit(images)))


class Means(nn.Module):
    """uint8 (B, 3, H, W) -> the mean of each channel."""

    num_features = 3

    def forward(self, images):
        return unit(images).mean((2, 3))


def test_the_frechet_distance_is_its_formula():
    images, reference = pictures(40, 8), pictures(40, 8, seed=1).float().mul(0.8).to(torch.uint8)
    found = measured(feature_distance(Means()), images, reference, (15, 25))["fid"]
    a, b = (Means()(x).double() for x in (images, reference))
    roots = torch.linalg.eigvals(a.T.cov() @ b.T.cov()).sqrt().real.sum()
    expected = (a.mean(0) - b.mean(0)).square().sum() + a.T.cov().trace() + b.T.cov().trace() - 2 * roots
    assert found == pytest.approx(float(expected), rel=1e-4)
    assert measured(feature_distance(Means()), images, images)["fid"] == pytest.approx(0, abs=1e-6)


def alexnet_layers():
    """The convolutions of AlexNet with random weights, as torchvision builds them."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 64, 11, 4, 2), nn.ReLU(), nn.MaxPool2d(3, 2), nn.Conv2d(64, 192, 5, padding=2), nn.ReLU(),
        nn.MaxPool2d(3, 2), nn.Conv2d(192, 384, 3, padding=1), nn.ReLU(), nn.Conv2d(384, 256, 3, padding=1), nn.ReLU(),
        nn.Conv2d(256, 256, 3, padding=1), nn.ReLU(), nn.MaxPool2d(3, 2),
    )  # fmt: skip


@pytest.fixture
def torchvision(monkeypatch):
    """A stand-in that reads its weights as torchvision does: from torch.hub's folder, and else by download."""
    url = "http://127.0.0.1:9/alexnet-0123.pth"

    def alexnet(weights):
        features = alexnet_layers()
        features.load_state_dict(torch.hub.load_state_dict_from_url(weights.url, progress=False))
        return SimpleNamespace(features=features)

    models = ModuleType("torchvision.models")
    models.alexnet, models.AlexNet_Weights = alexnet, SimpleNamespace(DEFAULT=SimpleNamespace(url=url))
    package = ModuleType("torchvision")
    package.models = models
    monkeypatch.setitem(sys.modules, "torchvision", package)
    monkeypatch.setitem(sys.modules, "torchvision.models", models)
    for module in ("torchmetrics.functional.image.lpips", "torchmetrics.image.lpip"):
        monkeypatch.setattr(f"{module}._TORCHVISION_AVAILABLE", True)


def test_lpips_takes_its_backbone_from_a_file(tmp_path, torchvision):
    """With random weights: zero for equal pictures, the same in any batches, larger for pictures further apart."""
    before, path = torch.hub.get_dir(), tmp_path / "weights.pth"
    torch.save(alexnet_layers().state_dict(), path)
    images = pictures(4, 64)
    near = (images.int() + 20).clamp(0, 255).to(torch.uint8)
    running = networks.lpips(path)
    assert torch.hub.get_dir() == before
    assert measured(running, images, images)["lpips"] == 0
    running.metric.reset()
    small = measured(running, images, near, (1, 3))["lpips"]
    running.metric.reset()
    assert small == pytest.approx(measured(networks.lpips(path), images, near)["lpips"], rel=1e-5)
    assert 0 < small < measured(running, images, pictures(4, 64, seed=1))["lpips"]


def test_a_network_without_weights_leaves_a_reason(tmp_path, torchvision, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "_hub_dir", None)
    found, missing = networks.available(
        [("lpips", lambda: networks.lpips(None)), ("other", lambda: networks.lpips(tmp_path / "absent.pth"))]
    )
    assert found == []
    assert missing["lpips"].startswith("URLError: ")
    assert "no such file" in missing["other"]


def test_clip_score_is_a_hundred_cosines(tmp_path):
    """A random CLIP of transformers, its tokenizer mini-flux's: the library's score against the cosines themselves."""
    from pathlib import Path

    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizer

    weights = Path(__file__).parents[2] / "apps" / "mini-flux" / "weights" / "tokenizer"
    tokenizer = CLIPTokenizer.from_pretrained(weights)
    common = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {"vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id, "bos_token_id": 0}
    vision = {"image_size": 32, "patch_size": 8}
    torch.manual_seed(0)
    model = CLIPModel(CLIPConfig(text_config=common | text, vision_config=common | vision, projection_dim=16)).eval()
    size = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
    processor = CLIPProcessor(CLIPImageProcessor(**size), tokenizer)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    images, prompts = pictures(3), ["a red cube", "a blue ball", "a cone"]
    found = measured(networks.clip_score(str(tmp_path)), images, images, (2, 1), prompts)["clip_score"]
    inputs = processor(text=prompts, images=list(images), return_tensors="pt", padding=True)
    with torch.inference_mode():
        out = model(**inputs)
    cosines = torch.nn.functional.cosine_similarity(out.image_embeds, out.text_embeds)
    assert found == pytest.approx(100 * float(cosines.mean()), rel=1e-4)


def test_image_reward_scores_each_picture_with_its_prompt(monkeypatch):
    package = ModuleType("ImageReward")
    package.load = lambda name: SimpleNamespace(
        score=lambda prompt, image: len(prompt) + image.size[0] / 100 + (name == "ImageReward-v1.0")
    )
    monkeypatch.setitem(sys.modules, "ImageReward", package)
    images = pictures(2)
    found = measured(networks.image_reward(), images, images, prompts=["a", "abc"])
    assert found == {"image_reward": pytest.approx(2 + 0.32 + 1)}


def test_reference_pictures_are_learned_once(monkeypatch):
    """FID against a folder of pictures: the same after a reset, and the 16-bit pictures have one as well."""
    known = networks.FeatureDistance
    monkeypatch.setattr(networks, "FeatureDistance", lambda features, **kw: known(Means(), **kw))
    reference, images = pictures(30, 8, seed=1), pictures(30, 8)
    running = networks.inception_distance(iter(reference.split(16)))
    assert not running.paired
    first = measured(running, images, images)["fid"]
    running.metric.reset()
    assert measured(running, images, images)["fid"] == pytest.approx(first)
    assert first == pytest.approx(measured(feature_distance(Means()), images, reference)["fid"], rel=1e-6)
