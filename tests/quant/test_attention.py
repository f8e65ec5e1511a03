"""Attention in 8 bits: the switch, what fused blocks then compute, and where it is refused."""

from __future__ import annotations

import copy
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from convrot_kernels import reference
from convrot_kernels.backends import cudnn
from convrot_kernels.testing import assert_equal, make_inputs
from convrot_quant import fp8_attention_, fuse_, quantize_, unfuse_
from convrot_quant.families import flux as fused_flux
from convrot_quant.graphs import _Watch

Flux = Callable[..., nn.Module]
BLOCKS = ("transformer_blocks.0", "single_transformer_blocks.0")

_quantized: dict[torch.dtype, nn.Module] = {}  # quantizing takes seconds, a copy does not


def _model(make_flux: Flux, dtype: torch.dtype = torch.float32) -> nn.Module:
    if dtype not in _quantized:
        model, generator = make_flux(dtype=dtype), torch.Generator().manual_seed(5)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                drawn = torch.randn(parameter.shape, generator=generator)
                norm = "norm_" in name and name.endswith("weight")
                parameter.copy_(1 + 0.1 * drawn if norm else 0.05 * drawn)
        quantize_(model, progress=False)
        _quantized[dtype] = model
    return copy.deepcopy(_quantized[dtype])


