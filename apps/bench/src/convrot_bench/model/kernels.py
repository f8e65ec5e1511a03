"""What kind of work a kernel does, told by its name: a table, read from the top.

Inductor names a kernel after all ops around it, so its kernels are told apart first: a pointwise one that feeds
attention bears attention's name. Names of CPU ops stand for kernels where there is no GPU.
"""

import re

LOW_BIT, WIDE, ROTATE, ATTENTION = "gemm_low_bit", "gemm_16_bit", "rotate_quantize", "attention"
NORM, MODULATION, ELEMENTWISE, OTHER = "norm_rope", "modulation", "elementwise", "other"
GAPS = "launch_gaps"  # of no kernel: the step's time less that of its kernels
# in the order of tables and bars
TITLES = {
    LOW_BIT: "GEMM (low-bit)",
    WIDE: "GEMM (16-bit)",
    ROTATE: "rotate + quantize",
    ATTENTION: "attention",
    NORM: "norm + RoPE",
    MODULATION: "modulation (GEMV)",
    ELEMENTWISE: "elementwise",
    OTHER: "other",
    GAPS: "launch gaps",
}

_NORMS = r"norm(?!al)|rsqrt|rope|rotary"
RULES = tuple(
    (re.compile(pattern, re.IGNORECASE), kind)
    for pattern, kind in (
        # inductor: templates of products, then what it fused
        (r"^triton_(tem|mm)_", WIDE),
        (rf"^triton_\w*({_NORMS}|stack|unbind)", NORM),
        (r"^triton_(poi|red|per|for)_", ELEMENTWISE),
        # ours; `rotate` comes before a weight-only product
        (r"norm_rope", NORM),
        (r"rotate", ROTATE),
        # cuBLAS' products of one row, where it has no GEMM for them, are these too
        (r"gemv|dot_kernel|reduce_1block", MODULATION),
        (r"sdpa|flash|fmha|attention|softmax", ATTENTION),
        # CUTLASS with our epilogue, Triton's kernel; int8, fp8 and int4 of others
        (
            r"convrot|scaled_mm|int_mm|integer_subbyte|int4|int8|i8i32|i16832|_s8|imma|e4m3|fp8|qgmma|nvjet_\w*qq",
            LOW_BIT,
        ),
        (_NORMS, NORM),
        (r"gemm|nvjet|xmma|cutlass|splitk|cublas|aten::(addmm|mm|bmm|matmul|linear|_?convolution)|mkldnn", WIDE),
        (
            r"elementwise|vectorized|catarray|copy|gelu|silu|fill|memcpy|memset|index|reduce_kernel"
            r"|aten::(cat|stack|add|sub|mul|div|pow|neg|mean|sin|cos|to|clone|contiguous|ones|zeros|arange|where|chunk)",
            ELEMENTWISE,
        ),
    )
)


def classify(name: str) -> str:
    """The kind of a kernel by its (demangled) name; OTHER where no rule knows it."""
    return next((kind for pattern, kind in RULES if pattern.search(name)), OTHER)


def sums(durations: dict[str, float]) -> dict[str, float]:
    """{kernel: time} -> {kind: time}, every kind but the gaps."""
    found = dict.fromkeys((kind for kind in TITLES if kind != GAPS), 0.0)
    for name, duration in durations.items():
        found[classify(name)] += duration
    return found
