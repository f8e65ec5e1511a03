"""Fused blocks: the same layers and files, and what the separate layers compute, wherever they may run."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from convrot_kernels import rotate_quantize
from convrot_kernels.testing import assert_equal, make_inputs
from convrot_quant import (
    ConvLinear4bit,
    QuantConfig,
    Scheme,
    dequantize_,
    fuse_,
    load_quantized,
    quantize_,
    save_quantized,
    unfuse_,
)
from convrot_quant.families import flux as fused_flux
from convrot_quant.fuse import is_fused
from convrot_quant.linear import Side, operand
from convrot_quant.stack import Stack

Flux = Callable[..., nn.Module]
Run = Callable[..., Tensor]
BLOCKS = ("transformer_blocks.0", "single_transformer_blocks.0")


def _random(model: nn.Module) -> nn.Module:
    """Weights of a size that lets every layer count."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm_" in name and name.endswith("weight"):
                parameter.copy_(1 + 0.1 * torch.randn(parameter.shape, generator=generator))
            else:
                parameter.copy_(0.05 * torch.randn(parameter.shape, generator=generator))
    return model


_quantized: dict[str, nn.Module] = {}  # quantizing takes seconds, a copy does not


def _pair(make_flux: Flux, config: QuantConfig | str = "ours", **options: Any) -> tuple[nn.Module, nn.Module]:
    """One model fused, and the same layer by layer."""
    key = f"{config} {sorted(options.items())}"
    if key not in _quantized:
        _quantized[key] = _random(make_flux(**options))
        quantize_(_quantized[key], config, fuse=False, progress=False)
    fused, plain = copy.deepcopy(_quantized[key]), copy.deepcopy(_quantized[key])
    fuse_(fused)
    return fused, plain


def _block_inputs(model: nn.Module, batch: int = 1, dtype: torch.dtype = torch.bfloat16) -> dict[str, Any]:
    ids = torch.zeros(16, 3)
    ids[6:, 1] = torch.arange(10)
    return {
        "hidden_states": make_inputs(batch, 10, 512, dtype=dtype).clamp(-4, 4),
        "encoder_hidden_states": make_inputs(batch, 6, 512, dtype=dtype, seed=1).clamp(-4, 4),
        "temb": make_inputs(batch, 512, dtype=dtype, seed=2).clamp(-2, 2),
        "image_rotary_emb": model.pos_embed(ids),
    }


def _distance(actual: Tensor, expected: Tensor) -> float:
    return ((actual.float() - expected.float()).norm() / expected.float().norm()).item()