def _inputs(model: Any, batch: int = 2, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    ids = torch.zeros(16, 3)
    ids[6:, 1] = torch.arange(10)
    return {
        "hidden_states": make_inputs(batch, 10, 512, dtype=dtype).clamp(-4, 4),
        "encoder_hidden_states": make_inputs(batch, 6, 512, dtype=dtype, seed=1).clamp(-4, 4),
        "temb": make_inputs(batch, 512, dtype=dtype, seed=2).clamp(-2, 2),
        "image_rotary_emb": model.pos_embed(ids),
    }


def _run(model: nn.Module, name: str, **inputs: Any) -> list[Tensor]:
    with torch.no_grad():
        return list(model.get_submodule(name)(**inputs))


@pytest.mark.parametrize("name", BLOCKS)
def test_a_block_attends_with_q_k_and_v_rounded_to_e4m3(
    make_flux: Flux, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    model = _model(make_flux)
    inputs = _inputs(model)
    wide = _run(model, name, **inputs)
    assert fp8_attention_(model) == len(model.transformer_blocks) + len(model.single_transformer_blocks)  # type: ignore[arg-type]
    narrow = _run(model, name, **inputs)
    fp8_attention_(model, False)
    for again, before in zip(_run(model, name, **inputs), wide, strict=True):
        assert_equal(again, before)

    def by_hand(attn: nn.Module, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """From what 16-bit attention reads, here in fp32: rounded once, as the fused op does it."""
        values = reference.fp8_of(v)
        return reference.attention_fp8(reference.to_fp8(q), reference.to_fp8(k), *values, v.dtype).flatten(2)

    monkeypatch.setattr(fused_flux, "_attention", by_hand)
    for actual, expected, exact in zip(narrow, _run(model, name, **inputs), wide, strict=True):
        assert_equal(actual, expected)
        assert not torch.equal(actual, exact)


@pytest.mark.parametrize("name", BLOCKS)
def test_compiles_as_one_graph(make_flux: Flux, name: str) -> None:
    model = _model(make_flux, torch.bfloat16)
    fp8_attention_(model)
    inputs = _inputs(model, 1, torch.bfloat16)
    expected = _run(model, name, **inputs)
    torch._dynamo.reset()
    model.get_submodule(name).compile(fullgraph=True, backend="eager")
    for actual, wanted in zip(_run(model, name, **inputs), expected, strict=True):
        assert_equal(actual, wanted)


def test_a_block_that_runs_unfused_attends_in_16_bits(make_flux: Flux) -> None:
    model = _model(make_flux)
    inputs = _inputs(model)
    block = model.get_submodule(BLOCKS[0])
    handle = block.ff.register_forward_hook(lambda *_: None)  # type: ignore[union-attr]
    wide = _run(model, BLOCKS[0], **inputs)
    fp8_attention_(model)
    for actual, expected in zip(_run(model, BLOCKS[0], **inputs), wide, strict=True):
        assert_equal(actual, expected)
    handle.remove()
    assert not torch.equal(_run(model, BLOCKS[0], **inputs)[1], wide[1])


def test_what_has_no_fused_blocks_is_refused(make_flux: Flux) -> None:
    with pytest.raises(ValueError, match="only fused blocks attend in 8 bits, and Linear has none whose layers"):
        fp8_attention_(nn.Linear(4, 4))
    with pytest.raises(ValueError, match=r"expected a model such as pipe.transformer; got str"):
        fp8_attention_("model")  # type: ignore[arg-type]
    model = _model(make_flux)
    unfuse_(model)
    with pytest.raises(ValueError, match="only fused blocks"):
        fp8_attention_(model)
    assert fp8_attention_(model, False) == 0
    fuse_(model)
    assert fp8_attention_(model) > 0


def test_a_gpu_that_cannot_is_named(make_flux: Flux, monkeypatch: pytest.MonkeyPatch) -> None:
    model = _model(make_flux)
    monkeypatch.setattr(model, "parameters", lambda: [SimpleNamespace(device=torch.device("cuda", 0))])
    monkeypatch.setattr(cudnn, "why_not", lambda device: f"{device} is too old")
    with pytest.raises(ValueError, match="attention in 8 bits does not run here: cuda:0 is too old"):
        fp8_attention_(model)
    assert not any(getattr(module, "fp8_attention", False) for module in model.modules())


def test_tokens_shared_among_gpus_are_refused(make_flux: Flux) -> None:
    model = _model(make_flux)
    fp8_attention_(model)
    for name in BLOCKS:
        model.get_submodule(name).attn.processor._parallel_config = object()  # type: ignore[union-attr]
        with pytest.raises(ValueError, match=r"shares its tokens among several .*fp8_attention_\(model, False\)"):
            _run(model, name, **_inputs(model))


def test_graphs_notice_the_switch_wherever_it_is_thrown(make_flux: Flux) -> None:
    model = _model(make_flux)
    for part in (model, model.single_transformer_blocks):
        for enabled in (True, False):
            watch = _Watch(model)
            assert watch.intact()
            fp8_attention_(part, enabled)  # type: ignore[arg-type]
            assert not watch.intact()


def test_blocks_that_never_run_fused_do_not_count(make_flux: Flux) -> None:
    model = make_flux()
    quantize_(model, "w4a16", progress=False)
    with pytest.raises(ValueError, match="has none whose layers quantize their activations; quantize a FLUX"):
        fp8_attention_(model)


def test_unfusing_takes_the_switch_along(make_flux: Flux) -> None:
    model = _model(make_flux)
    fp8_attention_(model)
    unfuse_(model)
    fuse_(model)
    assert not any(getattr(module, "fp8_attention", False) for module in model.modules())


@pytest.mark.gpu
@pytest.mark.parametrize("name", BLOCKS)
def test_the_first_call_may_come_from_compiled_code_with_cuda_graphs(make_flux: Flux, name: str) -> None:
    if why_not := cudnn.why_not(torch.device("cuda")):
        pytest.skip(why_not)
    model = _model(make_flux, torch.bfloat16).cuda()
    fp8_attention_(model)
    inputs = {key: _to_gpu(value) for key, value in _inputs(model, 1, torch.bfloat16).items()}
    block: Any = model.get_submodule(name)
    cudnn._graph.cache_clear()
    cudnn._numbers.cache_clear()
    torch._dynamo.reset()
    block.compile(fullgraph=True, mode="reduce-overhead")
    for _ in range(3):
        torch.compiler.cudagraph_mark_step_begin()
        replayed = [out.clone() for out in _run(model, name, **inputs)]
    block._compiled_call_impl = None
    for actual, wanted in zip(replayed, _run(model, name, **inputs), strict=True):
        # compiled glue rounds otherwise, and 4-bit codes turn that into whole steps
        assert (actual - wanted).norm() < 0.4 * wanted.norm()


def _to_gpu(value: Any) -> Any:
    return tuple(map(_to_gpu, value)) if isinstance(value, tuple) else value.cuda()
