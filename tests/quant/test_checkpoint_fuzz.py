"""Damaged checkpoints: whatever is wrong with the bytes, loading ends in a CheckpointError or in a whole model."""

import json
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from convrot_quant import CheckpointError, load_quantized, quantize_, save_quantized
from convrot_quant.manifest import WEIGHTS


class Saved:
    """A small quantized model on disk. A class, so that a failing example does not print megabytes."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.content = folder, (folder / WEIGHTS).read_bytes()
        self.header_end = 8 + int.from_bytes(self.content[:8], "little")

    def load(self, content: bytes) -> torch.nn.Module:
        """Load the same folder with other bytes in its one file."""
        folder = self.folder.with_name("damaged")
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        shutil.copyfile(self.folder / "config.json", folder / "config.json")
        (folder / WEIGHTS).write_bytes(content)
        return load_quantized(folder)

    def load_or_refuse(self, content: bytes) -> None:
        """A whole model or a CheckpointError; anything else is a bug."""
        with suppress(CheckpointError):
            model = self.load(content)
            assert not [name for name, tensor in model.state_dict().items() if tensor.is_meta]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory, make_flux: Callable[..., torch.nn.Module]) -> Saved:
    folder = tmp_path_factory.mktemp("fuzz") / "model"
    model = make_flux(1, 1)
    quantize_(model, progress=False)
    save_quantized(model, folder)
    return Saved(folder)


@given(data=st.data())
def test_changed_header_bytes(saved: Saved, data: st.DataObject) -> None:
    content = bytearray(saved.content)
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, saved.header_end - 1))] = data.draw(st.integers(0, 255))
    saved.load_or_refuse(bytes(content))


@given(share=st.floats(0, 1, exclude_max=True))
def test_truncated_anywhere(saved: Saved, share: float) -> None:
    with pytest.raises(CheckpointError):
        saved.load(saved.content[: int(share * len(saved.content))])


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)


@given(data=st.data())
def test_changed_plan(saved: Saved, data: st.DataObject) -> None:
    """Any one value of the plan in the header replaced by other JSON."""
    header = json.loads(saved.content[8 : saved.header_end])
    plan = json.loads(header["__metadata__"]["convrot_plan"])
    layer = data.draw(st.sampled_from(plan["layers"]))
    target = data.draw(st.sampled_from([plan, plan["config"], layer, layer["scheme"] or plan]))
    target[data.draw(st.sampled_from(sorted(target)))] = data.draw(JSON)
    header["__metadata__"]["convrot_plan"] = json.dumps(plan)
    changed = json.dumps(header).encode()
    changed += b" " * (-len(changed) % 8)
    saved.load_or_refuse(len(changed).to_bytes(8, "little") + changed + saved.content[saved.header_end :])


def test_the_undamaged_file_loads(saved: Saved) -> None:
    assert isinstance(saved.load(saved.content), torch.nn.Module)
