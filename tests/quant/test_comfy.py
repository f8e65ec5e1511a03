"""ComfyUI's files: what we write, read by a decoder that shares no code with us; what others write, read by us."""

import hashlib
import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from diffusers import SD3Transformer2DModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from convrot_kernels import rotate_quantize
from convrot_quant import CheckpointError, QuantConfig, Scheme, load_quantized, quantize_
from convrot_quant.checkpoint import save_quantized
from convrot_quant.comfy import load_comfy, read_comfy, save_comfy
from convrot_quant.linear import ConvLinear4bit
from convrot_quant.markers import make_marker
from convrot_quant.tensorfile import Stored

NUMPY = {"F32": numpy.float32, "I8": numpy.int8, "U8": numpy.uint8, "BF16": numpy.uint16}
MIXED = QuantConfig(
    Scheme(),
    {
        "*norm*.linear": Scheme(4, 16),
        "*.to_out.0": Scheme(8, 8),
        "*.proj_out": Scheme(4, 8, 64),
        "*.ff.net.2": Scheme(8, 16, 16),
    },
    keep=("*.ff_context.net.0.proj",),
)


def decode(path: Path) -> tuple[dict[str, str], dict[str, numpy.ndarray[Any, Any]]]:
    """A safetensors file by its specification: struct, json and numpy alone."""
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    metadata, data, tensors = header.pop("__metadata__"), content[8 + length :], {}
    assert length % 8 == 0
    for name, entry in header.items():
        begin, end = entry["data_offsets"]
        kind = numpy.dtype(NUMPY[entry["dtype"]])
        assert begin % kind.itemsize == 0, name
        tensors[name] = numpy.frombuffer(data[begin:end], kind).reshape(entry["shape"])
    assert max(entry["data_offsets"][1] for entry in header.values()) == len(data)
    return metadata, tensors


def decode_codes(packed: numpy.ndarray[Any, Any]) -> numpy.ndarray[Any, Any]:
    """I8 (N, K/2) -> (N, K): the low nibble is the even column, two's complement."""
    both = numpy.stack([packed.view(numpy.uint8) & 15, packed.view(numpy.uint8) >> 4], -1).astype(numpy.int8)
    return numpy.where(both > 7, both - 16, both).reshape(len(packed), -1)


def layers(model: nn.Module) -> dict[str, ConvLinear4bit]:
    return {name: module for name, module in model.named_modules() if isinstance(module, ConvLinear4bit)}


def codes(layer: ConvLinear4bit) -> numpy.ndarray[Any, Any]:
    weight = layer.state_dict()["weight"].numpy()
    return decode_codes(weight) if layer.scheme.weight_bits == 4 else weight


@pytest.fixture(scope="module")
def model(make_flux: Callable[..., nn.Module]) -> nn.Module:
    made = make_flux(2, 2)
    quantize_(made, MIXED, progress=False)
    return made


