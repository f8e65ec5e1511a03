"""Every op under torch.library.opcheck, torch.compile, inference mode, autocast, meta tensors and autograd."""

import shutil
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import convrot_kernels as ck
from convrot_kernels import dispatch, ops
from convrot_kernels.testing import assert_equal, make_codes, make_inputs, make_scale


def _matrix_product() -> tuple[Tensor, ...]:
    """a, b, a_scale, b_scale, bias"""
    a, b = make_codes(2, 5, 128), ck.pack_int4(make_codes(24, 128, seed=1))
    return a, b, make_scale(2, 5), make_scale(24), torch.linspace(-1, 1, 24)


def _joined() -> tuple[Any, ...]:
    a, b, a_scale, b_scale, bias = _matrix_product()
    return a, [b, b[:16]], a_scale, [b_scale, b_scale[:16].clone()], [bias, bias[:16].clone()]


def _x(seed: int = 0) -> Tensor:
    return make_inputs(2, 5, 128, seed=seed)


def _wide(seed: int = 0) -> Tensor:
    return make_inputs(2, 5, 192, seed=seed)


def _attended() -> tuple[Tensor, ...]:
    """q, k, v, v_scale"""
    return ck.norm_rope_fp8(_wide(), *torch.ones(2, 16), *torch.ones(2, 5, 16))


CASES: dict[str, Callable[[], tuple[tuple[Any, ...], dict[str, Any]]]] = {
    "rotate": lambda: ((_x(), 64), {}),
    "rotate_quantize": lambda: ((_x(), 64, 4), {"packed": True, "clip": 0.9}),
    "rotate_quantize_gelu": lambda: ((_x(), 64, 8), {}),
    "rotate_quantize_modulate": lambda: ((_x(), torch.ones(2, 128), torch.ones(2, 128), 1e-5, 64), {"packed": True}),
    "rotate_quantize_silu_mul": lambda: ((_x(), _x(1), 64), {"clip": 0.5}),
    "rotate_quantize_cat_gelu": lambda: ((_x(), _x(1), 64, 8), {}),
    "scaled_mm": lambda: (_matrix_product(), {"out_dtype": torch.float16}),
    "scaled_mm_out": lambda: ((torch.zeros(2, 5, 64).bfloat16()[..., 8:32], *_matrix_product()), {}),
    "scaled_mm_cat": lambda: (_joined(), {"out_dtype": torch.float16}),
    "scaled_mm_gate_residual": lambda: ((*_matrix_product(), torch.ones(2, 24), torch.ones(2, 5, 24)), {}),
    "norm_rope": lambda: ((_x(), *torch.ones(2, 16), *torch.ones(2, 5, 16)), {"eps": 1e-5}),
    "norm_rope_joint": lambda: ((_wide(), _wide(1), *torch.ones(4, 16), *torch.ones(2, 10, 16)), {}),
    "norm_rope_fp8": lambda: ((_wide(), *torch.ones(2, 16), *torch.ones(2, 5, 16)), {"eps": 1e-5}),
    "norm_rope_joint_fp8": lambda: ((_wide(), _wide(1), *torch.ones(4, 16), *torch.ones(2, 10, 16)), {}),
    "attention_fp8": lambda: (_attended(), {"out_dtype": torch.float16}),
    "low_rank_down": lambda: ((_x(), [torch.ones(3, 256).bfloat16()], _x(1)), {}),
    "low_rank_up": lambda: ((_wide(), _x()[..., :5], [torch.ones(64, 5).bfloat16()], [8], [0.5]), {}),
    "pack_int4": lambda: ((make_codes(3, 8),), {}),
    "unpack_int4": lambda: ((ck.pack_int4(make_codes(3, 8)),), {}),
}
# of inputs, or at all
WITHOUT_GRADIENTS = ("pack_int4", "unpack_int4", "scaled_mm_out", "low_rank_up", "attention_fp8")
DIFFERENTIABLE_INPUTS = [op for op in CASES if op not in WITHOUT_GRADIENTS]
OPS = pytest.mark.parametrize("op", list(CASES))


def _call(op: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, ...]:
    """The results of the public function; for the op that writes, what it wrote into."""
    result = getattr(ck, op)(*args, **kwargs)
    if result is None:
        return (args[0],)
    return result if isinstance(result, tuple) else (result,)


def _on_meta(arg: Any) -> Any:
    if isinstance(arg, list):
        return [_on_meta(one) for one in arg]
    return arg.to("meta") if isinstance(arg, Tensor) else arg


def _requiring_grad(args: tuple[Any, ...]) -> tuple[Any, ...]:
    floating = [isinstance(arg, Tensor) and arg.is_floating_point() for arg in args]
    return tuple(arg.requires_grad_() if is_float else arg for arg, is_float in zip(args, floating, strict=True))