def _calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of block classes whose fused forward went its own way, as it goes."""
    seen: list[str] = []
    whole = fused_flux._attention

    def counted(attn: nn.Module, *args: Tensor) -> Tensor:
        seen.append("double" if attn.added_kv_proj_dim else "single")
        return whole(attn, *args)

    monkeypatch.setattr(fused_flux, "_attention", counted)
    return seen


# numbers


@pytest.mark.parametrize("scheme", ["W4A4", "W4A8", "W8A8", "W4A16"])
def test_a_stack_gives_the_bits_of_its_layers(scheme: str) -> None:
    x = make_inputs(2, 5, 512)
    layers = [
        ConvLinear4bit.from_linear(nn.Linear(512, n, dtype=torch.bfloat16), Scheme.parse(scheme))
        for n in (512, 256, 1024)
    ]
    expected = torch.cat([layer(x) for layer in layers], dim=-1)
    stack = Stack()
    assert_equal(stack(layers, lambda s: operand(x, s), x.dtype), expected)  # apart
    stack.join(layers)
    assert len(stack.parts(layers)) == 1
    assert_equal(stack(layers, lambda s: operand(x, s), x.dtype), expected)
    assert_equal(torch.cat([layer(x) for layer in layers], dim=-1), expected)  # the members still work alone


def test_a_stack_quantizes_once_for_each_scheme_and_joins_neighbours() -> None:
    x, made = make_inputs(3, 256), list[Scheme]()
    schemes = ["W4A4", "W4A4", "W8A8", "W4A4"]
    linears = [nn.Linear(256, 64, dtype=torch.bfloat16) for _ in schemes]
    layers = [ConvLinear4bit.from_linear(a, Scheme.parse(s)) for a, s in zip(linears, schemes, strict=True)]
    expected = torch.cat([layer(x) for layer in layers], dim=-1)
    stack = Stack()
    stack.join(layers)

    def counted(scheme: Scheme) -> tuple[Tensor, Tensor | None]:
        made.append(scheme)
        return operand(x, scheme)

    assert_equal(stack(layers, counted, x.dtype), expected)
    assert [scheme.name for scheme in made] == ["W4A4", "W8A8"]
    assert [len(part.weight) for part in stack.parts(layers)] == [128, 64, 64]


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("preset", ["ours", "ours-r16", "w8a8", "paper-mixed"])
@pytest.mark.parametrize("name", BLOCKS)
def test_a_fused_block_computes_what_its_layers_do(make_flux: Flux, name: str, preset: str, batch: int) -> None:
    # in fp32 nothing is left of what folding leaves out: roundings to 16 bits, which flip codes
    fused, plain = _pair(make_flux, preset, dtype=torch.float32, double=2, single=2)
    inputs = _block_inputs(fused, batch, torch.float32)
    with torch.no_grad():
        results = [model.get_submodule(name)(**inputs) for model in (fused, plain)]
    for actual, expected in zip(*results, strict=True):
        assert actual.shape == expected.shape
        assert actual.dtype == expected.dtype
        assert _distance(actual, expected) < 2e-3


@pytest.mark.parametrize("preset", ["ours", "ours-r16", "paper", "paper-mixed", "w4a8"])
def test_every_preset_stays_as_close_to_16_bits_as_unfused(make_flux: Flux, run: Run, preset: str) -> None:
    fused, plain = _pair(make_flux, preset)
    exact = run(_random(make_flux()))
    assert _distance(run(fused), exact) < 1.1 * _distance(run(plain), exact) + 0.01


@pytest.mark.parametrize("batch", [1, 2])
def test_the_streams_of_a_single_block_are_joined_without_a_copy_where_they_lie_so(batch: int) -> None:
    whole = make_inputs(batch, 9, 32)
    with torch.no_grad():
        joined = fused_flux._in_a_row(whole[:, :4], whole[:, 4:])
        assert joined.data_ptr() == whole.data_ptr()
        assert_equal(joined, whole)
        for text, image in (
            (whole[:, :4].clone(), whole[:, 4:]),
            (whole[:, :4], whole[:, 5:]),
            (whole[:, 5:], whole[:, :5]),
            (whole[..., :16][:, :4], whole[..., :16][:, 4:]),
        ):
            joined = fused_flux._in_a_row(text, image)
            assert joined.data_ptr() != whole.data_ptr()
            assert_equal(joined, torch.cat((text, image), 1))
    assert fused_flux._in_a_row(whole[:, :4], whole[:, 4:]).data_ptr() != whole.data_ptr()  # gradients need both


def test_fp16_is_clipped_as_diffusers_clips_it(make_flux: Flux) -> None:
    fused, _ = _pair(make_flux, dtype=torch.float16)
    inputs = _block_inputs(fused, dtype=torch.float16)
    inputs["encoder_hidden_states"] = inputs["encoder_hidden_states"].clone()
    inputs["encoder_hidden_states"][0, 0, :4] = torch.tensor([65504.0, -65504.0, 65504.0, -65504.0])
    with torch.no_grad():
        for name in BLOCKS:
            fused.get_submodule(f"{name.rpartition('.')[0]}.0").get_parameter(
                "proj_out.bias" if name.startswith("single") else "ff_context.net.2.bias"
            ).fill_(1e4)
            text, _ = fused.get_submodule(name)(**inputs)
            assert text.isfinite().all()


# storage


def test_names_files_and_bytes_are_those_of_separate_layers(make_flux: Flux, run: Run, tmp_path: Path) -> None:
    fused, plain = _pair(make_flux)
    state, expected = fused.state_dict(), plain.state_dict()
    assert list(state) == list(expected)
    for name, tensor in expected.items():
        assert_equal(state[name], tensor)
    save_quantized(fused, tmp_path / "model")
    size = sum(path.stat().st_size for path in (tmp_path / "model").glob("*.safetensors"))
    save_quantized(plain, tmp_path / "plain")
    assert size == sum(path.stat().st_size for path in (tmp_path / "plain").glob("*.safetensors"))
    loaded = load_quantized(tmp_path / "model")
    assert is_fused(loaded.get_submodule(BLOCKS[0]))
    assert_equal(run(loaded), run(fused))


def test_stacked_weights_are_held_once(make_flux: Flux) -> None:
    fused, _ = _pair(make_flux)
    attn = fused.get_submodule(BLOCKS[0]).attn
    for tensors in zip(*((m.weight, m.weight_scale, m.bias) for m in (attn.to_q, attn.to_k, attn.to_v)), strict=True):
        assert len({tensor.untyped_storage().data_ptr() for tensor in tensors}) == 1
        assert tensors[0].untyped_storage().nbytes() == sum(t.numel() * t.element_size() for t in tensors)


@pytest.mark.parametrize("assign", [False, True])
def test_loaded_weights_are_used(make_flux: Flux, run: Run, assign: bool) -> None:
    fused, _ = _pair(make_flux)
    other = _random(make_flux())
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.1).add_(0.01)
    quantize_(other, progress=False)
    fused.load_state_dict(copy.deepcopy(other.state_dict()), assign=assign)
    assert_equal(run(fused), run(other))
    block = fused.get_submodule(BLOCKS[0])
    assert len(block._stacks["image"].parts(block.stacked()["image"])) == 1  # joined again


def test_a_member_that_moved_alone_is_multiplied_alone(make_flux: Flux) -> None:
    fused, _ = _pair(make_flux)
    block, inputs = fused.get_submodule(BLOCKS[0]), _block_inputs(fused)
    with torch.no_grad():
        expected = block(**inputs)
        block.attn.to_k.weight.data = block.attn.to_k.weight.data.clone()
        assert_equal(block(**inputs)[1], expected[1])
        stack = block._stacks["image"]
        assert len(stack.parts(block.stacked()["image"])) == 3
        assert not stack._parts  # nothing stays behind
        block.attn.to_k.weight.data = torch.zeros_like(block.attn.to_k.weight.data)
        assert not torch.equal(block(**inputs)[1], expected[1])
        fuse_(fused)
        block.float().bfloat16()
        assert len(stack.parts(block.stacked()["image"])) == 1


def test_a_copy_is_fused_and_of_its_own(make_flux: Flux, run: Run) -> None:
    fused, _ = _pair(make_flux)
    twin, expected = copy.deepcopy(fused), run(fused)
    assert_equal(run(twin), expected)
    with torch.no_grad():
        fused.get_submodule(BLOCKS[0]).attn.to_q.weight.zero_()
    assert_equal(run(twin), expected)


# where the forward is diffusers' own


def test_unfuse_and_dequantize_give_diffusers_forward_back(make_flux: Flux, run: Run) -> None:
    fused, plain = _pair(make_flux)
    assert fuse_(fused) == 0  # nothing left to do
    unfuse_(fused)
    assert not any(map(is_fused, fused.modules()))
    assert_equal(run(fused), run(plain))
    assert fuse_(fused) == 3
    dequantize_(fused)
    assert type(fused.get_submodule(BLOCKS[0])).__module__.startswith("diffusers")


def test_classes_keep_their_names_and_ancestry(make_flux: Flux) -> None:
    fused, plain = _pair(make_flux)
    for name in BLOCKS:
        ours, theirs = fused.get_submodule(name), plain.get_submodule(name)
        assert type(ours).__name__ == type(theirs).__name__
        assert isinstance(ours, type(theirs))


TARGETS = ["attn.to_q", "attn.add_k_proj", "attn.to_out.0", "ff.net.0.proj", "ff_context.net.2", "norm1.linear"]


@pytest.mark.parametrize("target", [*TARGETS, "proj_mlp", "proj_out", "attn.to_v"])
def test_a_lora_changes_a_fused_block_as_it_does_an_unfused_one(
    make_flux: Flux, monkeypatch: pytest.MonkeyPatch, target: str
) -> None:
    from peft import LoraConfig, inject_adapter_in_model

    fused, plain = _pair(make_flux, dtype=torch.float32)
    name = BLOCKS["proj_" in target or target == "attn.to_v"]
    inputs, results, seen = _block_inputs(fused, 2, torch.float32), [], _calls(monkeypatch)
    for model in (fused, plain):
        block = model.get_submodule(name)
        with torch.no_grad():
            before = block(**inputs)
            torch.manual_seed(1)
            inject_adapter_in_model(LoraConfig(r=4, target_modules=[target], init_lora_weights=False), block)
            after = block(**inputs)
        results.append(after)
        assert max(_distance(*pair) for pair in zip(after, before, strict=True)) > 0.005
    for actual, expected in zip(*results, strict=True):
        assert _distance(actual, expected) < 2e-3
    assert len(seen) == 2  # fused before and after


def test_several_adapters_of_one_layer_add_up(make_flux: Flux) -> None:
    from peft import LoraConfig

    fused, plain = _pair(make_flux, dtype=torch.float32)
    inputs, results = _block_inputs(fused, 1, torch.float32), []
    for model in (fused, plain):
        for seed, (adapter, rank) in enumerate((("one", 4), ("two", 8))):
            torch.manual_seed(seed)
            targets = ["to_q", "to_v", "proj_mlp"]
            model.add_adapter(LoraConfig(r=rank, target_modules=targets, init_lora_weights=False), adapter)
        model.set_adapters(["one", "two"], [0.5, 2.0])
        with torch.no_grad():
            results.append([model.get_submodule(name)(**inputs)[1] for name in BLOCKS])
    for actual, expected in zip(*results, strict=True):
        assert _distance(actual, expected) < 2e-3


def test_an_adapter_that_is_more_or_is_trained_keeps_a_block_unfused(
    make_flux: Flux, monkeypatch: pytest.MonkeyPatch
) -> None:
    from peft import LoraConfig, inject_adapter_in_model

    seen = _calls(monkeypatch)
    for options, grad in (({"lora_bias": True}, False), ({"lora_dropout": 0.5}, False), ({}, True)):
        fused, plain = _pair(make_flux, dtype=torch.float32)
        inputs, results = _block_inputs(fused, 1, torch.float32), []
        for model in (fused, plain):
            block = model.get_submodule(BLOCKS[1])
            torch.manual_seed(1)
            config = LoraConfig(r=4, target_modules=["to_k"], init_lora_weights=False, **options)
            inject_adapter_in_model(config, block)
            with torch.set_grad_enabled(grad):
                torch.manual_seed(2)
                results.append(block(**inputs)[1].detach())
        assert_equal(*results)
    assert not seen


def test_a_hook_inside_is_called_and_may_change_the_output(make_flux: Flux) -> None:
    fused, plain = _pair(make_flux)
    inputs, outputs = _block_inputs(fused), []
    for model in (fused, plain):
        block = model.get_submodule(BLOCKS[0])
        handle = block.attn.register_forward_hook(lambda module, args, output: tuple(2 * part for part in output))
        with torch.no_grad():
            outputs.append(block(**inputs)[1])
        handle.remove()
    assert_equal(*outputs)
    with torch.no_grad():
        assert not torch.equal(fused.get_submodule(BLOCKS[0])(**inputs)[1], outputs[0])


def test_another_processor_or_keyword_runs_diffusers_forward(make_flux: Flux, monkeypatch: pytest.MonkeyPatch) -> None:
    fused, plain = _pair(make_flux)
    seen, inputs = _calls(monkeypatch), _block_inputs(fused)

    class Doubled(type(plain.get_submodule(BLOCKS[0]).attn.processor)):  # type: ignore[misc]
        def __call__(self, *args: Any, **options: Any) -> Any:
            return tuple(2 * part for part in super().__call__(*args, **options))

    with torch.no_grad():
        fused.get_submodule(BLOCKS[0])(**inputs)
        fused.get_submodule(BLOCKS[1])(**inputs)
        assert seen == ["double", "single"]
        for model in (fused, plain):
            model.get_submodule(BLOCKS[0]).attn.set_processor(Doubled())
        results = [model.get_submodule(BLOCKS[0])(**inputs) for model in (fused, plain)]
        assert_equal(results[0][1], results[1][1])
        fused.get_submodule(BLOCKS[1])(**inputs, joint_attention_kwargs={"scale": 1.0})
    assert seen == ["double", "single"]


def test_a_16_bit_layer_in_a_block_keeps_it_unfused(make_flux: Flux, monkeypatch: pytest.MonkeyPatch) -> None:
    fused, plain = _pair(make_flux, QuantConfig(keep=("*.to_k",)))
    seen, inputs = _calls(monkeypatch), _block_inputs(fused)
    with torch.no_grad():
        for name in BLOCKS:
            assert_equal(fused.get_submodule(name)(**inputs)[1], plain.get_submodule(name)(**inputs)[1])
    assert not seen


def test_weight_only_schemes_run_layer_by_layer(make_flux: Flux, run: Run) -> None:
    fused, plain = _pair(make_flux, "w4a16")
    assert_equal(run(fused), run(plain))


# with the rest of diffusers


@pytest.mark.parametrize("kind", ["leaf_level", "block_level"])
def test_group_offload_gives_the_same_output(make_flux: Flux, run: Run, kind: str) -> None:
    fused, plain = _pair(make_flux)
    expected = run(fused if kind == "block_level" else plain)  # hooks on leaves keep blocks unfused
    fused.enable_group_offload(
        onload_device=torch.device("cpu"), offload_device=torch.device("cpu"), offload_type=kind, num_blocks_per_group=1
    )
    assert_equal(run(fused), expected)
    assert_equal(run(fused), expected)
    if kind == "leaf_level":  # nothing holds on to what hooks move
        assert not any(stack._parts for name in BLOCKS for stack in fused.get_submodule(name)._stacks.values())


def test_compiled_blocks_call_the_hooks_that_offload_their_layers(make_flux: Flux, run: Run) -> None:
    torch._dynamo.reset()
    fused, plain = _pair(make_flux)
    expected = run(plain)  # hooks on leaves keep blocks unfused, where they are traced too
    cpu = torch.device("cpu")
    fused.enable_group_offload(onload_device=cpu, offload_device=cpu, offload_type="leaf_level")
    fused.compile_repeated_blocks(backend="eager")
    assert_equal(run(fused), expected)
    torch._dynamo.reset()


def test_the_first_block_cache_knows_fused_blocks(make_flux: Flux, run: Run) -> None:
    from diffusers import FirstBlockCacheConfig

    fused, _ = _pair(make_flux)
    expected = run(fused)
    fused.enable_cache(FirstBlockCacheConfig(threshold=1e-6))
    with fused.cache_context("test"):
        assert _distance(run(fused), expected) < 1e-6
    fused.disable_cache()
    assert_equal(run(fused), expected)


def test_blocks_compile_once_for_steps_prompts_and_blocks(make_flux: Flux, run: Run) -> None:
    torch._dynamo.reset()
    fused, _ = _pair(make_flux, double=2, single=3)
    expected = run(fused)
    fused.compile_repeated_blocks(fullgraph=True)
    run(fused)
    with torch._dynamo.config.patch(error_on_recompile=True):
        actual = run(fused)
        run(fused, seed=1)
    assert _distance(actual, expected) < 0.3  # compiled code rounds less: see docs/design.md
    torch._dynamo.reset()


def test_blocks_compile_whose_modulation_has_a_side(make_flux: Flux, run: Run) -> None:
    torch._dynamo.reset()
    fused, _ = _pair(make_flux, dtype=torch.float32)
    linear = fused.single_transformer_blocks[0].norm.linear
    plain = run(fused)
    linear.add_side("s", Side(torch.randn(4, linear.in_features) / 8, torch.randn(linear.out_features, 4) / 8, 1.0))
    expected = run(fused)
    assert not torch.equal(expected, plain)
    fused.compile_repeated_blocks(fullgraph=True, backend="aot_eager")
    assert _distance(run(fused), expected) < 2e-3
    torch._dynamo.reset()


def test_a_family_without_a_file_runs_layer_by_layer() -> None:
    from diffusers import SD3Transformer2DModel

    model = SD3Transformer2DModel(
        sample_size=8, num_layers=1, attention_head_dim=64, num_attention_heads=8, joint_attention_dim=64,
        caption_projection_dim=512, pooled_projection_dim=64, in_channels=16, patch_size=2, pos_embed_max_size=8,
    ).bfloat16()  # fmt: skip
    quantize_(model, progress=False)
    assert fuse_(model) == 0
    output = model(
        make_inputs(1, 16, 8, 8), make_inputs(1, 3, 64), make_inputs(1, 64), torch.tensor([500.0]), return_dict=False
    )[0]
    assert output.isfinite().all()
    assert rotate_quantize(output.flatten(1)[:, :256])[0].any()
