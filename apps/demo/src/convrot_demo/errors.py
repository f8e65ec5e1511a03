"""What went wrong, as a sentence for the page; the traceback goes to the log."""

from __future__ import annotations

import logging

import torch

from convrot_quant import CheckpointError
from convrot_quant.generation import SettingsError

LOG = logging.getLogger("convrot_demo")
# errors whose message was written for a person: rule, value, remedy
OURS = (CheckpointError, SettingsError, FileNotFoundError)
# a GPU without memory for what is not torch's: handles and workspaces of libraries, kernels that are loaded
GPU_IS_FULL = ("CUDA error: out of memory", "[CUDA]: out of memory", "STATUS_ALLOC_FAILED")


class UserError(ValueError):
    """A wrong input: its message is the whole answer, so that no traceback is logged."""


def sentence(error: BaseException, size: tuple[int, int] | None = None) -> str:
    """An exception -> one sentence; `size` is the image's (width, height) where memory may be the matter."""
    on_gpu = isinstance(error, torch.OutOfMemoryError) or any(said in str(error) for said in GPU_IS_FULL)
    if on_gpu or isinstance(error, MemoryError) or "not enough memory" in str(error):
        smaller = "choose a smaller size" if size is None else f"choose a smaller size than {size[0]} x {size[1]}"
        where = "GPU" if on_gpu else "machine"
        return f"The {where} ran out of memory: {smaller}, or start the demo with --memory 4bit or --memory offload."
    if isinstance(error, (UserError, *OURS)):
        return _one_line(error)
    LOG.error("a run failed", exc_info=(type(error), error, error.__traceback__))
    if isinstance(error, ValueError):  # diffusers' own checks of a call
        return _one_line(error)
    return f"The run failed ({type(error).__name__}: {_one_line(error)}). The server's log has the details."


def _one_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines() or ["no reason given"]
    line = lines[0].strip()
    return line if len(line) <= 400 else f"{line[:400]}..."
