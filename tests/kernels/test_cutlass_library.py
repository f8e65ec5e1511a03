"""What the launcher says when it cannot run, and that its C signatures are those of the sources."""

import re
import shutil
import subprocess
from collections.abc import Iterator
from ctypes import c_float, c_int, c_int64, c_void_p
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from convrot_kernels.backends import cutlass
from convrot_kernels.backends.cutlass import build, library, products
from convrot_kernels.backends.cutlass.library import KernelError, Library, LibraryError
from convrot_kernels.backends.cutlass.variants import of_arch

ARCH = "sm_90a"
TYPES = {"void const*": c_void_p, "void*": c_void_p, "int64_t": c_int64, "int": c_int, "float": c_float}
TYPES |= {"void const* const*": c_void_p, "int const*": c_void_p}  # lists
NEEDS_GXX = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    library.forget()
    yield
    library.forget()
    library._arch.cache_clear()


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that says it has one H200."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    library._arch.cache_clear()


def _declared(source: str, function: str) -> list[Any]:
    """The ctypes of a C function's parameters, read from its source."""
    text = " ".join(re.sub(r"\\\n|//.*", " ", (build.HERE / "csrc" / source).read_text()).split())
    parameters = re.search(re.escape(function) + r"\s*\)?\(([^)]*)\)\s*\{", text)
    assert parameters, f"{function} in {source}"
    return [
        TYPES[re.sub(r"(?<=[\s*])\w+$|^int \w+$", "", p.strip()).strip() or "int"] for p in parameters[1].split(",")
    ]


@pytest.mark.parametrize("source", ["sm90_gemm.cuh", "sm80_gemm.cuh"])
def test_the_gemm_signature_is_the_source_s(source: str) -> None:
    assert list(library._GEMM) == _declared(source, "CONVROT_EXPORT int name")


@pytest.mark.parametrize("function", ["convrot_gemv", "convrot_gemv_joined", "convrot_unpack"])
def test_the_gemv_signatures_are_the_source_s(function: str) -> None:
    assert list(library._PLAIN[function]) == _declared("gemv.cu", f"CONVROT_EXPORT int {function}")


@pytest.mark.parametrize("function", ["convrot_norm_rope", "convrot_norm_rope_fp8", "convrot_widen_fp8"])
def test_the_signatures_around_attention_are_the_source_s(function: str) -> None:
    assert list(library._PLAIN[function]) == _declared("norm_rope.cu", f"CONVROT_EXPORT int {function}")


def test_the_quantizer_s_signature_is_the_source_s() -> None:
    declared = _declared(
        "rotate_quantize.cu", "CONVROT_EXPORT int CONVROT_JOIN(convrot_rotate_quantize_, CONVROT_INPUT"
    )
    assert list(library._PLAIN["convrot_rotate_quantize_bf16"]) == declared


def test_dtype_codes_are_the_source_s() -> None:
    text = (build.HERE / "csrc" / "abi.h").read_text()
    codes = dict(re.findall(r"k(Float32|Float16|BFloat16) = (\d)", text))
    names = {torch.float32: "Float32", torch.float16: "Float16", torch.bfloat16: "BFloat16"}
    assert {names[dtype]: str(code) for dtype, code in products.DTYPES.items()} == codes


# sentences


def test_on_the_cpu_it_needs_a_gpu() -> None:
    assert cutlass.why_not(torch.device("cpu")) == "needs an NVIDIA GPU, got cpu"


def test_without_a_driver_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "torch sees no GPU" in str(cutlass.why_not(torch.device("cuda", 0)))


def test_a_rocm_build_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "hip", "6.0")
    assert "ROCm" in str(cutlass.why_not(torch.device("cuda", 0)))


