"""The wheels: what is in them, what they ask for, and that each works in an environment that holds nothing else."""

import ast
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from email import message_from_string
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import pytest

from convrot_kernels.backends.cutlass.build import ABI_VERSION, CUTLASS_VERSION, source_key

ROOT = Path(__file__).parents[1]
KERNELS = ROOT / "packages" / "convrot-kernels"
QUANT = ROOT / "packages" / "convrot-quant"

EXAMPLE = """
import importlib.util, torch
import convrot_kernels as ck
x, weight = torch.randn(4, 512), torch.randn(64, 512)
packed, weight_scale = ck.rotate_quantize(weight, packed=True)
codes, scale = ck.rotate_quantize(x)
y = ck.scaled_mm(codes, packed, scale, weight_scale, out_dtype=torch.float32)
error = (y - x @ weight.T).norm() / (x @ weight.T).norm()
assert error < 0.3, error
assert importlib.util.find_spec("diffusers") is None
print("kernels alone: ok")
"""

# what `python -m convrot_kernels build --arch sm_90a` does, but for a fourth of the units: enough to load and to ask
SMALL_BUILD = """
import ctypes, sys
from convrot_kernels.backends.cutlass import build
everything = build.units("sm_90a")
some = (everything[0], *(unit for unit in everything if unit.name in ("rotate_quantize_bf16", "gemv", "abi")))
build.units = lambda arch: some
toolkit = build.find_toolkit()
assert sys.prefix in str(toolkit.nvcc), toolkit.nvcc
functions = ctypes.CDLL(str(build.build("sm_90a")))
assert all((functions.convrot_gemv, functions.convrot_rotate_quantize_bf16, functions[some[0].name]))
functions.convrot_source_key.restype = ctypes.c_char_p
print("loaded", functions.convrot_abi_version(), functions.convrot_source_key().decode() == build.source_key("sm_90a"))
"""
FIND = """
import json, sys
from convrot_kernels.backends.cutlass import build
print(json.dumps([build.__file__, *map(str, build.find(sys.argv[1]))]))
"""


def imported_modules(folder: Path) -> set[str]:
    """Top-level names that the sources import anywhere, inside functions too."""
    found = set()
    for file in folder.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                found |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                found.add(node.module.split(".")[0])
    return found


def test_imports_point_down_only():
    kernels, quant = imported_modules(KERNELS / "src"), imported_modules(QUANT / "src")
    assert not kernels & {"diffusers", "transformers", "convrot_quant", "convrot_bench", "mini_flux"}
    assert not quant & {"convrot_bench", "mini_flux", "gradio"}
    assert "convrot_bench" not in imported_modules(ROOT / "apps" / "mini-flux" / "src")


