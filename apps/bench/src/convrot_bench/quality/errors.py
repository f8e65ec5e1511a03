"""Errors of layers: inputs and outputs kept while the 16-bit model draws, then the same inputs into quantized layers.

A picture is drawn at a time, so that the rows of one call share one timestep and one AdaLN shift. Levers that take the
shift out learn it from the modulation layers, which are therefore run first in each call, as they are in the model.
"""

from collections.abc import Iterable, Sequence
from statistics import median

import torch
from torch import Tensor, nn

from convrot_bench.quality.roles import kind_of
from convrot_bench.quality.subjects import Subject
from convrot_quant.probe import LayerProbe

PICTURES = 3  # no divisor of the probe's four calls, so that these fall on early and late steps


def probe_layers(subject: Subject, numbers: Sequence[int], steps: int) -> LayerProbe:
    """Rows of every linear's inputs and outputs while the pipe's 16-bit transformer draws a few of these prompts."""
    model = subject.pipe.transformer
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    some = numbers[:PICTURES]
    with LayerProbe(model, names, steps * len(some)) as probe:
        for i in some:
            subject.draw([subject.prompts[i]], [subject.seeds[i]], steps)
    return probe


@torch.inference_mode()
def layer_errors(probe: LayerProbe, model: nn.Module, names: Iterable[str], device: torch.device) -> dict[str, float]:
    """{layer: |y_quantized - y_16bit| / |y_16bit|}, L2 over all kept rows, for layers that ran."""
    wanted = [name for name in names if probe.inputs.get(name)]
    modulations = [name for name in probe.inputs if kind_of(name) == "modulation"]
    order = dict.fromkeys([*modulations, *wanted])
    wrong, whole = dict.fromkeys(wanted, 0.0), dict.fromkeys(wanted, 0.0)
    for call in range(max((len(probe.inputs[name]) for name in wanted), default=0)):
        for name in order:
            if call < len(probe.inputs[name]):
                found = model.get_submodule(name)(probe.inputs[name][call].to(device))
                if name in wrong:
                    kept = probe.outputs[name][call].to(device).float()
                    wrong[name] += _squares(found.flatten(0, -2).float() - kept)
                    whole[name] += _squares(kept)
    return {name: (wrong[name] / max(whole[name], 1e-60)) ** 0.5 for name in wanted}


def _squares(x: Tensor) -> float:
    return float(x.double().square().sum())


def error_figures(errors: dict[str, float]) -> dict[str, float]:
    """{layer: relative L2} -> its median, 95th percentile and maximum."""
    ordered = sorted(errors.values())
    return {
        "layer_l2_median": median(ordered),
        "layer_l2_p95": ordered[int(0.95 * (len(ordered) - 1))],
        "layer_l2_worst": ordered[-1],
    }
