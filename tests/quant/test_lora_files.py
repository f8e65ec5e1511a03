"""LoRA files merged into the 16-bit weights while these are read: as fuse_lora before quantize_, to the last bit."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from typer.testing import CliRunner

from convrot_kernels.testing import assert_equal
from convrot_quant import CheckpointError, load_and_quantize, load_quantized, quantize_, save_quantized
from convrot_quant.cli import app
from convrot_quant.lora_files import LoraFile, Merge
from convrot_quant.pipeline import ModelFolder, quantize_folder

pytest.importorskip("peft")
Flux = Callable[..., nn.Module]
TARGETS = [
    "to_q",
    "to_k",
    "to_v",
    "to_out.0",
    "proj_mlp",
    "ff.net.2",
    "norm1.linear",
    "single_transformer_blocks.0.proj_out",
]
TO_Q = "transformer_blocks.0.attn.to_q"


@pytest.fixture(scope="module")
def files(make_flux: Flux, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """one.safetensors and two.safetensors, of which the second reaches a layer that stays in 16 bits."""
    from diffusers import FluxPipeline
    from peft import LoraConfig, get_peft_model_state_dict

    folder = tmp_path_factory.mktemp("lora")
    for seed, name in enumerate(("one", "two")):
        model: Any = make_flux()
        torch.manual_seed(seed)
        targets = [*TARGETS, *(["x_embedder"] if name == "two" else [])]
        model.add_adapter(LoraConfig(r=4, lora_alpha=2, target_modules=targets, init_lora_weights=False))
        FluxPipeline.save_lora_weights(
            folder, transformer_lora_layers=get_peft_model_state_dict(model), weight_name=f"{name}.safetensors",
            transformer_lora_adapter_metadata=model.peft_config["default"].to_dict(),
        )  # fmt: skip
    return folder


@pytest.fixture(scope="module")
def source(make_flux: Flux, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("source")
    make_flux().save_pretrained(folder, max_shard_size="8MB")  # type: ignore[operator]
    return folder


def fused(model: Any, files: list[tuple[Path, float]]) -> Any:
    """The 16-bit model with the files merged by diffusers itself."""
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline

    nothing = dict.fromkeys(("vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))
    pipe = FluxPipeline(scheduler=FlowMatchEulerDiscreteScheduler(), transformer=model, **nothing)
    for i, (path, _) in enumerate(files):
        pipe.load_lora_weights(path.parent, weight_name=path.name, adapter_name=f"a{i}")
    pipe.set_adapters([f"a{i}" for i in range(len(files))], [scale for _, scale in files])
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    return pipe.transformer


def assert_same(model: nn.Module, expected: nn.Module) -> None:
    state, wanted = model.state_dict(), expected.state_dict()
    assert state.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert_equal(state[name], tensor)


def rewritten(path: Path, target: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> Path:
    save_file(change(load_file(path)), target)
    return target


def kohya(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rank 4, alpha 2 on the fused qkv of the first double block."""
    torch.manual_seed(7)
    name = "lora_unet_double_blocks_0_img_attn_qkv"
    down, up = torch.randn(4, 512).bfloat16(), torch.randn(3 * 512, 4).bfloat16()
    return {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up, f"{name}.alpha": torch.tensor(2.0)}


def test_is_what_fusing_before_quantizing_gives(make_flux: Flux, files: Path, source: Path, tmp_path: Path) -> None:
    merged = [(files / "one.safetensors", 0.7), (files / "two.safetensors", -1.25)]
    expected = fused(make_flux(), merged)
    assert not torch.equal(expected.x_embedder.weight, make_flux().x_embedder.weight)  # type: ignore[union-attr]
    quantize_(expected, progress=False)
    loras = [LoraFile(path, scale) for path, scale in merged]
    assert_same(load_and_quantize(source, loras=loras, progress=False), expected)
    quantize_folder(ModelFolder(source, False, {"": source}), tmp_path / "out", "ours", loras=loras, progress=False)  # type: ignore[arg-type]
    assert_same(load_quantized(tmp_path / "out"), expected)


