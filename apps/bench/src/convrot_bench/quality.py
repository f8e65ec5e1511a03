"""Image quality of a pipeline under each method: same captions, same noise, the 16-bit pictures as the reference."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

from convrot_bench.methods import BASELINE, METHODS, Method
from convrot_bench.results import Writer
from convrot_quant.patch import model_bytes
from convrot_quant.probe import LayerProbe
from mini_flux.evaluate import chance, draw_captions, read_images
from mini_flux.judge import Judge, Verdict, judge_images, load_judge
from mini_flux.parts import load_pipeline
from mini_flux.scenes import Scene, caption, held_out_scenes

# case suffix -> unit; what a row of the table is made of
CASES = {
    "layer_l2_median": "relative_l2", "layer_l2_p95": "relative_l2", "psnr_db": "db", "ssim": "ssim",
    "caption_accuracy": "share", "object": "share", "color": "share", "relation": "share", "bytes": "bytes",
}  # fmt: skip


EQUAL_DB = 100.0  # the PSNR of equal pictures is infinite, which no mean can hold


@dataclass
class Measured:
    """One method's figures by case, and what else its rows say."""

    figures: dict[str, float]
    more: dict[str, Any]
    layer_l2: dict[str, float] = field(default_factory=dict)


class Suite:
    """Draws and judges held-out captions with one pipeline folder, first in 16 bits, then under each method."""

    def __init__(self, folder: Path, judge_file: Path, captions: int, steps: int, device: str, batch: int) -> None:
        self.folder, self.steps, self.device, self.batch = folder, steps, device, batch
        self.scenes: list[Scene] = held_out_scenes(captions)
        self.texts = [caption(s) for s in self.scenes]
        self.judge: Judge = load_judge(judge_file).to(device)
        self.pipe: Any = load_pipeline(folder, device)

    def draw(self) -> Tensor:
        return draw_captions(self.pipe, self.texts, steps=self.steps, batch=self.batch)

    def reference(self) -> tuple[Measured, Measured, Tensor, LayerProbe]:
        """(16-bit figures, chance level, its pictures, inputs and outputs of every linear it has)."""
        model = self.pipe.transformer
        names = [n for n, m in model.named_modules() if isinstance(m, nn.Linear)]
        with LayerProbe(model, names, self.steps * -(-len(self.texts) // self.batch)) as probe:
            images = self.draw()
        seen = read_images(self.judge, images)
        figures = verdict_figures(judge_images(seen, self.scenes)) | {"bytes": float(model_bytes(model))}
        return Measured(figures, {}), Measured(verdict_figures(chance(seen, self.scenes)), {}), images, probe

    def measure(self, method: Method, reference: Tensor, probe: LayerProbe) -> Measured:
        """A fresh 16-bit transformer, quantized by the method, drawn and judged."""
        self.pipe = load_pipeline(self.folder, self.device)
        model = self.pipe.transformer
        linears = sum(isinstance(m, nn.Linear) for m in model.modules())
        built = method.build(model)
        errors = probe.errors(model, built.layers)
        images = self.draw()
        figures = verdict_figures(judge_images(read_images(self.judge, images), self.scenes))
        ranked = sorted(errors, key=lambda name: errors[name])
        figures |= {
            "layer_l2_median": median(errors.values()),
            "layer_l2_p95": errors[ranked[int(0.95 * (len(ranked) - 1))]],
            "psnr_db": mean_psnr(images, reference),
            "ssim": mean_ssim(images, reference),
            "bytes": float(built.bytes),
        }
        more = {
            "title": method.title, "emulated": method.emulated, "layers": len(built.layers),
            "layers_planned": built.planned, "linears": linears, "worst_layer": ranked[-1],
            "worst_layer_l2": errors[ranked[-1]],
        }  # fmt: skip
        return Measured(figures, more, errors)


def verdict_figures(verdict: Verdict) -> dict[str, float]:
    return {
        "caption_accuracy": verdict.all, "object": verdict.object, "color": verdict.color, "relation": verdict.relation,
    }  # fmt: skip


def mean_psnr(images: Tensor, reference: Tensor) -> float:
    """(B, 3, H, W) in 0..1 -> mean over pictures of each one's PSNR in dB, equal pictures at EQUAL_DB."""
    value = peak_signal_noise_ratio(images, reference, data_range=1.0, reduction="none", dim=(1, 2, 3))
    return float(value.clamp_max(EQUAL_DB).mean())


def mean_ssim(images: Tensor, reference: Tensor) -> float:
    """(B, 3, H, W) in 0..1 -> mean SSIM."""
    parts = zip(images.split(50), reference.split(50), strict=True)
    values = [structural_similarity_index_measure(a, b, data_range=1.0, reduction="none") for a, b in parts]
    return float(torch.cat([v for v in values if isinstance(v, Tensor)]).mean())


def run(suite: Suite, writer: Writer, methods: Sequence[Method], say: Callable[[str], None]) -> None:
    """Measure the 16-bit pipeline and every method; write all rows at the end, each beside the baseline of this run."""
    bf16, by_chance, reference, probe = suite.reference()
    say("bf16: " + describe(bf16))
    found = {"bf16": bf16, "chance": by_chance}
    for method in methods:
        found[method.name] = suite.measure(method, reference, probe)
        say(f"{method.name}: {describe(found[method.name])}")
    base = found[BASELINE].figures
    shape = {"model": suite.folder.name, "steps": suite.steps, "prompts": len(suite.texts)}
    for name, measured in found.items():
        for case, value in measured.figures.items():
            more = measured.more | ({"layer_l2": measured.layer_l2} if case == "layer_l2_median" else {})
            writer.write(f"{name}/{case}", shape, value, base[case], CASES[case], BASELINE, device=suite.device, **more)


def describe(measured: Measured) -> str:
    return ", ".join(f"{k} {v:.4g}" for k, v in measured.figures.items())


def select(names: Sequence[str]) -> list[Method]:
    """Methods by name, the baseline always among them; an unknown name is refused."""
    known = {m.name: m for m in METHODS}
    if unknown := [n for n in names if n not in known]:
        raise ValueError(f"quality: unknown method {unknown[0]!r}; use some of {', '.join(known)}")
    return [m for m in METHODS if not names or m.name in names or m.name == BASELINE]
