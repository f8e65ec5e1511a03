"""Shapes of real models: data only. A linear is (N, K), a product (M, N, K): M tokens, N outputs, K inputs."""

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
