"""Text -> nvcc -> one shared library per arch, in a cache. Never at import, never in a forward: only when asked.

A library is named by the hash of everything that goes into it, beside a manifest with its own checksum: whatever was
half-written, truncated or built from other sources is not found, says why, and is built again. One lock per library;
files appear by renaming. Objects are kept, so an interrupted build goes on where it stopped.
"""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock

from convrot_kernels.backends.cutlass.generate import CUTLASS_VERSION, generate
from convrot_kernels.backends.cutlass.variants import ARCHS, arch_of, of_arch

ABI_VERSION = 1  # of the C functions' signatures
COMMAND = "python -m convrot_kernels build"
HERE = Path(__file__).parent
SHIPPED = HERE / "lib"  # where a wheel carries its libraries
# -fmad=false: every step of the epilogue is rounded on its own; a static cudart: no toolkit at run time
FLAGS = (
    *("-std=c++17", "-O3", "-DNDEBUG", "-fmad=false", "--expt-relaxed-constexpr", "--expt-extended-lambda"),
    *("-cudart", "static", "-Xcompiler=-fPIC,-fvisibility=hidden"),
)
_INCLUDE = re.compile(r'^#include "([^"]+)"', re.MULTILINE)
_INPUTS = ("bf16", "fp16", "fp32")  # rotate_quantize.cu is compiled once for each
_PLAIN = ("gemv", "norm_rope", "low_rank", "abi")


class BuildError(RuntimeError):
    """The library cannot be built here; the message says what is missing or what the compiler said."""


@dataclass(frozen=True)
class Unit:
    """One object file: its text and what is defined on the command line."""

    name: str
    text: str
    defines: tuple[str, ...] = ()


@dataclass(frozen=True)
class Toolkit:
    """Where nvcc is, with whatever it does not find by itself."""

    nvcc: Path
    includes: tuple[Path, ...]
    libraries: tuple[Path, ...]


# what is built


def units(arch: str) -> tuple[Unit, ...]:
    """Everything in the library of `arch`, the slowest to compile first."""
    gemms = [Unit(variant.name, generate(variant)) for variant in of_arch(arch)]
    quantizer = (HERE / "csrc" / "rotate_quantize.cu").read_text()
    inputs = [Unit(f"rotate_quantize_{name}", quantizer, (f"-DCONVROT_INPUT={name}",)) for name in _INPUTS]
    plain = [
        Unit(name, (HERE / "csrc" / f"{name}.cu").read_text()) for name in ("gemv", "norm_rope", "low_rank", "abi")
    ]
    return (*gemms, *inputs, *plain)


def _headers(text: str) -> str:
    """The text of every header of ours that `text` includes, at any depth: a change elsewhere recompiles nothing."""
    found: dict[str, str] = {}
    todo = _INCLUDE.findall(text)
    while todo:
        name = todo.pop()
        path = HERE / "csrc" / name
        if name not in found and path.exists():
            found[name] = path.read_text()
            todo += _INCLUDE.findall(found[name])
    return "".join(found[name] for name in sorted(found))


