"""write_model_card: README.md of a quantized folder: what it was made from, each layer's scheme, how to load it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from convrot_quant.patch import plan_of
from convrot_quant.plans import COLUMNS, Plan, size_text
from convrot_quant.versions import versions

MADE_BY = "<!-- written by convrot-quant; without this line the file is yours and stays as it is -->"

# of the card that diffusers makes for a model that is pushed without one
DIFFUSERS_CARD = "has been automatically generated"

_BODY = """# {name}, quantized by ConvRot

{intro}

```python
import torch
import convrot_quant  # registers the format; pip install convrot-quant
from {library} import {name}

model = {name}.from_pretrained("{folder}"{subfolder}, dtype=torch.{dtype})
```

{loras}{summary}

## Layers

{layers}

Made with {made_with}. The licence of the base model applies.

{made_by}
"""


def write_model_card(
    folder: str | Path, model: Any, base_model: str | None, *, named: str | None = None, subfolder: str | None = None
) -> None:
    """Write README.md, unless there is one that somebody else wrote. `named`: what from_pretrained is to be given."""
    path = Path(folder) / "README.md"
    if path.exists() and not _is_generated(path.read_text(encoding="utf-8", errors="replace")):
        return
    path.write_text(model_card(model, base_model, named or Path(folder).name, subfolder), encoding="utf-8")


def _is_generated(text: str) -> bool:
    """Ours, or what diffusers writes for the hub where there was no card, which says nothing of the model."""
    return text.rstrip().endswith(MADE_BY) or DIFFUSERS_CARD in text


def model_card(model: Any, base_model: str | None, folder: str, subfolder: str | None = None) -> str:
    """The text: YAML that the hub reads, then Markdown."""
    from huggingface_hub import ModelCardData

    decided = plan_of(model)
    schemes = sorted({scheme.name for scheme in decided.values()})
    on_hub = base_model is not None and re.fullmatch(r"[\w.-]+/[\w.-]+", base_model) and not Path(base_model).exists()
    data = ModelCardData(
        base_model=base_model if on_hub else None,
        base_model_relation="quantized" if on_hub else None,
        library_name=_library(model),
        tags=["convrot", "quantized", *schemes],
    )
    # a local path says more about a machine than about a model: its last part is enough
    source = base_model if on_hub else Path(base_model).name if base_model else "an unnamed model"
    return f"---\n{data.to_yaml()}\n---\n\n" + _BODY.format(
        name=type(model).__name__,
        intro=_intro(decided, str(source), schemes),
        library=_library(model),
        folder=folder,
        subfolder=f', subfolder="{subfolder}"' if subfolder else "",
        loras=_loras(model),
        dtype=str(model.dtype).removeprefix("torch."),
        summary=_table(("", "layers", "before", "after"), _summary(decided)),
        layers=_table(COLUMNS, decided.rows()),
        made_with=", ".join(f"{package} {version}" for package, version in versions().items()),
        made_by=MADE_BY,
    )


def _intro(decided: Plan, source: str, schemes: list[str]) -> str:
    sizes = f"{size_text(decided.bytes_before)} -> {size_text(decided.bytes_after)}"
    share = f"{len(decided)} of {len(decided.planned)} linear layers"
    return (
        f"Made from `{source}`: {share} in {', '.join(schemes) or 'none'} "
        f"(bits of weights and activations), rotated by a regular Hadamard matrix; {sizes}."
    )


def _loras(model: Any) -> str:
    """The LoRA files that were merged into the 16-bit weights before they were quantized."""
    loras = getattr(model, "convrot_loras", None) or ()
    rows = [(str(lora.get("file")), str(lora.get("scale")), str(lora.get("sha256"))) for lora in loras]
    return f"Merged into the weights:\n\n{_table(('LoRA', 'scale', 'SHA-256'), rows)}\n\n" if rows else ""


def _summary(decided: Plan) -> list[tuple[str, ...]]:
    return [
        (name, str(count or ""), size_text(before), size_text(after))
        for name, count, before, after in decided.summary()
    ]


def _table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', '/') for cell in line)} |" for line in lines)


def _library(model: Any) -> str:
    return type(model).__module__.split(".")[0]
