"""Every test: its own seed, poisoned empty memory, and fixtures for the device and the backend."""

import os
import zlib
from collections.abc import Iterator

import pytest
import torch
from hypothesis import HealthCheck, settings

from convrot_kernels import dispatch

INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"  # Triton's interpreter runs kernels on CPU tensors, slowly
DEVICES = ["cpu", *([pytest.param("cuda", marks=pytest.mark.gpu)] if torch.cuda.is_available() else [])]

# the same few examples every time; HYPOTHESIS_PROFILE=long (nox -s tests_full) looks for new ones
# and no clock decides: a machine may be busy with something else
QUIET = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow]}
settings.register_profile("default", derandomize=True, max_examples=30, database=None, **QUIET)
settings.register_profile("long", max_examples=500, print_blob=True, **QUIET)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))


def pytest_configure(config: pytest.Config) -> None:
    # also fills new empty tensors with NaN or the largest integer, so that reading one shows
    torch.use_deterministic_algorithms(True, warn_only=True)
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # else cuBLAS warns that it is not deterministic
    # a GPU without compiled kernels is a machine to test on as well
    config.addinivalue_line("filterwarnings", "ignore:.*there are faster kernels:UserWarning")
    if "PYTEST_XDIST_WORKER" in os.environ:
        torch.set_num_threads(1)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """On the CPU, leave out backends that are for GPUs; under TRITON_INTERPRET=1, all that runs no Triton kernel."""
    skipped = [item for item in items if not _belongs_here(item)]
    items[:] = [item for item in items if _belongs_here(item)]
    config.hook.pytest_deselected(items=skipped)


def _belongs_here(item: pytest.Item) -> bool:
    parameters = item.callspec.params if hasattr(item, "callspec") else {}
    backend = parameters.get("backend")
    if INTERPRETING:
        return backend == "triton"
    return backend is None or parameters.get("device") != "cpu" or not dispatch.available_backends("cpu")[backend]


@pytest.fixture(autouse=True)
def _seed(request: pytest.FixtureRequest) -> None:
    torch.manual_seed(zlib.crc32(request.node.nodeid.encode()))


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    """Every kind of device of this machine."""
    return str(request.param)


@pytest.fixture(params=list(dispatch.BACKENDS))
def backend(request: pytest.FixtureRequest, device: str) -> Iterator[str]:
    """Every backend, in force during the test; skipped where it cannot run or lacks the OP that the module names."""
    name, op = request.param, getattr(request.module, "OP", None)
    reason = dispatch.available_backends(device)[name]
    if reason is not None:
        pytest.skip(f"{name} on {device}: {reason}")
    if op is not None and name not in dispatch.ORDER[op]:
        pytest.skip(f"{name} does not implement {op}")
    with dispatch.use_backend(name):
        yield name
