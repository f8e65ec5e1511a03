"""Where pictures are kept until they are compared: in memory, or as files that a later run goes on with."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor

BF16 = "bf16"  # the name of the 16-bit model's pictures


class Store(Protocol):
    """Pictures by method, step count and number of the prompt: uint8 (3, H, W)."""

    def load(self, name: str, steps: int, indices: Sequence[int]) -> dict[int, Tensor]:
        """Those of the pictures that are there."""

    def save(self, name: str, steps: int, index: int, image: Tensor) -> None:
        """Keep one picture."""


class Memory:
    """Keeps the 16-bit pictures, and of every method the first `shown`; what is drawn again costs less than a file."""

    def __init__(self, shown: int = 0) -> None:
        self.shown = shown
        self._kept: dict[tuple[str, int, int], Tensor] = {}

    def load(self, name: str, steps: int, indices: Sequence[int]) -> dict[int, Tensor]:
        return {i: self._kept[name, steps, i] for i in indices if (name, steps, i) in self._kept}

    def save(self, name: str, steps: int, index: int, image: Tensor) -> None:
        if name == BF16 or index < self.shown:
            self._kept[name, steps, index] = image


class Folder:
    """One PNG a picture, written whole or not at all, and the settings of the run, which a later run must share."""

    def __init__(self, root: Path, settings: dict[str, Any]) -> None:
        self.root = root
        root.mkdir(parents=True, exist_ok=True)
        path = root / "settings.json"
        if not path.exists():
            _write_whole(path, json.dumps(settings, indent=2).encode())
        kept = json.loads(path.read_text())
        for key, value in json.loads(json.dumps(settings)).items():
            if kept.get(key) != value:
                raise ValueError(
                    f"quality: the pictures in {root} were drawn with {key}={kept.get(key)!r}, not {value!r}; "
                    "go on with the same settings, or name another --pictures folder"
                )

    def path(self, name: str, steps: int, index: int) -> Path:
        """The file of one picture."""
        return self.root / f"{name}_{steps}_steps" / f"{index:05}.png"

    def load(self, name: str, steps: int, indices: Sequence[int]) -> dict[int, Tensor]:
        paths = {i: self.path(name, steps, i) for i in indices}
        return {i: read_picture(path) for i, path in paths.items() if path.exists()}

    def save(self, name: str, steps: int, index: int, image: Tensor) -> None:
        path = self.path(name, steps, index)
        path.parent.mkdir(exist_ok=True)
        part = path.with_suffix(f".{os.getpid()}.part")
        to_pil(image).save(part, format="PNG")
        part.replace(path)


def _write_whole(path: Path, data: bytes) -> None:
    part = path.with_suffix(f".{os.getpid()}.part")
    part.write_bytes(data)
    part.replace(path)


def to_pil(image: Tensor) -> Image.Image:
    """uint8 (3, H, W) -> an RGB picture."""
    return Image.fromarray(image.permute(1, 2, 0).cpu().numpy())


def read_picture(path: Path, size: tuple[int, int] | None = None) -> Tensor:
    """A file -> uint8 (3, H, W); `size`: (H, W) to scale it to."""
    with Image.open(path) as image:
        rgb = image.convert("RGB")
    if size is not None:
        rgb = rgb.resize(size[::-1], Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(rgb)).permute(2, 0, 1)


PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")


def picture_files(folder: Path) -> list[Path]:
    """The picture files of a folder, by name."""
    files = sorted(p for p in folder.rglob("*") if p.suffix.lower() in PICTURE_SUFFIXES)
    if not files:
        raise ValueError(f"--reference-images {folder}: holds no {', '.join(PICTURE_SUFFIXES)} files")
    return files
