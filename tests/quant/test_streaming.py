"""load_and_quantize: what loading and then quantizing gives, bit for bit, one 16-bit weight at a time; refusals."""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import diffusers
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import convrot_quant.pipeline
from convrot_quant import CheckpointError, ConvLinear4bit, Plan, QuantConfig, plan, quantize_
from convrot_quant.manifest import INDEX, WEIGHTS
from convrot_quant.pipeline import load_transformer, meta_transformer, open_folder, quantize_folder
from convrot_quant.streaming import load_and_quantize, outline

Flux = Callable[..., nn.Module]
MINI_FLUX = Path(__file__).parents[2] / "apps" / "mini-flux" / "weights" / "transformer"
LAYER = "transformer_blocks.0.attn.to_q"


def assert_same(streamed: nn.Module, loaded: nn.Module) -> None:
    """Modules, values, dtypes, plan: nothing tells the two apart."""
    states = streamed.state_dict(), loaded.state_dict()
    assert list(states[0]) == list(states[1])
    for name, tensor in states[0].items():
        assert tensor.dtype == states[1][name].dtype, name
        assert torch.equal(tensor, states[1][name]), name
    for (name, a), (_, b) in zip(streamed.named_buffers(), loaded.named_buffers(), strict=True):
        assert a.dtype == b.dtype, name
        assert torch.equal(a, b), name
    layers = [[m for m in model.modules() if isinstance(m, ConvLinear4bit)] for model in (streamed, loaded)]
    for a, b in zip(*layers, strict=True):
        assert (a.scheme, a.compute_dtype, a.weight_layout) == (b.scheme, b.compute_dtype, b.weight_layout)
    gradients = [[p.requires_grad for p in model.parameters()] for model in (streamed, loaded)]
    assert gradients[0] == gradients[1]
    assert streamed.convrot_plan.to_dict() == loaded.convrot_plan.to_dict()
    assert dict(streamed.config) == dict(loaded.config) | {"_name_or_path": str(loaded.config["_name_or_path"])}
    assert not streamed.training


def load_then_quantize(folder: Path, config: QuantConfig | str, dtype: torch.dtype = torch.bfloat16) -> nn.Module:
    model = load_transformer(folder, dtype=dtype)
    quantize_(model, config, progress=False)
    return model


@pytest.fixture
def folder(make_flux: Flux, tmp_path: Path) -> Path:
    """A 16-bit folder of one file."""
    make_flux(1, 1).save_pretrained(tmp_path / "flux")
    return tmp_path / "flux"


def rewrite(folder: Path, **tensors: Tensor | None) -> None:
    """Change a file's tensors; None drops one, __ stands for a dot."""
    state = load_file(folder / WEIGHTS)
    for name, tensor in tensors.items():
        state.pop(name.replace("__", "."), None)
        if tensor is not None:
            state[name.replace("__", ".")] = tensor
    save_file(state, folder / WEIGHTS, {"format": "pt"})


