"""Thin sessions: each installs the workspace into an environment of its own and runs one command.

nox                  lint and tests, types among them: what has to pass before a commit, and what CI runs
nox -s generate      BF16 and 4-bit images of the shipped mini-flux, side by side
nox -s demo          the same in the browser
nox -s tests_full    everything, slow tests included; leaves its result in docs/results
nox -s kernels       the compiled kernels in a wheel, no GPU needed; leaves its times and sizes in docs/results
"""

import argparse
import json
import os
import re
import shutil
import sys
import time
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import nox

# OpenMP threads that spin while they wait make torch tens of times slower wherever a core is shared with anything else
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

nox.needs_version = ">=2024.4.15"
nox.options.sessions = ["lint", "tests"]
nox.options.default_venv_backend = "venv"
nox.options.reuse_venv = "yes"

PACKAGES = ("packages/convrot-kernels", "packages/convrot-quant", "apps/mini-flux", "apps/bench", "apps/demo")
FORMATTED = ("packages", "apps", "tests", "noxfile.py")
SHIPPED_ARCHS = ("sm_80", "sm_90a")  # 8.0 to 8.9 and 9.0: together at most 12 GEMMs to compile
SHIPPED_LOADS = """
import sys
from convrot_kernels.backends.cutlass import build, library
for arch in sys.argv[1:]:
    path, why = build.find(arch)
    assert path is not None and path.parent == build.SHIPPED, f"{arch}: {path or why}"
    library.Library(path, arch)
"""


def install(session: nox.Session, *groups: str) -> None:
    """All packages, editable, in one pip command (none of them is on an index), plus dependency groups."""
    constraints = ("-c", "constraints.txt")
    # torch by itself and first: pip then takes the build that a find-links folder or an extra index offers
    session.install("torch==2.13.0", *constraints, silent=False)
    editable = [part for package in PACKAGES for part in ("-e", package)]
    session.install("--upgrade", "pip>=25.1")  # dependency groups
    session.install(*editable, *[part for group in groups for part in ("--group", group)], *constraints, silent=False)


@nox.session
def lint(session: nox.Session) -> None:
    """ruff: rules and formatting."""
    session.install("ruff", "-c", "constraints.txt")
    session.run("ruff", "check", *FORMATTED)
    session.run("ruff", "format", "--check", *FORMATTED)


@nox.session
def types(session: nox.Session) -> None:
    """mypy over the packages and apps."""
    install(session, "types")
    session.run("mypy")


@nox.session
def tests(session: nox.Session) -> None:
    """mypy, and all CPU tests but the slow ones. `nox -s tests -- tests/kernels -k rotate` runs some, without mypy."""
    install(session, "types", "test", "browser")  # one environment: making another takes as long as mypy itself
    if not session.posargs:
        session.run("mypy")
    session.run("pytest", "-n", "2", "-m", "not slow and not gpu", *session.posargs)


@nox.session
def tests_full(session: nox.Session) -> None:
    """Every CPU test: the slow ones, longer fuzzing, clean-environment builds. Writes docs/results/tests_full.json."""
    install(session, "test", "browser")
    session.install("build", "-c", "constraints.txt")
    report = Path(session.create_tmp()).resolve() / "junit.xml"
    command = ("pytest", "-n", "2", "-m", "not gpu", f"--junitxml={report}", *session.posargs)
    session.run(*command, env={"HYPOTHESIS_PROFILE": "long"}, success_codes=[0, 1])
    suite = ElementTree.parse(report).getroot().find("testsuite")
    assert suite is not None, "pytest writes one testsuite"
    counts = {key: int(suite.attrib[key]) for key in ("tests", "failures", "errors", "skipped")}
    commit = session.run("git", "rev-parse", "--short=12", "HEAD", external=True, silent=True)
    result = {"date": suite.attrib["timestamp"], "commit": str(commit).strip(), "python": sys.version.split()[0]}
    result |= counts | {"seconds": round(float(suite.attrib["time"])), "command": "nox -s tests_full"}
    Path("docs/results/tests_full.json").write_text(json.dumps(result, indent=2) + "\n")
    if counts["failures"] or counts["errors"]:
        session.error(f"{counts['failures'] + counts['errors']} of {counts['tests']} tests failed")


