"""versions: what a checkpoint was written with."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

PACKAGES = ("convrot-quant", "convrot-kernels", "torch", "diffusers")


def versions() -> dict[str, str]:
    """{package: version} of what is installed."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
