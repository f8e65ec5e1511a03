"""The compiled binding: what it serves (binding_scenarios.py, in a process of its own), how it is built and found."""

import os
import re
import shutil
import subprocess
import sys
from ctypes import c_float, c_int, c_int64, c_void_p
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import convrot_kernels as ck
from convrot_kernels import __main__ as command
from convrot_kernels import dispatch
from convrot_kernels.backends import cutlass
from convrot_kernels.backends.cutlass import binding, build, library
from convrot_kernels.testing import assert_equal, make_codes, make_inputs, make_scale

HERE = Path(__file__).parent
TYPES = {"void const*": c_void_p, "void*": c_void_p, "int64_t": c_int64, "int": c_int, "float": c_float}
UNBUILDABLE = binding.why_not_buildable()
BUILDABLE = pytest.mark.skipif(UNBUILDABLE is not None, reason=str(UNBUILDABLE))


@pytest.fixture(autouse=True)
def _fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CONVROT_CACHE", str(tmp_path / "cache"))
    binding.forget()


@BUILDABLE
def test_the_binding_serves_the_ops_in_a_process_of_its_own(tmp_path: Path) -> None:
    sys.path.insert(0, str(HERE))
    try:
        import bound
    finally:
        sys.path.remove(str(HERE))
    binding.compile_to(tmp_path / "binding.so", key="CPU")
    bound.compile_kernels(tmp_path / "kernels.so")
    environment = os.environ | {"PYTHONPATH": str(HERE), "CONVROT_TEST_FOLDER": str(tmp_path), "OMP_NUM_THREADS": "1"}
    environment.pop("PYTEST_XDIST_WORKER", None)
    files = [str(HERE / name) for name in ("binding_scenarios.py", "test_errors.py")]
    pytests = [
        "-m",
        "pytest",
        "-q",
        "-p",
        "bound",
        "-p",
        "no:cacheprovider",
        "-o",
        "addopts=",
        "--import-mode=importlib",
    ]
    result = subprocess.run([sys.executable, *pytests, *files], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-8000:] + result.stderr[-2000:]


def _declared(alias: str) -> list[Any]:
    """The ctypes of a function type in the source."""
    text = " ".join(binding.SOURCE.read_text().split())
    parameters = re.search(rf"using {alias} = int \(\*\)\(([^)]*)\);", text)
    assert parameters, alias
    return [TYPES[parameter.strip().rpartition(" ")[0]] for parameter in parameters[1].split(",")]


def test_the_kernels_signatures_are_the_library_s() -> None:
    assert _declared("Gemm") == list(library._GEMM)
    assert _declared("Gemv") == list(library._PLAIN["convrot_gemv"])
    assert _declared("Attended") == list(library._PLAIN["convrot_norm_rope"])
    assert _declared("AttendedFp8") == list(library._PLAIN["convrot_norm_rope_fp8"])
    assert _declared("Quantizer") == list(library._PLAIN["convrot_rotate_quantize_bf16"])


def test_dtype_codes_are_those_of_the_kernels() -> None:
    codes = re.compile(r"k(Float32|Float16|BFloat16) = (\d)")
    header = (build.HERE / "csrc" / "abi.h").read_text()
    assert codes.findall(binding.SOURCE.read_text()) == codes.findall(header)


# found


def test_an_old_torch_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "__version__", "2.9.1+cu128")
    monkeypatch.setattr(binding, "_stream_function", lambda: 1)
    assert binding.why_not() == "needs torch 2.10 or newer, found 2.9.1+cu128"
    assert binding.why_not_buildable() == binding.why_not()


def test_a_torch_without_cuda_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(binding, "_stream_function", lambda: None)
    assert binding.why_not() == "needs a build of torch with CUDA"


@BUILDABLE
def test_built_once_then_found_until_it_is_damaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(binding, "_stream_function", lambda: 1)
    assert binding.why_not() == "not built; run `python -m convrot_kernels build`"
    made = binding.build_binding()
    assert made == tmp_path / "cache" / binding.name()
    changed = made.stat().st_mtime_ns
    assert binding.build_binding().stat().st_mtime_ns == changed
    binding.forget()
    assert binding.why_not() is None
    made.write_bytes(made.read_bytes()[:1000])
    binding.forget()
    assert binding.why_not() == f"{made} is not the file that was built; run `python -m convrot_kernels build`"
    binding.build_binding()
    binding.forget()
    assert binding.why_not() is None


def test_what_cannot_be_loaded_leaves_python_to_serve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(binding, "_loaded", None)
    garbage = tmp_path / "garbage.so"
    garbage.write_bytes(b"not ELF at all")
    binding.register(garbage, None)
    assert binding._loaded is None


# built


