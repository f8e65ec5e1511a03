"""Inputs of the linears while the 16-bit model draws tuning captions: what methods that calibrate are given."""

from torch import Tensor, nn

from convrot_bench.quality.subjects import TUNING_SEEDS, Subject
from convrot_quant import Calibration

PROMPTS = 20
MOST_ROWS = 4096  # of each layer; a Hessian of K=3072 wants more rows than columns


def calibration_inputs(subject: Subject, steps: int, batch: int) -> dict[str, Tensor]:
    """{linear: (rows, K) on the CPU}, captured while the pipe's 16-bit transformer draws the calibration prompts."""
    prompts = list(subject.calibration)
    if not prompts:
        raise ValueError(
            "quality: a method needs inputs of the layers; give --calibration FILE, prompts that are not measured"
        )
    model = subject.pipe.transformer
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    with Calibration(model, names, calls=steps * -(-len(prompts) // batch), rows=MOST_ROWS) as seen:
        for start in range(0, len(prompts), batch):
            some = prompts[start : start + batch]
            subject.draw(some, [i % TUNING_SEEDS for i in range(start, start + len(some))], steps)
    found = {name: seen.inputs(name) for name in names}
    return {name: rows for name, rows in found.items() if rows is not None}
