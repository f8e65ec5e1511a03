"""The wheels: what is in them, what they ask for, and that each works in an environment that holds nothing else."""

import ast
import subprocess
import sys
import zipfile
from email import message_from_string
from pathlib import Path

import pytest

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


def build(package: Path, folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", str(folder), str(package)]
    subprocess.run(command, check=True)
    return next(folder.glob(package.name.replace("-", "_") + "-*.whl"))


@pytest.mark.slow
def test_wheels_carry_types_and_licence_and_pin_nothing(tmp_path):
    for package in (KERNELS, QUANT):
        wheel = zipfile.ZipFile(build(package, tmp_path))
        names = wheel.namelist()
        assert any(n.endswith("/py.typed") for n in names)
        assert any(n.endswith("licenses/LICENSE") for n in names)
        metadata = message_from_string(wheel.read(next(n for n in names if n.endswith("/METADATA"))).decode())
        assert metadata["License-Expression"] == "Apache-2.0"
        assert metadata["Requires-Python"] == ">=3.10"
        needs = metadata.get_all("Requires-Dist") or []
        assert "torch>=2.6" in needs
        assert not [n for n in needs if "==" in n.split(";")[0]]


@pytest.mark.slow
def test_kernels_wheel_works_alone_in_a_clean_environment(tmp_path):
    wheel = build(KERNELS, tmp_path)
    subprocess.run([sys.executable, "-m", "venv", str(tmp_path / "env")], check=True)
    python = str(tmp_path / "env" / "bin" / "python")
    subprocess.run([python, "-m", "pip", "install", "-q", "torch==2.13.0"], check=True)
    subprocess.run([python, "-m", "pip", "install", "-q", str(wheel)], check=True)
    out = subprocess.run([python, "-c", EXAMPLE], check=True, capture_output=True, text=True, cwd=tmp_path)
    assert "kernels alone: ok" in out.stdout
    doctor = subprocess.run([python, "-m", "convrot_kernels", "doctor"], capture_output=True, text=True, cwd=tmp_path)
    assert doctor.returncode == 0
    assert "reference" in doctor.stdout
