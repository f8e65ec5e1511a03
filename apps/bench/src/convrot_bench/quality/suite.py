"""Draws a subject's prompts in 16 bits and under each method, and measures pictures and layers.

Several processes (torchrun, accelerate) each draw their share of the prompts; figures are of all pictures together.
`mine` are the numbers of this process's prompts, from replicas.share().
"""

import gc
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor, nn

from convrot_bench.bench import ERRORS
from convrot_bench.quality.calibration import calibration_inputs
from convrot_bench.quality.errors import error_figures, layer_errors, probe_layers
from convrot_bench.quality.methods import Built, Method
from convrot_bench.quality.metrics import Batch, Metrics, unit
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
        self, subject: Subject, metrics: Metrics, store: Store, steps: Sequence[int], batch: int, mine: Sequence[int]
    ) -> None:
        self.subject, self.metrics, self.store = subject, metrics, store
        self.steps, self.batch, self.mine = tuple(steps), batch, list(mine)
        self._probes: dict[int, LayerProbe] = {}
        self._inputs: dict[str, Tensor] | None = None

    def reference(self, *, calibrate: bool) -> dict[str, dict[int, Measured]]:
        """The 16-bit model's figures and, with a judge, the level of chance; keeps pictures and inputs of layers.

        `calibrate`: also keep inputs for methods that need them.
        """
        model = self.subject.pipe.transformer
        found: dict[str, dict[int, Measured]] = defaultdict(dict)
        for steps in self.steps:
            self._probes[steps] = probe_layers(self.subject, self.mine, steps)
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
        gc.collect()
        torch.cuda.empty_cache()
        with self._together():
            model = self.subject.fresh()
            linears = sum(isinstance(m, nn.Linear) for m in model.modules())
            started = time.perf_counter()
            built = method.build(model, self._inputs if method.needs_inputs else None)
            self.subject.pipe.register_modules(transformer=model)
        more = {
            "title": method.title, "emulated": method.emulated, "layers": len(built.layers),
            "layers_planned": built.planned, "linears": linears,
            "multiplied": built.multiplied, "build_s": round(time.perf_counter() - started, 2),
        }  # fmt: skip
        return {steps: self._measure_at(method.name, built, steps, more) for steps in self.steps}

    @contextmanager
    def _together(self) -> Iterator[None]:
        """Work of each process by itself: what fails in one fails in all, so that none waits for it forever."""
        said = ""
        try:
            yield
        except ERRORS as error:
            said = f"{type(error).__name__}: {error}"
        if failed := [other for other in gather_object([said]) if other]:
            raise RuntimeError(failed[0])

    def _measure_at(self, name: str, built: Built, steps: int, more: dict[str, Any]) -> Measured:
        started = time.perf_counter()
        errors = self._layer_errors(steps, built.layers)
        figures, seen = self._picture_figures(name, steps)
        if seen is not None:
            figures |= verdict_figures(judge_images(seen, self.subject.scenes))
        figures |= error_figures(errors) | {"bytes": float(built.bytes)}
        worst = max(errors, key=lambda layer: errors[layer])
        facts = {"worst_layer": worst, "worst_layer_l2": errors[worst]}
        return Measured(figures, more | facts | {"measure_s": round(time.perf_counter() - started, 2)}, errors)

    def _layer_errors(self, steps: int, names: Sequence[str]) -> dict[str, float]:
        """Mean over processes, each of which has kept inputs from pictures of its own."""
        with self._together():
            mine = layer_errors(self._probes[steps], self.subject.pipe.transformer, names, self.subject.device)
        every = gather_object([mine])
        return {name: sum(errors[name] for errors in every) / len(every) for name in every[0]}

    def _picture_figures(self, name: str, steps: int) -> tuple[dict[str, float], Tensor | None]:
        """(figures over all pictures, what the judge reads in each picture, or None without a judge)."""
        paired, judge = name != BF16, self.subject.judge
        self.metrics.reset()
        read = []
        with self._together():
            for indices, images in self._pictures(name, steps):
                kept = self.store.load(BF16, steps, indices)
                reference = torch.stack([kept[i] for i in indices]).to(images.device)
                self.metrics.update(Batch(images, reference, [self.subject.prompts[i] for i in indices]), paired=paired)
                if judge is not None:
                    read.append(read_images(judge, unit(images)))
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
            yield indices, torch.stack([kept[i].to(self.subject.device) for i in indices])

    def _draw(self, indices: Sequence[int], steps: int) -> Tensor:
        prompts, seeds = self.subject.prompts, self.subject.seeds
        return self.subject.draw([prompts[i] for i in indices], [seeds[i] for i in indices], steps)


def verdict_figures(verdict: Verdict) -> dict[str, float]:
    """The judge's shares, by case."""
    return {
        "caption_accuracy": verdict.all, "object": verdict.object, "color": verdict.color, "relation": verdict.relation,
    }  # fmt: skip
