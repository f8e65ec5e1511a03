"""A LoRA that a visitor uploads: safetensors of bounded size, read into memory, given to one side at a time.

Diffusers gets tensors, never a path or a name: what is uploaded cannot make it look in a folder or on the hub.
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from convrot_demo.errors import UserError

MAX_BYTES = 2**30  # rank 64 on every layer of FLUX.1-dev is 0.7 GB
ADAPTER = "upload"


@dataclass(frozen=True)
class Lora:
    """An uploaded LoRA: its tensors, and what names it in the settings."""

    name: str
    sha256: str
    tensors: dict[str, Tensor]


def read(path: str) -> Lora:
    """An uploaded file -> its tensors."""
    file = Path(path)
    name = file.name[:80]
    if file.suffix.lower() != ".safetensors":
        raise UserError(f"A LoRA must be a .safetensors file, got {name!r}: pickled files can run code when read.")
    size = file.stat().st_size
    if size > MAX_BYTES:
        raise UserError(f"A LoRA may have {MAX_BYTES / 2**30:g} GiB, got {size / 2**30:.1f} GiB: use a lower rank.")
    try:
        with safe_open(path, framework="pt") as opened:
            tensors = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118  # not a dict
    except (SafetensorError, OSError) as error:
        raise UserError(f"{name!r} cannot be read as safetensors ({error}): upload it again.") from None
    if not any("lora" in key.lower() for key in tensors):
        raise UserError(f"{name!r} holds no LoRA: none of its {len(tensors)} tensors is named so. Upload an adapter.")
    return Lora(name, _sha256(file), tensors)


def _sha256(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as data:
        for block in iter(lambda: data.read(2**20), b""):
            digest.update(block)
    return digest.hexdigest()


@contextmanager
def applied(pipe: Any, lora: Lora | None, scale: float) -> Iterator[None]:
    """The pipeline with the LoRA on the transformer that it holds now, and without it afterwards."""
    if lora is None:
        yield
        return
    try:
        _load(pipe, lora, scale)
        yield
    finally:
        _unload(pipe)


def _load(pipe: Any, lora: Lora, scale: float) -> None:
    # not pipe.load_lora_weights: it would load the text encoders' part as well, and those both sides share
    model = pipe.transformer
    try:
        state, alphas = _converted(pipe, lora)
        _check_names(lora, model, state)
        model.load_lora_adapter(
            state, network_alphas=alphas, adapter_name=ADAPTER, prefix=pipe.transformer_name, _pipeline=pipe
        )
        pipe.set_adapters([ADAPTER], [scale])
    except UserError:
        raise
    except (ValueError, RuntimeError, KeyError, TypeError, AttributeError, IndexError) as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise _misfit(lora, model, reason) from error


def _converted(pipe: Any, lora: Lora) -> tuple[dict[str, Tensor], Any]:
    """Diffusers' names from any trainer's, and the alphas where the family has them apart."""
    known = inspect.signature(pipe.lora_state_dict).parameters
    options = {"return_alphas": True} if "return_alphas" in known else {}
    converted = pipe.lora_state_dict(dict(lora.tensors), **options)
    state, alphas = converted if isinstance(converted, tuple) else (converted, None)
    # both sides share the text encoders: their part would count on whichever side loads it first
    return {key: tensor for key, tensor in state.items() if key.startswith(f"{pipe.transformer_name}.")}, alphas


def _check_names(lora: Lora, model: nn.Module, state: dict[str, Tensor]) -> None:
    """Diffusers drops layers that the model lacks without a word."""
    wanted = {key.split(".", 1)[1].split(".lora", 1)[0] for key in state if ".lora" in key}
    unknown = sorted(wanted - {name for name, _ in model.named_modules()})
    if not wanted:
        raise _misfit(lora, model, "no layer of the transformer is in it")
    if unknown:
        raise _misfit(lora, model, f"{len(unknown)} of its {len(wanted)} layers are not in the model: {unknown[0]}")


def _misfit(lora: Lora, model: nn.Module, reason: str) -> UserError:
    return UserError(f"{lora.name!r} does not fit this {type(model).__name__} ({reason}). Upload a LoRA of this model.")


def _unload(pipe: Any) -> None:
    """Also after a load that failed halfway."""
    pipe.unload_lora_weights()
