"""save_quantized and load_quantized: bit-equal round trips, and one sentence for every way a folder can be wrong."""

import gc
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import convrot_quant.checkpoint
from convrot_quant import ConvLinear4bit, Plan, load_quantized, quantize_, save_quantized
from convrot_quant.manifest import INDEX, WEIGHTS, is_quantized, read_manifest

Flux = Callable[..., nn.Module]
Run = Callable[..., Tensor]
LAYER = "transformer_blocks.0.attn.to_q"


def assert_same(a: nn.Module, b: nn.Module) -> None:
    states = a.state_dict(), b.state_dict()
    assert list(states[0]) == list(states[1])
    for name, tensor in states[0].items():
        assert tensor.dtype == states[1][name].dtype, name
        assert torch.equal(tensor, states[1][name]), name


def content(path: Path) -> object:
    """A file's bytes; for safetensors, metadata and bytes by tensor (their order in the header is not fixed)."""
    if path.suffix != ".safetensors":
        return path.read_bytes()
    with safe_open(str(path), framework="pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    return metadata, {name: (t.dtype, t.shape, t.view(torch.uint8).numpy().tobytes()) for name, t in tensors.items()}


@pytest.mark.parametrize("preset", ["ours", "ours-r16", "paper-mixed", "w8a16"])
@pytest.mark.parametrize("size", ["5GB", "3MB"])
def test_round_trip_is_bit_equal(make_flux: Flux, run: Run, tmp_path: Path, preset: str, size: str) -> None:
    model = make_flux()
    decided = quantize_(model, preset, progress=False)
    save_quantized(model, tmp_path / "out", max_shard_size=size)
    files = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert (INDEX in files) == (size == "3MB")
    assert (WEIGHTS in files) == (size == "5GB")
    again = load_quantized(tmp_path / "out")
    assert type(again) is type(model)
    assert_same(model, again)
    assert torch.equal(run(again), run(model))
    assert again.convrot_plan.to_dict() == decided.to_dict()
    layers = [m for m in again.modules() if isinstance(m, ConvLinear4bit)]
    assert {layer.compute_dtype for layer in layers} == {torch.bfloat16}
    assert not again.training
    save_quantized(again, tmp_path / "twice", max_shard_size=size)
    assert sorted(path.name for path in (tmp_path / "twice").iterdir()) == files
    for name in files:
        assert content(tmp_path / "twice" / name) == content(tmp_path / "out" / name), name


def test_file_is_row_major_and_says_what_it_is(one: Path) -> None:
    model = load_quantized(one)
    layer = model.get_submodule(LAYER)
    with safe_open(str(one / WEIGHTS), framework="pt") as file:
        weight, metadata = file.get_slice(f"{LAYER}.weight"), file.metadata()
        assert (weight.get_dtype(), weight.get_shape()) == ("I8", [512, 256])
        scale = file.get_slice(f"{LAYER}.weight_scale")
        assert (scale.get_dtype(), scale.get_shape()) == ("F32", [512])
        assert file.get_tensor(f"{LAYER}.weight").numpy().tobytes() == layer.weight.numpy().tobytes()
        assert file.get_slice(f"{LAYER}.bias").get_dtype() == "BF16"
    assert metadata["convrot_format_version"] == "1"
    assert metadata["format"] == "pt"
    assert Plan.from_json(metadata["convrot_plan"])[LAYER].name == "W4A4"
    assert json.loads(metadata["convrot_versions"]).keys() == {"convrot-quant", "convrot-kernels", "torch", "diffusers"}
    config = json.loads((one / "config.json").read_text())
    assert config["_class_name"] == "FluxTransformer2DModel"


def test_every_shard_has_the_metadata_and_few_enough_bytes(shards: Path) -> None:
    files = sorted(shards.glob("*.safetensors"))
    assert len(files) > 3
    found = set()
    for path in files:
        assert sum(t.nbytes for t in load_file(path).values()) <= 3_000_000
        with safe_open(str(path), framework="pt") as file:
            found.add(tuple(sorted(file.metadata().items())))
    assert len(found) == 1
    assert sum(path.stat().st_size for path in files) == read_manifest(shards).file_bytes


def test_loading_allocates_no_16_bit_weights(one: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    built = []
    original = convrot_quant.checkpoint.build_quantized

    def spy(manifest: Any) -> nn.Module:
        model = original(manifest)
        built.extend(parameter.device.type for parameter in model.parameters())
        return model

    monkeypatch.setattr(convrot_quant.checkpoint, "build_quantized", spy)
    load_quantized(one)
    assert set(built) == {"meta"}


def test_a_model_holds_the_only_copy_of_its_codes_when_it_comes_to_its_device(
    one: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There layers may take another order, one at a time: what a second reference keeps alive would add up."""
    from diffusers import FluxTransformer2DModel

    others = []

    def to(model: nn.Module, *_: object) -> nn.Module:
        kept = {id(tensor) for tensor in (*model.parameters(), *model.buffers())}
        # by exact type: torch.compile leaves dead weak proxies and tensors without storage behind
        tensors = [t for t in gc.get_objects() if type(t) in (Tensor, nn.Parameter) and t.dtype == torch.uint8]
        codes = {t.data_ptr() for t in model.parameters() if t.dtype == torch.uint8}
        others.extend(t for t in tensors if id(t) not in kept and t.data_ptr() in codes)
        return model

    monkeypatch.setattr(FluxTransformer2DModel, "to", to)
    load_quantized(one)
    assert others == []


def test_dtype_casts_what_is_in_16_bits_and_nothing_else(one: Path, run: Run) -> None:
    plain, cast = load_quantized(one), load_quantized(one, dtype=torch.float16)
    for name, tensor in plain.state_dict().items():
        other = cast.state_dict()[name]
        changed = tensor.dtype == torch.bfloat16
        assert other.dtype == (torch.float16 if changed else tensor.dtype), name
        assert torch.equal(other, tensor.to(other.dtype)), name
    assert run(cast).dtype == torch.float16
    assert cast.get_submodule(LAYER).compute_dtype == torch.float16


def test_modules_that_stay_in_fp32_and_computed_buffers_survive(tmp_path: Path) -> None:
    """Wan keeps norms and tables in fp32 and computes its rotary tables at construction."""
    from diffusers import WanTransformer3DModel

    torch.manual_seed(0)
    sizes = {"num_attention_heads": 4, "attention_head_dim": 128, "ffn_dim": 512, "num_layers": 1, "text_dim": 64}
    WanTransformer3DModel(**sizes, freq_dim=64).save_pretrained(tmp_path / "wan")
    model = WanTransformer3DModel.from_pretrained(tmp_path / "wan", torch_dtype=torch.bfloat16)
    quantize_(model, progress=False)
    save_quantized(model, tmp_path / "out")
    again = load_quantized(tmp_path / "out", dtype=torch.bfloat16)
    assert_same(model, again)
    assert {t.dtype for t in model.state_dict().values()} >= {torch.float32, torch.bfloat16, torch.uint8}
    values = torch.randn(1, 16, 1, 4, 4).bfloat16(), torch.tensor([5]), torch.randn(1, 3, 64).bfloat16()
    with torch.no_grad():
        assert torch.equal(again(*values).sample, model.eval()(*values).sample)


def test_computed_buffers_get_the_dtype_that_diffusers_gives_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import diffusers
    from diffusers.configuration_utils import ConfigMixin, register_to_config

    class MadeUp(diffusers.ModelMixin, ConfigMixin):
        @register_to_config
        def __init__(self, width: int = 512) -> None:
            super().__init__()
            self.blocks = nn.ModuleList([nn.ModuleDict({"lin": nn.Linear(width, 16)})])
            self.register_buffer("table", torch.linspace(0, 3, 7), persistent=False)

    monkeypatch.setattr(diffusers, "MadeUp", MadeUp, raising=False)
    MadeUp().save_pretrained(tmp_path / "made")
    model = MadeUp.from_pretrained(tmp_path / "made", torch_dtype=torch.bfloat16)
    quantize_(model, progress=False)
    save_quantized(model, tmp_path / "out")
    again = load_quantized(tmp_path / "out")
    assert again.table.dtype == model.table.dtype == torch.bfloat16
    assert torch.equal(again.table, model.table)
    assert torch.get_default_dtype() == torch.float32


def test_tied_tensors_are_written_under_each_name(make_flux: Flux, run: Run, tmp_path: Path) -> None:
    model = make_flux()
    norms = [block.attn.norm_q for block in model.single_transformer_blocks]
    norms[1].weight = norms[0].weight
    quantize_(model, progress=False)
    save_quantized(model, tmp_path / "out")
    assert_same(load_quantized(tmp_path / "out"), model)


def test_plan_of_a_model_patched_by_hand_is_what_it_is(make_flux: Flux, run: Run, tmp_path: Path) -> None:
    model = make_flux()
    quantize_(model, progress=False)
    model.set_submodule(LAYER, model.get_submodule(LAYER).dequantize())
    save_quantized(model, tmp_path / "out")
    again = load_quantized(tmp_path / "out")
    assert type(again.get_submodule(LAYER)) is nn.Linear
    assert again.convrot_plan.reasons[LAYER] == "not quantized"
    assert torch.equal(run(again), run(model))


def test_refuses_to_save_what_it_cannot(make_flux: Flux, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="FluxTransformer2DModel is not quantized; quantize_ it first"):
        save_quantized(make_flux(), tmp_path / "out")
    with pytest.raises(ValueError, match="expected a diffusers model with save_config; got Linear"):
        save_quantized(nn.Linear(2, 2), tmp_path / "out")
    model = make_flux()
    quantize_(model, progress=False)
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "config.json").write_text("{}")
    with pytest.raises(FileExistsError, match="exists; choose another destination"):
        save_quantized(model, tmp_path / "there")
    model.get_submodule(LAYER).to("meta")
    with pytest.raises(ValueError, match=f"'{LAYER}.weight' is on the meta device"):
        save_quantized(model, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["there"]


FULL = "{} was not written: No space left on device; make room, or choose another destination"


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (OSError(28, "No space left on device"), FULL),
        (SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"), FULL),
        (SafetensorError("Error while serializing: a damaged tensor"), "Error while serializing: a damaged tensor"),
    ],
)
def test_a_save_that_fails_half_way_keeps_the_old_folder(
    make_flux: Flux, shards: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, message: str
) -> None:
    before = {path.name: path.read_bytes() for path in shards.iterdir()}
    model = make_flux(seed=9)
    quantize_(model, progress=False)
    written = []

    def fails(tensors: dict, path: str, metadata: dict) -> None:
        if len(written) == 2:
            raise error
        written.append(path)
        save_file(tensors, path, metadata)

    monkeypatch.setattr(convrot_quant.checkpoint, "save_file", fails)
    with pytest.raises(OSError if message == FULL else SafetensorError) as caught:
        save_quantized(model, shards, max_shard_size="3MB", overwrite=True)
    assert str(caught.value) == message.format(shards)
    assert len(written) == 2
    assert {path.name: path.read_bytes() for path in shards.iterdir()} == before
    assert [path.name for path in shards.parent.iterdir()] == ["shards"]
    monkeypatch.undo()
    save_quantized(model, shards, overwrite=True)
    assert_same(load_quantized(shards), model)


def test_is_quantized_by_config_or_files(one: Path, shards: Path, pipeline_folder: Path, tmp_path: Path) -> None:
    assert is_quantized(one)
    assert is_quantized(shards)
    assert not is_quantized(pipeline_folder / "transformer")
    (tmp_path / "config.json").write_text('{"_class_name": "FluxTransformer2DModel", "quantization_config": "odd"}')
    assert not is_quantized(tmp_path)
    config = json.loads((one / "config.json").read_text())
    del config["quantization_config"]
    (one / "config.json").write_text(json.dumps(config))
    assert is_quantized(one)  # the files say it too
    load_quantized(one)


def test_diffusers_own_loader_refuses_the_folder_where_nothing_is_registered(
    one: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import diffusers.quantizers.auto as auto
    from diffusers import FluxTransformer2DModel

    assert_same(FluxTransformer2DModel.from_pretrained(one), load_quantized(one))
    monkeypatch.delitem(auto.AUTO_QUANTIZATION_CONFIG_MAPPING, "convrot")
    with pytest.raises(ValueError, match="Unknown quantization type, got convrot"):
        FluxTransformer2DModel.from_pretrained(one)


def test_symbolic_links_into_a_cache_are_followed(shards: Path, tmp_path: Path) -> None:
    linked = tmp_path / "linked"
    linked.mkdir()
    for path in shards.iterdir():
        (linked / path.name).symlink_to(path)
    assert_same(load_quantized(linked), load_quantized(shards))
