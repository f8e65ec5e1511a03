"""Shapes of real models: data only. A linear is (N, K), a product (M, N, K): M tokens, N outputs, K inputs."""

from collections.abc import Mapping
from dataclasses import dataclass, field

# FLUX.1's block linears: attention, fused q/k/v, MLP in, MLP out, fused single-block input and its output
FLUX_LINEARS = ((3072, 3072), (9216, 3072), (12288, 3072), (3072, 12288), (21504, 3072), (3072, 15360))
FLUX_TOKENS = (4608, 512)  # 1024 x 1024: 4096 image and 512 text tokens; the text stream of a double block

MINI_FLUX_LINEARS = ((512, 512), (2048, 512), (512, 2048), (512, 2560))
MINI_FLUX_TOKENS = (96, 32)

# Products of one FLUX.1-dev step at 1024 x 1024 and batch 1, in the order of the model; M=1 are the modulations
_STREAM = ((9216, 3072), (3072, 3072), (12288, 3072), (3072, 12288))
FLUX_DOUBLE_BLOCK = (
    (1, 18432, 3072),
    (1, 18432, 3072),
    *((4096, *linear) for linear in _STREAM),
    *((512, *linear) for linear in _STREAM),
)
FLUX_SINGLE_BLOCK = ((1, 9216, 3072), (4608, 21504, 3072), (4608, 3072, 15360))
FLUX_STEP = 19 * FLUX_DOUBLE_BLOCK + 38 * FLUX_SINGLE_BLOCK
FLUX_MODULATIONS = tuple(product for product in FLUX_STEP if product[0] == 1)

# Weight-only products: FLUX's modulations, and a few rows
GEMV_PRODUCTS = ((1, 18432, 3072), (1, 9216, 3072), (1, 3072, 3072), (8, 3072, 3072))

# What rotate_quantize reads in FLUX (silu_mul: in models with gated MLPs): K -> prologues
ROTATE_TOKENS = (4608, 4096, 512)
ROTATE_PROLOGUES = {
    3072: ("none", "gelu", "modulate"),
    12288: ("none", "gelu", "silu_mul"),
    15360: ("none", "cat_gelu"),
}

HOST_PRODUCT = (64, 3072, 3072)
WEIGHT = (12288, 3072)


@dataclass(frozen=True)
class Family:
    """What the blocks of one model multiply, rotate and normalize at the size that it is used at.

    `name` as convrot_quant's table of released models has it. `linears` are its 4-bit ones, (N, K), q, k and v as the
    one product that fused blocks make of them; `gated` those whose result goes through a gate into the residual.
    """

    name: str
    tokens: int  # of an image's or a video's stream, or of both streams joined
    text: int
    linears: tuple[tuple[int, int], ...]
    prologues: Mapping[int, tuple[str, ...]]  # K -> what is folded in front of its rotation
    gated: tuple[tuple[int, int], ...]
    modulation: tuple[int, int] | None = None  # (N, K), one row, W4A16
    group_sizes: Mapping[int, int] = field(default_factory=dict)  # K -> group size where it is not 256
    heads: tuple[int, int] | None = None  # number and size, where q and k are normalized a head at a time and turned
    streams: int = 1  # 2: text and image are normalized with weights of their own

    def group_size(self, k: int) -> int:
        """The largest that divides K, as plans choose it."""
        return self.group_sizes.get(k, 256)


_WIDE = 3072
FAMILIES = (
    Family(  # 1024 x 1024, both streams joined as its single blocks have them
        name="FLUX.1-dev", tokens=4608, text=512, linears=FLUX_LINEARS,
        prologues={_WIDE: ("none", "modulate"), 12288: ("gelu",), 15360: ("cat_gelu",)},
        gated=((_WIDE, 12288), (_WIDE, 15360)), modulation=(18432, _WIDE), heads=(24, 128), streams=2,
    ),
    Family(  # 1024 x 1024; 77 tokens of CLIP and 256 of T5; K = 2432 is no multiple of 256
        name="SD3.5-large", tokens=4096, text=333,
        linears=((2432, 2432), (7296, 2432), (9728, 2432), (2432, 9728)),
        prologues={2432: ("none", "modulate"), 9728: ("gelu",)},
        gated=((2432, 9728),), modulation=(14592, 2432), group_sizes={2432: 64},
    ),
    Family(  # 1328 x 1328, its own resolution: 83 x 83 tokens, a multiple of nothing
        name="Qwen-Image", tokens=6889, text=512,
        linears=((_WIDE, _WIDE), (9216, _WIDE), (12288, _WIDE), (_WIDE, 12288)),
        prologues={_WIDE: ("none", "modulate"), 12288: ("gelu",)},
        gated=((_WIDE, 12288),), modulation=(18432, _WIDE), heads=(24, 128), streams=2,
    ),
    Family(  # 832 x 480, 81 frames: 21 x 30 x 52 tokens; its q and k are normalized over all heads at once
        name="Wan2.2-T2V-A14B", tokens=32760, text=512,
        linears=((5120, 5120), (15360, 5120), (13824, 5120), (5120, 13824)),
        prologues={5120: ("none", "modulate"), 13824: ("gelu",)},
        gated=((5120, 13824),),
    ),
    Family(  # 1024 x 1024 and its caption in one stream; the gated MLP that silu_mul is for
        name="Z-Image-Turbo", tokens=4608, text=512,
        linears=((3840, 3840), (11520, 3840), (10240, 3840), (3840, 10240)),
        prologues={3840: ("none",), 10240: ("silu_mul",)},
        gated=(),
    ),
)  # fmt: skip
MINI_FLUX = Family(
    name="mini-flux", tokens=96, text=32, linears=((512, 512), (2048, 512), (512, 2048)),
    prologues={512: ("none", "modulate"), 2048: ("gelu",), 2560: ("cat_gelu",)},
    gated=((512, 2048),), modulation=(3072, 512), heads=(8, 64), streams=2,
)  # fmt: skip

# What shows the highest rates of a GPU: large, square, and free of ragged edges
CEILING_PRODUCTS = ((8192, 8192, 8192), (16384, 8192, 4096), (4608, 12288, 12288))
CEILING_COPY = 1 << 30  # bytes read and written

# tokens, heads, columns of a head: FLUX.1-dev at 1024 x 1024, 512 x 512 and 2048 x 2048, 512 tokens of text among them
ATTENTION = ((4608, 24, 128), (1536, 24, 128), (16896, 24, 128))
MINI_FLUX_ATTENTION = ((96, 8, 64),)

ROTATED = ((4608, 3072), (4608, 12288), (32760, 5120))  # (M, K) of FLUX.1-dev and Wan
PEER_PRODUCTS = ((4608, 3072, 3072), (4608, 12288, 3072), (4608, 3072, 12288))
