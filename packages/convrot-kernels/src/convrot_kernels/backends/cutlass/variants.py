"""The GEMM kernels that exist, as a table, and which of them runs a product, as a pure function.

A variant is one instantiation of a CUTLASS template. `pick` answers None where no GEMM fits: gemv.cu then runs the
product, slower for many rows and without any condition on the shape. Figures: one H200, K=3072..15360.
"""

from dataclasses import dataclass

# a CUTLASS tile is a compile-time constant: every line costs 25 s (sm_80) to 145 s (sm_90a) of compiling
_OUT_BITS = {"bf16": 16, "fp16": 16, "fp32": 32}
MAX_K = 1 << 16  # 16 * 8 * 128 * K stays inside int32
GEMV_ROWS = 8  # up to here one pass of the GEMV over the weight is faster than a GEMM (9.1 against 14.9 us, N=18432)


@dataclass(frozen=True)
class GemmVariant:
    """One kernel. `tile` is (N, M, K) on sm_90a, where the product is transposed, and (M, N, K) on sm_80.

    weight and activation: "s4" is packed, "s8" one code a byte; a reordered weight is in the order of layouts.py.
    cluster is sm_90a's, warps (in M, N) and stages are sm_80's.
    """

    weight: str
    activation: str
    out: str
    template: str
    tile: tuple[int, int, int]
    archs: tuple[str, ...]
    reordered: bool = False
    cluster: tuple[int, int] = (1, 1)
    warps: tuple[int, int] = (0, 0)
    stages: int = 0
    max_m: int | None = None

    @property
    def name(self) -> str:
        """The name of the unit and of its C function."""
        a, b, c = self.tile
        return f"{self.template}_{self.weight}{self.activation}_{a}x{b}x{c}_{self.out}"

    @property
    def aligned(self) -> tuple[int, int]:
        """(multiple of N, multiple of K): rows of 16 bytes, whole blocks of the nibble order."""
        n = 16 if self.reordered else 128 // _OUT_BITS[self.out]
        return n, 32 if self.activation == "s4" or self.reordered else 16


_HOPPER = ("sm_90a",)
_AMPERE = ("sm_80",)
# mma.sync s8 is native there; s4 is emulated from 9.0 on (20 times slower), and tcgen05 has no int8 on every chip
_WITH_S8_MMA = ("sm_80", "sm_100", "sm_103", "sm_110", "sm_120", "sm_121")


def _hopper(
    weight: str, out: str, tile: tuple[int, int, int], cluster: tuple[int, int], max_m: int | None = None
) -> GemmVariant:
    return GemmVariant(weight, "s8", out, "sm90", tile, _HOPPER, weight == "s4", cluster, max_m=max_m)


# order matters: the first that fits is taken
VARIANTS: tuple[GemmVariant, ...] = (
    # few rows: 64 x 16 wastes least of the M side; from 65 rows on, one tile is within 1.5 % of the best everywhere
    _hopper("s4", "bf16", (64, 16, 256), (1, 1), 64),
    _hopper("s4", "fp16", (64, 16, 256), (1, 1), 64),
    _hopper("s4", "bf16", (128, 128, 128), (1, 2)),
    _hopper("s4", "fp16", (128, 128, 128), (1, 2)),
    _hopper("s4", "fp32", (128, 128, 128), (1, 2)),
    _hopper("s8", "bf16", (128, 128, 128), (1, 2)),
    _hopper("s8", "fp16", (128, 128, 128), (1, 2)),
    GemmVariant("s4", "s4", "bf16", "sm80", (128, 256, 128), _AMPERE, warps=(2, 4), stages=3),
    GemmVariant("s4", "s4", "fp16", "sm80", (128, 256, 128), _AMPERE, warps=(2, 4), stages=3),
    GemmVariant("s8", "s8", "bf16", "sm80", (128, 128, 64), _WITH_S8_MMA, warps=(2, 2), stages=4),
    GemmVariant("s8", "s8", "fp16", "sm80", (128, 128, 64), _WITH_S8_MMA, warps=(2, 2), stages=4),
)
assert len(VARIANTS) <= 12, "the default build must compile in 15 minutes on two cores"
assert len({variant.name for variant in VARIANTS}) == len(VARIANTS), "a name is a C function"

ARCHS = ("sm_80", "sm_90a", *_WITH_S8_MMA[1:])


def arch_of(capability: tuple[int, int]) -> str | None:
    """The arch whose library serves a GPU, by compute capability; None where there is no code for it."""
    major, minor = capability
    if major == 8:
        return "sm_80"  # one cubin serves 8.0 to 8.9
    if (major, minor) == (9, 0):
        return "sm_90a"
    name = f"sm_{major}{minor}"
    return name if name in ARCHS else None


def of_arch(arch: str) -> tuple[GemmVariant, ...]:
    """The variants that a library for `arch` holds."""
    return tuple(variant for variant in VARIANTS if arch in variant.archs)


def pick(m: int, n: int, k: int, arch: str, weight: str, activation: str, out: str) -> GemmVariant | None:
    """The kernel for (M, K) x (N, K) -> (M, N), or None: run it on the GEMV.

    `weight` and `activation` are as GemmVariant has them; a variant that needs another form of the same codes (s8 for
    packed s4) is not considered here: the launcher widens first and asks again.
    """
    if m <= GEMV_ROWS or k > MAX_K:
        return None
    for variant in of_arch(arch):
        multiple_n, multiple_k = variant.aligned
        if (variant.weight, variant.activation, variant.out) != (weight, activation, out):
            continue
        if n % multiple_n == 0 and k % multiple_k == 0 and (variant.max_m is None or m <= variant.max_m):
            return variant
    return None