def test_every_op_is_covered_here_and_in_the_dispatch_table() -> None:
    assert list(CASES) == [schema.partition("(")[0] for schema in ops.SCHEMAS] == list(dispatch.ORDER)


@OPS
def test_opcheck(op: str) -> None:
    args, kwargs = CASES[op]()
    checks = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    if op == "attention_fp8":
        checks = checks[1:]  # the first multiplies inputs, which PyTorch cannot in e4m3
    torch.library.opcheck(getattr(torch.ops.convrot, op).default, args, kwargs, test_utils=checks)


def test_opcheck_of_the_autograd_registration() -> None:
    args, kwargs = CASES["rotate"]()  # the other ops have none, and their functions a backward that refuses
    overload = torch.ops.convrot.rotate.default
    torch.library.opcheck(overload, _requiring_grad(args), kwargs, test_utils="test_autograd_registration")


@OPS
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_as_one_graph(op: str, dynamic: bool) -> None:
    args, kwargs = CASES[op]()
    expected = _call(op, args, kwargs)
    torch._dynamo.reset()
    compiled = torch.compile(_call, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    args, kwargs = CASES[op]()
    for actual, wanted in zip(compiled(op, args, kwargs), expected, strict=True):
        assert_equal(actual, wanted)


@pytest.mark.skipif(shutil.which("c++") is None, reason="inductor needs a C++ compiler")
def test_inductor_compiles_a_whole_layer() -> None:
    def layer(x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        codes, scale = ck.rotate_quantize_gelu(x * 2, 64)
        whole = torch.zeros(*x.shape[:-1], 64, dtype=x.dtype)
        ck.scaled_mm_out(whole[..., 8:32], codes, weight, scale, weight_scale, bias)
        y = ck.scaled_mm(codes, weight, scale, weight_scale, bias) + 1
        return whole, ck.rotate(torch.cat((y, y), -1)[..., :16], 16)

    _, weight, _, weight_scale, bias = _matrix_product()
    torch._dynamo.reset()
    actual = torch.compile(layer, fullgraph=True)(_x(), weight, weight_scale, bias)
    for got, wanted in zip(actual, layer(_x(), weight, weight_scale, bias), strict=True):
        assert_equal(got, wanted)


@OPS
def test_inference_mode_gives_the_same(op: str) -> None:
    expected = _call(op, *CASES[op]())
    with torch.inference_mode():
        actual = _call(op, *CASES[op]())
    for got, wanted in zip(actual, expected, strict=True):
        assert_equal(got, wanted)


@OPS
def test_autocast_and_matmul_precision_change_nothing(op: str) -> None:
    expected = _call(op, *CASES[op]())
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            actual = _call(op, *CASES[op]())
    finally:
        torch.set_float32_matmul_precision(before)
    for got, wanted in zip(actual, expected, strict=True):
        assert_equal(got, wanted)


@OPS
def test_meta_tensors_give_shapes_and_dtypes(op: str) -> None:
    args, kwargs = CASES[op]()
    expected = _call(op, args, kwargs)
    actual = _call(op, tuple(_on_meta(arg) for arg in args), kwargs)
    assert [(got.shape, got.dtype) for got in actual] == [(wanted.shape, wanted.dtype) for wanted in expected]
    assert all(got.device.type == "meta" for got in actual)


@pytest.mark.parametrize("op", [op for op in DIFFERENTIABLE_INPUTS if op != "rotate"])
@pytest.mark.parametrize("compiled", [False, True])
def test_backward_through_integer_codes_is_refused(op: str, compiled: bool) -> None:
    args, kwargs = CASES[op]()
    expected = _call(op, args, kwargs)[-1]
    torch._dynamo.reset()
    call = torch.compile(_call, fullgraph=True, backend="aot_eager") if compiled else _call
    result = call(op, _requiring_grad(args), kwargs)[-1]
    assert_equal(result.detach(), expected)
    with pytest.raises(NotImplementedError, match=rf"{op}: not differentiable.*call it under torch.no_grad\(\)"):
        result.float().sum().backward()


def test_the_op_that_writes_takes_inputs_that_require_grad() -> None:
    args, _ = CASES["scaled_mm_out"]()
    ck.scaled_mm_out(*args)
    expected = args[0].clone()
    args[0].zero_()
    ck.scaled_mm_out(args[0], *_requiring_grad(args[1:]))
    assert_equal(args[0], expected)


def test_import_is_light_and_touches_no_gpu() -> None:
    program = (
        "import sys, torch, convrot_kernels, convrot_kernels.testing, convrot_kernels.transforms\n"
        "heavy = [name for name in ('diffusers', 'transformers', 'triton') if name in sys.modules]\n"
        "assert not heavy, heavy\n"
        "assert not torch.cuda.is_initialized()\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)


def test_all_names_of_the_package_exist() -> None:
    assert sorted(ck.__all__) == ck.__all__
    assert all(hasattr(ck, name) for name in ck.__all__)