def test_without_a_library_it_names_the_command(hopper: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CONVROT_CACHE", str(tmp_path))
    assert cutlass.why_not(torch.device("cuda", 0)) == (
        f"no compiled library for sm_90a in {tmp_path}; run `python -m convrot_kernels build --arch sm_90a`"
    )
    assert "there is no cuda:7" in str(cutlass.why_not(torch.device("cuda", 7)))


def test_a_gpu_without_code_is_named_with_those_that_have(hopper: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (7, 5))
    why = str(cutlass.why_not(torch.device("cuda", 0)))
    assert why == "no code for compute capability 7.5; there is for 8.x, 9.0, 10.0, 10.3, 11.0, 12.0 and 12.1"


def test_an_answer_holds_until_forgotten(hopper: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CONVROT_CACHE", str(tmp_path))
    first = cutlass.why_not(torch.device("cuda", 0))
    monkeypatch.setattr(build, "find", lambda arch: (None, "something else"))
    assert cutlass.why_not(torch.device("cuda", 0)) == first
    library.forget()
    assert cutlass.why_not(torch.device("cuda", 0)) == "something else"


def _place(folder: Path, made: Path) -> Path:
    """Put a file where the library of ARCH is expected, with a matching manifest."""
    import hashlib
    import json

    target = folder / build._name(ARCH)
    shutil.copy(made, target)
    digest = hashlib.sha256(target.read_bytes()).hexdigest()
    target.with_suffix(".json").write_text(json.dumps({"sha256": digest}))
    return target


def test_a_file_that_is_no_library_gives_a_sentence(
    hopper: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CONVROT_CACHE", str(tmp_path))
    garbage = tmp_path / "garbage"
    garbage.write_bytes(b"not ELF at all")
    placed = _place(tmp_path, garbage)
    why = str(cutlass.why_not(torch.device("cuda", 0)))
    assert why.startswith(f"{placed} cannot be loaded")
    assert "run `python -m convrot_kernels build --arch sm_90a`" in why


def _compile(folder: Path, text: str) -> Path:
    source, made = folder / "fake.cpp", folder / "fake.so"
    source.write_text(text)
    subprocess.run(["g++", "-shared", "-fPIC", "-o", str(made), str(source)], check=True)
    return made


def _fake(folder: Path, *, key: str | None = None, abi: int = build.ABI_VERSION, result: int = 0) -> Path:
    """A library with all of our names; every function returns `result`."""
    names = [*library._PLAIN, *(variant.name for variant in of_arch(ARCH))]
    functions = "\n".join(f"int {name}() {{ return {result}; }}" for name in names)
    head = f"""extern "C" {{ int convrot_abi_version() {{ return {abi}; }}
    const char* convrot_source_key() {{ return "{key or build.source_key(ARCH)}"; }}
    const char* convrot_error(int code) {{ return "it did not work"; }}\n"""
    return _compile(folder, head + functions + "\n}")


@NEEDS_GXX
def test_a_foreign_library_gives_a_sentence(hopper: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CONVROT_CACHE", str(tmp_path))
    _place(tmp_path, _compile(tmp_path, 'extern "C" int answer() { return 42; }'))
    assert "is not a library of this project" in str(cutlass.why_not(torch.device("cuda", 0)))
    with pytest.raises(LibraryError, match="is not a library of this project"):
        library.of(torch.device("cuda", 0))


@NEEDS_GXX
@pytest.mark.parametrize("other", [{"key": "0123456789abcdef"}, {"abi": build.ABI_VERSION + 1}])
def test_a_library_of_other_sources_gives_a_sentence(tmp_path: Path, other: dict[str, Any]) -> None:
    with pytest.raises(LibraryError, match="was built from other sources"):
        Library(_fake(tmp_path, **other), ARCH)


@NEEDS_GXX
def test_an_error_code_becomes_an_exception_with_its_sentence(tmp_path: Path) -> None:
    with pytest.raises(KernelError, match=r"convrot_unpack: it did not work \(code 3\)"):
        Library(_fake(tmp_path, result=3), ARCH).call("convrot_unpack", None, None, 1, None)


@NEEDS_GXX
def test_a_good_library_is_ready(hopper: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CONVROT_CACHE", str(tmp_path))
    _place(tmp_path, _fake(tmp_path))
    assert cutlass.why_not(torch.device("cuda", 0)) is None
    assert library.of(torch.device("cuda", 0))[0] == ARCH


def test_importing_the_backend_touches_neither_cuda_nor_the_cache(tmp_path: Path) -> None:
    code = "import torch, convrot_kernels.backends.cutlass as c; assert not torch.cuda.is_initialized()"
    environment = {"CONVROT_CACHE": str(tmp_path / "cache"), "PATH": "/usr/bin:/bin"}
    import sys

    subprocess.run([sys.executable, "-c", code], check=True, env=environment)
    assert not (tmp_path / "cache").exists()


# the output as rows


@pytest.mark.parametrize(
    ("out", "stride"),
    [
        (torch.empty(6, 8), 8),
        (torch.empty(2, 3, 8), 8),
        (torch.empty(2, 3, 20)[..., 4:12], 20),
        (torch.empty(6, 20)[::2, :8], 40),
        (torch.empty(1, 5, 8), 8),
        (torch.empty(8), 8),
        (torch.empty(3, 0, 8), None),
        (torch.empty(3, 2, 8).transpose(0, 1), None),
        (torch.empty(4, 5, 8)[:, :3], None),
        (torch.empty(8, 6).t(), None),
        (torch.empty(8).expand(3, 8), None),
    ],
)
def test_rows_of_an_output_are_a_view_or_none(out: Tensor, stride: int | None) -> None:
    rows = products._as_rows(out)
    if stride is None:
        assert rows is None or rows.numel() == 0
    else:
        assert rows is not None
        assert (rows.stride(0), rows.data_ptr(), rows.numel()) == (stride, out.data_ptr(), out.numel())
        out.copy_(torch.arange(out.numel()).view(out.shape))
        assert rows.flatten().tolist() == list(range(out.numel()))
