"""gemm_step: every linear of one FLUX.1-dev step as one CUDA graph a side, all weights distinct.

gemv_step: its modulations alone, as one product.
"""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from convrot_bench.bench import Bench
from convrot_bench.ops.gates import gate_product, gate_values
from convrot_bench.ops.linears import BASELINE, TIMING, coded, matmul, multiply, multiply_values
from convrot_bench.ops.problems import Source, Weight, prepared, under
from convrot_bench.results import Figure, gpu_clocks
from convrot_bench.shapes import FLUX_MODULATIONS, FLUX_STEP
from convrot_kernels import rotate_quantize, scaled_mm_cat, testing, use_backend

LEAD_IN = 0.8  # seconds: the power limit settles
WARM = 10  # steps before the clocks are read

Products = Sequence[tuple[int, int, int]]


class Step:
    """The tensors of both sides. Activations are shared by products of one (M, K), outputs are freed at once."""

    def __init__(self, bench: Bench, products: Products) -> None:
        source, self.backend = Source(bench.device), bench.backends[0]
        self.products = products
        extents = dict.fromkeys((m, k) for m, _, k in products)
        self.values = {extent: source.inputs(*extent) for extent in extents}
        self.codes = {extent: coded(x, self.backend) for extent, x in self.values.items() if extent[0] > 1}
        self.weights: list[Tensor] = []
        self.quantized: list[Weight] = []
        self.biases: list[Tensor] = []
        for _, n, k in products:
            self.weights.append(source.weight(n, k))
            with use_backend(self.backend):
                packed, scale = rotate_quantize(self.weights[-1], packed=True)
            self.quantized.append(prepared(packed, scale, self.backend))
            self.biases.append(source.vector(n))

    def check(self) -> None:
        """One product of every shape."""
        for (m, n, k), index in {mnk: i for i, mnk in enumerate(self.products)}.items():
            weight, bias = self.quantized[index], self.biases[index]
            assert len(weight.codes) == n, "weights stand in the order of the products"
            if m == 1:
                gate_values(self.backend, self.values[m, k], weight, bias)
            else:
                gate_product(self.backend, *self.codes[m, k], weight, bias)

    def ours(self) -> None:
        """scaled_mm with scales and bias: int8 codes, and 16-bit values where M is 1."""
        for (m, _, k), weight, bias in zip(self.products, self.quantized, self.biases, strict=True):
            if m == 1:
                multiply_values(self.values[m, k], weight, bias)
            else:
                multiply(*self.codes[m, k], weight, bias)

    def theirs(self) -> None:
        """torch.matmul in bf16, without bias."""
        for (m, _, k), weight in zip(self.products, self.weights, strict=True):
            matmul(self.values[m, k], weight)

    def joined(self) -> Tensor:
        """scaled_mm_cat: one x, every weight, side by side."""
        (x,) = self.values.values()
        codes, scales = [weight.codes for weight in self.quantized], [weight.scale for weight in self.quantized]
        return scaled_mm_cat(x, codes, None, scales, self.biases, b_layout=self.quantized[0].layout)

    def check_joined(self) -> None:
        """Bit for bit what one product after the other gives."""
        (x,) = self.values.values()
        alone = [multiply_values(x, weight, bias) for weight, bias in zip(self.quantized, self.biases, strict=True)]
        testing.assert_equal(self.joined(), torch.cat(alone, dim=-1))


def gemv_step(bench: Bench, products: Products = FLUX_MODULATIONS) -> Iterator[Figure]:
    """Microseconds of all modulations of a step in one product; `apart_us`: one after the other."""
    step = Step(bench, products)
    if not bench.passes(step.check) or not bench.passes(under(step.backend, bench.device, step.check_joined)):
        return
    contenders = {
        step.backend: (under(step.backend, bench.device, step.joined), [()]),
        "apart": (under(step.backend, bench.device, step.ours), [()]),
        BASELINE: (step.theirs, [()]),
    }
    seconds = testing.time_graphs(contenders)
    moved = sum(testing.gemm_bytes(*product, a_bits=16) for product in products)
    more = bench.facts(step.backend) | {
        "timing": TIMING,
        "gb_s": moved / seconds[step.backend] / 1e9,
        "apart_us": seconds["apart"] * 1e6,
    }
    shape = {"model": "FLUX.1-dev", "products": len(products)}
    figures = seconds[step.backend] * 1e6, seconds[BASELINE] * 1e6
    yield Figure("gemv_step", shape, *figures, "us", "torch.matmul bf16", more)


def gemm_step(bench: Bench, products: Products = FLUX_STEP) -> Iterator[Figure]:
    """Milliseconds of all products of a step."""
    step = Step(bench, products)
    if not bench.passes(step.check):
        return
    ours = under(step.backend, bench.device, step.ours)
    seconds = testing.time_graphs({step.backend: (ours, [()]), BASELINE: (step.theirs, [()])}, seconds=LEAD_IN)
    operations = sum(testing.gemm_operations(*product) for product in products)
    more = bench.facts(step.backend) | {
        "timing": TIMING,
        "tops": operations / seconds[step.backend] / 1e12,
        "baseline_tops": operations / seconds[BASELINE] / 1e12,
        "operations": operations,
        "weight_bytes": sum(w.codes.nbytes + w.scale.nbytes for w in step.quantized),
        "baseline_weight_bytes": sum(w.nbytes for w in step.weights),
    }
    if torch.device(bench.device).type == "cuda":
        more |= {"clocks_ours": clocks_under(ours), "clocks_baseline": clocks_under(step.theirs)}
    shape = {"model": "FLUX.1-dev", "products": len(products)}
    figures = seconds[step.backend] * 1e3, seconds[BASELINE] * 1e3
    yield Figure("gemm_step", shape, *figures, "ms", "torch.matmul bf16", more)


def clocks_under(function: Callable[[], None]) -> str:
    """SM clock, memory clock and power, read while the GPU has this to do and nothing else."""
    with ThreadPoolExecutor(1) as pool:
        for _ in range(WARM):
            function()
        reading = pool.submit(gpu_clocks)
        while not reading.done():
            function()
    torch.cuda.synchronize()
    return reading.result()
