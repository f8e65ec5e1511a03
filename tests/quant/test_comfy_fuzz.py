"""Files that nobody vouches for: whatever is in them, reading ends in a CheckpointError or in a whole model."""

import json
import time
import tracemalloc
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from convrot_quant import CheckpointError, quantize_
from convrot_quant.comfy import load_comfy, read_comfy, save_comfy
from convrot_quant.convert import convert, read_quantized
from convrot_quant.manifest import INDEX, read_index

JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)
MARKER_KEYS = ("format", "convrot", "convrot_groupsize", "linear_dtype", "params", "full_precision_matrix_mult")


class Saved:
    """A small file for ComfyUI. A class, so that a failing example does not print megabytes."""

    def __init__(self, path: Path) -> None:
        self.path, self.content = path, path.read_bytes()
        self.end = 8 + int.from_bytes(self.content[:8], "little")
        self.header = json.loads(self.content[8 : self.end])

    def write(self, content: bytes) -> Path:
        damaged = self.path.with_name("damaged.safetensors")
        damaged.write_bytes(content)
        return damaged

    def with_header(self, header: dict[str, Any]) -> bytes:
        raw = json.dumps(header).encode()
        raw += b" " * (-len(raw) % 8)
        return len(raw).to_bytes(8, "little") + raw + self.content[self.end :]

    def load_or_refuse(self, content: bytes) -> None:
        """A whole model or a CheckpointError; anything else is a bug."""
        with suppress(CheckpointError):
            model = load_comfy(self.write(content))
            assert not [name for name, tensor in model.state_dict().items() if tensor.is_meta]


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory, make_flux: Callable[..., nn.Module]) -> Saved:
    path = tmp_path_factory.mktemp("fuzz") / "model.safetensors"
    model = make_flux(1, 1)
    quantize_(model, progress=False)
    save_comfy(model, path)
    return Saved(path)


@given(data=st.data())
def test_changed_header_bytes(small: Saved, data: st.DataObject) -> None:
    content = bytearray(small.content)
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, small.end - 1))] = data.draw(st.integers(0, 255))
    small.load_or_refuse(bytes(content))


@given(share=st.floats(0, 1, exclude_max=True))
def test_truncated_anywhere(small: Saved, share: float) -> None:
    with pytest.raises(CheckpointError):
        load_comfy(small.write(small.content[: int(share * len(small.content))]))


@given(content=st.binary(max_size=200))
def test_any_bytes(small: Saved, content: bytes) -> None:
    with pytest.raises(CheckpointError):
        read_quantized(small.write(content))


