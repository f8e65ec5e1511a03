"""Calibration: rows of what each layer reads while the 16-bit model runs, for a rounding that looks at them (gptq.py).

Nothing needs it: without one, a model is quantized by its weights alone.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from convrot_quant.config import Scheme
from convrot_quant.plans import LayerPlan, Plan
from convrot_quant.probe import some_rows

ROWS = 2048  # of each layer: by their sizes 6 GB in all for FLUX.1-dev
NOT_CALIBRATED = (
    "weight_rounding='gptq' needs rows that the layer reads; quantize with a calibration (--calibrate PROMPTS), or use "
    "weight_rounding='balanced'"
)
LEAST_ROWS = 256  # below that (a modulation layer has a row a step) a layer is rounded without


class Calibration:
    """Use as a context around runs of the 16-bit model, then give it to quantize_ or apply.

    `names`: the layers to look at, all linears by default. `calls`: how often the model will run; `rows` are spread
    evenly over calls and tokens. They lie on the CPU, once for layers that read the same tensor; rows with inf or NaN
    are left out.
    """

    def __init__(self, model: nn.Module, names: Iterable[str] | None = None, *, calls: int, rows: int = ROWS) -> None:
        if calls < 1 or rows < 1:
            raise ValueError(f"Calibration: calls and rows must be 1 or more; got calls={calls}, rows={rows}")
        if names is None:
            names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
        self._layers = {name: model.get_submodule(name) for name in names}
        self._each = -(-rows // calls)
        self._kept: dict[str, list[Tensor]] = defaultdict(list)
        self._last: tuple[Tensor, int, Tensor] | None = None
        self._hooks: list[Any] = []

    @classmethod
    def of(cls, inputs: Mapping[str, Tensor]) -> Calibration:
        """{layer: (C, K)} that were captured elsewhere."""
        made = cls(nn.Module(), (), calls=1)
        made._kept = {name: [_finite(rows)] for name, rows in inputs.items()}
        return made

    def __enter__(self) -> Calibration:
        for name, layer in self._layers.items():
            self._hooks.append(layer.register_forward_pre_hook(self._keep(name)))
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        self._layers.clear()  # so that the 16-bit weights can go before the quantized ones come
        self._last = None

    def _keep(self, name: str) -> Any:
        def keep(_layer: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            self._kept[name].append(self._rows(arguments[0]))

        return keep

    def _rows(self, x: Tensor) -> Tensor:
        """(..., K) -> some of its rows; those kept last if that was the same tensor, and nothing was written to it."""
        if x.is_inference():  # has no count of what was written
            return _finite(some_rows(x, self._each))
        if self._last is None or self._last[0] is not x or self._last[1] != x._version:
            self._last = x, x._version, _finite(some_rows(x, self._each))
        return self._last[2]

    def inputs(self, name: str) -> Tensor | None:
        """(C, K) of a layer on the CPU; None for one that did not run."""
        kept = self._kept.get(name)
        return torch.cat(kept) if kept else None

    def cannot_round(self, name: str, in_features: int) -> str:
        """Why the rows of this layer are none to round it by, or ""."""
        kept = self._kept.get(name, [])
        if not sum(map(len, kept)):
            return NOT_CALIBRATED
        other = next((rows.shape[1] for rows in kept if rows.shape[1] != in_features), None)
        return "" if other is None else f"its calibration has rows of {other} values, and K={in_features}"

    def rounded(self, schemes: Mapping[str, Scheme]) -> dict[str, Scheme]:
        """The schemes, "gptq" where 4-bit weights are to be rounded and enough rows were seen."""
        return {name: self._rounded(name, scheme) for name, scheme in schemes.items()}

    def plan(self, decided: Plan) -> Plan:
        """The same of a plan, whose notes say so."""
        layers = [self._planned(layer) for layer in decided.layers]
        return Plan(layers, decided.config, decided.model_class, decided.other_bytes)

    def _planned(self, layer: LayerPlan) -> LayerPlan:
        scheme = None if layer.scheme is None else self._rounded(layer.name, layer.scheme)
        if scheme == layer.scheme:
            return layer
        return replace(layer, scheme=scheme, note="; ".join(filter(None, (layer.note, "calibrated"))))

    def _rounded(self, name: str, scheme: Scheme) -> Scheme:
        seen = sum(map(len, self._kept.get(name, ())))
        return replace(scheme, weight_rounding="gptq") if scheme.weight_bits == 4 and seen >= LEAST_ROWS else scheme


def _finite(rows: Tensor) -> Tensor:
    """(C, K) -> the rows without inf and NaN."""
    return rows[rows.isfinite().all(dim=1)]


def inputs_of(calibration: Calibration | None, name: str, scheme: Scheme) -> Tensor | None:
    """What quantize_weight wants to know of a layer."""
    return None if calibration is None or scheme.weight_rounding != "gptq" else calibration.inputs(name)
