"""The build and its cache, with a stand-in for nvcc that logs each call and writes what it was given."""

import json
import os
import re
import shutil
import stat
import subprocess
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest
import torch

from convrot_kernels import __main__ as command
from convrot_kernels.backends.cutlass import build, library
from convrot_kernels.backends.cutlass.build import BuildError, find, source_key, units
from convrot_kernels.backends.cutlass.variants import ARCHS, of_arch

ARCH = "sm_80"
NVCC = f"""#!{sys.executable} -IS
import os, sys
arguments = sys.argv[1:]
log = os.environ["FAKE_NVCC_LOG"]
with open(log, "a") as handle:
    handle.write(" ".join(arguments) + "\\n")
if os.environ.get("FAKE_NVCC_FAILS", "nothing") in " ".join(arguments):
    sys.stderr.write("error: identifier is undefined\\n")
    sys.exit(2)
made = arguments[arguments.index("-o") + 1]
inputs = [a for a in arguments if a.endswith((".cu", ".o")) and a != made]
with open(made, "w") as handle:
    handle.write("".join(open(name).read() for name in inputs))
"""


@pytest.fixture
def toolkit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A stand-in toolkit, an empty cache; -> the log of compiler calls."""
    nvcc = tmp_path / "cuda" / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True)
    nvcc.write_text(NVCC)
    nvcc.chmod(nvcc.stat().st_mode | stat.S_IXUSR)
    cutlass = tmp_path / "cutlass_library"
    cutlass.mkdir()
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "cuda"))
    monkeypatch.setenv("CONVROT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("FAKE_NVCC_LOG", str(tmp_path / "log"))
    monkeypatch.setattr(build, "_package_folder", lambda name: cutlass if name == "cutlass_library" else None)
    monkeypatch.setattr(build, "version", lambda package: build.CUTLASS_VERSION)
    return tmp_path / "log"


def _calls(log: Path) -> list[str]:
    return log.read_text().splitlines() if log.exists() else []


def _quiet(done: int, total: int, name: str, seconds: float) -> None:
    pass


def test_one_call_per_unit_and_one_link_then_none(toolkit: Path) -> None:
    steps = []
    library = build.build(ARCH, 2, report=lambda done, total, name, seconds: steps.append((done, total)))
    count = len(units(ARCH))
    assert steps == [(done, count) for done in range(1, count + 1)]
    assert len(_calls(toolkit)) == count + 1
    assert find(ARCH) == (library, "")
    assert build.build(ARCH, report=_quiet) == library
    assert len(_calls(toolkit)) == count + 1
    assert not [path for path in library.parent.iterdir() if path.name.startswith("tmp")]


def test_every_call_names_its_arch_and_forbids_fused_multiplication(toolkit: Path) -> None:
    build.build(ARCH, report=_quiet)
    *compiled, linked = _calls(toolkit)
    assert all("-gencode=arch=compute_80,code=sm_80" in call and "-fmad=false" in call for call in compiled)
    assert sum("-DCONVROT_INPUT=" in call for call in compiled) == 3
    assert "-shared" in linked
    assert "-cudart static" in linked


def test_units_hold_every_variant_of_the_arch_and_what_is_not_generated() -> None:
    for arch in ARCHS:
        names = [unit.name for unit in units(arch)]
        assert names[: -len(names) + len(of_arch(arch))] == [variant.name for variant in of_arch(arch)]
        assert {
            "gemv",
            "norm_rope",
            "low_rank",
            "abi",
            "rotate_quantize_bf16",
            "rotate_quantize_fp16",
            "rotate_quantize_fp32",
        } <= set(names)


def test_the_key_changes_with_arch_flags_version_text_and_abi(monkeypatch: pytest.MonkeyPatch) -> None:
    keys = {source_key(arch) for arch in ARCHS}
    assert len(keys) == len(ARCHS)

    def key_with(name: str, value: object) -> str:
        with monkeypatch.context() as patch:
            patch.setattr(build, name, value)
            source_key.cache_clear()
            return source_key(ARCH)

    changed = {
        key_with("FLAGS", (*build.FLAGS, "-lineinfo")),
        key_with("CUTLASS_VERSION", "4.2.1"),
        key_with("ABI_VERSION", build.ABI_VERSION + 1),
        key_with("_headers", lambda text: "// another header"),
        key_with("generate", lambda variant: f"// {variant.name}"),
    }
    source_key.cache_clear()
    assert len(changed) == 5
    assert source_key(ARCH) not in changed


def test_a_unit_s_key_depends_on_the_headers_that_it_includes_alone() -> None:
    headers = {unit.name: build._headers(unit.text) for arch in ("sm_80", "sm_90a") for unit in units(arch)}
    marks = {"sm90_gemm.cuh": "NibbleOrder", "sm90_epilogue.cuh": "OptionalSource", "abi.h": "enum Error"}
    assert all(mark in headers["sm90_s4s8_128x128x128_bf16"] for mark in marks.values())
    assert "enum Error" in headers["sm80_s4s4_128x256x128_bf16"]
    assert not any(mark in headers["gemv"] for mark in ("NibbleOrder", "OptionalAuxLoad", "left_entry"))
    assert "fragments16" in headers["gemv"]
    assert "left_entry" in headers["rotate_quantize_fp32"]


@pytest.mark.parametrize("damage", ["truncated", "manifest", "empty manifest", "no manifest", "no library"])
def test_a_broken_entry_is_not_found_says_so_and_is_rebuilt(toolkit: Path, damage: str) -> None:
    library = build.build(ARCH, report=_quiet)
    manifest = library.with_suffix(".json")
    if damage == "truncated":
        library.write_bytes(library.read_bytes()[:100])
    elif damage == "no library":
        library.unlink()
    elif damage == "no manifest":
        manifest.unlink()
    else:
        manifest.write_text("{}" if damage == "empty manifest" else "{")
    path, why = find(ARCH)
    assert path is None
    assert f"run `python -m convrot_kernels build --arch {ARCH}`" in why
    assert ("no compiled library" if damage == "no library" else str(library)) in why
    before = len(_calls(toolkit))
    assert build.build(ARCH, report=_quiet) == library
    assert len(_calls(toolkit)) == before + 1  # the objects are kept: only the link
    assert find(ARCH) == (library, "")


def test_concurrent_processes_build_once(toolkit: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from convrot_kernels.backends.cutlass import build\n"
        "folder = Path(sys.argv[1])\n"
        "build._package_folder = lambda name: folder if name == 'cutlass_library' else None\n"
        "build.version = lambda package: build.CUTLASS_VERSION\n"
        f"print(build.build({ARCH!r}, 2, report=lambda *step: None))"
    )
    arguments = [sys.executable, "-c", code, str(toolkit.parent / "cutlass_library")]
    running = [subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True, env=os.environ) for _ in range(3)]
    said = {process.communicate(timeout=120)[0] for process in running}
    assert [process.returncode for process in running] == [0, 0, 0]
    assert len(said) == 1
    assert len(_calls(toolkit)) == len(units(ARCH)) + 1
    assert find(ARCH)[0] == Path(said.pop().strip())


def test_a_compiler_error_is_quoted_and_leaves_nothing(toolkit: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_NVCC_FAILS", "gemv.cu")
    with pytest.raises(BuildError, match=r"gemv does not compile \(exit code 2\):\nerror: identifier is undefined"):
        build.build(ARCH, report=_quiet)
    assert find(ARCH)[0] is None
    monkeypatch.delenv("FAKE_NVCC_FAILS")
    build.build(ARCH, report=_quiet)
    assert find(ARCH)[0] is not None


def test_a_folder_of_its_own_for_wheels(toolkit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "SHIPPED", tmp_path / "lib")
    library = build.build(ARCH, folder=tmp_path / "lib", report=_quiet)
    assert library.parent == tmp_path / "lib"
    assert json.loads(library.with_suffix(".json").read_text())["arch"] == ARCH
    assert find(ARCH) == (library, "")


def test_missing_pieces_are_named(toolkit: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "version", lambda package: "4.1.0")
    with pytest.raises(BuildError, match=r"nvidia-cutlass 4\.2\.0\.0 is needed, found 4\.1\.0"):
        build.build(ARCH, report=_quiet)
    monkeypatch.setattr(build, "version", lambda package: build.CUTLASS_VERSION)
    monkeypatch.delenv("CUDA_HOME")
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(BuildError, match=r"nvcc is neither in \$CUDA_HOME.*pip install convrot-kernels\[build\]"):
        build.build(ARCH, report=_quiet)
    monkeypatch.setenv("CUDA_HOME", str(toolkit.parent / "cuda"))
    with pytest.raises(BuildError, match="install g\\+\\+"):
        build.build(ARCH, report=_quiet)
    monkeypatch.setattr(build, "_package_folder", lambda name: None)
    with pytest.raises(BuildError, match="CUTLASS headers are missing"):
        build.build(ARCH, report=_quiet)


def test_the_manifest_tells_the_seconds_of_every_unit(toolkit: Path) -> None:
    library = build.build(ARCH, report=_quiet)
    seconds = json.loads(library.with_suffix(".json").read_text())["units"]
    assert set(seconds) == {unit.name for unit in units(ARCH)}
    assert all(value >= 0 for value in seconds.values())


def test_the_emulated_library_is_compiled_for_9_0_and_found_by_nobody(toolkit: Path, tmp_path: Path) -> None:
    spec = spec_from_file_location("emulated", Path(__file__).with_name("emulated.py"))
    assert spec is not None
    assert spec.loader is not None
    emulated = module_from_spec(spec)
    spec.loader.exec_module(emulated)
    made = emulated.build_emulated(tmp_path / "emulated", 2)
    assert made.name == f"convrot-{ARCH}-{source_key(ARCH)}.so"
    calls = _calls(toolkit)
    assert len(calls) == len(units(ARCH)) + 1
    assert all("compute_90,code=sm_90" in call and "sm_80 " not in f"{call} " for call in calls[:-1])
    assert find(ARCH)[0] is None
    build.build(ARCH, report=_quiet)
    assert len(_calls(toolkit)) == 2 * len(calls)  # no object is shared


def test_an_unknown_arch_is_refused_before_anything_runs(toolkit: Path) -> None:
    with pytest.raises(BuildError, match=r"no code for sm_75; use one of sm_80, sm_90a"):
        build.build("sm_75")
    assert not _calls(toolkit)


def test_the_command_shows_progress_and_the_library(toolkit: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["build", "--arch", ARCH, "--jobs", "2"]) == 0
    said = capsys.readouterr()
    assert said.out.startswith(str(find(ARCH)[0]))
    assert re.search(r"^\[#{30}\] (\d+)/\1 ", said.err.splitlines()[-1])


def test_the_command_without_a_gpu_asks_for_an_arch(
    toolkit: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert command.main(["build"]) == 1
    assert "name one, as in `python -m convrot_kernels build --arch sm_90a`" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
def test_nvcc_builds_a_library_that_loads_and_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    try:
        build.find_toolkit()
    except BuildError as error:
        pytest.skip(str(error))
    variant = next(variant for variant in of_arch(ARCH) if variant.weight == "s8")
    wanted = [unit for unit in units(ARCH) if unit.name in (variant.name, *build._PLAIN, "rotate_quantize_bf16")]
    monkeypatch.setenv("CONVROT_CACHE", str(tmp_path))
    monkeypatch.setattr(build, "units", lambda arch: tuple(wanted))
    monkeypatch.setattr(library, "of_arch", lambda arch: (variant,))
    for name in ("fp16", "fp32"):
        monkeypatch.delitem(library._PLAIN, f"convrot_rotate_quantize_{name}")
    source_key.cache_clear()
    try:
        ours = library.Library(build.build(ARCH, 2, report=_quiet), ARCH)
    finally:
        source_key.cache_clear()
    nothing = (None, 0, None, 0, None, 0)
    with pytest.raises(library.KernelError, match="a shape or an option that it has no code for"):
        ours.call("convrot_gemv", None, 2, None, 3, None, None, *nothing, None, 2, 16, 1, 16, 33, None)
    with pytest.raises(library.KernelError, match="not aligned as the kernel needs"):
        ours.call(variant.name, *(None,) * 4, *nothing, None, 15, 16, 15, 64, 0, 0, None)
    if not torch.cuda.is_available():
        with pytest.raises(library.KernelError, match=r"code 1\d\d\d"):  # what the CUDA runtime says
            ours.call("convrot_gemv", None, 2, None, 3, None, None, *nothing, None, 2, 16, 1, 16, 32, None)