@given(data=st.data())
def test_changed_markers(small: Saved, data: st.DataObject) -> None:
    header = json.loads(json.dumps(small.header))
    marked = json.loads(header["__metadata__"]["_quantization_metadata"])
    names = sorted(marked["layers"])
    target = data.draw(st.sampled_from([marked, marked["layers"], *(marked["layers"][name] for name in names)]))
    target[data.draw(st.sampled_from([*sorted(target), *MARKER_KEYS]))] = data.draw(JSON)
    header["__metadata__"]["_quantization_metadata"] = json.dumps(marked)
    if data.draw(st.booleans()):  # else the tensors contradict the header
        header = {name: entry for name, entry in header.items() if not name.endswith("comfy_quant")}
        last = max(entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__")
        small.load_or_refuse(
            small.with_header(header)[: len(small.with_header(header)) - len(small.content) + small.end + last]
        )
    else:
        small.load_or_refuse(small.with_header(header))


@given(data=st.data())
def test_changed_config(small: Saved, data: st.DataObject) -> None:
    header = json.loads(json.dumps(small.header))
    config = json.loads(header["__metadata__"]["convrot_config"])
    config[data.draw(st.sampled_from([*sorted(config), "_class_name"]))] = data.draw(JSON)
    header["__metadata__"]["convrot_config"] = json.dumps(config)
    small.load_or_refuse(small.with_header(header))


@given(data=st.data())
def test_renamed_and_reshaped_tensors(small: Saved, data: st.DataObject) -> None:
    header = json.loads(json.dumps(small.header))
    name = data.draw(st.sampled_from(sorted(header.keys() - {"__metadata__"})))
    entry = header[name]
    if data.draw(st.booleans()):
        header[data.draw(st.text(max_size=12))] = header.pop(name)
    shape = data.draw(
        st.lists(st.integers(0, 2**64), max_size=4) | st.just([*entry["shape"], 1]) | st.just([1, *entry["shape"]])
    )
    entry["shape"] = shape
    entry["dtype"] = data.draw(st.sampled_from(["I8", "U8", "F8_E4M3", "BOOL", "F32", "BF16", "F4", "X"]))
    small.load_or_refuse(small.with_header(header))


def header_only(**entries: Any) -> bytes:
    raw = json.dumps(entries).encode()
    return len(raw).to_bytes(8, "little") + raw


EMPTY = {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}
HUGE = {
    "shape": header_only(x={"dtype": "I8", "shape": [2**40, 2**20], "data_offsets": [0, 2**60]}),
    "shape that overflows": header_only(x={"dtype": "F32", "shape": [2**40, 2**40], "data_offsets": [0, 0]}),
    "header": (2**62).to_bytes(8, "little") + b"{}",
    "header of 90 MB": (90 * 2**20).to_bytes(8, "little") + b"{}",
    "a million tensors": header_only(**{f"{i}.comfy_quant": EMPTY for i in range(10**6)}),
    "nested header": len(b"[" * 100_000).to_bytes(8, "little") + b"[" * 100_000,
    "nested marker": header_only(__metadata__={"_quantization_metadata": "[" * 100_000}),
    "nested config": header_only(__metadata__={"convrot_config": "[" * 100_000}),
    "empty": b"",
    "pickle": b"\x80\x04\x95" + b"\0" * 64,
}


@pytest.mark.parametrize("case", HUGE)
def test_what_a_file_declares_is_not_allocated(tmp_path: Path, case: str) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(HUGE[case])
    tracemalloc.start()
    began = time.monotonic()
    with pytest.raises(CheckpointError):
        read_quantized(path)
    assert time.monotonic() - began < 2
    assert tracemalloc.get_traced_memory()[1] < 5 * 2**20
    tracemalloc.stop()


def test_a_model_of_a_billion_blocks_is_not_built(small: Saved) -> None:
    header = json.loads(json.dumps(small.header))
    config = json.loads(header["__metadata__"]["convrot_config"]) | {"num_layers": 10**9}
    header["__metadata__"]["convrot_config"] = json.dumps(config)
    began = time.monotonic()
    with pytest.raises(CheckpointError, match="it describes a model of more than"):
        load_comfy(small.write(small.with_header(header)))
    assert time.monotonic() - began < 10


@pytest.mark.parametrize(
    "name", ["../x.safetensors", "/etc/x.safetensors", "..\\x.safetensors", ".x.safetensors", "x.bin"]
)
def test_shards_outside_of_the_folder_are_refused(shards: Path, tmp_path: Path, name: str) -> None:
    index = json.loads((shards / INDEX).read_text())
    index["weight_map"][next(iter(index["weight_map"]))] = name
    (shards / INDEX).write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="do not trust this folder"):
        read_index(shards)
    with pytest.raises(CheckpointError, match="do not trust this folder"):
        convert(shards, tmp_path / "x.safetensors", to="comfy")


@pytest.mark.parametrize("name", ["model.ckpt", "model.pt", "model.bin"])
def test_no_pickle_is_opened(tmp_path: Path, name: str) -> None:
    torch.save({"a": torch.ones(1)}, tmp_path / name)
    with pytest.raises(CheckpointError, match="a pickle can run code when it is read"):
        read_quantized(tmp_path / name)


def test_the_undamaged_file_loads(small: Saved) -> None:
    assert len(read_comfy(small.path).schemes) > 10
    assert isinstance(load_comfy(small.write(small.with_header(small.header))), nn.Module)
