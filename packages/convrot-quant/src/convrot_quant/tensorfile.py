"""Stored tensors: where each tensor's bytes are, and a safetensors writer that copies them through, one at a time.

Reading leaves all values on disk; rows of a tensor are a span of a file. safetensors' own save_file wants every tensor
in memory at once: write_tensors writes the header first, then bytes in its order, and holds one chunk.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from torch import Tensor
from tqdm.auto import tqdm

from convrot_quant.manifest import CheckpointError, read_header

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I8": torch.int8}
DTYPES |= {"U8": torch.uint8, "I16": torch.int16, "I32": torch.int32, "I64": torch.int64, "BOOL": torch.bool}
DTYPES |= {"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
CHUNK = 8 * 2**20
DIGEST_KEY, NO_DIGEST = "convrot_sha256", "0" * 64
ALIGNMENT = 8  # bytes: safetensors asks it of the data's begin, mapped readers of every tensor


@dataclass(frozen=True)
class Span:
    """Bytes of a file."""

    file: Path
    begin: int
    length: int


Part = Span | bytes | Tensor | Callable[[], Tensor]  # the last is made when it is written


@dataclass(frozen=True)
class Stored:
    """One tensor as a header describes it; its bytes are those of its parts, one after the other."""

    dtype: str  # safetensors' names: I8, F32, BF16, ...
    shape: tuple[int, ...]
    parts: tuple[Part, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of the values."""
        return prod(self.shape) * DTYPES[self.dtype].itemsize

    @property
    def file(self) -> Path | None:
        """The file that holds it, or None where that is memory."""
        return next((part.file for part in self.parts if isinstance(part, Span)), None)

    def rows(self, start: int, stop: int) -> Stored:
        """(N, ...) -> (stop - start, ...): the same bytes, none read."""
        row, cut, at = self.nbytes // max(self.shape[0], 1), [], 0
        for part in self.parts:
            size = _size(part)
            first, last = max(start * row - at, 0), min(stop * row - at, size)
            if first < last:
                cut.append(_cut(part, first, last, row))
            at += size
        return Stored(self.dtype, (stop - start, *self.shape[1:]), tuple(cut))

    def chunks(self) -> Iterator[bytes | memoryview]:
        """The values' bytes, at most CHUNK at a time where they lie in a file."""
        for part in self.parts:
            if isinstance(part, Span):
                yield from _read(part)
            elif isinstance(part, bytes):
                yield part
            else:
                tensor = part if isinstance(part, Tensor) else part()
                yield tensor.detach().to("cpu").contiguous().reshape(-1).view(torch.uint8).numpy().data

    def value(self) -> Tensor:
        """The tensor itself, in memory of its own."""
        if not self.nbytes:
            return torch.empty(self.shape, dtype=DTYPES[self.dtype])
        content, at = bytearray(self.nbytes), 0
        for chunk in self.chunks():
            content[at : at + len(chunk)] = chunk
            at += len(chunk)
        return torch.frombuffer(content, dtype=DTYPES[self.dtype]).reshape(self.shape)


def _size(part: Part) -> int:
    assert isinstance(part, (Span, bytes, Tensor)), "rows are cut of what exists"
    if isinstance(part, Span):
        return part.length
    return part.numel() * part.element_size() if isinstance(part, Tensor) else len(part)


