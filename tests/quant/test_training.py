"""Training on quantized weights: refused with one sentence, before anything is computed with made-up gradients.

Codes are integers. Inference never asks for gradients, adapters that are loaded do not require any, and whoever trains
an adapter trains it on the 16-bit model, then loads it here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from convrot_kernels.testing import assert_equal
from convrot_quant import ConvLinear4bit, Scheme, quantize_

REFUSED = r"scaled_mm: not differentiable, its codes are integers, .*; call it under torch\.no_grad\(\) or detach them"


@pytest.mark.parametrize("scheme", [Scheme(), Scheme(4, 8), Scheme(4, 16), Scheme(8, 8)], ids=lambda s: s.name)
def test_a_gradient_through_a_quantized_layer_is_refused(scheme: Scheme, device: str) -> None:
    layer = ConvLinear4bit.from_linear(nn.Linear(256, 64, device=device), scheme)
    assert not any(parameter.requires_grad for parameter in layer.parameters())
    x = torch.randn(3, 256, device=device)
    plain = layer(x)
    assert not plain.requires_grad
    out = layer(x.requires_grad_())
    assert_equal(out.detach(), plain)  # a forward alone is the same
    with pytest.raises(NotImplementedError, match=REFUSED):
        out.sum().backward()
    assert x.grad is None


def loss_of(model: Any) -> Tensor:
    """A forward with gradients switched on, as a training script does it."""
    torch.manual_seed(0)
    values = {"hidden_states": (1, 4, 64), "encoder_hidden_states": (1, 6, 64), "pooled_projections": (1, 64)}
    inputs = {name: torch.randn(shape).to(model.dtype) for name, shape in values.items()}
    ids = {"img_ids": torch.zeros(4, 3), "txt_ids": torch.zeros(6, 3)}
    half, guidance = torch.full((1,), 0.5, dtype=model.dtype), torch.full((1,), 3.5, dtype=model.dtype)
    out: Tensor = model(**inputs, **ids, timestep=half, guidance=guidance, return_dict=False)[0]
    return out.float().square().mean()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
def test_a_branch_is_refused_in_the_backward_alone(make_flux: Callable[..., nn.Module], dtype: torch.dtype) -> None:
    model: Any = make_flux().to(dtype)
    quantize_(model, "ours-r16", progress=False)
    with torch.no_grad():
        expected = loss_of(model)
    loss = loss_of(model)  # the embedders' parameters require gradients
    assert loss.requires_grad
    assert_equal(loss.detach(), expected)
    with pytest.raises(NotImplementedError, match="not differentiable, its codes are integers"):
        loss.backward()


@pytest.mark.parametrize("fuse", [True, False])
def test_training_a_lora_on_a_quantized_transformer_is_refused(make_flux: Callable[..., nn.Module], fuse: bool) -> None:
    from peft import LoraConfig

    model: Any = make_flux()
    quantize_(model, fuse=fuse, progress=False)
    model.add_adapter(LoraConfig(r=4, target_modules=["to_q", "to_v"], init_lora_weights=False))
    loss = loss_of(model)
    assert loss.requires_grad
    with pytest.raises(NotImplementedError, match=REFUSED):
        loss.backward()
    trained = [p for name, p in model.named_parameters() if "lora_" in name and p.requires_grad]
    assert trained
    last = {id(p) for name, p in model.named_parameters() if name.startswith("single_transformer_blocks.1")}
    assert all(p.grad is None for p in trained if id(p) not in last)


def test_the_quantizer_says_that_it_is_not_trainable() -> None:
    from convrot_quant import ConvRotConfig
    from convrot_quant.diffusers import ConvRotQuantizer

    assert ConvRotQuantizer(ConvRotConfig()).is_trainable is False