def digest(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def _unit_key(unit: Unit, arch: str) -> str:
    return digest(unit.name, unit.text, _headers(unit.text), *unit.defines, *FLAGS, CUTLASS_VERSION, arch)


@lru_cache(maxsize=len(ARCHS))
def source_key(arch: str) -> str:
    """The hash of text, flags, CUTLASS version and arch: part of the library's name, and answered by the library."""
    return digest(str(ABI_VERSION), *(_unit_key(unit, arch) for unit in units(arch)))


# where it lies


def cache_folder() -> Path:
    """$CONVROT_CACHE, else convrot-kernels in the user's cache folder."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("CONVROT_CACHE") or Path(base) / "convrot-kernels")


def _name(arch: str) -> str:
    return f"convrot-{arch}-{source_key(arch)}.so"


def defect(library: Path) -> str | None:
    """None for a library as it was built, else what is wrong with the entry."""
    if not library.exists():
        return "missing"
    manifest = library.with_suffix(".json")
    if not manifest.exists():
        return "without its manifest"
    try:
        expected = json.loads(manifest.read_text())["sha256"]
    except (ValueError, KeyError, TypeError):
        return "with a broken manifest"
    return None if hashlib.sha256(library.read_bytes()).hexdigest() == expected else "not the file that was built"


def find_file(name: str) -> tuple[Path | None, str]:
    """-> (the file, "") or (None, what is wrong with it, "" if it is nowhere): in the package, then in the cache."""
    defects = {path: defect(path) for path in (SHIPPED / name, cache_folder() / name)}
    for path, wrong in defects.items():
        if wrong is None:
            return path, ""
    return None, "; ".join(f"{path} is {wrong}" for path, wrong in defects.items() if wrong != "missing")


def find(arch: str) -> tuple[Path | None, str]:
    """-> (the library for `arch`, "") or (None, why there is none)."""
    path, broken = find_file(_name(arch))
    why = broken or f"no compiled library for {arch} in {cache_folder()}"
    return path, "" if path else f"{why}; run `{COMMAND} --arch {arch}`"


# with what


def _package_folder(name: str) -> Path | None:
    spec = find_spec(name)
    return Path(next(iter(spec.submodule_search_locations))) if spec and spec.submodule_search_locations else None


def find_toolkit() -> Toolkit:
    """nvcc of $CUDA_HOME, of PATH, or of the PyPI packages; CUTLASS headers of the nvidia-cutlass package."""
    cutlass = _package_folder("cutlass_library")
    remedy = "install the build requirements with `pip install convrot-kernels[build]`"
    if cutlass is None:
        raise BuildError(f"build: the CUTLASS headers are missing: {remedy}")
    try:
        found = version("nvidia-cutlass")
    except PackageNotFoundError:
        found = "unknown"
    if found != CUTLASS_VERSION:
        raise BuildError(f"build: nvidia-cutlass {CUTLASS_VERSION} is needed, found {found}: {remedy}")
    headers = (cutlass / "source" / "include", cutlass / "source" / "tools" / "util" / "include")
    on_path = shutil.which("nvcc")
    homes = [Path(home) for home in (os.environ.get("CUDA_HOME"),) if home]
    homes += [Path(on_path).resolve().parents[1]] if on_path else []
    wheels = _package_folder("nvidia")
    homes += sorted(wheels.glob("cu*"), reverse=True) if wheels else []
    for home in homes:
        if (nvcc := home / "bin" / "nvcc").exists():
            if shutil.which("g++") is None:
                raise BuildError("build: nvcc needs a host compiler and g++ is not on PATH: install g++")
            return Toolkit(nvcc, (*headers, home / "include"), (home / "lib64", home / "lib"))
    raise BuildError(f"build: nvcc is neither in $CUDA_HOME, nor on PATH, nor in a PyPI package: {remedy}")


def _gencode(arch: str) -> str:
    return f"-gencode=arch={arch.replace('sm', 'compute')},code={arch}"


def run_compiler(command: list[str], what: str) -> None:
    try:
        result = subprocess.run(command, capture_output=True, text=True)
    except OSError as error:
        raise BuildError(f"build: {what}: {command[0]} does not run: {error}") from error
    if result.returncode:
        said = "\n".join((result.stderr or result.stdout).splitlines()[:20])
        raise BuildError(f"build: {what} does not compile (exit code {result.returncode}):\n{said}")


def compile_unit(unit: Unit, arch: str, toolkit: Toolkit, folder: Path, *, more_flags: tuple[str, ...] = ()) -> Path:
    """-> the object file in `folder`, named by its key; one that is there already is taken as it is."""
    identity = (
        (f"-DCONVROT_ABI={ABI_VERSION}", f'-DCONVROT_SOURCE_KEY="{source_key(arch)}"') if unit.name == "abi" else ()
    )
    target = folder / f"{unit.name}-{arch}-{digest(_unit_key(unit, arch), *identity, *more_flags)}.o"
    if target.exists():
        return target
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        source, made = Path(scratch) / f"{unit.name}.cu", Path(scratch) / "made.o"
        source.write_text(unit.text)
        includes = [f"-I{path}" for path in (HERE / "csrc", *toolkit.includes)]
        options = [*FLAGS, *more_flags, *unit.defines, *identity, *includes, _gencode(arch)]
        run_compiler([str(toolkit.nvcc), *options, "-c", str(source), "-o", str(made)], unit.name)
        made.replace(target)
    return target


# building


def publish(made: Path, target: Path, facts: dict[str, Any]) -> None:
    """Rename a new library, in a folder beside `target`, to `target`, with its manifest."""
    content, manifest = made.read_bytes(), made.with_suffix(".json")
    facts = {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)} | facts
    manifest.write_text(json.dumps(facts, indent=2) + "\n")
    made.replace(target)  # a reader between the two renames sees a defect, not a wrong library
    manifest.replace(target.with_suffix(".json"))


def _report_to_terminal(done: int, total: int, name: str, seconds: float) -> None:
    width = 30
    bar = "#" * (width * done // total)
    sys.stderr.write(f"[{bar:<{width}}] {done}/{total} {name} {seconds:.0f} s\n")
    sys.stderr.flush()


def _compile_all(
    arch: str, jobs: int, toolkit: Toolkit, folder: Path, report: Callable[[int, int, str, float], None]
) -> tuple[list[Path], dict[str, float]]:
    """-> (object files, seconds that each unit took: 0 for one that was there)."""
    todo, started = units(arch), time.monotonic()

    def compiled(unit: Unit) -> tuple[Path, float]:
        begun = time.monotonic()
        return compile_unit(unit, arch, toolkit, folder), round(time.monotonic() - begun, 1)

    with ThreadPoolExecutor(jobs) as pool:
        running = {pool.submit(compiled, unit): unit.name for unit in todo}
        try:
            for done, future in enumerate(as_completed(running), 1):
                future.result()
                report(done, len(todo), running[future], time.monotonic() - started)
        finally:
            pool.shutdown(cancel_futures=True)  # after an error, what has not begun does not begin
    made = {name: future.result() for future, name in running.items()}
    return [path for path, _ in made.values()], {name: seconds for name, (_, seconds) in made.items()}


def build(
    arch: str,
    jobs: int = 1,
    folder: Path | None = None,
    report: Callable[[int, int, str, float], None] = _report_to_terminal,
) -> Path:
    """-> the library for `arch` in `folder` (default: the cache), compiled with `jobs` processes unless it is there."""
    if arch not in ARCHS:
        raise BuildError(f"build: no code for {arch}; use one of {', '.join(ARCHS)}")
    folder = folder or cache_folder()
    objects = cache_folder() / "objects"
    folder.mkdir(parents=True, exist_ok=True)
    objects.mkdir(parents=True, exist_ok=True)
    library = folder / _name(arch)
    with FileLock(library.with_suffix(".lock")):  # a process that dies gives it back
        if defect(library) is None:
            return library
        toolkit, started = find_toolkit(), time.monotonic()
        parts, seconds = _compile_all(arch, jobs, toolkit, objects, report)
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            made = Path(scratch) / "made.so"
            libraries = [f"-L{path}" for path in toolkit.libraries if path.exists()]
            command = [str(toolkit.nvcc), "-shared", "-cudart", "static", _gencode(arch), *libraries, "-o", str(made)]
            run_compiler([*command, *map(str, parts)], "the link of the library")
            facts: dict[str, Any] = {"arch": arch, "key": source_key(arch), "cutlass": CUTLASS_VERSION}
            facts |= {"seconds": round(time.monotonic() - started), "jobs": jobs, "units": seconds}
            publish(made, library, facts)
    return library


def build_command(archs: list[str], jobs: int, folder: Path | None = None) -> int:
    """`python -m convrot_kernels build`. Exit code 0, or 1 with one sentence on stderr."""
    if not archs and torch.cuda.is_available():
        capabilities = {torch.cuda.get_device_capability(index) for index in range(torch.cuda.device_count())}
        archs = sorted({arch for capability in capabilities if (arch := arch_of(capability))})
    try:
        if not archs:
            raise BuildError(f"build: no GPU here to build for; name one, as in `{COMMAND} --arch sm_90a`")
        for arch in archs:
            library = build(arch, jobs, folder)
            sys.stdout.write(f"{library} ({library.stat().st_size / 2**20:.1f} MiB)\n")
    except BuildError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    return 0