def _cut(part: Part, first: int, last: int, row: int) -> Part:
    """Bytes [first, last) of a part; they are whole rows."""
    assert isinstance(part, (Span, bytes, Tensor)), "rows are cut of what exists"
    if isinstance(part, Span):
        return Span(part.file, part.begin + first, last - first)
    return part[first // row : last // row] if isinstance(part, Tensor) else part[first:last]


def _read(span: Span) -> Iterator[bytes]:
    with span.file.open("rb") as file:
        file.seek(span.begin)
        left = span.length
        while left:
            chunk = file.read(min(CHUNK, left))
            if not chunk:
                raise CheckpointError(f"{span.file}: it became shorter while it was read; copy it again")
            left -= len(chunk)
            yield chunk


def in_memory(tensor: Tensor) -> Stored:
    """A tensor that lies in memory, on any device; it is moved when it is written."""
    return Stored(NAMES[tensor.dtype], tuple(tensor.shape), (tensor,))


def read_tensors(path: Path) -> tuple[dict[str, str], dict[str, Stored]]:
    """Metadata and tensors of a safetensors file; nothing is allocated that the header merely declares."""
    metadata, headers = read_header(path)  # safetensors' own checks: sizes, overflow, holes, the file's length
    entries, data = _offsets(path)
    tensors = {}
    for name, header in headers.items():
        if header.dtype not in DTYPES:
            raise CheckpointError(f"{path}: {name!r} is {header.dtype}, which this program does not read")
        begin, end = entries.get(name, (0, -1))
        stored = Stored(header.dtype, header.shape, (Span(path, data + begin, end - begin),))
        if stored.nbytes != end - begin:
            raise CheckpointError(f"{path}: the header says two things of {name!r}; do not trust this file")
        tensors[name] = stored
    return metadata, tensors


def _offsets(path: Path) -> tuple[dict[str, tuple[int, int]], int]:
    """{name: (begin, end)} of a file that read_header has accepted, and where the data begins."""
    raw = _raw_header(path)
    try:
        entries = {k: tuple(v["data_offsets"]) for k, v in json.loads(raw).items() if k != "__metadata__"}
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path}: damaged header ({error}); copy it again") from None
    return entries, 8 + len(raw)


def _raw_header(path: Path) -> bytes:
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        return file.read(min(length, path.stat().st_size))


def write_tensors(
    path: Path,
    tensors: Mapping[str, Stored],
    metadata: Mapping[str, str],
    *,
    digest: bool = True,
    verb: str = "write",
    progress: bool = False,
) -> None:
    """Write a safetensors file; with `digest`, the SHA-256 of the file (these 64 digits as zeros) in its metadata."""
    # whole multiples of 8 bytes first, then wide dtypes first: every tensor is aligned without a hole, as asked for
    order = sorted(tensors, key=lambda name: _after(tensors[name]))
    entries: dict[str, object] = {"__metadata__": {**metadata, **({DIGEST_KEY: NO_DIGEST} if digest else {})}}
    end = 0
    for name in order:
        begin, end = end, end + tensors[name].nbytes
        entries[name] = {"dtype": tensors[name].dtype, "shape": tensors[name].shape, "data_offsets": (begin, end)}
    header = json.dumps(entries, separators=(",", ":")).encode()
    header += b" " * (-len(header) % ALIGNMENT)
    total = hashlib.sha256()
    bar = tqdm(total=end, desc=verb, unit="B", unit_scale=True, disable=not progress)
    with path.open("wb") as file, bar:
        for chunk in _content(header, order, tensors):
            file.write(chunk)
            if digest:
                total.update(chunk)
            bar.update(len(chunk))
        if digest:
            file.seek(8 + _digest_place(header, NO_DIGEST))
            file.write(total.hexdigest().encode())


def _after(stored: Stored) -> tuple[bool, int]:
    odd = stored.nbytes % ALIGNMENT != 0
    return odd, -DTYPES[stored.dtype].itemsize if odd else 0


def _content(header: bytes, order: list[str], tensors: Mapping[str, Stored]) -> Iterator[bytes | memoryview]:
    """All bytes of a file, in order; a tensor whose parts are more or less than its shape says is a bug here."""
    yield len(header).to_bytes(8, "little")
    yield header
    for name in order:
        written = 0
        for chunk in tensors[name].chunks():
            written += len(chunk)
            yield chunk
        assert written == tensors[name].nbytes, f"{name} has {written} bytes, its header {tensors[name].nbytes}"


def _digest_place(header: bytes, digest: str) -> int:
    """Where in the header the digest's 64 digits are, or -1. Quotes inside strings are escaped: there is one place."""
    key = f'"{DIGEST_KEY}":"'.encode()
    place = header.find(key + digest.encode() + b'"')
    return place + len(key) if place >= 0 else -1


def digest_of(path: Path, claimed: str) -> str:
    """The SHA-256 of a file whose metadata claims one, computed as write_tensors does."""
    header = _raw_header(path)
    place = _digest_place(header, claimed)
    if place < 0:
        raise CheckpointError(f"{path}: its {DIGEST_KEY} is not written as convrot writes it; another tool changed it")
    total = hashlib.sha256(len(header).to_bytes(8, "little"))
    total.update(header[:place] + NO_DIGEST.encode() + header[place + len(claimed) :])
    begin = 8 + len(header)
    for chunk in _read(Span(path, begin, path.stat().st_size - begin)):
        total.update(chunk)
    return total.hexdigest()