@pytest.fixture(scope="module")
def file(model: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("comfy") / "model.safetensors"
    save_comfy(model, path)
    return path


def assert_same_state(model: nn.Module, other: nn.Module) -> None:
    state, others = model.state_dict(), other.state_dict()
    assert state.keys() == others.keys()
    for name, tensor in state.items():
        assert tensor.dtype == others[name].dtype, name
        assert torch.equal(tensor, others[name]), name


def test_an_independent_decoder_reads_the_same_codes_and_scales(model: nn.Module, file: Path) -> None:
    metadata, tensors = decode(file)
    marked = json.loads(metadata["_quantization_metadata"])["layers"]
    assert marked == {
        name[:-12]: json.loads(t.tobytes()) for name, t in tensors.items() if name.endswith("comfy_quant")
    }
    fused = {
        "double_blocks.1.img_attn.qkv": [f"transformer_blocks.1.attn.to_{part}" for part in "qkv"],
        "double_blocks.0.txt_attn.qkv": [f"transformer_blocks.0.attn.add_{part}_proj" for part in "qkv"],
        "single_blocks.1.linear1": [
            *(f"single_transformer_blocks.1.attn.to_{part}" for part in "qkv"),
            "single_transformer_blocks.1.proj_mlp",
        ],
        "double_blocks.0.img_attn.proj": ["transformer_blocks.0.attn.to_out.0"],
        "double_blocks.0.img_mlp.2": ["transformer_blocks.0.ff.net.2"],
        "single_blocks.0.modulation.lin": ["single_transformer_blocks.0.norm.linear"],
        "single_blocks.0.linear2": ["single_transformer_blocks.0.proj_out"],
    }  # fmt: skip
    ours = layers(model)
    for layer, members in fused.items():
        four = marked[layer]["format"] == "convrot_w4a4"
        found = decode_codes(tensors[f"{layer}.weight"]) if four else tensors[f"{layer}.weight"]
        assert numpy.array_equal(found, numpy.concatenate([codes(ours[name]) for name in members])), layer
        scale = tensors[f"{layer}.weight_scale"]
        assert scale.shape == ((len(found),) if four else (len(found), 1))
        assert numpy.array_equal(scale.ravel(), numpy.concatenate([ours[n].weight_scale.numpy() for n in members]))
        bias = numpy.concatenate([ours[n].bias.view(torch.int16).numpy() for n in members])
        assert numpy.array_equal(tensors[f"{layer}.bias"].view(numpy.int16), bias)


def test_markers_are_comfyuis(file: Path) -> None:
    marked = json.loads(decode(file)[0]["_quantization_metadata"])["layers"]
    assert marked["double_blocks.0.img_attn.qkv"] == {"format": "convrot_w4a4", "convrot_groupsize": 256}
    assert marked["single_blocks.0.linear2"] == {
        "format": "convrot_w4a4", "convrot_groupsize": 64, "linear_dtype": "int8",
    }  # fmt: skip
    assert marked["double_blocks.0.img_attn.proj"] == {
        "format": "int8_tensorwise", "convrot": True, "convrot_groupsize": 256, "per_row": True,
    }  # fmt: skip
    assert marked["double_blocks.0.img_mod.lin"]["full_precision_matrix_mult"] is True
    assert "double_blocks.0.txt_mlp.0" not in marked


def test_safetensors_reads_what_we_stream(file: Path) -> None:
    ours, theirs = decode(file)[1], load_file(file)
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert tensor.contiguous().view(torch.uint8).numpy().tobytes() == ours[name].tobytes(), name


def test_the_digest_is_that_of_the_file_with_zeros_in_its_place(file: Path) -> None:
    content, digest = file.read_bytes(), decode(file)[0]["convrot_sha256"]
    assert content.count(digest.encode()) == 1
    assert hashlib.sha256(content.replace(digest.encode(), b"0" * 64)).hexdigest() == digest


@pytest.mark.parametrize("keys", ["original", "diffusers"])
@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_a_loaded_file_is_the_model_that_was_written(
    model: nn.Module, run: Callable[..., Tensor], tmp_path: Path, keys: Any, prefix: str
) -> None:
    save_comfy(model, tmp_path / "x.safetensors", keys=keys, prefix=prefix)
    save_quantized(model, tmp_path / "folder")
    loaded, ours = load_comfy(tmp_path / "x.safetensors"), load_quantized(tmp_path / "folder")
    assert_same_state(ours, loaded)
    (was, is_) = [{n: (x.scheme, x.compute_dtype) for n, x in layers(m).items()} for m in (ours, loaded)]
    assert was == is_
    assert torch.equal(run(ours), run(loaded))
    for name in decode(tmp_path / "x.safetensors")[1]:
        assert name.startswith(prefix)


def test_other_models_keep_diffusers_names(tmp_path: Path) -> None:
    sizes = {
        "num_layers": 2,
        "attention_head_dim": 64,
        "num_attention_heads": 8,
        "sample_size": 8,
        "pos_embed_max_size": 8,
    }
    dims = {"joint_attention_dim": 64, "caption_projection_dim": 512, "pooled_projection_dim": 64}
    made = SD3Transformer2DModel(**sizes, **dims).to(torch.bfloat16).eval()
    quantize_(made, "paper", progress=False)
    with pytest.raises(CheckpointError, match=r"FLUX\.1 alone, not of SD3Transformer2DModel"):
        save_comfy(made, tmp_path / "x.safetensors")
    save_comfy(made, tmp_path / "x.safetensors", keys="diffusers")
    assert_same_state(made, load_comfy(tmp_path / "x.safetensors"))


@pytest.mark.parametrize("style", ["tensors", "header", "params", "header with the other prefix"])
def test_either_kind_of_marker_is_enough(model: nn.Module, file: Path, tmp_path: Path, style: str) -> None:
    tensors = load_file(file)
    with safe_open(str(file), framework="pt") as opened:
        metadata = dict(opened.metadata())
    if style == "tensors":
        del metadata["_quantization_metadata"]
    elif style == "params":
        header = json.loads(metadata["_quantization_metadata"])
        changed = {n: {"format": c.pop("format"), "params": c} for n, c in header["layers"].items()}
        metadata["_quantization_metadata"] = json.dumps({"format_version": "1.0", "layers": changed})
    elif style.startswith("header with"):
        tensors = {f"model.diffusion_model.{name}": tensor for name, tensor in tensors.items()}
    if style != "tensors":
        tensors = {name: tensor for name, tensor in tensors.items() if not name.endswith("comfy_quant")}
    save_file(tensors, tmp_path / "x.safetensors", metadata)
    assert_same_state(load_comfy(file), load_comfy(tmp_path / "x.safetensors"))


def write(path: Path, marker: dict[str, Any] | None, **tensors: Tensor) -> Path:
    """A file with one layer `a`, as another program writes it."""
    state = {name.replace("__", "."): tensor for name, tensor in tensors.items()}
    if marker is not None:
        state["a.comfy_quant"] = torch.tensor(list(json.dumps(marker).encode()), dtype=torch.uint8)
    save_file({name: tensor.clone() for name, tensor in state.items()}, path)
    return path


def test_the_golden_vector_of_comfyui_is_read(tmp_path: Path) -> None:
    index = torch.arange(8 * 256, dtype=torch.int64)
    weight = (((index * 2654435761) % 65536).double() / 65536 - 0.5).float().view(8, 256)
    packed, scale = rotate_quantize(weight, packed=True)
    marker = {"format": "convrot_w4a4", "convrot_groupsize": 256, "quant_group_size": 64}
    path = write(tmp_path / "x.safetensors", marker, a__weight=packed.view(torch.int8), a__weight_scale=scale)
    contents = read_comfy(path)
    assert contents.schemes == {"a": Scheme(4, 4, 256)}
    found = contents.tensors["a.weight"].value().view(torch.uint8)
    assert found[0, :16].numpy().tobytes().hex() == "0221ff0feeff13f4f31210301f2f4c1d"
    assert contents.tensors["a.weight_scale"].value()[:4].numpy().tobytes().hex() == "49a2063e0028ec3d6e4bda3ddbeefe3d"


@pytest.mark.parametrize(
    ("marker", "scheme"),
    [
        ({"format": "convrot_w4a4"}, None),
        ({"convrot": True, "convrot_groupsize": 256, "per_row": True}, Scheme(8, 8, 256)),
        ({"format": "int8_tensorwise", "convrot": True, "convrot_groupsize": 64}, Scheme(8, 8, 64)),
        ({"format": "int8_tensorwise", "params": {"convrot": True, "convrot_groupsize": 16}}, Scheme(8, 8, 16)),
        ({"convrot": True, "full_precision_matrix_mult": True}, Scheme(8, 16, 256)),
    ],
)
@pytest.mark.parametrize("shape", [(16,), (16, 1), ()])
def test_int8_files_and_legacy_markers(
    tmp_path: Path, marker: dict[str, Any], scheme: Scheme | None, shape: tuple[int, ...]
) -> None:
    weight = torch.randint(-127, 128, (16, 256), dtype=torch.int8)
    scale = torch.full(shape, 0.25)
    path = write(tmp_path / "x.safetensors", marker, a__weight=weight, a__weight_scale=scale)
    if scheme is None and shape == ():
        with pytest.raises(CheckpointError, match="must be F32"):
            read_comfy(path)
        return
    contents = read_comfy(path)
    assert contents.schemes["a"] == (scheme or Scheme())
    assert torch.equal(contents.tensors["a.weight"].value(), weight)
    assert torch.equal(contents.tensors["a.weight_scale"].value(), torch.full((16,), 0.25))


CODES, SCALES = torch.zeros(16, 128, dtype=torch.int8), torch.ones(16)
GOOD = {"format": "convrot_w4a4", "convrot_groupsize": 256}
REFUSED: dict[str, tuple[dict[str, Any] | None, dict[str, Tensor], str]] = {
    "asym": ({"format": "asym_w4a8_int8"}, {}, "format 'asym_w4a8_int8': codebook indices with FP8 group scales"),
    "asym without a marker": (None, {"a__weight_s_rel": SCALES}, "'a.weight_s_rel' belongs to asym_w4a8_int8"),
    "nunchaku": (None, {"a__wscales": SCALES}, "belongs to nunchaku's SVDQuant"),
    "plain int8": ({"format": "int8_tensorwise"}, {}, "INT8 without ConvRot; layers here are always rotated"),
    "fp8": ({"format": "float8_e4m3fn"}, {}, "'float8_e4m3fn': not one of convrot_w4a4"),
    "group of 4": (GOOD | {"convrot_groupsize": 4}, {}, "convrot_groupsize 4; this program has 16, 64, 256, 1024"),
    "group of a list": (GOOD | {"convrot_groupsize": [256]}, {}, "convrot_groupsize"),
    "clip": (
        GOOD | {"convrot_activation_clip": 2},
        {},
        "the marker of 'a' does not fit: Scheme: activation_clip",
    ),
    "linear dtype": (GOOD | {"linear_dtype": "fp4"}, {}, "linear_dtype 'fp4'"),
    "group that does not divide": (GOOD | {"convrot_groupsize": 1024}, {}, "K=256, not a multiple of 64 and of group"),
    "no marker": (None, {}, "no layer is marked as quantized"),
    "another layer without a marker": (GOOD, {"b__weight": CODES}, "'b.weight' is quantized and has no marker"),
    "scale of another size": (GOOD, {"a__weight_scale": torch.ones(8)}, r"a.weight_scale must be F32 \(16,\)"),
    "scale in 16 bits": (GOOD, {"a__weight_scale": SCALES.half()}, r"must be F32 \(16,\), got F16"),
    "weight in 16 bits": (GOOD, {"a__weight": torch.zeros(16, 256)}, "a.weight must be I8"),
    "a whole checkpoint": (GOOD, {"model__diffusion_model__x": SCALES}, "holds more than a diffusion model"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refuses_by_name(tmp_path: Path, case: str) -> None:
    marker, tensors, message = REFUSED[case]
    state = {"a__weight": CODES, "a__weight_scale": SCALES} if marker else {}
    with pytest.raises(CheckpointError, match=message):
        read_comfy(write(tmp_path / "x.safetensors", marker, **(state | tensors)))


def test_markers_that_contradict_each_other(file: Path, tmp_path: Path) -> None:
    layers = {"double_blocks.0.img_attn.qkv": GOOD | {"convrot_groupsize": 64}}
    metadata = {"_quantization_metadata": json.dumps({"layers": layers})}
    save_file(load_file(file), tmp_path / "x.safetensors", metadata)
    with pytest.raises(
        CheckpointError, match=r"header and marker tensor differ about 'double_blocks\.0\.img_attn\.qkv'"
    ):
        read_comfy(tmp_path / "x.safetensors")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ({"*.to_v": Scheme(8, 8)}, "'double_blocks.0.img_attn.qkv' is one layer .*to_v W8A8"),
        ({"*.to_v": Scheme(4, 16)}, "'double_blocks.0.img_attn.qkv' is one layer .*to_q W4A4.*to_v W4A16"),
        ({"*.to_out.0": Scheme(8, 4)}, "no place for Scheme"),
    ],
)
def test_what_the_format_cannot_hold_is_not_written(
    make_flux: Callable[..., nn.Module], tmp_path: Path, override: dict[str, Scheme], message: str
) -> None:
    made = make_flux(1, 1)
    quantize_(made, QuantConfig(overrides=override), progress=False)
    with pytest.raises(ValueError, match=message):
        save_comfy(made, tmp_path / "x.safetensors")
    assert list(tmp_path.iterdir()) == []
    if "to_v" in next(iter(override)):
        save_comfy(made, tmp_path / "x.safetensors", keys="diffusers")
        assert_same_state(made, load_comfy(tmp_path / "x.safetensors"))


def test_groups_that_no_kernel_of_comfyui_takes_are_not_written() -> None:
    with pytest.raises(ValueError, match="'a': ComfyUI's kernels take groups of 16, 64 or 256, not 1024"):
        make_marker("a", Scheme(4, 4, 1024))


def test_a_file_appears_whole_or_not_at_all(model: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(b"old")
    with pytest.raises(FileExistsError, match="exists; choose another destination"):
        save_comfy(model, path)
    chunks, left = Stored.chunks, [20]

    def failing(stored: Stored) -> Any:
        left[0] -= 1
        if not left[0]:
            raise KeyboardInterrupt
        return chunks(stored)

    monkeypatch.setattr(Stored, "chunks", failing)
    with pytest.raises(KeyboardInterrupt):
        save_comfy(model, path, overwrite=True)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]
    monkeypatch.undo()
    save_comfy(model, path, overwrite=True)
    assert_same_state(model, load_comfy(path))