@pytest.mark.parametrize("source", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("shard_size", ["5GB", "2MB"])
def test_equals_loading_and_then_quantizing(
    make_flux: Flux, tmp_path: Path, source: torch.dtype, shard_size: str
) -> None:
    make_flux(1, 1, dtype=source).save_pretrained(tmp_path, max_shard_size=shard_size)
    assert (tmp_path / INDEX).is_file() == (shard_size == "2MB")
    for dtype in (torch.bfloat16, source):
        streamed = load_and_quantize(tmp_path, "paper-mixed", dtype=dtype, progress=False)
        assert_same(streamed, load_then_quantize(tmp_path, "paper-mixed", dtype))


@pytest.mark.parametrize("preset", ["ours", "ours-r16", "w8a8"])
def test_equals_loading_and_then_quantizing_the_shipped_model(preset: str) -> None:
    assert_same(load_and_quantize(MINI_FLUX, preset, progress=False), load_then_quantize(MINI_FLUX, preset))


def test_modules_that_stay_in_fp32_and_tensors_that_a_class_ignores(tmp_path: Path) -> None:
    sizes = {"num_attention_heads": 4, "attention_head_dim": 128, "ffn_dim": 512, "num_layers": 1, "text_dim": 64}
    diffusers.WanTransformer3DModel(**sizes, freq_dim=64).save_pretrained(tmp_path)
    rewrite(tmp_path, blocks__0__attn1__norm_added_q__weight=torch.ones(512))
    config = QuantConfig(overrides={"condition_embedder.time_embedder.linear_2": "W4A4"})  # of a module kept in fp32
    streamed = load_and_quantize(tmp_path, config, progress=False)
    assert_same(streamed, load_then_quantize(tmp_path, config))
    layers = {layer.name: layer for layer in streamed.convrot_plan.layers}
    assert layers["condition_embedder.time_embedder.linear_2"].dtype == "float32"
    assert {t.dtype for t in streamed.state_dict().values()} >= {torch.float32, torch.bfloat16, torch.uint8}


def test_buffers_that_are_in_no_file_have_values(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from diffusers.configuration_utils import ConfigMixin, register_to_config

    class MadeUp(diffusers.ModelMixin, ConfigMixin):
        @register_to_config
        def __init__(self, width: int = 512) -> None:
            super().__init__()
            self.blocks = nn.ModuleList([nn.ModuleDict({"lin": nn.Linear(width, 16)})])
            self.register_buffer("table", torch.linspace(0, 3, 7), persistent=False)
            self.register_buffer("ids", torch.arange(5))
            self.register_buffer("mean", torch.full((3,), 1 / 3))

    monkeypatch.setattr(diffusers, "MadeUp", MadeUp, raising=False)
    MadeUp().save_pretrained(tmp_path)
    streamed = load_and_quantize(tmp_path, progress=False)
    assert_same(streamed, load_then_quantize(tmp_path, "ours"))
    assert streamed.table.dtype == streamed.mean.dtype == torch.bfloat16
    assert torch.get_default_dtype() == torch.float32


def test_one_16_bit_weight_at_a_time(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[str]] = []
    model = meta_transformer(folder)
    planned = set(plan(model))
    load = convrot_quant.streaming._load

    def spy(model: nn.Module, name: str, *arguments: object) -> None:
        load(model, name, *arguments)
        linears = [(n, m) for n, m in model.named_modules() if type(m) is nn.Linear and n in planned]
        seen.append([n for n, m in linears if not m.weight.is_meta])

    monkeypatch.setattr(convrot_quant.streaming, "_load", spy)
    load_and_quantize(folder, progress=False)
    assert max(map(len, seen)) == 1
    assert {name for names in seen for name in names} == planned


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_stays_far_below_the_16_bit_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from diffusers.configuration_utils import ConfigMixin, register_to_config

    class Large(diffusers.ModelMixin, ConfigMixin):
        @register_to_config
        def __init__(self, layers: int = 192) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(nn.ModuleDict({"lin": nn.Linear(1024, 1024)}) for _ in range(layers))

    def memory(key: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))

    monkeypatch.setattr(diffusers, "Large", Large, raising=False)
    Large().to(torch.bfloat16).save_pretrained(tmp_path)
    load_and_quantize(tmp_path, "paper", progress=False)  # what the process needs once; no search, which takes a minute
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = memory("VmRSS")
    model = load_and_quantize(tmp_path, "paper", progress=False)
    peak, size = memory("VmHWM") - before, (tmp_path / WEIGHTS).stat().st_size
    assert size == pytest.approx(192 * 1024 * 1024 * 2, rel=0.01)
    assert peak < model.convrot_plan.bytes_after + 120e6 < 0.7 * size  # the codes, and what one layer needs in fp64


def test_the_outline_has_every_module_and_size_and_no_values(folder: Path) -> None:
    model, empty = load_and_quantize(folder, "paper-mixed", progress=False), outline(folder, "paper-mixed")
    shapes = [{n: (t.shape, t.dtype) for n, t in m.state_dict().items()} for m in (model, empty)]
    assert shapes[0] == shapes[1]
    assert all(parameter.is_meta for parameter in empty.parameters())
    kinds = [[(n, type(m)) for n, m in each.named_modules() if isinstance(m, nn.Linear)] for each in (model, empty)]
    assert kinds[0] == kinds[1]


def test_a_ready_plan_decides_every_layer(folder: Path) -> None:
    decided = plan(meta_transformer(folder), "paper")
    del decided[LAYER]
    model = load_and_quantize(folder, decided, progress=False)
    assert {n for n, m in model.named_modules() if isinstance(m, ConvLinear4bit)} == set(decided)
    assert model.convrot_plan.reasons[LAYER] == "taken out by hand"


def test_quantize_folder_never_holds_the_16_bit_model(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(convrot_quant.pipeline, "load_transformer", None)
    monkeypatch.setattr(diffusers.FluxTransformer2DModel, "from_pretrained", None)
    plans = quantize_folder(open_folder(folder), tmp_path / "out", QuantConfig.preset("ours"), progress=False)
    monkeypatch.undo()
    assert plans["transformer"].to_dict() == load_transformer(tmp_path / "out").convrot_plan.to_dict()
    loaded = load_then_quantize(folder, "ours").state_dict()
    for name, tensor in load_transformer(tmp_path / "out").state_dict().items():
        assert torch.equal(tensor, loaded[name]), name


def pickle(folder: Path) -> None:
    torch.save(load_file(folder / WEIGHTS), folder / "diffusion_pytorch_model.bin")
    (folder / WEIGHTS).unlink()


def quantized_by(folder: Path, method: str) -> None:
    config = json.loads((folder / "config.json").read_text()) | {"quantization_config": {"quant_method": method}}
    (folder / "config.json").write_text(json.dumps(config))


def lose_a_shard(folder: Path) -> None:
    diffusers.FluxTransformer2DModel.from_pretrained(folder).save_pretrained(folder, max_shard_size="2MB")
    next(folder.glob("*-00002-of-*")).unlink()


def cut(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-100])


WEIGHT = "transformer_blocks__0__attn__to_q__weight"
WRONG: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (lambda f: rewrite(f, **{WEIGHT: None}), rf"lacks tensor '{LAYER}.weight'; copy or download"),
    "unexpected": (lambda f: rewrite(f, other=torch.ones(2)), "has an unknown tensor 'other'; copy or download"),
    "shape": (
        lambda f: rewrite(f, **{WEIGHT: torch.ones(512, 256)}),
        rf"'{LAYER}.weight' must be \(512, 512\), got \(512, 256\); take config.json and weights from the same model",
    ),
    "dtype": (
        lambda f: rewrite(f, **{WEIGHT: torch.ones(512, 512, dtype=torch.int8)}),
        rf"'{LAYER}.weight' must not be I8; give the 16-bit folder",
    ),
    "NaN": (
        lambda f: rewrite(f, **{WEIGHT: torch.full((512, 512), float("nan"))}),
        rf"'{LAYER}' cannot be quantized: .* must be finite .* repair or reload the weight",
    ),
    "pickled": (
        pickle,
        r"its weights are pickled \(diffusion_pytorch_model.bin\), which can run code when",
    ),
    "no weights": (lambda f: (f / WEIGHTS).unlink(), f"neither {WEIGHTS} nor {INDEX}; copy or download"),
    "of another method": (lambda f: quantized_by(f, "gguf"), "says that gguf has quantized it; give the 16-bit folder"),
    "of our own": (lambda f: quantized_by(f, "convrot"), "says that convrot has quantized it; give the 16-bit folder"),
    "a lost shard": (lose_a_shard, "the shard diffusion_pytorch_model-00002-of-.* is missing; copy the folder again"),
    "cut": (cut, "truncated or damaged"),
}


