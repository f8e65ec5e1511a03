"""Triton's kernels become machine code for GPUs that are not there: what the interpreter runs may still not compile."""

import os
from typing import Any

import pytest

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)
triton = pytest.importorskip("triton")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from convrot_kernels.backends.triton import low_rank_kernel, rotate_quantize_kernel  # noqa: E402

SHARED = 99 * 1024  # bytes that a block may have on sm_86 and sm_89, the least of all since sm_80
ROTATION = {"GROUP": 256, "SHRUNK": 32.0, "TERMS": 2, "QMAX": 7, "CLIPPED": True, "TIES": False, "PACKED": False}
WHOLE = {"i8": ("codes_ptr",), "fp32": ("scale_ptr",)}  # pointers whose type is always this
DIVISIBLE = ("K", "N", "R", "split", "stride_x", "stride_y", "stride_down", "stride_up", "stride_low", "stride_out")


def _type(name: str, dtype: str, terms: str) -> str:
    for fixed, names in WHOLE.items():
        if name in names:
            return f"*{fixed}"
    if name.endswith("_ptr"):
        return f"*{terms if name.startswith(('down', 'up')) else dtype}"
    return "fp32" if name in ("eps", "clip") or name.startswith("alpha") else "i32"


def _compiled(kernel: Any, constants: dict[str, Any], dtype: str, terms: str, capability: int, **options: int) -> Any:
    names = kernel.arg_names
    signature = {n: "constexpr" if n in constants else _type(n, dtype, terms) for n in names}
    values = {(names.index(name),): value for name, value in constants.items()}
    aligned = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if n.endswith("_ptr") or n in DIVISIBLE}
    source = ASTSource(fn=kernel, signature=signature, constexprs=values, attrs=aligned)
    return triton.compile(
        source, target=GPUTarget("cuda", capability, 32), options=options | {"enable_fp_fusion": False}
    )


DOWN, UP = low_rank_kernel._low_rank_down, low_rank_kernel._low_rank_up
CASES = {
    "down to 16": (DOWN, {"ROWS": 32, "RANKS": 16, "BLOCK": 128}, "bf16", "bf16", 4),
    "down to 64, few rows": (DOWN, {"ROWS": 16, "RANKS": 64, "BLOCK": 128}, "bf16", "bf16", 4),
    "down to 64": (DOWN, {"ROWS": 32, "RANKS": 64, "BLOCK": 128}, "fp16", "fp16", 4),
    "down, adapter in fp32": (DOWN, {"ROWS": 32, "RANKS": 64, "BLOCK": 128}, "bf16", "fp32", 2),
    "down in fp32": (DOWN, {"ROWS": 32, "RANKS": 64, "BLOCK": 64}, "fp32", "fp32", 2),
    "up": (
        UP, {"TERMS": 4, "GATED": False, "ALIKE": True, "ROWS": 64, "COLUMNS": 128, "RANKS": 16},
        "bf16", "bf16", 1,
    ),
    "up, gated": (
        UP, {"TERMS": 1, "GATED": True, "ALIKE": False, "ROWS": 64, "COLUMNS": 128, "RANKS": 64},
        "bf16", "fp32", 1,
    ),
    "modulate": (low_rank_kernel._prologue, {"PROLOGUE": "modulate", "COLUMNS": 4096, "STEPS": 1}, "bf16", "bf16", 3),
    "modulate, long rows": (
        low_rank_kernel._prologue, {"PROLOGUE": "modulate", "COLUMNS": 16384, "STEPS": 2}, "bf16", "bf16", 3
    ),
    "cat_gelu": (low_rank_kernel._prologue, {"PROLOGUE": "cat_gelu", "COLUMNS": 4096, "STEPS": 1}, "fp16", "fp16", 3),
    "quantize, modulate": (
        rotate_quantize_kernel._rotate_quantize, ROTATION | {"PROLOGUE": "modulate", "COLUMNS": 4096, "STEPS": 1},
        "bf16", "bf16", 3,
    ),
    "quantize, two passes": (
        rotate_quantize_kernel._rotate_quantize, ROTATION | {"PROLOGUE": "gelu", "COLUMNS": 1024, "STEPS": 12},
        "bf16", "bf16", 3,
    ),
}  # fmt: skip


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("case", list(CASES))
def test_it_compiles_and_fits(case: str, capability: int) -> None:
    kernel, constants, dtype, terms, stages = CASES[case]
    warps = 8 if constants.get("COLUMNS") == 16384 else 1 if "two passes" in case else 4
    made = _compiled(kernel, constants, dtype, terms, capability, num_warps=warps, num_stages=stages)
    assert made.metadata.shared <= SHARED
    assert "ld.local" not in made.asm["ptx"], "spills registers"
    assert made.asm["cubin"]
