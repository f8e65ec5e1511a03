"""apply, quantize_, dequantize_: what changes, what is refused before anything changes, what memory is held."""

import copy
import weakref
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import convrot_quant.patch
from convrot_kernels import hadamard
from convrot_quant import ConvLinear4bit, LayerPlan, Plan, QuantConfig, Scheme, apply, dequantize_, plan, quantize_

Flux = Callable[..., nn.Module]
Run = Callable[..., Tensor]


def quantized(model: nn.Module) -> dict[str, Scheme]:
    return {name: m.scheme for name, m in model.named_modules() if isinstance(m, ConvLinear4bit)}


@pytest.mark.parametrize(("preset", "bound"), [("ours", 0.06), ("paper", 0.06), ("w8a8", 0.01)])
def test_quantize_follows_its_plan_and_keeps_the_output_close(
    make_flux: Flux, run: Run, preset: str, bound: float
) -> None:
    model = make_flux()
    expected = run(model)
    decided = quantize_(model, preset, progress=False)
    assert isinstance(decided, Plan)
    assert quantized(model) == decided
    error = (run(model) - expected).norm() / expected.norm()
    assert 0 < error < bound


def test_apply_takes_a_plain_dict_and_leaves_the_rest_alone(make_flux: Flux) -> None:
    model = make_flux()
    before = {name: id(module) for name, module in model.named_modules()}
    name = "transformer_blocks.0.attn.to_q"
    apply(model, {name: Scheme.parse("W8A8")}, progress=False)
    assert quantized(model) == {name: Scheme.parse("W8A8")}
    after = {name: id(module) for name, module in model.named_modules()}
    assert {key for key in before if before[key] != after[key]} == {name}