@pytest.mark.parametrize("case", WRONG)
def test_refuses_a_folder_that_is_not_what_it_should_be(folder: Path, case: str) -> None:
    damage, message = WRONG[case]
    damage(folder)
    with pytest.raises(CheckpointError, match=message) as caught:
        load_and_quantize(folder, progress=False)
    assert str(caught.value).startswith(str(folder))
    assert "\n" not in str(caught.value)


def test_refuses_plans_that_do_not_fit(folder: Path, make_flux: Flux) -> None:
    def changed(**values: object) -> Plan:
        data = plan(meta_transformer(folder)).to_dict()
        layer = next(layer for layer in data["layers"] if layer["name"] == LAYER)
        layer.update(values)
        return Plan.from_dict(data)

    def without(name: str) -> Plan:
        data = plan(meta_transformer(folder)).to_dict()
        return Plan.from_dict(data | {"layers": [layer for layer in data["layers"] if layer["name"] != name]})

    other = Plan.from_dict(plan(meta_transformer(folder)).to_dict() | {"model_class": "SD3Transformer2DModel"})
    scheme = plan(meta_transformer(folder))[LAYER].to_dict() | {"group_size": 1024}
    cases = [
        (other, "the plan is one of SD3Transformer2DModel, not of FluxTransformer2DModel; plan this model first"),
        (without(LAYER), f"the plan says nothing of '{LAYER}', not even that it stays in 16 bits; plan this model"),
        (without("proj_out"), "the plan says nothing of 'proj_out'"),
        (plan(make_flux(2, 1)), "FluxTransformer2DModel has no linear 'transformer_blocks.1."),
        (changed(shape=[512, 256]), rf"'{LAYER}' cannot be quantized: it is \(512, 512\) here and \(512, 256\) in the"),
        (changed(scheme=scheme), rf"'{LAYER}' cannot be quantized: K=512 is not a multiple of group_size=1024; plan"),
        (QuantConfig(keep=("*",)), "nothing to quantize: every linear stays in 16 bits; see `convrot inspect`"),
    ]
    for config, message in cases:
        with pytest.raises(ValueError, match=message):
            load_and_quantize(folder, config, progress=False)
        with pytest.raises(ValueError, match=message):
            outline(folder, config)


def test_an_index_decides_over_a_single_file(folder: Path, make_flux: Flux) -> None:
    """As diffusers does: of a folder with both, the shards count."""
    shards = folder.with_name("shards")
    make_flux(1, 1, seed=9).save_pretrained(shards, max_shard_size="2MB")
    for path in shards.iterdir():
        shutil.copyfile(path, folder / path.name)
    assert (folder / WEIGHTS).is_file()
    assert_same(load_and_quantize(folder, progress=False), load_then_quantize(folder, "ours"))