def test_kohyas_names_and_alphas_are_read_as_diffusers_reads_them(
    make_flux: Flux, files: Path, source: Path, tmp_path: Path
) -> None:
    path = rewritten(files / "one.safetensors", tmp_path / "kohya.safetensors", kohya)
    expected = fused(make_flux(), [(path, 1.0)])
    state = load_file(path)
    down, up = (next(value for key, value in state.items() if part in key) for part in ("lora_down", "lora_up"))
    delta = 0.5 * up[:512].float() @ down.float()
    plain: Any = make_flux()
    torch.testing.assert_close(
        expected.get_submodule(TO_Q).weight.float() - plain.get_submodule(TO_Q).weight.float(), delta, rtol=0, atol=0.1
    )
    quantize_(expected, progress=False)
    assert_same(load_and_quantize(source, loras=[LoraFile(path)], progress=False), expected)


def test_a_wider_embedder_takes_a_lora_of_the_narrow_one_with_zeros(make_flux: Flux, files: Path) -> None:
    from diffusers import FluxTransformer2DModel

    config = dict(make_flux().config) | {"in_channels": 384, "out_channels": 64}  # type: ignore[call-overload]
    with torch.device("meta"):
        model = FluxTransformer2DModel.from_config(config).to(torch.bfloat16)
    merge = Merge(model, [LoraFile(files / "two.safetensors")])
    delta = merge("x_embedder.weight", torch.zeros(512, 384, dtype=torch.bfloat16))
    assert delta[:, :64].any(dim=0).all()
    assert not delta[:, 64:].any()


def with_text_encoder(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return state | {f"text_encoder.{k.removeprefix('transformer.')}": v.clone() for k, v in list(state.items())[:2]}


def test_what_belongs_to_other_models_is_left_out_and_said(files: Path, source: Path, tmp_path: Path) -> None:
    path = rewritten(files / "one.safetensors", tmp_path / "both.safetensors", with_text_encoder)
    with pytest.warns(UserWarning, match=r"both\.safetensors: left out 2 tensors of other models, such as 'text_enc"):
        model = load_and_quantize(source, loras=[LoraFile(path)], progress=False)
    alone = [
        LoraFile(
            rewritten(path, tmp_path / "one.safetensors", lambda s: {k: v for k, v in s.items() if "text" not in k})
        )
    ]
    assert_same(model, load_and_quantize(source, loras=alone, progress=False))


def renamed(old: str, new: str) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    return lambda state: {key.replace(old, new): value for key, value in state.items()}


def with_key(key: str) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    return lambda state: state | {key: torch.ones(4)}


def wider(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {k: torch.ones(4, 1024) if k == f"transformer.{TO_Q}.lora_A.weight" else v for k, v in state.items()}


def taller(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {k: torch.ones(1024, 4) if k == f"transformer.{TO_Q}.lora_B.weight" else v for k, v in state.items()}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (renamed("blocks", "layers"), "none of its .* belongs to a layer of FluxTransformer2DModel .*for this model"),
        (renamed("transformer.", "unet."), "none of its .* tensors belongs to a layer"),
        (wider, rf"'transformer.{TO_Q}.lora_A.weight' is \(4, 1024\), and its layer .* has 512 inputs"),
        (taller, rf"'transformer.{TO_Q}.lora_B.weight' is \(1024, 4\), and its layer .* has 512 outputs"),
        (with_key(f"transformer.{TO_Q}.dora_scale"), "it is a DoRA"),
        (with_key(f"transformer.{TO_Q}.lora_magnitude_vector"), "it is a DoRA"),
        (with_key(f"transformer.{TO_Q}.lokr_w1"), "it is a LoKr"),
        (with_key("double_blocks.0.img_attn.norm.query_norm.scale"), "it is a Control LoRA"),
        (with_key(f"transformer.{TO_Q}.lora_B.bias"), "is no low-rank term of FluxTransformer2DModel"),
        (renamed("lora_A.weight", "lora_A.wrong"), "is no low-rank term"),
    ],
)  # fmt: skip
def test_refuses_what_it_cannot_merge(
    files: Path, source: Path, tmp_path: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]], message: str
) -> None:
    path = rewritten(files / "one.safetensors", tmp_path / "changed.safetensors", change)
    with pytest.raises(CheckpointError, match=rf"changed\.safetensors.*: .*{message}"):
        load_and_quantize(source, loras=[LoraFile(path)], progress=False)


