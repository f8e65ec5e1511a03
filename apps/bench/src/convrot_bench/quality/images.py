"""The pictures of docs/images about quality: drawn from committed rows, again only where their figures have changed."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from PIL import Image

from convrot_bench.bars import Rows
from convrot_bench.quality import plots
from convrot_bench.quality.tables import LEVER, SHORT, all_seeds, figures, most_steps, synthetic, title_of

TEXT = "Description"  # of a PNG: what is drawn, by which a stale picture is known
Data = dict[str, Any]
LAYERS = ("layers", "layers_planned")


def errors_of(rows: Rows, cases: tuple[str, ...]) -> Data:
    """{method: its title and these figures} of methods that have errors of layers."""
    found = figures(rows)
    keep = ("title", *cases)
    return {n: {k: f[k] for k in keep if k in f} for n, f in found.items() if cases[0] in f}


def rivals_of(data: Data) -> Data:
    """Without levers, whose labels would be a thicket, and without what fits few layers and leaves the rest alone."""
    kept = {n: f for n, f in data.items() if not n.startswith(LEVER) and f["layers"] > 0.9 * f["layers_planned"]}
    return {n: {key: value for key, value in f.items() if key not in LAYERS} for n, f in kept.items()}


def layers_of(rows: Rows) -> Data:
    """{title: {layer: error}} of the newest rows of the methods in README's table."""
    kept = {r["case"].split("/")[0]: r for r in rows if r.get("layer_l2")}
    return {title_of(name, kept[name]): kept[name]["layer_l2"] for name in SHORT if name in kept}


PICTURES: dict[str, tuple[Callable[[Rows], Data], Callable[[Data], Figure]]] = {
    # known by its parameters: the third digit of a figure is not the same on every machine
    "quality_dc_token.png": (
        lambda rows: {"means": plots.DC, "group": plots.GROUP, "tokens": plots.TOKENS},
        lambda data: plots.figure_3(plots.figure_3_data()),
    ),
    "quality_errors.png": (
        lambda rows: errors_of(most_steps(rows), ("layer_l2_median", "layer_l2_p95")),
        lambda data: plots.error_by_method(data, "mini-flux"),
    ),
    "quality_errors_synthetic.png": (
        lambda rows: errors_of(all_seeds(synthetic(rows)), ("layer_l2_median", "layer_l2_p95")),
        lambda data: plots.error_by_method(data, "generated layers of FLUX's shapes"),
    ),
    "quality_layers.png": (
        lambda rows: layers_of(most_steps(rows)), lambda data: plots.error_by_layer(data, "mini-flux"),
    ),
    "quality_pareto.png": (
        lambda rows: rivals_of(errors_of(most_steps(rows), ("layer_l2_median", "bytes", "psnr_db", *LAYERS))),
        lambda data: plots.pareto(data, "mini-flux: bytes against error"),
    ),
}  # fmt: skip


def draw(rows: Rows, folder: Path, *, check: bool) -> list[Path]:
    """Draw what has changed into the folder (with `check`, only say so); returns those paths. No rows, no picture."""
    changed = []
    for name, (data_of, plot) in PICTURES.items():
        data, path = data_of(rows), folder / name
        said = json.dumps(data, sort_keys=True)
        if not data or _drawn(path) == said:
            continue
        changed.append(path)
        if not check:
            folder.mkdir(parents=True, exist_ok=True)
            plot(data).savefig(path, metadata={TEXT: said, "Software": None})
    return changed


def _drawn(path: Path) -> str | None:
    """The figures in a picture that is there."""
    if not path.exists():
        return None
    with Image.open(path) as picture:
        return picture.info.get(TEXT)
