"""Inputs of the linears while the 16-bit model draws tuning captions: what methods that calibrate are given."""

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from convrot_bench.quality.subjects import TUNING_SEEDS, Subject

PROMPTS = 20
MOST_ROWS = 4096  # of each layer; a Hessian of K=3072 wants more rows than columns


class InputRows:
    """A context around runs of a model: rows of each named layer's inputs, spread evenly over calls and tokens."""

    def __init__(self, model: nn.Module, names: Iterable[str], calls: int, most: int = MOST_ROWS) -> None:
        self._layers = {name: model.get_submodule(name) for name in names}
        self._each = -(-most // max(calls, 1))
        self._rows: dict[str, list[Tensor]] = defaultdict(list)
        self._hooks: list[Any] = []

    def __enter__(self) -> "InputRows":
        for name, layer in self._layers.items():
            self._hooks.append(layer.register_forward_pre_hook(self._keep(name)))
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        self._layers.clear()

    def _keep(self, name: str) -> Any:
        def keep(_layer: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            rows = arguments[0].detach().flatten(0, -2)
            step = max(1, len(rows) // self._each)
            self._rows[name].append(rows[::step][: self._each].to("cpu", copy=True))

        return keep

    def inputs(self) -> dict[str, Tensor]:
        """{layer: (rows, K) on the CPU} of the layers that ran."""
        return {name: torch.cat(rows) for name, rows in self._rows.items()}


def calibration_inputs(subject: Subject, steps: int, batch: int) -> dict[str, Tensor]:
    """{linear: (rows, K) on the CPU}, captured while the pipe's 16-bit transformer draws the calibration prompts."""
    prompts = list(subject.calibration)
    if not prompts:
        raise ValueError(
            "quality: a method needs inputs of the layers; give --calibration FILE, prompts that are not measured"
        )
    model = subject.pipe.transformer
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    with InputRows(model, names, steps * -(-len(prompts) // batch)) as rows:
        for start in range(0, len(prompts), batch):
            some = prompts[start : start + batch]
            subject.draw(some, [i % TUNING_SEEDS for i in range(start, start + len(some))], steps)
    return rows.inputs()