def convrot(*arguments: object) -> Any:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_the_command_merges_and_says_so(pipeline_folder: Path, files: Path, make_flux: Flux, tmp_path: Path) -> None:
    from diffusers import FluxTransformer2DModel

    out, file = tmp_path / "out", files / "one.safetensors"
    done = convrot("quantize", pipeline_folder, "-o", out, "--lora", f"{file}:0.5", "--json", "-q")
    assert done.exit_code == 0, done.stderr
    assert json.loads(done.stdout)["loras"] == [{"file": str(file), "scale": 0.5}]
    expected = fused(make_flux(), [(file, 0.5)])
    quantize_(expected, progress=False)
    loaded: Any = load_quantized(out / "transformer")
    assert_same(loaded, expected)
    card = (out / "transformer" / "README.md").read_text()
    assert "| one.safetensors | 0.5 |" in card
    assert 'from_pretrained("out/transformer", dtype' in card
    save_quantized(loaded, tmp_path / "again")
    theirs = FluxTransformer2DModel.from_pretrained(tmp_path / "again")
    theirs.save_pretrained(tmp_path / "third")
    assert "| one.safetensors | 0.5 |" in (tmp_path / "third" / "README.md").read_text()
    marks = [json.loads((path / "config.json").read_text())["quantization_config"]["loras"]
             for path in (out / "transformer", tmp_path / "again", tmp_path / "third")]  # fmt: skip
    assert marks[0] == marks[1] == marks[2]
    assert (marks[0][0]["file"], marks[0][0]["scale"], len(marks[0][0]["sha256"])) == ("one.safetensors", 0.5, 64)


@pytest.mark.parametrize(
    ("lora", "message"),
    [("nothing.safetensors", "no such file"), ("bad.safetensors", "bad.safetensors: "), ("x.bin", "x.bin"),
     ("good.safetensors:nan", "its scale must be a finite number, got nan")],
)  # fmt: skip
def test_the_command_refuses_a_bad_file_in_one_sentence(
    source: Path, files: Path, tmp_path: Path, lora: str, message: str
) -> None:
    (tmp_path / "bad.safetensors").write_bytes(b"not a safetensors file")
    (tmp_path / "x.bin").write_bytes(b"\x80\x04pickled")
    (tmp_path / "good.safetensors").write_bytes((files / "one.safetensors").read_bytes())
    failed = convrot("quantize", source, "-o", tmp_path / "out", "--lora", tmp_path / lora, "-q")
    assert failed.exit_code == 1, failed.stdout
    assert message in failed.stderr
    assert len(failed.stderr.strip().splitlines()) == 1
    assert not list(tmp_path.glob("*out*"))


def test_two_transformers_and_unknown_classes_are_refused(source: Path, files: Path, tmp_path: Path) -> None:
    both = ModelFolder(source, False, {"transformer": source, "transformer_2": source})
    with pytest.raises(ValueError, match="quantize each of the two folders with its own --lora"):
        quantize_folder(both, tmp_path / "out", "ours", loras=[LoraFile(files / "one.safetensors")])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="--lora: diffusers has no LoRA loader for Linear"):
        Merge(nn.Linear(4, 4, device="meta"), [LoraFile(files / "one.safetensors")])


@pytest.mark.gpu
def test_merging_on_a_gpu_is_close_to_merging_on_the_cpu(source: Path, files: Path) -> None:
    loras = [LoraFile(files / "one.safetensors", 0.7)]
    ours = load_and_quantize(source, loras=loras, device="cuda", home="cpu", progress=False)
    theirs, plain = load_and_quantize(source, loras=loras, progress=False), load_and_quantize(source, progress=False)
    weights: list[Tensor] = [m.get_submodule(TO_Q).dequantize().weight.float() for m in (ours, theirs, plain)]  # type: ignore[operator]
    assert (weights[0] - weights[1]).norm() < 0.02 * (weights[1] - weights[2]).norm()
