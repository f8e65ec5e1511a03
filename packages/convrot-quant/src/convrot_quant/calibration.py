"""Calibration: rows of what each layer reads while the 16-bit model runs, for a rounding that looks at them (gptq.py).

Nothing needs it: without one, a model is quantized by its weights alone.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from convrot_quant.config import Scheme
from convrot_quant.plans import LayerPlan, Plan

ROWS = 2048  # of each layer: 6 GB in all for FLUX.1-dev, and about as many as its rows are long
NOT_CALIBRATED = (
    "weight_rounding='gptq' needs rows that the layer reads; quantize with a calibration (--calibrate PROMPTS), or use "
    "weight_rounding='balanced'"
)
LEAST_ROWS = 256  # below that (a modulation layer has a row a step) a layer is rounded without


class Calibration:
    """Use as a context around runs of the 16-bit model, then give it to quantize_ or apply.

    `names`: the layers to look at, all linears by default. `calls`: how often the model will run; `rows` are spread
    evenly over calls and tokens. They lie on the CPU, once for layers that read the same tensor.
    """

    def __init__(self, model: nn.Module, names: Iterable[str] | None = None, *, calls: int, rows: int = ROWS) -> None:
        if calls < 1 or rows < 1:
            raise ValueError(f"Calibration: calls and rows must be 1 or more; got calls={calls}, rows={rows}")
        if names is None:
            names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
        self._layers = {name: model.get_submodule(name) for name in names}
        self._each = -(-rows // calls)
        self._kept: Mapping[str, Sequence[Tensor]] = defaultdict(list)
        self._last: tuple[Tensor, Tensor] | None = None
        self._hooks: list[Any] = []

    @classmethod
    def of(cls, inputs: Mapping[str, Tensor]) -> Calibration:
        """{layer: (C, K)} that were captured elsewhere."""
        made = cls(nn.Module(), (), calls=1)
        made._kept = {name: [rows] for name, rows in inputs.items()}
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
            if self._last is None or self._last[0] is not arguments[0]:
                self._last = arguments[0], self._some(arguments[0])
            self._kept[name].append(self._last[1])  # type: ignore[attr-defined]  # a list, while it records

        return keep

    def _some(self, x: Tensor) -> Tensor:
        rows = x.detach().flatten(0, -2)
        return rows[:: max(1, len(rows) // self._each)][: self._each].to("cpu", copy=True)

    def __contains__(self, name: object) -> bool:
        """Whether a layer ran."""
        return bool(self._kept.get(name))  # type: ignore[call-overload]

    def inputs(self, name: str) -> Tensor | None:
        """(C, K) of a layer on the CPU, rows with inf or NaN left out; None for one that did not run."""
        kept = self._kept.get(name)
        if not kept:
            return None
        rows = torch.cat(list(kept))
        return rows[rows.isfinite().all(dim=1)]

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


def inputs_of(calibration: Calibration | None, name: str, scheme: Scheme) -> Tensor | None:
    """What quantize_weight wants to know of a layer."""
    return None if calibration is None or scheme.weight_rounding != "gptq" else calibration.inputs(name)
