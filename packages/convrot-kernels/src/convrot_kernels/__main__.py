"""python -m convrot_kernels doctor: what this machine can run, and why not the rest; build: the compiled kernels."""

import argparse
import json
import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from convrot_kernels import dispatch


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _gpus() -> list[dict[str, Any]]:
    found = []
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        properties = torch.cuda.get_device_properties(index)
        capability = f"{properties.major}.{properties.minor}"
        found.append({"name": properties.name, "capability": capability, "memory": properties.total_memory})
    return found


def _auto(op: str, device: str) -> str:
    try:
        return dispatch.pick(op, device)[0]
    except dispatch.BackendError as error:
        return str(error)


def examine() -> dict[str, Any]:
    """Everything the doctor reports. `runs` per device: every op but the optional ones has a backend there."""
    gpus = _gpus()
    devices = {}
    for device in ["cpu", *(f"cuda:{index}" for index in range(len(gpus)))]:
        auto = {op: _auto(op, device) for op in dispatch.ORDER}
        runs = all(chosen in dispatch.BACKENDS for op, chosen in auto.items() if op not in dispatch.GPU_ORDER)
        devices[device] = {"runs": runs, "backends": dispatch.available_backends(device), "auto": auto}
    from convrot_kernels.backends.cutlass import binding

    packages = ("convrot-kernels", "torch", "triton")
    return {
        "python": platform.python_version(),
        # torch's own word has the build in it (+cu130, +cpu)
        "packages": {package: _version(package) for package in packages} | {"torch": torch.__version__},
        "cuda": torch.version.cuda,
        "gpus": gpus,
        "binding": binding.why_not(),
        "devices": devices,
    }


def _print_report(report: dict[str, Any]) -> None:
    print(f"Python {report['python']}, CUDA of torch: {report['cuda'] or 'none'}")
    for package, found in report["packages"].items():
        print(f"  {package} {found or 'not installed'}")
    for gpu in report["gpus"]:
        print(f"  GPU: {gpu['name']}, sm_{gpu['capability'].replace('.', '')}, {gpu['memory'] / 2**30:.0f} GiB")
    if not report["gpus"]:
        print("  GPU: none")
    print(f"  binding, GPU ops without Python: {report['binding'] or 'ready'}")
    for device, state in report["devices"].items():
        print(f"\nBackends on {device}")
        for name, reason in state["backends"].items():
            print(f"  {name}: {'ready' if reason is None else reason}")
        print(f"What auto takes on {device}")
        for op, chosen in state["auto"].items():
            print(f"  {op:<26}{chosen}")


def main(arguments: list[str] | None = None) -> int:
    """Exit code: 0 when every op can run on some device, 1 when not, 2 for a wrong command line."""
    parser = argparse.ArgumentParser(
        prog="python -m convrot_kernels", description="Rotation and 4-bit kernels of ConvRot for PyTorch."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    doctor = commands.add_parser(
        "doctor",
        help="versions, GPUs, every backend and why it cannot run, what auto takes for each op",
        description="Show versions, GPUs, every backend and why it cannot run, and what auto takes for each op.",
        epilog="Exit code 0 when every op can run on some device, else 1. Example: python -m convrot_kernels doctor",
    )
    doctor.add_argument("--json", action="store_true", help="one JSON object instead of text")
    compiling = commands.add_parser(
        "build",
        help="compile the CUTLASS kernels of this GPU, or of --arch, into the cache",
        description="Compile the CUTLASS kernels with nvcc, once per version: minutes, and no GPU is needed.",
        epilog="Example: python -m convrot_kernels build --arch sm_90a --jobs 2",
    )
    compiling.add_argument("--arch", action="append", default=[], help="sm_80, sm_90a, sm_120, ...; may be repeated")
    compiling.add_argument("--jobs", type=int, default=2, help="compilers at a time, up to 5 GB each (default 2)")
    compiling.add_argument("--output", type=Path, help="folder of the library instead of the cache")
    options = parser.parse_args(arguments)
    if options.command == "build":
        from convrot_kernels.backends.cutlass import binding, build

        return build.build_command(options.arch, options.jobs, options.output) or binding.build_command(options.output)
    report = examine()
    if options.json:
        print(json.dumps(report, indent=2))
    else:
        _print_report(report)
    return 0 if any(state["runs"] for state in report["devices"].values()) else 1


if __name__ == "__main__":
    sys.exit(main())
