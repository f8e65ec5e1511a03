"""convrot doctor: versions, GPUs, and which kernels can run here, each with its reason where not."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

import torch
import typer
from rich import box
from rich.table import Table

from convrot_kernels.__main__ import examine
from convrot_kernels.backends import cudnn
from convrot_quant.cli.options import Json, Quiet
from convrot_quant.cli.output import Output

EXAMPLES = """Examples:

convrot doctor

convrot doctor --json
"""
PACKAGES = ("convrot-quant", "diffusers", "transformers", "peft", "accelerate", "safetensors")


def command(as_json: Json = False, quiet: Quiet = False) -> None:
    """Check this machine: package versions, GPUs, and every backend with why it cannot run. Exit code 1 if none can."""
    output = Output(as_json, quiet)
    report = examine()
    report["packages"] = report["packages"] | {package: _version(package) for package in PACKAGES}
    devices = map(torch.device, report["devices"])
    report["fp8_attention"] = {str(device): cudnn.why_not(device) for device in devices if device.type == "cuda"}
    packages = Table("package", "version", box=box.SIMPLE_HEAD, pad_edge=False)
    for package, found in {"python": report["python"], **report["packages"]}.items():
        packages.add_row(package, found or "not installed")
    backends = Table("device", "backend", "state", box=box.SIMPLE_HEAD, pad_edge=False)
    for device, state in report["devices"].items():
        for name, reason in state["backends"].items():
            backends.add_row(device, name, "ready" if reason is None else reason)
    gpus = [f"{gpu['name']} (sm_{gpu['capability'].replace('.', '')})" for gpu in report["gpus"]]
    output.show(packages, f"GPUs: {', '.join(gpus) or 'none'}", backends)
    if report["fp8_attention"]:
        states = [f"{device}: {reason or 'ready'}" for device, reason in report["fp8_attention"].items()]
        output.show(f"fp8 attention: {'; '.join(states)}")
    output.result(report)
    if not any(state["runs"] for state in report["devices"].values()):
        typer.echo("convrot: no device of this machine can run every op; see the reasons above", err=True)
        raise typer.Exit(1)


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