def test_importing_kernels_loads_neither_diffusers_nor_cuda():
    code = (
        "import sys, torch, convrot_kernels\n"
        "assert 'diffusers' not in sys.modules and 'transformers' not in sys.modules\n"
        "assert not torch.cuda.is_initialized()"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def build(package: Path, folder: Path, **environment: str) -> Path:
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", str(folder), str(package)]
    plain = {name: value for name, value in os.environ.items() if name != "CONVROT_LIBRARIES"}
    subprocess.run(command, check=True, env=plain | environment)
    return next(folder.glob(package.name.replace("-", "_") + "-*.whl"))


def metadata_of(wheel: zipfile.ZipFile, name: str = "METADATA"):
    return message_from_string(wheel.read(next(n for n in wheel.namelist() if n.endswith(f"/{name}"))).decode())


def clean_environment(folder: Path, *requirements: str) -> Path:
    """-> python of a new environment with torch and the requirements."""
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    python = folder / "bin" / "python"
    for wanted in (["torch==2.13.0"], requirements):
        subprocess.run([python, "-m", "pip", "install", "-q", *wanted], check=True)
    return python


@pytest.mark.slow
def test_wheels_carry_types_and_licence_and_pin_nothing(tmp_path):
    for package in (KERNELS, QUANT):
        built = build(package, tmp_path)
        wheel = zipfile.ZipFile(built)
        names = wheel.namelist()
        assert built.name.endswith("-py3-none-any.whl")
        assert not [n for n in names if n.endswith(".so")]
        assert any(n.endswith("/py.typed") for n in names)
        assert any(n.endswith("licenses/LICENSE") for n in names)
        metadata = metadata_of(wheel)
        # convrot-kernels holds text that CUTLASS's generator emits
        licence = "Apache-2.0 AND BSD-3-Clause" if package == KERNELS else "Apache-2.0"
        assert metadata["License-Expression"] == licence
        assert metadata["Requires-Python"] == ">=3.10"
        needs = metadata.get_all("Requires-Dist") or []
        assert "torch>=2.6" in needs
        assert not [n for n in needs if "==" in n.split(";")[0]]


def test_cutlass_s_notice_is_the_one_of_the_version_that_is_compiled():
    notice = (KERNELS / "LICENSES" / "CUTLASS.txt").read_text()
    assert "SPDX-License-Identifier: BSD-3-Clause" in notice
    assert "Redistributions in binary form must reproduce the above copyright notice" in notice
    try:
        cutlass = distribution("nvidia-cutlass")
    except PackageNotFoundError:
        return
    if cutlass.version == CUTLASS_VERSION:
        assert notice == cutlass.read_text("licenses/LICENSE.txt")


def pinned_minor(requirement: str) -> str:
    """Two digits of `name~=13.0.0; extra == 'build'`; pip takes no other release then."""
    return re.sub(r".*~=(\d+\.\d+)\.\S*?(;.*)?$", r"\1", requirement)


@pytest.mark.slow
def test_the_build_extra_brings_one_toolkit_and_cutlass(tmp_path):
    needs = metadata_of(zipfile.ZipFile(build(KERNELS, tmp_path))).get_all("Requires-Dist") or []
    extra = {re.split(r"[~;]", need)[0]: pinned_minor(need) for need in needs if "extra == 'build'" in need}
    toolkit = {name: minor for name, minor in extra.items() if name != "nvidia-cutlass"}
    assert set(toolkit) == {f"nvidia-{part}" for part in ("cuda-cccl", "cuda-crt", "cuda-nvcc", "cuda-runtime", "nvvm")}
    assert len(set(toolkit.values())) == 1
    assert CUTLASS_VERSION.startswith(extra["nvidia-cutlass"])


@pytest.mark.slow
def test_a_wheel_of_libraries_names_its_platform_and_is_found_there(tmp_path):
    folder, name = tmp_path / "lib", f"convrot-sm_80-{source_key('sm_80')}"
    folder.mkdir()
    binary = b"\x7fELF GLIBC_2.2.5 GLIBC_2.34 GLIBC_2.17"
    (folder / f"{name}.so").write_bytes(binary)
    (folder / f"{name}.json").write_text(json.dumps({"sha256": hashlib.sha256(binary).hexdigest()}))
    (folder / "objects.lock").touch()
    built = build(KERNELS, tmp_path, CONVROT_LIBRARIES=str(folder))
    assert re.search(r"-py3-none-manylinux_2_34_\w+\.whl$", built.name)
    wheel = zipfile.ZipFile(built)
    shipped = [n for n in wheel.namelist() if "/cutlass/lib/" in n]
    assert {Path(n).name for n in shipped} == {f"{name}.so", f"{name}.json"}
    assert metadata_of(wheel, "WHEEL")["Root-Is-Purelib"] == "false"
    assert metadata_of(wheel)["License-Expression"] == "Apache-2.0 AND BSD-3-Clause"
    notice = next(n for n in wheel.namelist() if n.endswith("/licenses/LICENSES/CUTLASS.txt"))
    assert wheel.read(notice) == (KERNELS / "LICENSES" / "CUTLASS.txt").read_bytes()
    wheel.extractall(tmp_path / "site")
    here = os.environ | {"PYTHONPATH": str(tmp_path / "site"), "CONVROT_CACHE": str(tmp_path / "cache")}
    said = subprocess.run([sys.executable, "-c", FIND, "sm_80"], check=True, capture_output=True, text=True, env=here)
    module, found, why = json.loads(said.stdout)
    assert Path(module).is_relative_to(tmp_path / "site")
    assert (Path(found), why) == (tmp_path / "site" / "convrot_kernels/backends/cutlass/lib" / f"{name}.so", "")


@pytest.mark.slow
def test_a_wheel_of_no_libraries_is_refused(tmp_path):
    with pytest.raises(subprocess.CalledProcessError):
        build(KERNELS, tmp_path, CONVROT_LIBRARIES=str(tmp_path))


def test_the_recorded_build_keeps_to_twelve_gemms_and_fifteen_minutes():
    record = json.loads((ROOT / "docs" / "results" / "kernels_build.json").read_text())
    assert {"sm_80", "sm_90a"} <= set(record["archs"])
    gemms = [name for units in record["unit_seconds"].values() for name in units if re.match(r"sm\d+_", name)]
    assert 0 < len(gemms) <= 12
    assert record["jobs"] <= record["cores"] <= 2
    assert record["seconds"] <= 15 * 60
    assert all(seconds > 0 for units in record["unit_seconds"].values() for seconds in units.values())


@pytest.mark.slow
def test_kernels_wheel_works_alone_in_a_clean_environment(tmp_path):
    python = clean_environment(tmp_path / "env", str(build(KERNELS, tmp_path)))
    out = subprocess.run([python, "-c", EXAMPLE], check=True, capture_output=True, text=True, cwd=tmp_path)
    assert "kernels alone: ok" in out.stdout
    doctor = subprocess.run([python, "-m", "convrot_kernels", "doctor"], capture_output=True, text=True, cwd=tmp_path)
    assert doctor.returncode == 0
    assert "reference" in doctor.stdout


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++", path=os.defpath) is None, reason="needs g++")
def test_the_build_extra_compiles_a_library_with_no_cuda_but_its_own(tmp_path):
    python = clean_environment(tmp_path / "env", f"{build(KERNELS, tmp_path)}[build]")
    bare = {"PATH": os.defpath, "HOME": str(tmp_path), "CONVROT_CACHE": str(tmp_path / "cache")}
    out = subprocess.run([python, "-c", SMALL_BUILD], capture_output=True, text=True, cwd=tmp_path, env=bare)
    assert out.returncode == 0, out.stderr
    assert f"loaded {ABI_VERSION} True" in out.stdout
