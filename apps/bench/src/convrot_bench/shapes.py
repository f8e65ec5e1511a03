"""Shapes of real models: data only."""

# (N, K) of FLUX.1's block linears: attention, fused q/k/v, MLP in, MLP out, fused single-block input and its output
FLUX_LINEARS = ((3072, 3072), (9216, 3072), (12288, 3072), (3072, 12288), (21504, 3072), (3072, 15360))
FLUX_TOKENS = (4608, 512)  # 1024 x 1024: 4096 image and 512 text tokens; the text stream of a double block

MINI_FLUX_LINEARS = ((512, 512), (2048, 512), (512, 2048), (512, 2560))
MINI_FLUX_TOKENS = (96, 32)
