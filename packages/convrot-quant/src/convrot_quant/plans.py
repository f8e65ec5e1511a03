"""Plan: dict[str, Scheme] for the quantized layers, with the reason for every 16-bit one; prints as a table; JSON."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch

from convrot_quant.config import QuantConfig, Scheme

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions
    from rich.table import Table

FORMAT_VERSION = 1
COLUMNS = ("layer", "count", "shape (N, K)", "before", "after", "scheme or reason")
WIDE = 110  # columns in which a row of the table fits on one line
_RIGHT_ALIGNED = ("count", "shape (N, K)", "before", "after")


def size_text(n: float) -> str:
    """A number of bytes for people, three digits of it: 512 B, 1.50 KiB, 22.2 GiB."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if n < 1000 or unit == "GiB":
            digits = 0 if unit == "B" or n >= 100 else 1 if n >= 10 else 2
            return f"{n:.{digits}f} {unit}"
        n /= 1024
    raise AssertionError("the loop returns at GiB")


@dataclass(frozen=True)
class LayerPlan:
    """One linear: its shape, the dtype of its values, and its scheme with a note or None with the reason."""

    name: str
    out_features: int
    in_features: int
    dtype: str  # torch's name without "torch."
    bias_bytes: int
    scheme: Scheme | None
    note: str

    @property
    def bytes_before(self) -> int:
        """Weight and bias as they are in the model that was planned."""
        return self.out_features * self.in_features * getattr(torch, self.dtype).itemsize + self.bias_bytes

    @property
    def bytes_after(self) -> int:
        """Codes, fp32 scales, low-rank branch and bias; the same as before where the layer stays in 16 bits."""
        if self.scheme is None:
            return self.bytes_before
        codes = self.out_features * (self.in_features * self.scheme.weight_bits // 8)
        return codes + self.scale_bytes + self.branch_bytes + self.bias_bytes

    @property
    def scale_bytes(self) -> int:
        """The fp32 scales of a quantized layer."""
        return 4 * self.out_features if self.scheme else 0

    @property
    def branch_bytes(self) -> int:
        """Its low-rank branch."""
        rank = self.scheme.low_rank if self.scheme else 0
        return rank * (self.in_features + self.out_features) * getattr(torch, self.dtype).itemsize

    def to_dict(self) -> dict[str, Any]:
        """One entry of the plan's JSON."""
        return {
            "name": self.name,
            "shape": [self.out_features, self.in_features],
            "dtype": self.dtype,
            "bias_bytes": self.bias_bytes,
            "scheme": None if self.scheme is None else self.scheme.to_dict(),
            "note": self.note,
            "bytes": [self.bytes_before, self.bytes_after],
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> LayerPlan:
        """The inverse of to_dict; `bytes` is computed again. Every value is checked: plans come from files."""
        name, shape, dtype, bias_bytes, note = (
            _entry(data, key) for key in ("name", "shape", "dtype", "bias_bytes", "note")
        )
        fits = isinstance(name, str) and isinstance(note, str) and isinstance(dtype, str)
        fits = fits and isinstance(getattr(torch, dtype, None), torch.dtype) and _is_count(bias_bytes)
        fits = fits and isinstance(shape, list) and len(shape) == 2 and all(map(_is_count, shape))
        if not fits:
            raise ValueError(
                f"Plan: a layer has a name, a shape [N, K], a dtype of torch, bias_bytes and a note; got {dict(data)!r}"
            )
        (out_features, in_features), scheme = shape, _entry(data, "scheme")
        decoded = None if scheme is None else Scheme.from_dict(scheme)
        return cls(name, out_features, in_features, dtype, bias_bytes, decoded, note)


def _entry(data: Any, key: str) -> Any:
    """data[key] of what should be a JSON object with that key."""
    if not isinstance(data, Mapping) or key not in data:
        raise ValueError(f"Plan: the key {key!r} is missing in {data!r}")
    return data[key]


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**48


class Plan(dict[str, Scheme]):
    """{layer name: Scheme} of the quantized layers in the model's order. Edit it like the dict it is, then apply it.

    `layers` has every linear of the model with its shape, bytes and note; `reasons` maps each 16-bit one to its reason.
    """

    def __init__(self, layers: Iterable[LayerPlan], config: QuantConfig, model_class: str, other_bytes: int) -> None:
        self.planned = tuple(layers)
        self.config = config
        self.model_class = model_class
        self.other_bytes = other_bytes
        super().__init__({layer.name: layer.scheme for layer in self.planned if layer.scheme is not None})

    @property
    def layers(self) -> tuple[LayerPlan, ...]:
        """Every linear in the model's order, edits of the dict included."""
        return tuple(_edited(layer, self.get(layer.name)) for layer in self.planned)

    @property
    def reasons(self) -> dict[str, str]:
        """{layer name: why it stays in 16 bits}."""
        return {layer.name: layer.note for layer in self.layers if layer.scheme is None}

    @property
    def bytes_before(self) -> int:
        """The whole model as it was planned."""
        return self.other_bytes + sum(layer.bytes_before for layer in self.layers)

    @property
    def bytes_after(self) -> int:
        """The whole model once the plan is applied."""
        return self.other_bytes + sum(layer.bytes_after for layer in self.layers)

    def rows(self, *, fold: bool = True) -> list[tuple[str, ...]]:
        """The table's rows as text; fold: layers that differ only in their block's index share a row."""
        groups: dict[tuple[object, ...], list[LayerPlan]] = {}
        for layer in self.layers:
            pattern = _split_index(layer.name) if fold else (layer.name, "", "")
            key = (pattern[0], pattern[2], layer.out_features, layer.in_features, layer.scheme, layer.note)
            groups.setdefault(key, []).append(layer)
        return [_row(group) for group in groups.values()]

    def summary(self) -> list[tuple[str, int, int, int]]:
        """(scheme or what else, layers, bytes before, bytes after): one entry a scheme, then the total."""
        totals: dict[str, list[int]] = {}
        for layer in self.layers:
            name = "16-bit" if layer.scheme is None else layer.scheme.name
            total = totals.setdefault(name, [0, 0, 0])
            for i, value in enumerate((1, layer.bytes_before, layer.bytes_after)):
                total[i] += value
        lines = [(name, *totals[name]) for name in sorted(totals, key=lambda name: (name == "16-bit", name))]
        other = [("not linear", 0, self.other_bytes, self.other_bytes)] if self.other_bytes else []
        return [*lines, *other, ("total", len(self.planned), self.bytes_before, self.bytes_after)]  # type: ignore[list-item]

    def summary_lines(self) -> list[str]:
        """The summary as aligned text, the total with its ratio."""
        lines = []
        for name, count, before, after in self.summary():
            layers = f"{count} layers" if count else ""
            lines.append(f"{name:<10} {layers:>11} {size_text(before):>11} -> {size_text(after):>10}")
        return [*lines[:-1], f"{lines[-1]}  ({self.bytes_before / max(self.bytes_after, 1):.2f}x smaller)"]

    def __str__(self) -> str:
        rows = [COLUMNS, *self.rows()]
        widths = [max(len(row[i]) for row in rows) for i in range(len(COLUMNS))]
        lines = []
        for row in rows:
            right = [name in _RIGHT_ALIGNED for name in COLUMNS]
            cells = [c.rjust(w) if r else c.ljust(w) for c, w, r in zip(row, widths, right, strict=True)]
            lines.append("  ".join(cells).rstrip())
        return "\n".join([f"{self.model_class}: plan", *lines, "", *self.summary_lines()])

    def table(self, *, fold: bool = True, width: int = WIDE) -> Table:
        """The plan as a rich table for a console of `width` columns; the summary is its caption."""
        from rich import box
        from rich.table import Table

        table = Table(title=f"{self.model_class}: plan", box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
        table.caption = "\n".join(self.summary_lines())
        table.caption_style, table.title_style, table.caption_justify = "", "bold", "left"
        rows = self.rows(fold=fold)
        for name in COLUMNS:
            right = name in _RIGHT_ALIGNED
            justify: Literal["left", "right"] = "right" if right else "left"
            whole = name == "layer" and width >= WIDE  # names on one line, unless the console is too narrow
            table.add_column(name, justify=justify, no_wrap=right or whole, overflow="fold")
        for row in rows:
            table.add_row(*row, style="dim" if row[-1].startswith("16-bit") else None)
        return table

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Table]:
        yield self.table(width=options.max_width)

    def to_dict(self) -> dict[str, Any]:
        """The plan with its configuration, ready for JSON."""
        return {
            "format_version": FORMAT_VERSION,
            "model_class": self.model_class,
            "config": self.config.to_dict(),
            "other_bytes": self.other_bytes,
            "layers": [layer.to_dict() for layer in self.layers],
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Plan:
        """The inverse of to_dict."""
        version = data.get("format_version") if isinstance(data, Mapping) else None
        if version != FORMAT_VERSION or isinstance(version, bool):
            raise ValueError(f"Plan: format_version must be {FORMAT_VERSION}; got {version!r}; upgrade convrot-quant")
        layers, model_class, other_bytes = (_entry(data, key) for key in ("layers", "model_class", "other_bytes"))
        if not (isinstance(layers, list) and isinstance(model_class, str) and _is_count(other_bytes)):
            raise ValueError("Plan: layers must be a list, model_class a name and other_bytes a number of bytes")
        config = QuantConfig.from_dict(_entry(data, "config"))
        decoded = [LayerPlan.from_dict(layer) for layer in layers]
        name, count = Counter(layer.name for layer in decoded).most_common(1)[0] if decoded else ("", 1)
        if count > 1:
            raise ValueError(f"Plan: every layer must be listed once; {name!r} is there {count} times; plan again")
        return cls(decoded, config, model_class, other_bytes)

    def to_json(self) -> str:
        """The plan as JSON text."""
        return json.dumps(self.to_dict(), indent=2)

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """The inverse of to_json."""
        try:
            data = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"Plan: not valid JSON: {error}") from None
        return cls.from_dict(data)


def _edited(layer: LayerPlan, scheme: Scheme | None) -> LayerPlan:
    """The layer as the plan's dict has it now."""
    if scheme == layer.scheme:
        return layer
    sizes = (layer.out_features, layer.in_features, layer.dtype, layer.bias_bytes)
    return LayerPlan(layer.name, *sizes, scheme, "changed by hand" if scheme else "taken out by hand")


def _split_index(name: str) -> tuple[str, str, str]:
    """ "blocks.3.attn.to_out.0" -> ("blocks", "3", "attn.to_out.0"): at the first number."""
    parts = name.split(".")
    for i, part in enumerate(parts):
        if part.isdigit():
            return ".".join(parts[:i]), part, ".".join(parts[i + 1 :])
    return name, "", ""


def _row(group: list[LayerPlan]) -> tuple[str, ...]:
    """The cells of one row, in the order of COLUMNS."""
    first = group[0]
    before, _, after = _split_index(first.name)
    indices = [int(_split_index(layer.name)[1]) for layer in group] if len(group) > 1 else []
    name = f"{before}.{{{_ranges(indices)}}}.{after}".rstrip(".") if indices else first.name
    sizes = [size_text(sum(sizes)) for sizes in zip(*((g.bytes_before, g.bytes_after) for g in group), strict=True)]
    scheme = "16-bit" if first.scheme is None else f"{first.scheme.name} g{first.scheme.group_size}"
    reason = f"{scheme}: {first.note}" if first.note else scheme
    return (name, str(len(group)), f"{first.out_features} x {first.in_features}", *sizes, reason)


def _ranges(indices: list[int]) -> str:
    """[0, 1, 2, 5] -> "0-2,5"."""
    runs: list[list[int]] = []
    for i in indices:
        if runs and i == runs[-1][-1] + 1:
            runs[-1].append(i)
        else:
            runs.append([i])
    return ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
