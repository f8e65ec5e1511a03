"""Step caches of diffusers on a quantized FLUX: while on they skip work, and once off nothing is left of them.

Caches that hook whole blocks (FirstBlockCache, MagCache) leave fused blocks fused. Those that hook attention
(TaylorSeer, PyramidAttentionBroadcast, FasterCache) run diffusers' own forwards while they are on.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from convrot_kernels.testing import assert_equal
from convrot_quant import ConvLinear4bit, quantize_
from convrot_quant.fuse import unfuse_

Flux = Callable[..., nn.Module]
STEPS = 6


class Denoiser:
    """A FLUX transformer with a toy loop around it, as a pipeline calls it; counts calls of quantized layers."""

    def __init__(self, model: Any) -> None:
        self.model, self.timestep = model, 0.0
        self.device = next(model.parameters()).device

    @torch.no_grad()
    def run(self) -> Tensor:
        """STEPS steps of two latents from one noise."""
        generator = torch.Generator().manual_seed(0)
        values = {"hidden_states": (2, 4, 64), "encoder_hidden_states": (2, 6, 64), "pooled_projections": (2, 64)}
        inputs = {name: torch.randn(shape, generator=generator).bfloat16() for name, shape in values.items()}
        inputs |= {"img_ids": torch.zeros(4, 3), "txt_ids": torch.zeros(6, 3)}
        inputs["guidance"] = torch.full((2,), 3.5).bfloat16()
        inputs = {name: value.to(self.device) for name, value in inputs.items()}
        x = inputs.pop("hidden_states")
        self.model._reset_stateful_cache()  # as the pipelines do between images
        for step in range(STEPS):
            time = 1 - step / STEPS
            self.timestep = 1000 * time  # where the caches' callback looks
            with self.model.cache_context("cond"):
                timestep = torch.full((2,), time, dtype=torch.bfloat16, device=self.device)
                out = self.model(hidden_states=x, timestep=timestep, **inputs, return_dict=False)[0]
            x = x - out / STEPS
        return x

    def counted(self) -> tuple[Tensor, int]:
        """The result of a run, and how many products of attention's quantized layers it took."""
        calls = 0
        own = ConvLinear4bit.multiply

        def counting(layer: ConvLinear4bit, *args: Any) -> Tensor:
            nonlocal calls
            calls += 1
            return own(layer, *args)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(ConvLinear4bit, "multiply", counting)
            return self.run(), calls


def config(name: str, denoiser: Denoiser) -> Any:
    """A cache that skips some of six steps."""
    import diffusers

    callback = {"current_timestep_callback": lambda: int(denoiser.timestep)}
    after_first = {"spatial_attention_timestep_skip_range": (-1, 901)}
    options: dict[str, dict[str, Any]] = {
        "FirstBlockCacheConfig": {"threshold": 10.0},
        "MagCacheConfig": {"num_inference_steps": STEPS, "mag_ratios": [1.0] * STEPS, "retention_ratio": 0.2},
        "TaylorSeerCacheConfig": {"cache_interval": 2, "disable_cache_before_step": 2},
        "PyramidAttentionBroadcastConfig": {"spatial_attention_block_skip_range": 2} | after_first | callback,
        "FasterCacheConfig": {
            "spatial_attention_block_skip_range": 2,
            "unconditional_batch_skip_range": 2,
            "attention_weight_callback": lambda _: 0.5,
            "is_guidance_distilled": True,
        }
        | after_first
        | callback,
    }
    return getattr(diffusers, name)(**options[name])


ON_BLOCKS = ("FirstBlockCacheConfig", "MagCacheConfig")
ON_ATTENTION = ("TaylorSeerCacheConfig", "PyramidAttentionBroadcastConfig", "FasterCacheConfig")


@pytest.fixture
def denoiser(make_flux: Flux, device: str) -> Denoiser:
    model = make_flux(2, 2).to(device)
    quantize_(model, "w8a8", progress=False)
    return Denoiser(model)


def layer_by_layer(denoiser: Denoiser) -> tuple[Tensor, int]:
    """A run of the same model with no fused block."""
    import copy

    plain = copy.deepcopy(denoiser.model)
    unfuse_(plain)
    return Denoiser(plain).counted()


@pytest.mark.parametrize("name", ON_BLOCKS)
def test_caches_of_blocks_skip_steps_and_go_without_a_trace(denoiser: Denoiser, name: str) -> None:
    never, all_calls = denoiser.counted()
    denoiser.model.enable_cache(config(name, denoiser))
    cached, calls = denoiser.counted()
    assert calls < all_calls
    assert 0 < (cached - never).float().norm() < 0.5 * never.float().norm()
    assert_equal(denoiser.run(), cached)  # the next image starts afresh
    denoiser.model.disable_cache()
    again, calls = denoiser.counted()
    assert_equal(again, never)
    assert calls == all_calls


@pytest.mark.parametrize("name", ON_ATTENTION)
def test_caches_of_attention_skip_steps_unfused_and_go_without_a_trace(denoiser: Denoiser, name: str) -> None:
    """diffusers leaves a `forward` on each module that was hooked. It is the module's own: blocks run fused again."""
    fused, _ = denoiser.counted()
    separate, all_calls = layer_by_layer(denoiser)
    denoiser.model.enable_cache(config(name, denoiser))
    cached, calls = denoiser.counted()
    assert calls < all_calls
    assert (cached - separate).float().norm() < 0.5 * separate.float().norm()
    denoiser.model.disable_cache()
    assert_equal(denoiser.run(), fused)
    stacks = [stack for block in denoiser.model.modules() for stack in getattr(block, "_stacks", {}).values()]
    assert stacks
    assert all(stack._parts for stack in stacks)  # joined again


@pytest.mark.parametrize("name", [*ON_BLOCKS, *ON_ATTENTION])
def test_a_cache_is_as_close_to_16_bits_as_without(make_flux: Flux, denoiser: Denoiser, name: str) -> None:
    original = Denoiser(make_flux(2, 2).to(denoiser.device))
    for one in (denoiser, original):
        one.model.enable_cache(config(name, one))
    ours, theirs = denoiser.run().float(), original.run().float()
    assert (ours - theirs).norm() < 0.05 * theirs.norm()


def test_a_second_cache_needs_the_first_to_go(denoiser: Denoiser) -> None:
    denoiser.model.enable_cache(config("FirstBlockCacheConfig", denoiser))
    with pytest.raises(ValueError, match="Caching has already been enabled"):
        denoiser.model.enable_cache(config("TaylorSeerCacheConfig", denoiser))
    denoiser.model.disable_cache()
    with contextlib.ExitStack() as stack:
        denoiser.model.enable_cache(config("TaylorSeerCacheConfig", denoiser))
        stack.callback(denoiser.model.disable_cache)
        denoiser.run()
