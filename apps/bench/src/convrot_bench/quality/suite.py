"""Draws a subject's prompts in 16 bits and under each method, and measures pictures and layers.

Several processes (torchrun, accelerate) each draw their share of the prompts; figures are of all pictures together.
"""

import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from torch import Tensor, nn

from convrot_bench.methods import Built, Method
from convrot_bench.quality.calibration import calibration_inputs
from convrot_bench.quality.metrics import Batch, Metrics
from convrot_bench.quality.pictures import BF16, Store
from convrot_bench.quality.subjects import Subject
from convrot_quant.patch import model_bytes
from convrot_quant.probe import LayerProbe
from mini_flux.evaluate import chance, read_images
from mini_flux.judge import Verdict, judge_images

CHANCE = "chance"


@dataclass
class Measured:
    """One method's figures by case at one step count, and what else its rows say."""

    figures: dict[str, float]
    more: dict[str, Any]
    layer_l2: dict[str, float] = field(default_factory=dict)


class Suite:
    """reference() first, then measure() for each method: {steps: figures}."""

    def __init__(
        self, subject: Subject, metrics: Metrics, store: Store, steps: Sequence[int], batch: int, state: PartialState
    ) -> None:
        self.subject, self.metrics, self.store = subject, metrics, store
        self.steps, self.batch, self.state = tuple(steps), batch, state
        numbers = list(range(len(subject.prompts)))
        if len(numbers) < state.num_processes:
            raise ValueError(f"quality: {len(numbers)} prompts for {state.num_processes} processes; use fewer processes")
        with state.split_between_processes(numbers) as mine:
            self.mine: list[int] = mine
        self._probes: dict[int, LayerProbe] = {}
        self._inputs: dict[str, Tensor] | None = None

    def reference(self, *, calibrate: bool) -> dict[str, dict[int, Measured]]:
        """The 16-bit model's figures and, with a judge, the level of chance; keeps pictures and inputs of layers.

        `calibrate`: also keep inputs for methods that need them.
        """
        model = self.subject.pipe.transformer
        names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
        some = self.mine[: self.batch]
        found: dict[str, dict[int, Measured]] = defaultdict(dict)
        for steps in self.steps:
            with LayerProbe(model, names, steps) as self._probes[steps]:
                self._draw(some, steps)
            figures, seen = self._picture_figures(BF16, steps)
            figures["bytes"] = float(model_bytes(model))
            found[BF16][steps] = Measured(figures, {"title": "BF16", "multiplied": "16 x 16, floating point"})
            if seen is not None:
                figures.update(verdict_figures(judge_images(seen, self.subject.scenes)))
                found[CHANCE][steps] = Measured(verdict_figures(chance(seen, self.subject.scenes)), {"title": CHANCE})
        if calibrate:
            self._inputs = calibration_inputs(self.subject, max(self.steps), self.batch)
        return dict(found)

    def measure(self, method: Method) -> dict[int, Measured]:
        """A fresh 16-bit transformer, quantized by the method, drawn and measured at every step count."""
        self.subject.pipe.register_modules(transformer=None)  # so that there is room for the next one
        model = self.subject.fresh()
        linears = sum(isinstance(m, nn.Linear) for m in model.modules())
        started = time.perf_counter()
        built = build(method, model, self._inputs)
        more = {
            "title": method.title, "emulated": method.emulated, "layers": len(built.layers),
            "layers_planned": built.planned, "linears": linears, "build_s": round(time.perf_counter() - started, 2),
        }  # fmt: skip
        self.subject.pipe.register_modules(transformer=model)
        return {steps: self._measure_at(method.name, built, steps, more) for steps in self.steps}

    def _measure_at(self, name: str, built: Built, steps: int, more: dict[str, Any]) -> Measured:
        errors = self._layer_errors(steps, built.layers)
        figures, seen = self._picture_figures(name, steps)
        if seen is not None:
            figures |= verdict_figures(judge_images(seen, self.subject.scenes))
        figures |= error_figures(errors) | {"bytes": float(built.bytes)}
        worst = max(errors, key=lambda layer: errors[layer])
        return Measured(figures, more | {"worst_layer": worst, "worst_layer_l2": errors[worst]}, errors)

    def _layer_errors(self, steps: int, names: Sequence[str]) -> dict[str, float]:
        """Mean over processes, each of which has kept inputs from pictures of its own."""
        every = gather_object([self._probes[steps].errors(self.subject.pipe.transformer, names)])
        return {name: sum(errors[name] for errors in every) / len(every) for name in every[0]}

    def _picture_figures(self, name: str, steps: int) -> tuple[dict[str, float], Tensor | None]:
        """(figures over all pictures, what the judge reads in each picture, or None without a judge)."""
        paired, judge = name != BF16, self.subject.judge
        self.metrics.reset()
        read = []
        for indices, images in self._pictures(name, steps):
            kept = self.store.load(BF16, steps, indices)
            reference = torch.stack([kept[i] for i in indices]).to(images.device)
            self.metrics.update(Batch(images, reference, [self.subject.prompts[i] for i in indices]), paired=paired)
            if judge is not None:
                read.append(read_images(judge, images.float() / 255))
        seen = None if judge is None else torch.cat(gather_object([torch.cat(read)]))
        return self.metrics.compute(paired=paired), seen

    def _pictures(self, name: str, steps: int) -> Iterator[tuple[list[int], Tensor]]:
        """This process's pictures, a batch at a time: uint8 (B, 3, H, W); those that are kept are not drawn again."""
        for start in range(0, len(self.mine), self.batch):
            indices = self.mine[start : start + self.batch]
            kept = self.store.load(name, steps, indices)
            missing = [i for i in indices if i not in kept]
            if missing:
                for i, image in zip(missing, self._draw(missing, steps), strict=True):
                    self.store.save(name, steps, i, image)
                    kept[i] = image
            yield indices, torch.stack([kept[i].to(self.state.device) for i in indices])

    def _draw(self, indices: Sequence[int], steps: int) -> Tensor:
        prompts, seeds = self.subject.prompts, self.subject.seeds
        return self.subject.draw([prompts[i] for i in indices], [seeds[i] for i in indices], steps)


def build(method: Method, model: nn.Module, inputs: dict[str, Tensor] | None) -> Built:
    """Quantize the model in place."""
    if not method.needs_inputs:
        return method.build(model)
    assert inputs is not None, "reference() kept them: the run asked for it"
    return method.build(model, inputs)


def error_figures(errors: dict[str, float]) -> dict[str, float]:
    """{layer: relative L2} -> its median, 95th percentile and maximum."""
    ordered = sorted(errors.values())
    return {
        "layer_l2_median": median(ordered),
        "layer_l2_p95": ordered[int(0.95 * (len(ordered) - 1))],
        "layer_l2_worst": ordered[-1],
    }


def verdict_figures(verdict: Verdict) -> dict[str, float]:
    """The judge's shares, by case."""
    return {
        "caption_accuracy": verdict.all, "object": verdict.object, "color": verdict.color, "relation": verdict.relation,
    }  # fmt: skip
