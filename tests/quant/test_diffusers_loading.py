"""from_pretrained(..., quantization_config=ConvRotConfig()) on a tiny FLUX: how it loads, and what it refuses."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from convrot_quant import (
    CheckpointError,
    ConvLinear4bit,
    ConvRotConfig,
    QuantConfig,
    Scheme,
    load_quantized,
    quantize_,
    save_quantized,
)
from convrot_quant.convrot_config import register
from convrot_quant.diffusers import ConvRotQuantizer
from convrot_quant.on_load import quantization_device

WEIGHTS = "diffusion_pytorch_model.safetensors"
TO_Q = "transformer_blocks.0.attn.to_q"


@pytest.fixture(scope="module")
def folder(make_flux: Callable[..., nn.Module], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("flux")
    make_flux(1, 1).save_pretrained(path)  # type: ignore[operator]
    return path


@pytest.fixture(scope="module")
def saved_by_diffusers(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("quantized")
    load(folder, "paper-mixed").save_pretrained(path)
    return path


def load(path: Path, config: Any = None, options: dict[str, Any] | None = None, **kwargs: Any) -> Any:
    from diffusers import FluxTransformer2DModel

    quantization_config = ConvRotConfig(config, **{"quantization_device": "cpu"} | (options or {}))
    kwargs = {"torch_dtype": torch.bfloat16} | kwargs
    return FluxTransformer2DModel.from_pretrained(path, quantization_config=quantization_config, **kwargs)


def load_plain(path: Path, **kwargs: Any) -> Any:
    from diffusers import FluxTransformer2DModel

    return FluxTransformer2DModel.from_pretrained(path, **kwargs)


def assert_same(model: nn.Module, expected: nn.Module) -> None:
    state, wanted = model.state_dict(), expected.state_dict()
    assert state.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert state[name].dtype == tensor.dtype, name
        assert torch.equal(state[name], tensor), name


def rewrite(path: Path, change: Callable[[dict[str, Tensor], dict[str, str]], None], name: str = WEIGHTS) -> None:
    with safe_open(path / name, "pt") as file:
        state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  # no dict
        header = dict(file.metadata())
    change(state, header)
    save_file(state, path / name, header)


IMPORTS = {
    "first": "import convrot_quant, diffusers.quantizers.auto, transformers.quantizers.auto",
    "last": "import diffusers.quantizers.auto, transformers.quantizers.auto, convrot_quant",
    "by name": "import convrot_quant; from diffusers import FluxTransformer2DModel; from transformers import T5Model",
}


@pytest.mark.parametrize("order", list(IMPORTS))
def test_importing_registers_in_whatever_order(order: str) -> None:
    code = (
        f"import sys; {IMPORTS[order]}\n"
        "maps = [getattr(sys.modules[library + '.quantizers.auto'], name)"
        " for library in ('diffusers', 'transformers')"
        " for name in ('AUTO_QUANTIZER_MAPPING', 'AUTO_QUANTIZATION_CONFIG_MAPPING')]\n"
        "assert all('convrot' in found for found in maps)\n"
        "assert maps[1]['convrot'] is maps[3]['convrot'] is convrot_quant.ConvRotConfig\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_registering_again_changes_nothing() -> None:
    import diffusers.quantizers.auto as auto

    before = dict(auto.AUTO_QUANTIZER_MAPPING), dict(auto.AUTO_QUANTIZATION_CONFIG_MAPPING)
    finders = list(sys.meta_path)
    register()
    assert sys.meta_path == finders
    assert before == (auto.AUTO_QUANTIZER_MAPPING, auto.AUTO_QUANTIZATION_CONFIG_MAPPING)


@pytest.mark.parametrize(
    "config",
    [
        None,
        "w8a8",
        QuantConfig(Scheme(activation_bits=8), {"*.to_v": Scheme(8, 8)}, ("*.proj_out",)),
        QuantConfig(Scheme()).to_dict(),
    ],
)
def test_config_survives_json_and_forgets_the_device(config: Any) -> None:
    made = ConvRotConfig(config, modules_to_not_convert=["proj_out"], quantization_device="cuda:3")
    text = json.dumps(made.to_dict())
    assert "cuda" not in text
    again = ConvRotConfig.from_dict(json.loads(text))
    assert again.resolve("ours") == made.resolve("ours")
    assert again.modules_to_not_convert == ["proj_out"]
    assert made.quant_method.value == "convrot"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ConvRotConfig("best"), "unknown preset 'best'"),
        (lambda: ConvRotConfig(4), "config must be a QuantConfig or the name of a preset; got 4"),  # type: ignore[arg-type]
        (lambda: ConvRotConfig(modules_to_not_convert="proj_out"), "must be a list of names; got 'proj_out'"),
        (lambda: ConvRotConfig(quantization_device="gpu"), "gpu"),
        (lambda: ConvRotConfig.from_dict({"bits": 4}), "unknown or malformed keys"),
        (lambda: ConvRotConfig.from_dict({"dtype": 4}), "unknown or malformed keys"),
        (lambda: ConvRotConfig.from_dict({"format_version": 2}), "got 2; upgrade convrot-quant"),
        (lambda: ConvRotConfig.from_dict({"format_version": True}), "got True; upgrade convrot-quant"),
        (lambda: ConvRotConfig.from_dict({"quant_method": "sdnq"}), "quant_method must be 'convrot'"),
    ],
)
def test_config_refuses(make: Callable[[], Any], message: str) -> None:
    with pytest.raises((ValueError, RuntimeError), match=message):
        make()


@pytest.mark.parametrize("source", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shard_size", ["10GB", "2MB"])
def test_equals_loading_and_then_quantizing(
    make_flux: Callable[..., nn.Module],
    run: Callable[..., Tensor],
    tmp_path: Path,
    source: torch.dtype,
    shard_size: str,
) -> None:
    make_flux(1, 1, dtype=source).save_pretrained(tmp_path, max_shard_size=shard_size)  # type: ignore[operator]
    model, expected = load(tmp_path, "paper-mixed"), load_plain(tmp_path, torch_dtype=torch.bfloat16)
    quantize_(expected, "paper-mixed", progress=False)
    assert_same(model, expected)
    assert torch.equal(run(model), run(expected))
    assert not model.training


def test_blocks_are_fused_after_loading(folder: Path, saved_by_diffusers: Path) -> None:
    from convrot_quant.fuse import is_fused

    for model in (load(folder), load_plain(saved_by_diffusers)):
        assert is_fused(model.transformer_blocks[0])
        assert is_fused(model.single_transformer_blocks[0])


def test_a_16_bit_layer_is_gone_before_the_next_is_read(
    make_flux: Callable[..., nn.Module], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_flux(1, 1, dtype=torch.float32).save_pretrained(tmp_path)  # type: ignore[operator]  # so that each is a copy
    original, seen, most = ConvLinear4bit.from_linear, [], 0

    def watching(linear: nn.Linear, *args: Any, **kwargs: Any) -> ConvLinear4bit:
        nonlocal most
        seen.append(weakref.ref(linear.weight.untyped_storage()))
        most = max(most, sum(storage() is not None for storage in seen))
        return original(linear, *args, **kwargs)

    monkeypatch.setattr(ConvLinear4bit, "from_linear", watching)
    load(tmp_path)
    assert len(seen) > 10
    assert most <= 2


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU")
def test_peak_memory_on_a_gpu_is_the_quantized_model_and_one_layer(folder: Path) -> None:
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    model = load(folder, options={"quantization_device": "cuda"}, device_map="cuda")
    largest = max(m.in_features * m.out_features for m in model.modules() if isinstance(m, ConvLinear4bit))
    assert torch.cuda.max_memory_allocated() - before < model.get_memory_footprint() + 16 * largest


def test_layers_are_quantized_where_asked(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    devices, original = [], ConvLinear4bit.from_linear

    def watching(linear: nn.Linear, scheme: Scheme, *, device: Any) -> ConvLinear4bit:
        devices.append(device)
        return original(linear, scheme, device="cpu")

    monkeypatch.setattr(ConvLinear4bit, "from_linear", watching)
    load(folder, options={"quantization_device": "cuda:1"})
    assert set(devices) == {torch.device("cuda:1")}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert quantization_device(None, "cpu") == torch.device("cuda")
    assert quantization_device(None, "cuda:1") == torch.device("cuda:1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert quantization_device(None, "cpu") == torch.device("cpu")


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_scales_are_fp32_whatever_dtype_is_asked_for(saved_by_diffusers: Path, dtype: torch.dtype) -> None:
    own, other = load_plain(saved_by_diffusers), load_plain(saved_by_diffusers, torch_dtype=dtype)
    assert own.dtype == torch.bfloat16  # what it was saved with, where diffusers' default is fp32
    assert other.dtype == dtype
    for name, layer in own.named_modules():
        if isinstance(layer, ConvLinear4bit):
            twin = other.get_submodule(name)
            assert twin.compute_dtype == dtype
            assert twin.weight_scale.dtype == torch.float32
            assert torch.equal(twin.weight_scale, layer.weight_scale)
            assert torch.equal(twin.weight, layer.weight)


def test_what_a_class_keeps_in_fp32_stays_so(tmp_path: Path) -> None:
    from diffusers import WanTransformer3DModel

    sizes = {"num_attention_heads": 4, "attention_head_dim": 128, "ffn_dim": 512, "num_layers": 2, "text_dim": 64}
    WanTransformer3DModel(**sizes, freq_dim=64).save_pretrained(tmp_path / "wan")
    config = ConvRotConfig(QuantConfig(overrides={"condition_embedder.time_embedder.linear_2": Scheme()}))
    model = WanTransformer3DModel.from_pretrained(
        tmp_path / "wan", quantization_config=config, torch_dtype=torch.bfloat16
    )
    linear = model.condition_embedder.time_embedder.linear_2
    assert type(linear) is nn.Linear
    assert linear.weight.dtype == model.scale_shift_table.dtype == torch.float32
    assert isinstance(model.blocks[0].attn1.to_q, ConvLinear4bit)
    assert model.condition_embedder.time_proj.weight.dtype == torch.bfloat16
    model.save_pretrained(tmp_path / "saved")
    assert_same(WanTransformer3DModel.from_pretrained(tmp_path / "saved"), model)
    assert_same(load_quantized(tmp_path / "saved"), model)


@pytest.mark.parametrize("shard_size", ["10GB", "2MB"])
def test_the_two_ways_of_saving_read_each_other(
    folder: Path, run: Callable[..., Tensor], tmp_path: Path, shard_size: str
) -> None:
    model = load(folder, "paper-mixed")
    model.save_pretrained(tmp_path / "theirs", max_shard_size=shard_size)
    save_quantized(model, tmp_path / "ours", max_shard_size=shard_size)
    for path in (tmp_path / "theirs", tmp_path / "ours"):
        for again in (load_quantized(path), load_plain(path)):
            assert_same(again, model)
            assert torch.equal(run(again), run(model))
            assert again.convrot_plan.reasons == model.convrot_plan.reasons


def test_a_variant_is_saved_and_loaded(folder: Path, tmp_path: Path) -> None:
    model = load(folder)
    model.save_pretrained(tmp_path, variant="4bit", max_shard_size="2MB")
    assert_same(load_plain(tmp_path, variant="4bit"), model)


def test_a_single_file_is_quantized_on_load(folder: Path, tmp_path: Path) -> None:
    from diffusers import FluxTransformer2DModel

    path = shutil.copy(folder / WEIGHTS, tmp_path / "flux.safetensors")
    model = FluxTransformer2DModel.from_single_file(
        str(path), config=str(folder), quantization_config=ConvRotConfig(), torch_dtype=torch.bfloat16
    )
    assert_same(model, load(folder))
    model.save_pretrained(tmp_path / "saved")
    assert_same(load_plain(tmp_path / "saved"), model)


def test_a_quantized_single_file_is_refused(folder: Path, saved_by_diffusers: Path) -> None:
    from diffusers import FluxTransformer2DModel

    path = str(saved_by_diffusers / WEIGHTS)
    with pytest.raises(CheckpointError, match=r"the file is quantized already, .* load a folder with from_pretrained"):
        FluxTransformer2DModel.from_single_file(path, config=str(folder), quantization_config=ConvRotConfig())


def test_the_config_of_a_quantized_folder_wins(saved_by_diffusers: Path) -> None:
    with pytest.warns(UserWarning, match="The `quantization_config` from the model will be used"):
        model = load(saved_by_diffusers, "w8a8")
    assert model.config["quantization_config"].config == "paper-mixed"
    assert_same(model, load_plain(saved_by_diffusers))


def test_refuses_low_cpu_mem_usage_off_disk_and_pickles(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="low_cpu_mem_usage"):
        load(folder, low_cpu_mem_usage=False)
    with pytest.raises(ValueError, match=r"device_map must not put layers on disk, .* enable_group_offload"):
        load(folder, device_map={"": "disk"}, offload_folder=tmp_path)
    with pytest.raises(ValueError, match="safe_serialization=False would pickle the model"):
        load(folder).save_pretrained(tmp_path, safe_serialization=False)
    with pytest.raises(ValueError, match=r"dtype must be one of float16, bfloat16, float32; got torch\.float64"):
        load(folder, torch_dtype=torch.float64)


def test_nothing_to_quantize_is_a_warning(folder: Path) -> None:
    with pytest.warns(UserWarning, match="nothing to quantize in FluxTransformer2DModel"):
        model = load(folder, options={"modules_to_not_convert": ["*"]})
    assert model.num_parameters() == load(folder).num_parameters()


def test_a_weight_that_is_not_finite_is_named(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    rewrite(tmp_path, lambda state, _: state[f"{TO_Q}.weight"].fill_(float("nan")))
    with pytest.raises(ValueError, match=rf"'{TO_Q}' cannot be quantized: .* must be finite"):
        load(tmp_path)


def without_plan(state: dict[str, Tensor], header: dict[str, str]) -> None:
    del header["convrot_plan"]


def without_header(state: dict[str, Tensor], header: dict[str, str]) -> None:
    header.clear()


def newer(state: dict[str, Tensor], header: dict[str, str]) -> None:
    header["convrot_format_version"] = "2"


def without_scale(state: dict[str, Tensor], header: dict[str, str]) -> None:
    del state[f"{TO_Q}.weight_scale"]


def rounded_scale(state: dict[str, Tensor], header: dict[str, str]) -> None:
    state[f"{TO_Q}.weight_scale"] = state[f"{TO_Q}.weight_scale"].bfloat16()


def cut_codes(state: dict[str, Tensor], header: dict[str, str]) -> None:
    state[f"{TO_Q}.weight"] = state[f"{TO_Q}.weight"][:, :-1].contiguous()


def other_layer(state: dict[str, Tensor], header: dict[str, str]) -> None:
    header["convrot_plan"] = header["convrot_plan"].replace(TO_Q, TO_Q.replace("to_q", "to_p"))


def other_shape(state: dict[str, Tensor], header: dict[str, str]) -> None:
    header["convrot_plan"] = header["convrot_plan"].replace("[512,512]", "[512,1024]")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without_plan, "no convrot_plan"),
        (without_header, "not written by convrot"),
        (newer, "format_version 2 is newer"),
        (without_scale, f"the files lack '{TO_Q}.weight_scale'"),
        (rounded_scale, rf"'{TO_Q}\.weight_scale' must not be torch\.bfloat16"),
        (cut_codes, rf"'{TO_Q}\.weight' must be \(512, 256\), got \(512, 255\)"),
        (other_layer, "which FluxTransformer2DModel lacks"),
        (other_shape, "does not fit"),
    ],
)
def test_a_damaged_folder_is_refused(
    saved_by_diffusers: Path, tmp_path: Path, change: Callable[[dict[str, Tensor], dict[str, str]], None], message: str
) -> None:
    shutil.copytree(saved_by_diffusers, tmp_path, dirs_exist_ok=True)
    rewrite(tmp_path, change)
    with pytest.raises(CheckpointError, match=message):
        load_plain(tmp_path)


@pytest.mark.parametrize("preset", ["paper-mixed", "ours-r16"])
def test_sizes_for_device_maps_and_allocation_are_those_of_the_quantized_model(folder: Path, preset: str) -> None:
    from accelerate.utils import compute_module_sizes

    with torch.device("meta"):
        plain = load_plain(folder)
        model = type(plain).from_config(plain.config).to(torch.bfloat16)
    quantizer = ConvRotQuantizer(ConvRotConfig(preset), pre_quantized=False)
    quantizer.preprocess_model(model, keep_in_fp32_modules=[])
    assert quantizer.plan is not None
    special = quantizer.get_special_dtypes_update(model, torch.bfloat16)
    size = compute_module_sizes(model, dtype=torch.bfloat16, special_dtypes=special)[""]
    after = quantizer.plan.bytes_after
    assert size == after - sum(layer.scale_bytes + layer.branch_bytes for layer in quantizer.plan.layers)
    # what fits the memory that is left for it fits the device with scales and branches
    room = quantizer.adjust_max_memory({0: after, 1: "2GiB"})
    assert 0.99 * size < room[0] <= size
    assert 0 < room[1] < 2**31
    elements = sum(parameter.numel() for parameter in model.parameters())
    warm_up = 2 * (elements // quantizer.get_cuda_warm_up_factor())
    assert 0.5 * quantizer.plan.bytes_after < warm_up <= quantizer.plan.bytes_after
