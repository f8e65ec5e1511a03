"""LayerProbe: keeps rows of each layer's inputs and outputs while the 16-bit model runs, to measure quantized ones.

Quantization is per row, so a few rows of a few calls measure a layer exactly as all rows would, up to sampling.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

CALLS = 4  # spread evenly over the run, so that early and late steps count alike
ROWS = 16  # per call, spread evenly over the tokens
APART = 3  # calls, where there are as many: copying rows out waits for the GPU, and most steps are to keep their time


class LayerProbe:
    """Use as a context around runs of the 16-bit model, then ask errors(model) of the quantized one."""

    def __init__(self, model: nn.Module, names: Iterable[str], expected_calls: int) -> None:
        self.inputs: dict[str, list[Tensor]] = defaultdict(list)
        self.outputs: dict[str, list[Tensor]] = defaultdict(list)
        self._model, self._names = model, tuple(names)
        self._stride = max(1, min(max(APART, expected_calls // CALLS), expected_calls))
        self._seen: dict[str, int] = defaultdict(int)
        self._hooks: list[Any] = []

    def __enter__(self) -> LayerProbe:
        for name in self._names:
            layer = self._model.get_submodule(name)
            self._hooks.append(layer.register_forward_hook(self._hook(name)))
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()
        del self._model  # so that the 16-bit weights can go before the quantized model comes
        self._hooks.clear()

    def _hook(self, name: str) -> Any:
        def keep(_layer: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> None:
            call = self._seen[name]
            self._seen[name] += 1
            if call % self._stride == (self._stride - 1) // 2 and len(self.inputs[name]) < CALLS:
                self.inputs[name].append(some_rows(arguments[0], ROWS))
                self.outputs[name].append(some_rows(output, ROWS))

        return keep

    @torch.no_grad()
    def errors(self, model: nn.Module, names: Iterable[str]) -> dict[str, float]:
        """{layer: |y_quantized - y_16bit| / |y_16bit|} (L2 over the kept rows, fp32) for layers that ran."""
        return {name: self.error(name, model.get_submodule(name)) for name in names if self.inputs[name]}

    @torch.no_grad()
    def error(self, name: str, layer: nn.Module, columns: slice = slice(None)) -> float:
        """The same for one layer that ran; `layer` stands in for it, or for these columns of its output."""
        x, wanted = torch.cat(self.inputs[name]), torch.cat(self.outputs[name])[:, columns].float()
        actual = layer(x.to(next(layer.parameters()).device)).float().cpu()
        return float((actual - wanted).norm() / wanted.norm().clamp_min(1e-30))


def some_rows(x: Tensor, most: int) -> Tensor:
    """(..., K) -> at most `most` rows (R, K), spread evenly, copied to the CPU."""
    rows = x.detach().flatten(0, -2)
    step = max(1, rows.shape[0] // most)
    return rows[::step][:most].to("cpu", copy=True)
