"""Errors of methods on synthetic layers at FLUX's shapes, and Figure 3's amplitudes; rows in the results' format."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from convrot_bench.quality import outliers
from convrot_bench.quality.levers import Layer
from convrot_bench.quality.methods import BASELINE, METHODS, Method, cost, multiplied
from convrot_bench.quality.roles import kind_of
from convrot_bench.quality.suite import error_figures
from convrot_bench.quality.synthetic import CASES, REPORT_SEEDS, TOKENS, TUNING_SEEDS, Case, Sample, make
from convrot_bench.results import Writer
from convrot_kernels import transforms
from convrot_quant import QuantConfig
from convrot_quant.rules import Linear, choose

MODEL = "synthetic"
PEEL_GROUP = 256
SEEDS = {"report": REPORT_SEEDS, "tuning": TUNING_SEEDS}


@dataclass(frozen=True)
class Found:
    """One layer of one seed: its error over all outputs, the median over tokens, what it stores and multiplies."""

    relative_l2: float
    token_l2: float
    bytes: int
    macs: dict[str, int]


@torch.no_grad()
def measure(method: Method, case: Case, sample: Sample, device: str) -> Found | None:
    """The method's layer on the sample in bf16, against the product of the same bf16 values in fp32.

    None where the method leaves the layer in 16 bits.
    """
    linear = _linear(sample.weight.bfloat16().to(device))
    x = sample.x.bfloat16().to(device)
    layer = _layer(method, case, sample, linear)
    made = None if layer is None else method.make(layer)
    if made is None:
        return None
    wanted = x.float() @ linear.weight.float().t()
    wrong = made(x).float() - wanted
    per_token = wrong.norm(dim=1) / wanted.norm(dim=1).clamp_min(1e-30)
    spent = cost(made)
    whole = float(wrong.norm() / wanted.norm())
    return Found(whole, float(per_token.median()), spent.bytes, spent.macs)


def _linear(weight: Tensor) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    return linear


def _layer(method: Method, case: Case, sample: Sample, linear: nn.Linear) -> Layer | None:
    """The layer under the scheme that the method's preset has for the FLUX layer that the case stands for."""
    name = layer_name(case)
    described = Linear(name, linear, name, in_block=True, tied_to="")
    scheme, _ = choose(described, QuantConfig.preset(method.preset), "FluxTransformer2DModel")
    if scheme is None:
        return None
    calibration = sample.calibration.bfloat16().to(linear.weight.device) if method.needs_inputs else None
    shift = sample.shift
    return Layer(linear, scheme, kind_of(name), sample.split, None if shift is None else lambda: shift, calibration)


def layer_name(case: Case) -> str:
    """A FLUX layer of the case's kind: the first that it stands for, in block 0."""
    return case.stands_for.split(",")[0].replace("*", "0")


def run(
    writer: Writer, device: str, say: Callable[[str], None], *, methods: Sequence[Method] = METHODS,
    split: str = "report", cases: Sequence[Case] = CASES, tokens: int = TOKENS, outputs: int | None = None,
) -> None:  # fmt: skip
    """Rows `method/layer_l2_median` and so on over the cases, each case's error being the mean over the split's seeds.

    `outputs`: fewer than a layer's outputs, for a look on a CPU. Branches of low rank then seem better than they are.
    """
    if split not in SEEDS:
        raise ValueError(f"quality: unknown split {split!r}; use one of {', '.join(SEEDS)}")
    # a planner has a whole model to divide its bytes over, and attention is no layer
    methods = [m for m in methods if m.decide is None and not m.fp8_attention]
    found: dict[str, dict[str, list[Found]]] = {m.name: {} for m in methods}
    for case in cases:
        for seed in SEEDS[split]:
            sample = make(case, seed, tokens, outputs)
            for method in methods:
                if (one := measure(method, case, sample, device)) is not None:
                    found[method.name].setdefault(case.name, []).append(one)
        say(f"{case.name}: " + ", ".join(f"{n} {_mean(f[case.name]):.4f}" for n, f in found.items() if case.name in f))
    shape = {"model": MODEL, "split": split, "layers": len(cases), "seeds": len(SEEDS[split]), "tokens": tokens}
    base = figures(found[BASELINE])
    for method in methods:
        for name, value in figures(found[method.name]).items():
            more = _more(method, found[method.name], len(cases)) | {"device": device}
            if name == "layer_l2_median":
                more["layer_l2"] = {case: _mean(each) for case, each in found[method.name].items()}
                more |= {"figure_3": figure_3()} if method.name == BASELINE else {}
            unit = "bytes" if name == "bytes" else "relative_l2"
            writer.write(
                f"{method.name}/{name}", shape | {"outputs": outputs or 0}, value, base[name], unit, BASELINE, **more
            )


def _mean(found: Sequence[Found], figure: str = "relative_l2") -> float:
    return sum(getattr(f, figure) for f in found) / len(found)


def figures(by_case: Mapping[str, Sequence[Found]]) -> dict[str, float]:
    """{case: a result a seed} -> errors over cases (of all outputs; `token`: of the median token) and stored bytes."""
    if not by_case:
        return {}
    token = [_mean(found, "token_l2") for found in by_case.values()]
    size = sum(found[0].bytes for found in by_case.values())
    whole = {name: _mean(found) for name, found in by_case.items()}
    return error_figures(whole) | {"token_l2_median": median(token), "bytes": float(size)}


def _more(method: Method, by_case: Mapping[str, Sequence[Found]], cases: int) -> dict[str, Any]:
    macs: Counter[str] = Counter()
    for found in by_case.values():
        macs.update(found[0].macs)
    worst = max(by_case, key=lambda name: _mean(by_case[name]))
    return {
        "title": method.title, "emulated": method.emulated, "layers": len(by_case), "layers_planned": cases,
        "multiplied": multiplied(macs), "worst_layer": worst, "worst_layer_l2": _mean(by_case[worst]),
    }  # fmt: skip


def figure_3(seed: int = REPORT_SEEDS[0], tokens: int = TOKENS) -> dict[str, dict[str, float]]:
    """{matrix: outliers.describe} of a synthetic proj_out's inputs: as they are, rotated, and with group means out."""
    case = next(c for c in CASES if c.kind == "proj_out" and c.weights == "heavy_tailed")
    x = make(case, seed, tokens, outputs=1).x
    means = x.unflatten(-1, (-1, PEEL_GROUP)).mean(-1).repeat_interleave(PEEL_GROUP, dim=-1)
    rotate = transforms.apply_blockwise
    return {
        "original": outliers.describe(x),
        "Sylvester-256": outliers.describe(rotate(x, transforms.sylvester(256))),
        "signed Sylvester-256": outliers.describe(rotate(x, transforms.sylvester(256, signs=0))),
        "regular-256": outliers.describe(rotate(x, transforms.regular(256))),
        "regular-256, DC peeled": outliers.describe(rotate(x - means, transforms.regular(256))),
    }
