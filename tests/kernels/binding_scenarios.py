"""The ops with the compiled binding before them. Run by test_binding.py, with the plugin bound.py."""

import ctypes
import gc
import re
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import convrot_kernels as ck
from convrot_kernels.backends.cutlass import library
from convrot_kernels.backends.cutlass.products import BLOCKS
from convrot_kernels.testing import make_codes, make_inputs, make_scale

Call = tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]
IN_BLOCKS = {"b_layout": BLOCKS}


def _x(*shape: int, seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return make_inputs(*shape, seed=seed).to(dtype)


def _operands(*rows: int, n: int = 128, k: int = 256) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """a, b, a_scale, b_scale: what a Hopper GEMM reads as it lies."""
    b = ck.prepare_weight(ck.pack_int4(make_codes(n, k, seed=1)), BLOCKS)
    return make_codes(*rows, k), b, make_scale(*rows), make_scale(n)


def _bias(n: int = 128, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.linspace(-1, 1, n).to(dtype)


def _ones(*shape: int) -> Tensor:
    """What the stand-in leaves: columns that no term writes to look as if one had."""
    return torch.ones(shape, dtype=torch.bfloat16)


def _chunk(index: int, samples: int = 2, k: int = 512) -> Tensor:
    return _x(samples, 6 * k, seed=3).chunk(6, dim=-1)[index]


CASES: dict[str, Callable[[], Call]] = {
    "quantize": lambda: (ck.rotate_quantize, (_x(64, 512),), {}),
    "quantize packed fp16, clipped": lambda: (
        ck.rotate_quantize, (_x(2, 3, 512, dtype=torch.float16), 64, 4), {"packed": True, "clip": 0.5}
    ),
    "quantize fp32 to 8 bits": lambda: (ck.rotate_quantize, (_x(5, 512, dtype=torch.float32), 16, 8), {}),
    "quantize one vector": lambda: (ck.rotate_quantize, (_x(512),), {}),
    "quantize columns of a wider tensor": lambda: (ck.rotate_quantize, (_x(2, 7, 1024)[..., 256:768],), {}),
    "quantize gelu": lambda: (ck.rotate_quantize_gelu, (_x(64, 512),), {}),
    "modulate with chunks": lambda: (ck.rotate_quantize_modulate, (_x(2, 7, 512), _chunk(0), _chunk(1), 1e-5), {}),
    "modulate one sample": lambda: (ck.rotate_quantize_modulate, (_x(1, 7, 512), _chunk(0, 1), _chunk(1, 1)), {}),
    "modulate all alike": lambda: (
        ck.rotate_quantize_modulate, (_x(2, 7, 512), _x(512).float(), _x(512, seed=2)), {"packed": True}
    ),
    "silu mul": lambda: (ck.rotate_quantize_silu_mul, _x(4, 3, 1024).chunk(2, -1), {}),
    "cat gelu": lambda: (ck.rotate_quantize_cat_gelu, (_x(4, 3, 256), _x(4, 3, 1024)[..., :512]), {}),
    "norm and rope": lambda: (ck.norm_rope, (_x(2, 5, 256), *_x(2, 32), *torch.ones(2, 5, 32)), {"eps": 1e-5}),
    "norm and rope of columns": lambda: (
        ck.norm_rope, (_x(1, 5, 512)[..., :256], *_x(2, 64).float(), *torch.ones(2, 5, 64)), {}
    ),
    "joint norm and rope": lambda: (
        ck.norm_rope_joint, (_x(2, 3, 192), _x(2, 5, 384)[..., 64:256], *_x(4, 32), *torch.ones(2, 8, 32)), {}
    ),
    "norm and rope in e4m3": lambda: (
        ck.norm_rope_fp8, (_x(2, 5, 640)[..., 64:448], *_x(2, 32), *torch.ones(2, 5, 32)), {"eps": 1e-5}
    ),
    "joint norm and rope in e4m3": lambda: (
        ck.norm_rope_joint_fp8, (_x(2, 3, 192), _x(2, 5, 384)[..., 64:256], *_x(4, 32), *torch.ones(2, 8, 32)), {}
    ),
    "product": lambda: (ck.scaled_mm, (*_operands(300), _bias()), IN_BLOCKS),
    "product of few rows": lambda: (ck.scaled_mm, _operands(2, 20), IN_BLOCKS),
    "product to fp16": lambda: (ck.scaled_mm, (*_operands(64), None, torch.float16), IN_BLOCKS),
    "product of bytes": lambda: (ck.scaled_mm, (make_codes(64, 256), make_codes(128, 256), *_operands(64)[2:]), {}),
    "product of one row, no GEMM": lambda: (ck.scaled_mm, _operands(1), IN_BLOCKS),
    "product of values, no GEMM": lambda: (
        ck.scaled_mm, (_x(4, 256), ck.pack_int4(make_codes(128, 256)), None, make_scale(128), _bias()), {}
    ),
    "product to fp32, no GEMM": lambda: (ck.scaled_mm, (*_operands(4), None, torch.float32), IN_BLOCKS),
    "written into columns": lambda: (
        ck.scaled_mm_out, (torch.zeros(2, 20, 512, dtype=torch.bfloat16)[..., 128:256], *_operands(2, 20)), IN_BLOCKS
    ),
    "gate and residual": lambda: (
        ck.scaled_mm_gate_residual,
        (*_operands(2, 20), _bias(), _bias(dtype=torch.float32), _x(2, 20, 256, seed=2)[..., 64:192]),
        IN_BLOCKS,
    ),
    "a gate for each sample": lambda: (
        ck.scaled_mm_gate_residual, (*_operands(2, 20), None, _x(2, 128), _x(2, 20, 128, seed=2)), IN_BLOCKS
    ),
    "down": lambda: (ck.low_rank_down, (_x(2, 7, 512), [_x(16, 512), _x(16, 512, seed=1)]), {}),
    "down of columns, gelu": lambda: (ck.low_rank_down, (_x(5, 1024)[:, 512:], [_x(5, 512)]), {"gelu": True}),
    "down of two inputs": lambda: (ck.low_rank_down, (_x(2, 3, 256), [_x(8, 768)], _x(2, 3, 1024)[..., 512:]), {}),
    "down, modulated": lambda: (
        ck.low_rank_down, (_x(2, 7, 512), [_x(8, 512)] * 4, None, _chunk(0), _chunk(1), 1e-5), {}
    ),
    "down, modulated alike in fp16": lambda: (
        ck.low_rank_down,
        (_x(2, 7, 512).half(), [_x(8, 512).half()], None, _x(512).float(), _x(512, seed=2)), {},
    ),
    "up": lambda: (ck.low_rank_up, (_ones(2, 7, 128), _x(2, 7, 16), [_x(128, 16)]), {}),
    "up in columns": lambda: (
        ck.low_rank_up,
        (_ones(2, 7, 512)[..., 128:320], _x(2, 7, 32)[..., :24], [_x(64, 8), _x(96, 8), _x(32, 8)],
         [0, 64, 160], [1.0, -0.5, 2.0]), {},
    ),
    "up, gated": lambda: (ck.low_rank_up, (_ones(3, 5, 64), _x(3, 5, 4), [_x(64, 4)]), {"gate": _x(3, 64).float()}),
    "up, gated alike in fp16": lambda: (
        ck.low_rank_up,
        (_ones(3, 5, 64).half(), _x(3, 5, 64).half(), [_x(64, 64).half()]), {"gate": _x(64)},
    ),
}  # fmt: skip
OUTPUTS = {"convrot_gemv": (12,), "sm90": (10,), "convrot_rotate_quantize": (12, 13)}
OUTPUTS |= {"convrot_low_rank_down": (18,), "convrot_low_rank_up": (0,)}
OUTPUTS["convrot_norm_rope_fp8"] = (14, 15, 16, 17, 18)
OUTPUTS["convrot_norm_rope"] = (14, 15, 16)  # which arguments are results; v may be none


def _results(call: Call) -> tuple[Tensor, ...]:
    function, args, options = call
    result = function(*args, **options)
    return (args[0],) if result is None else result if isinstance(result, tuple) else (result,)


def _inputs_of(recorded: tuple[str, tuple[float, ...]]) -> tuple[str, tuple[float, ...]]:
    name, arguments = recorded
    outputs = next(places for start, places in OUTPUTS.items() if name.startswith(start))
    return name, tuple(value for place, value in enumerate(arguments) if place not in outputs)


@pytest.mark.parametrize("case", list(CASES))
def test_the_second_call_does_without_python_what_the_first_did(kernels: Any, case: str) -> None:
    call = CASES[case]()
    first = _results(call)
    taught, copies = kernels.take(), [tensor.clone() for tensor in first]
    assert kernels.in_python == 1
    second = _results(call)
    repeated = kernels.take()
    assert kernels.in_python == 1
    assert [_inputs_of(one) for one in repeated] == [_inputs_of(one) for one in taught]
    assert [(t.shape, t.stride(), t.dtype) for t in second] == [(t.shape, t.stride(), t.dtype) for t in first]
    name, arguments = repeated[0]
    places = next(places for start, places in OUTPUTS.items() if name.startswith(start))
    assert [arguments[place] for place in places][: len(second)] == [tensor.data_ptr() for tensor in second]
    assert all(torch.equal(got, wanted) and (got == 1).all() for got, wanted in zip(second, copies, strict=True))


def test_nothing_is_written_beside_the_columns_of_out(kernels: Any) -> None:
    whole = torch.zeros(2, 20, 512, dtype=torch.bfloat16)
    for _ in range(2):
        ck.scaled_mm_out(whole[..., 128:256], *_operands(2, 20), b_layout=BLOCKS)
    assert kernels.in_python == 1
    assert whole.sum() == whole[..., 128:256].sum() == 40 * 128


def _misaligned(tensor: Tensor) -> Tensor:
    """The same values one element further."""
    room = torch.empty(tensor.numel() + 1, dtype=tensor.dtype)[1:]
    return room.view(tensor.shape).copy_(tensor)


def _every_other(tensor: Tensor) -> Tensor:
    """The same values at twice the stride."""
    return tensor.repeat_interleave(2, -1)[..., ::2]


LIKE_A_LEARNED_CALL: dict[str, tuple[str, Callable[[tuple[Any, ...]], tuple[Any, ...]]]] = {
    "x misaligned": ("quantize", lambda args: (_misaligned(args[0]),)),
    "x not contiguous": ("quantize", lambda args: (_every_other(args[0]),)),
    "x one row for all": ("quantize", lambda args: (args[0][:1].expand(64, 512),)),
    "chunks of two strides": ("modulate with chunks", lambda args: (*args[:2], args[2].contiguous(), args[3])),
    "y misaligned": ("silu mul", lambda args: (args[0], _misaligned(args[1]))),
    "q and k misaligned": ("norm and rope", lambda args: (_misaligned(args[0]), *args[1:])),
    "a weight of another dtype": ("norm and rope", lambda args: (*args[:2], args[2].half(), *args[3:])),
    "a weight misaligned": ("norm and rope", lambda args: (args[0], _misaligned(args[1]), *args[2:])),
    "a weight not contiguous": ("norm and rope", lambda args: (args[0], _every_other(args[1]), *args[2:])),
    "cos in 16 bits": ("norm and rope", lambda args: (*args[:3], args[3].bfloat16(), args[4])),
    "sin misaligned": ("joint norm and rope", lambda args: (*args[:-1], _misaligned(args[-1]))),
    "text not contiguous": ("joint norm and rope", lambda args: (_every_other(args[0]), *args[1:])),
    "a not contiguous": ("product", lambda args: (_every_other(args[0]), *args[1:])),
    "a misaligned": ("product", lambda args: (_misaligned(args[0]), *args[1:])),
    "b misaligned": ("product", lambda args: (args[0], _misaligned(args[1]), *args[2:])),
    "a_scale not contiguous": ("product", lambda args: (*args[:2], _every_other(args[2]), *args[3:])),
    "bias not contiguous": ("product", lambda args: (*args[:4], _every_other(args[4]))),
    "out misaligned": (
        "written into columns",
        lambda args: (torch.zeros(2, 20, 513).bfloat16()[..., 1:129], *args[1:]),
    ),
    "residual not contiguous": ("gate and residual", lambda args: (*args[:6], _every_other(args[6]))),
    "y misaligned, down": ("down of two inputs", lambda args: (*args[:2], _misaligned(args[2]))),
    "x misaligned, down": ("down", lambda args: (_misaligned(args[0]), args[1])),
    "x of fp32, down": ("down", lambda args: (args[0].float(), [one.float() for one in args[1]])),
    "a matrix misaligned": ("down", lambda args: (args[0], [args[1][0], _misaligned(args[1][1])])),
    "a matrix not contiguous": ("down", lambda args: (args[0], [_every_other(one) for one in args[1]])),
    "a matrix of fp32": ("down", lambda args: (args[0], [one.float() for one in args[1]])),
    "matrices of two ranks": ("down", lambda args: (args[0], [args[1][0], args[1][1][:8]])),
    "five matrices": ("down", lambda args: (args[0], [args[1][0]] * 5)),
    "another number of matrices": ("down", lambda args: (args[0], args[1][:1])),
    "chunks of two strides, down": ("down, modulated", lambda args: (*args[:3], args[3].contiguous(), *args[4:])),
    "out misaligned, up": ("up", lambda args: (_misaligned(args[0]), *args[1:])),
    "low misaligned": ("up", lambda args: (args[0], _misaligned(args[1]), args[2])),
    "terms on one place": ("up in columns", lambda args: (*args[:3], [0, 56, 160], args[4])),
    "terms in no order": ("up in columns", lambda args: (*args[:2], [args[2][0]] * 3, [64, 0, 128], args[4])),
    "a column that is no multiple of 8": ("up in columns", lambda args: (*args[:2], [args[2][2]] * 3, [0, 33, 160])),
    "another dtype of bias": ("product", lambda args: (*args[:4], args[4].half())),
    "other rows": ("product", lambda args: (args[0][:8], args[1], args[2][:8], *args[3:])),
}


@pytest.mark.parametrize("difference", list(LIKE_A_LEARNED_CALL))
def test_what_is_not_like_a_learned_call_goes_to_python(kernels: Any, difference: str) -> None:
    case, change = LIKE_A_LEARNED_CALL[difference]
    function, args, options = CASES[case]()
    for _ in range(2):
        function(*args, **options)
    assert kernels.in_python == 1
    function(*change(args), **options)
    assert kernels.in_python == 2


def test_a_call_that_copies_is_not_learned(kernels: Any) -> None:
    a, b, a_scale, b_scale = _operands(64)
    for count in (1, 2):
        ck.scaled_mm(ck.pack_int4(a), b, a_scale, b_scale, b_layout=BLOCKS)  # widened by a kernel of its own
        assert kernels.in_python == count
    for count in (3, 4):
        ck.rotate_quantize(_x(4, 513)[:, 1:])
        assert kernels.in_python == count
    for count in (5, 6):
        ck.rotate_quantize(_x(0, 512))
        assert kernels.in_python == count


WRONG: list[tuple[str, Callable[[tuple[Any, ...]], Any], str]] = [
    ("quantize", lambda args: ck.rotate_quantize(*args, clip=1.5), "rotate_quantize: clip must be above 0 and at most"),
    ("quantize", lambda args: ck.rotate_quantize(*args, clip=float("nan")), "rotate_quantize: clip must be above 0"),
    ("quantize", lambda args: ck.rotate_quantize(*args, rule="median"), "rotate_quantize: rule must be one of"),
    ("quantize", lambda args: ck.rotate_quantize(*args, 128), "rotate_quantize: group_size must be one of"),
    ("modulate with chunks", lambda args: ck.rotate_quantize_modulate(*args[:3], -1.0), "eps must be positive, got -1"),
    (
        "modulate with chunks",
        lambda args: ck.rotate_quantize_modulate(args[0].view(7, 2, 512), *args[1:]),
        "scale must have the shape (512,) or (7, 512), got (2, 512)",
    ),
    (
        "silu mul",
        lambda args: ck.rotate_quantize_silu_mul(args[0].reshape(3, 4, 512), args[1]),
        "y must have the shape (3, 4, 512), got (4, 3, 512)",
    ),
    (
        "product",
        lambda args: ck.scaled_mm(args[0], args[1], args[2].view(2, 150), *args[3:], **IN_BLOCKS),
        "a_scale must have the shape (300,), got (2, 150)",
    ),
    ("product", lambda args: ck.scaled_mm(*args[:2], None, *args[3:], **IN_BLOCKS), "a_scale is required here"),
    ("product", lambda args: ck.scaled_mm(*args[:4], args[4][:5], **IN_BLOCKS), "bias must have the shape (128,), got"),
    ("product", lambda args: ck.scaled_mm(*args, torch.int32, **IN_BLOCKS), "out_dtype must be float16, bfloat16 or"),
    ("product", lambda args: ck.scaled_mm(*args, b_layout="hopper"), "the layout must be one of"),
    (
        "down",
        lambda args: ck.low_rank_down(args[0], [args[1][0][:, :256]]),
        "down[0] must have the shape (16, 512), got",
    ),
    ("down, modulated", lambda args: ck.low_rank_down(*args[:5], -1.0), "eps must be positive, got -1"),
    ("down, modulated", lambda args: ck.low_rank_down(*args[:4]), "scale and shift come together, got one of them"),
    ("up", lambda args: ck.low_rank_up(*args, [8]), "up[0] must lie within the columns of out, got 128 columns from 8"),
    ("up", lambda args: ck.low_rank_up(*args, [0], [1.0, 2.0]), "each term has one column and one alpha, got 1 up, 1"),
    (
        "down",
        lambda args: ck.low_rank_down(args[0], [args[1][0], args[1][1].requires_grad_()]),
        "down[1] must not require grad",
    ),
    ("up", lambda args: ck.low_rank_up(*args[:2], [args[2][0].requires_grad_()]), "up[0] must not require grad"),
    ("up", lambda args: ck.low_rank_up(args[0][:, :1].expand(2, 7, 128), *args[1:]), "must not share memory, got"),
    ("up, gated", lambda args: ck.low_rank_up(*args, gate=_x(2, 64)), "gate must have the shape (64,) or (3, 64), got"),
    (
        "product",
        lambda args: ck.scaled_mm(args[0], args[1].to("meta"), *args[2:], **IN_BLOCKS),
        "all tensors must be on one device, got a on cpu, b on meta",
    ),
    (
        "written into columns",
        lambda args: ck.scaled_mm_out(torch.zeros(2, 20, 128, requires_grad=True), *args[1:], **IN_BLOCKS),
        "out must not require grad",
    ),
    (
        "a gate for each sample",
        lambda args: ck.scaled_mm_gate_residual(*args[:5], args[5].repeat(2, 1), args[6], **IN_BLOCKS),
        "gate must have the shape (128,) or (2, 128), got (4, 128)",
    ),
]


@pytest.mark.parametrize(("case", "call", "message"), WRONG, ids=[message for *_, message in WRONG])
def test_a_wrong_call_raises_what_python_raises(
    kernels: Any, capfd: pytest.CaptureFixture[str], case: str, call: Callable[[tuple[Any, ...]], Any], message: str
) -> None:
    function, args, options = CASES[case]()
    for _ in range(2):
        function(*args, **options)
    kernels.take()
    capfd.readouterr()
    with pytest.raises(ValueError, match=re.escape(message)):
        call(args)
    assert kernels.take() == []
    assert capfd.readouterr() == ("", "")


def test_every_type_of_exception_arrives(kernels: Any) -> None:
    with ck.use_backend("triton"), pytest.raises(ck.BackendError, match="the chosen backend cannot run on cpu: triton"):
        ck.rotate_quantize(_x(4, 512))
    wide = make_codes(1, 1 << 17), make_codes(16, 1 << 17), make_scale(1), make_scale(16)
    with pytest.raises(library.KernelError, match="codes of at most K=65536 here"):
        ck.scaled_mm(*wide)
    with pytest.raises(RuntimeError, match=r"convrot::rotate_quantize\(\)"):  # torch's own stays as it is
        torch.ops.convrot.rotate_quantize.default("no tensor")


@pytest.mark.parametrize("learned", [False, True])
def test_an_error_code_becomes_an_exception_with_its_sentence(kernels: Any, learned: bool) -> None:
    x, operands = _x(4, 512), _operands(64)
    if learned:
        ck.rotate_quantize(x)
        ck.scaled_mm(*operands, b_layout=BLOCKS)
    kernels.answer(3)
    with pytest.raises(library.KernelError, match=r"^convrot_rotate_quantize_bf16: it did not work \(code 3\)$"):
        ck.rotate_quantize(x)
    with pytest.raises(library.KernelError, match=r"^sm90_s4s8_64x16x256_bf16: it did not work \(code 3\)$"):
        ck.scaled_mm(*operands, b_layout=BLOCKS)
    kernels.answer(0)
    assert (ck.scaled_mm(*operands, b_layout=BLOCKS) == 1).all()


def test_a_named_backend_serves_its_own_thread_and_no_other(kernels: Any) -> None:
    x, outside, inside, done = _x(4, 512), [], threading.Event(), threading.Event()
    ck.rotate_quantize(x)

    def works() -> None:
        assert inside.wait(30)
        outside.append(ck.rotate_quantize(x)[1])
        done.set()

    thread = threading.Thread(target=works)
    thread.start()
    with ck.use_backend("reference"):
        scale = ck.rotate_quantize(x)[1]
        inside.set()
        assert done.wait(30)
    thread.join(30)
    assert not (scale == 1).any()  # the reference computes
    assert (outside[0] == 1).all()  # the stand-in writes 1
    before = kernels.in_python
    assert (ck.rotate_quantize(x)[1] == 1).all()
    assert kernels.in_python == before


def test_threads_learn_and_run_at_the_same_time(kernels: Any) -> None:
    wrong: list[Any] = []

    def works(seed: int) -> None:
        try:
            for rows in range(1, 200):
                codes, scale = ck.rotate_quantize(_x(rows % 20 + 1, 256, seed=seed))
                assert (codes == 1).all()
                assert (scale == 1).all()
                with pytest.raises(ValueError, match=f"got K=1152, group_size=256, got|got K={1152 + seed * 16}"):
                    ck.rotate_quantize(torch.ones(1, 1152 + seed * 16))
        except BaseException as error:
            wrong.append(error)

    threads = [threading.Thread(target=works, args=(seed,)) for seed in (1, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not wrong


def test_more_shapes_than_are_remembered(kernels: Any) -> None:
    x = _x(5000, 16)
    for rows in range(1, 5000):
        ck.rotate_quantize(x[:rows], 16)
    ck.rotate_quantize(x[:4999], 16)
    assert kernels.in_python == 4999


def _layer(x: Tensor, weight: Tensor, weight_scale: Tensor, gate: Tensor) -> tuple[Tensor, Tensor]:
    codes, scale = ck.rotate_quantize(x * 2)
    whole = torch.zeros(*x.shape[:-1], 512, dtype=x.dtype)
    ck.scaled_mm_out(whole[..., 128:256], codes, weight, scale, weight_scale, b_layout=BLOCKS)
    return whole, ck.scaled_mm_gate_residual(
        codes, weight, scale, weight_scale, None, gate, whole[..., :128], b_layout=BLOCKS
    ) + 1


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_code_takes_it_too(kernels: Any, dynamic: bool) -> None:
    _, weight, _, weight_scale = _operands(1)
    arguments = _x(20, 256), weight, weight_scale, _bias()
    torch._dynamo.reset()
    compiled = torch.compile(_layer, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for _ in range(3):
        whole, y = compiled(*arguments)
    assert kernels.in_python == 3
    assert (y == 2).all()
    assert whole.sum() == 20 * 128


def test_with_gradients_asked_for_it_runs_and_refuses(kernels: Any) -> None:
    x = _x(4, 512).requires_grad_()
    for _ in range(2):
        scale = ck.rotate_quantize(x)[1]
    assert kernels.in_python == 1
    with pytest.raises(NotImplementedError, match="rotate_quantize: not differentiable"):
        scale.sum().backward()


class _Memory(ctypes.Structure):
    names = ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost")
    _fields_ = [(name, ctypes.c_size_t) for name in names]


def _allocated() -> int:
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mallinfo2"):
        pytest.skip("needs a C library that counts")
    libc.mallinfo2.restype = _Memory
    found = libc.mallinfo2()
    return int(found.uordblks + found.hblkhd)


def _refused(*args: Any) -> None:
    try:
        ck.scaled_mm(*args, b_layout="hopper")
    except ValueError:
        return
    raise AssertionError("not refused")


@pytest.mark.parametrize("kind", ["served here", "served in Python", "refused"])
def test_ten_thousand_calls_leave_nothing_behind(kernels: Any, kind: str) -> None:
    x, gate, args = _x(4, 512), _bias(), (*_operands(16), _bias(), torch.bfloat16)
    residual, packed = _x(16, 128), ck.pack_int4(args[0])
    down, up, low = [_x(8, 512), _x(8, 512, seed=1)], [_x(64, 8), _x(32, 8)], _x(16, 16)

    def once() -> None:
        if kind == "served here":
            ck.rotate_quantize(x, clip=0.5)
            ck.scaled_mm(*args, b_layout=BLOCKS)
            ck.scaled_mm_gate_residual(*args[:5], gate, residual, b_layout=BLOCKS)
            ck.low_rank_down(x, down)
            ck.low_rank_up(residual, low, up, [0, 64], None, gate)
        elif kind == "served in Python":
            ck.scaled_mm(packed, *args[1:], b_layout=BLOCKS)
        else:
            _refused(*args)

    held = [tensor for tensor in (x, gate, residual, packed, low, *down, *up, *args) if isinstance(tensor, Tensor)]
    for _ in range(200):
        once()
    gc.collect()
    counts, before = [tensor._use_count() for tensor in held], _allocated()
    for _ in range(10_000 if kind == "served here" else 2_000):
        once()
    assert [tensor._use_count() for tensor in held] == counts
    assert _allocated() - before < 16_000  # an object of 16 bytes a call would be more
    assert kernels.in_python == (5 if kind == "served here" else 2_200)