def test_each_16_bit_weight_is_freed_before_the_next_is_read(make_flux: Flux, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_flux()
    decided = plan(model)
    seen: list[weakref.ref[Tensor]] = []
    alive_at_each_call = []
    original = ConvLinear4bit.from_linear.__func__

    def spy(cls: type, linear: nn.Linear, scheme: Scheme, **options: object) -> ConvLinear4bit:
        alive_at_each_call.append(sum(ref() is not None for ref in seen))
        seen.append(weakref.ref(linear.weight))
        return original(cls, linear, scheme, **options)

    monkeypatch.setattr(ConvLinear4bit, "from_linear", classmethod(spy))
    apply(model, decided, progress=False)
    assert len(alive_at_each_call) == len(decided) == 26
    assert set(alive_at_each_call) == {0}
    assert not any(ref() is not None for ref in seen)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_weight_that_is_not_finite_is_refused_by_name_and_nothing_changes(make_flux: Flux, bad: float) -> None:
    model = make_flux()
    name = "single_transformer_blocks.1.proj_out"
    with torch.no_grad():
        model.get_submodule(name).weight[5, 7] = bad
    with pytest.raises(ValueError, match=f"apply: '{name}' cannot be quantized: its weight holds NaN or inf"):
        quantize_(model, progress=False)
    assert quantized(model) == {}


def test_a_weight_that_overflows_when_rotated_is_refused_by_name() -> None:
    model = nn.Module()
    model.blocks = nn.ModuleList([nn.ModuleDict({"lin": nn.Linear(512, 16)})])
    with torch.no_grad():
        row = hadamard(256, torch.float32, "cpu")[0].sign() * torch.finfo(torch.float32).max  # its sum is 16 times that
        model.blocks[0]["lin"].weight[3] = torch.cat([row, row])
    with pytest.raises(ValueError, match=r"apply: 'blocks.0.lin' .*finite after rotation in fp32; row 3 of 16"):
        quantize_(model, progress=False)
    assert quantized(model) == {}


def test_a_late_overflow_leaves_every_earlier_layer_as_it_was(make_flux: Flux) -> None:
    model = make_flux(dtype=torch.float32)
    before = {name: id(module) for name, module in model.named_modules()}
    name = "single_transformer_blocks.1.proj_out"  # the last of the plan
    weight = model.get_submodule(name).weight
    row = hadamard(256, torch.float32, "cpu")[0].sign() * torch.finfo(torch.float32).max
    with torch.no_grad():
        weight[5] = row.repeat(weight.shape[1] // 256)
    with pytest.raises(ValueError, match=rf"apply: '{name}' cannot be quantized: .*finite after rotation"):
        quantize_(model, progress=False)
    assert {name: id(module) for name, module in model.named_modules()} == before
    assert not hasattr(model, "convrot_plan")


def test_a_large_weight_that_fits_when_rotated_is_quantized(make_flux: Flux) -> None:
    model = make_flux(dtype=torch.float32)
    name = "single_transformer_blocks.1.proj_out"
    with torch.no_grad():
        model.get_submodule(name).weight[5, 7] = torch.finfo(torch.float32).max / 2  # alone in its group: / 16 rotated
    quantize_(model, progress=False)
    assert name in quantized(model)


def test_quantizing_twice_is_refused(make_flux: Flux) -> None:
    model = make_flux()
    decided = quantize_(model, progress=False)
    for again in (lambda: quantize_(model), lambda: apply(model, decided), lambda: plan(model)):
        with pytest.raises(ValueError, match=r"is already quantized \(26 ConvLinear4bit layers\)"):
            again()


def test_lora_must_come_after_quantizing_and_then_works(make_flux: Flux, run: Run) -> None:
    peft = pytest.importorskip("peft")
    lora = peft.LoraConfig(r=4, target_modules=["to_q", "to_k"], init_lora_weights=False)
    model = make_flux()
    model.add_adapter(lora)
    with pytest.raises(ValueError, match=r"is a LoRA layer .* load the LoRA after quantizing, or merge it first"):
        quantize_(model)
    model = make_flux()
    quantize_(model, progress=False)
    plain = run(model)
    model.add_adapter(lora)
    adapter = model.transformer_blocks[0].attn.to_q.lora_A["default"].weight
    assert adapter.dtype == torch.bfloat16
    assert not torch.equal(run(model), plain)
    model.disable_adapters()
    assert torch.equal(run(model), plain)


def test_errors_say_what_to_do(make_flux: Flux, prompts: tuple[str, ...]) -> None:
    model = make_flux()
    name = "transformer_blocks.0.attn.to_q"
    with pytest.raises(ValueError, match=r"expected a model such as pipe.transformer; got tuple"):
        plan(prompts)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="config must be a QuantConfig or the name of a preset; got 3"):
        plan(model, 3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="has no linear 'nope'; plan this model first"):
        apply(model, {"nope": Scheme()})
    with pytest.raises(ValueError, match="'x_embedder' cannot be quantized: K=64 is not a multiple of group_size=256"):
        apply(model, {"x_embedder": Scheme()})
    with pytest.raises(ValueError, match="its weight is on the meta device; load the weights first"):
        apply(make_flux().to("meta"), {name: Scheme()})
    wider = [LayerPlan(layer.name, 3072, 3072, "bfloat16", 0, layer.scheme, "") for layer in plan(make_flux()).layers]
    with pytest.raises(ValueError, match=r"is \(3072, 512\) here and \(3072, 3072\) in the plan"):
        apply(model, Plan(wider, QuantConfig(), "FluxTransformer2DModel", 0))
    with pytest.raises(ValueError, match=r"nothing to quantize in FluxTransformer2DModel: kept by '\*'"):
        quantize_(model, QuantConfig(keep=("*",)))
    with pytest.raises(ValueError, match="has no ConvLinear4bit; quantize_ it first"):
        dequantize_(model)
    assert quantized(model) == {}


def test_an_offloaded_model_is_refused(make_flux: Flux) -> None:
    from accelerate import cpu_offload

    model = cpu_offload(make_flux(), execution_device="cpu")
    with pytest.raises(ValueError, match="has an offloading hook; quantize first, then enable offloading"):
        quantize_(model)


def test_quantizing_elsewhere_gives_the_same_layers_in_place(make_flux: Flux) -> None:
    here, there = make_flux(), make_flux()
    quantize_(here, progress=False)
    quantize_(there, device="cpu:0", progress=False)
    states = here.state_dict(), there.state_dict()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_dequantize_gives_plain_linears_that_compute_alike(make_flux: Flux, run: Run) -> None:
    model = make_flux()
    quantize_(model, "w4a16", progress=False)
    expected = run(model)
    dequantize_(model)
    assert quantized(model) == {}
    assert all(type(model.get_submodule(name)) is nn.Linear for name in plan(model))
    assert (run(model) - expected).norm() / expected.norm() < 0.01


def test_a_copy_of_a_quantized_model_computes_the_same(make_flux: Flux, run: Run) -> None:
    model = make_flux()
    quantize_(model, progress=False)
    expected = run(model)
    again = copy.deepcopy(model)
    assert torch.equal(run(again), expected)
    assert convrot_quant.patch.plan_of(again) == quantized(model)
    half = again.to(torch.float16)
    assert quantized(half) == quantized(model)
    error = (run(half).float() - expected.float()).norm() / expected.float().norm()
    assert error < 0.06  # other roundings move some 4-bit codes by a step


def test_progress_is_one_line_on_stderr_and_can_be_off(make_flux: Flux, capsys: pytest.CaptureFixture[str]) -> None:
    quantize_(make_flux(), progress=True)
    assert "quantize" in capsys.readouterr().err
    quantize_(make_flux(), progress=False)
    assert "quantize" not in capsys.readouterr().err
