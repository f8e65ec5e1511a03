"""empty_model: a diffusers model from its config.json with shapes and no values; a config that cannot be is refused."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from convrot_quant.manifest import CheckpointError, diffusers_class

MOST_PARAMETERS = 100_000  # tensors of one model: FLUX.1 has 1400, the largest diffusion transformers below 10,000


def empty_model(
    folder: Path,
    config: Mapping[str, Any],
    *,
    dtype: torch.dtype | None = None,
    most_parameters: int = MOST_PARAMETERS,
) -> nn.Module:
    """A model's modules on the meta device (computed buffers have values), from the config.json of `folder`.

    `dtype` is torch's default while it is built, as in diffusers' loader: computed buffers depend on it.
    A config whose values the model class refuses, or that asks for more than `most_parameters` tensors, is an error.
    """
    from accelerate import init_empty_weights

    model_class = diffusers_class(folder, dict(config))
    try:
        with init_empty_weights(), _default_dtype(dtype), _counted(most_parameters):
            model: nn.Module = model_class.from_config(config)
    except CheckpointError as error:
        raise CheckpointError(f"{folder / 'config.json'}: {error}; copy the folder again") from None
    except Exception as error:  # whatever a constructor does with values that nobody foresaw: the config is at fault
        raise CheckpointError(
            f"{folder / 'config.json'}: {config['_class_name']} cannot be built from it: {_reason(error)}; "
            "copy the folder again"
        ) from error
    return model


def as_loaded(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """The model with its tensors in the dtypes that diffusers' loader would give them; in place."""
    for name, tensor in model.state_dict(keep_vars=True).items():
        if tensor.is_floating_point():
            tensor.data = tensor.data.to(torch.float32 if keeps_fp32(model, name) else dtype)
    return model


def keeps_fp32(model: nn.Module, name: str) -> bool:
    """Whether the model's class wants the tensor `name` of its state_dict in fp32, whatever the rest is in."""
    return not set(getattr(model, "_keep_in_fp32_modules", None) or ()).isdisjoint(name.split("."))


@contextmanager
def _default_dtype(dtype: torch.dtype | None) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype or before)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextmanager
def _counted(most: int) -> Iterator[None]:
    """Stop a model that grows beyond `most` parameters, long before it fills the memory."""
    register, count = nn.Module.register_parameter, 0

    def counting(module: nn.Module, name: str, param: nn.Parameter | None) -> None:
        nonlocal count
        count += param is not None
        if count > most:
            raise CheckpointError(f"it describes a model of more than {most} tensors")
        register(module, name, param)

    nn.Module.register_parameter = counting  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


def _reason(error: BaseException) -> str:
    """An error's first line, short, with its kind where the text alone says little."""
    text = (str(error).strip() or "no reason given").splitlines()[0][:200]
    return text if isinstance(error, ValueError) else f"{text} ({type(error).__name__})"