@BUILDABLE
def test_the_command_builds_it_into_the_folder_of_the_library(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(build, "build", lambda arch, jobs, folder: Path(__file__))
    assert command.main(["build", "--arch", "sm_90a", "--output", str(tmp_path)]) == 0
    assert str(tmp_path / binding.name()) in capsys.readouterr().out
    assert build.defect(tmp_path / binding.name()) is None


@pytest.mark.parametrize("missing", ["g++", "headers"])
def test_without_a_compiler_or_headers_the_command_goes_on_and_says_so(
    missing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(build, "build", lambda arch, jobs, folder: Path(__file__))
    if missing == "g++":
        monkeypatch.setattr(shutil, "which", lambda program: None)
    else:
        monkeypatch.setattr(shutil, "which", lambda program: program)
        monkeypatch.setattr(binding, "_torch_folder", lambda part: tmp_path)
    assert command.main(["build", "--arch", "sm_90a"]) == 0
    said = {"g++": "g\\+\\+ is not on PATH", "headers": "torch comes without its headers"}[missing]
    assert re.search(f"^build: without the binding, .*{said}", capsys.readouterr().err)


def test_blocks_that_name_a_backend_are_counted() -> None:
    with dispatch.use_backend("reference"), dispatch.use_backend("auto"), dispatch.use_backend("reference"):
        assert dispatch.named.value == 2
    with pytest.raises(ZeroDivisionError), dispatch.use_backend("reference"):
        raise ZeroDivisionError
    assert dispatch.named.value == 0


# on a GPU: built beforehand, and not in the empty cache that the other tests see


@pytest.fixture
def in_python(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The calls that Python serves for the binding."""
    monkeypatch.undo()  # the cache of the user
    library.forget()
    if (why := cutlass.why_not(torch.device("cuda", 0)) or binding.why_not()) is not None:
        pytest.skip(why)
    if torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("only sm_90a's kernels read all that is given here as it lies")
    calls, serve = list[Any](), binding.serve
    monkeypatch.setattr(binding, "serve", lambda *arguments: (calls.append(arguments), serve(*arguments))[1])
    return calls


def _layer(x: Tensor, weight: Tensor, weight_scale: Tensor, gate: Tensor, layout: str) -> tuple[Tensor, ...]:
    """Every op, each on what a kernel reads as it lies; K = 1024, N = 512."""
    codes, scale = ck.rotate_quantize(x)
    scaled = ck.scaled_mm(codes, weight, scale, weight_scale, gate[0], b_layout=layout)
    whole = torch.zeros(*x.shape[:-1], 1024, dtype=x.dtype, device=x.device)
    ck.scaled_mm_out(whole[..., 512:], codes, weight, scale, weight_scale, b_layout=layout)
    gated = ck.scaled_mm_gate_residual(codes, weight, scale, weight_scale, None, gate, scaled, b_layout=layout)
    vectors = x[:, 0], x[:, 1]
    quantized = (
        *ck.rotate_quantize_modulate(x, *vectors),
        *ck.rotate_quantize_gelu(whole, packed=True),
        *ck.rotate_quantize_silu_mul(*whole.chunk(2, dim=-1)),
        *ck.rotate_quantize_cat_gelu(gated, x),
    )
    return (codes, scale, scaled, whole, gated, *quantized)


def _arguments(*rows: int, device: str = "cuda:0") -> tuple[Any, ...]:
    layout = ck.preferred_layout(device)
    weight = ck.prepare_weight(ck.pack_int4(make_codes(512, 1024, device=device)), layout)
    return (
        make_inputs(2, *rows, 1024, device=device),
        weight,
        make_scale(512, device=device),
        make_inputs(2, 512, device=device),
        layout,
    )


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [3, 40, 300])
def test_on_a_gpu_it_does_what_python_does(in_python: list[Any], rows: int) -> None:
    arguments = _arguments(rows)
    with ck.use_backend("cutlass"):
        expected = _layer(*arguments)
    _layer(*arguments)
    in_python.clear()
    actual = _layer(*arguments)
    assert in_python == []
    for got, wanted in zip(actual, expected, strict=True):
        assert_equal(got, wanted)


@pytest.mark.gpu
def test_on_a_gpu_it_uses_the_current_stream_and_can_be_captured(in_python: list[Any]) -> None:
    arguments = _arguments(40)
    expected = _layer(*arguments)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    in_python.clear()
    with torch.cuda.graph(graph):  # a launch on another stream would end the capture with an error
        captured = _layer(*arguments)
    assert in_python == []
    for result in captured:
        result.zero_()
    graph.replay()
    for got, wanted in zip(captured, expected, strict=True):
        assert_equal(got, wanted)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_on_the_gpu_that_is_not_current_it_runs_there(in_python: list[Any]) -> None:
    arguments = _arguments(40, device="cuda:1")
    expected = _layer(*arguments)
    in_python.clear()
    actual = _layer(*arguments)
    assert in_python == []
    assert torch.cuda.current_device() == 0
    for got, wanted in zip(actual, expected, strict=True):
        assert_equal(got, wanted)
