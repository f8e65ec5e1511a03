"""The table of released models: what the preset `ours` makes of each, planned on the meta device at its real sizes."""

from collections import Counter
from functools import cache

from convrot_quant import Plan, plan
from convrot_quant.named_models import MODELS, named_model

COLUMNS = ("model", "class", "W4A4", "W4A16", "16-bit", "GB before", "GB after")


@cache
def released_plan(name: str) -> Plan:
    """What the preset `ours` makes of a released model."""
    return plan(named_model(name))


def families_table() -> str:
    """One line a model of released.py: layers by scheme, and the bytes of its transformer in 16 and in 4 bits."""
    lines = [f"| {' | '.join(COLUMNS)} |", "| --- | --- | ---: | ---: | ---: | ---: | ---: |"]
    for name, (model_class, _) in MODELS.items():
        found = released_plan(name)
        layers = Counter("16-bit" if layer.scheme is None else layer.scheme.name for layer in found.layers)
        sizes = [f"{size / 1e9:.2f}" for size in (found.bytes_before, found.bytes_after)]
        cells = [name, f"`{model_class}`", *(str(layers[column]) for column in COLUMNS[2:5]), *sizes]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)