@nox.session
def kernels(session: nox.Session) -> None:
    """The compiled kernels in a wheel in dist/, without a GPU. `nox -s kernels -- --arch sm_90a --jobs 2`"""
    parser = argparse.ArgumentParser(prog="nox -s kernels --")
    parser.add_argument("--arch", action="append", help=f"may be repeated; by default {' and '.join(SHIPPED_ARCHS)}")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="compilers at a time")
    options = parser.parse_args(session.posargs)
    archs, scratch = options.arch or list(SHIPPED_ARCHS), Path(session.create_tmp()).resolve() / "kernels"
    session.install("torch==2.13.0", "-c", "constraints.txt", silent=False)
    session.install("-e", "packages/convrot-kernels[build]", "-c", "constraints.txt", silent=False)
    nvcc = next(Path(session.virtualenv.location).resolve().glob("lib/python*/site-packages/nvidia/cu*/bin/nvcc"))
    shutil.rmtree(scratch, ignore_errors=True)  # the figure is a whole build's
    build = ("python", "-m", "convrot_kernels", "build", "--jobs", str(options.jobs), "--output", str(scratch / "lib"))
    environment = {"CUDA_HOME": str(nvcc.parents[1]), "CONVROT_CACHE": str(scratch / "cache")}
    started = time.monotonic()
    session.run(*build, *[part for arch in archs for part in ("--arch", arch)], env=environment)
    result: dict[str, Any] = {"seconds": round(time.monotonic() - started), "jobs": options.jobs}
    pack = ("python", "-m", "pip", "wheel", "-q", "--no-deps", "-w", str(scratch), "packages/convrot-kernels")
    session.run(*pack, env={"CONVROT_LIBRARIES": str(scratch / "lib")})
    wheel = next(scratch.glob("*.whl"))
    session.install("--force-reinstall", "--no-deps", str(wheel))
    session.run("python", "-c", SHIPPED_LOADS, *archs, env={"CONVROT_CACHE": str(scratch / "none")})
    Path("dist").mkdir(exist_ok=True)
    shutil.copy(wheel, "dist")
    version = re.search(r"V([\d.]+)", str(session.run(str(nvcc), "--version", external=True, silent=True)))
    result |= {"cores": os.cpu_count(), "nvcc": version and version[1], "wheel": wheel.name}
    _record_kernels(session, result | {"wheel_bytes": wheel.stat().st_size}, archs, scratch / "lib")


def _record_kernels(session: nox.Session, result: dict[str, Any], archs: list[str], folder: Path) -> None:
    """Writes docs/results/kernels_build.json: what was measured, with each library's size and each unit's seconds."""
    describe = ("git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*")
    commit = session.run(*describe, external=True, silent=True)
    manifests = [json.loads(file.read_text()) for file in sorted(folder.glob("*.json"))]
    result = {"date": time.strftime("%Y-%m-%d"), "commit": str(commit).strip(), "archs": archs} | result
    result["cutlass"] = next(found["cutlass"] for found in manifests if "cutlass" in found)
    result["library_bytes"] = {file.name: file.stat().st_size for file in sorted(folder.glob("*.so"))}
    result["unit_seconds"] = {found["arch"]: found["units"] for found in manifests if "units" in found}
    Path("docs/results/kernels_build.json").write_text(json.dumps(result, indent=2) + "\n")
    megabytes = ", ".join(f"{name} {size / 1e6:.1f} MB" for name, size in result["library_bytes"].items())
    session.log(f"compiled in {result['seconds']} s with {result['jobs']} jobs on {result['cores']} cores: {megabytes}")
    session.log(f"dist/{result['wheel']}: {result['wheel_bytes'] / 1e6:.1f} MB")


@nox.session
def interpreter(session: nox.Session) -> None:
    """The Triton kernels on CPU tensors, in Triton's interpreter, which a process has from its start or not at all."""
    install(session, "test", "browser")
    command = ("pytest", "-n", "2", "-m", "not gpu", "tests/kernels", *session.posargs)
    session.run(*command, env={"TRITON_INTERPRET": "1"})


@nox.session
def gpu(session: nox.Session) -> None:
    """The tests that need an NVIDIA GPU, in the environment that nox is run from (its torch knows the GPU)."""
    session.run("python", "-m", "pytest", "-m", "gpu", *session.posargs, external=True)


@nox.session
def generate(session: nox.Session) -> None:
    """The main job on the shipped mini-flux: BF16 and 4-bit images of the same prompts and seeds in one picture."""
    install(session)
    session.run(
        "convrot", "generate", "apps/mini-flux/weights", "--prompts-file", "apps/mini-flux/prompts.txt", "--seed", "0",
        "--sheet", "outputs/bf16_vs_4bit.png", "-o", "outputs", *session.posargs,
    )  # fmt: skip


@nox.session
def demo(session: nox.Session) -> None:
    """BF16 and 4-bit side by side in the browser, on the shipped mini-flux. `nox -s demo -- --port 8000`"""
    install(session)
    session.run("convrot-demo", *session.posargs)


@nox.session
def bench(session: nox.Session) -> None:
    """`nox -s bench -- quality apps/mini-flux/weights --judge apps/mini-flux/judge.safetensors`"""
    install(session)
    session.run("convrot-bench", *(session.posargs or ("--help",)))
