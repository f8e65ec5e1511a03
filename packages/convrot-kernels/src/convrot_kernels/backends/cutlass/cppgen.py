"""The sm80 epilogue from cutlass_cppgen, nvidia-cutlass's generator, on a machine without a GPU.

Where generate.py's sm80 text comes from, and what a test compares it with. The build does not import this: the
generator takes 40 s to list every kernel of every arch, and as installed it asks the driver for the GPU.
"""

import ast
import sys
import textwrap
from importlib import import_module
from typing import Any

from convrot_kernels.backends.cutlass.variants import GemmVariant

_EXPRESSION = """
def epilogue(accum, a_scale, b_scale, bias, gate, residual):
    scaled = accum * a_scale
    product = scaled * b_scale
    y = product + bias
    gated = gate * y
    D = residual + gated
    return D
"""
_M, _N = 4608, 3072  # any shape: only the broadcasts' direction reaches the text


def _without_gpu(cutlass: Any, capability: int) -> None:
    """The three questions to the driver, answered; and two imports that 4.2.0 forgets."""
    cutlass._device_id = 0
    cutlass._nvcc_version = cutlass.nvcc_version()
    for name, module in list(sys.modules.items()):
        if name.startswith("cutlass_cppgen") and hasattr(module, "device_cc"):
            vars(module)["device_cc"] = lambda device=-1: capability
    cutlass._option_registry = None
    frontend: Any = import_module("cutlass_cppgen.epilogue.epilogue")
    frontend.textwrap, frontend.ast = textwrap, ast


def emit_epilogue(variant: GemmVariant) -> str:
    """The expression tree of an sm80 variant, as cutlass_cppgen writes it."""
    cutlass: Any = import_module("cutlass_cppgen")
    _without_gpu(cutlass, 80)
    types = cutlass.DataType
    operand = {"s4": types.s4, "s8": types.s8}[variant.weight]
    out = {"bf16": types.bf16, "fp16": types.f16}[variant.out]
    row_major, column_major = cutlass.LayoutType.RowMajor, cutlass.LayoutType.ColumnMajor
    elements = {"element_A": operand, "element_B": operand, "element_C": out, "element_D": out}
    layouts = {"layout_A": row_major, "layout_B": column_major, "layout_C": row_major}
    plan = cutlass.op.Gemm(cc=80, element_accumulator=types.s32, **elements, **layouts)
    plan.tile_description = {
        "threadblock_shape": list(variant.tile),
        "warp_count": [*variant.warps, 1],
        "stages": variant.stages,
        "instruction_shape": [16, 8, 256 // int(variant.weight[1:])],
    }

    def tensor(element: Any, m: int, n: int) -> Any:
        return cutlass.Tensor(element=element, shape=(m, n), layout_tag=row_major)

    vectors = {name: tensor(types.f32, 1, _N) for name in ("b_scale", "bias", "gate")}
    matrices = {"residual": tensor(out, _M, _N), "D": tensor(out, _M, _N)}
    shapes = {"accum": tensor(types.s32, _M, _N), "a_scale": tensor(types.f32, _M, 1), **vectors, **matrices}
    plan.epilogue_visitor = cutlass.epilogue.trace(_EXPRESSION, shapes)
    text: str = plan.construct().rt_module.emit()
    return text[text.index("using OutputTileThreadMap") : text.index("// Gemm operator")]
