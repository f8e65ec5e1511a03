"""What the HTML report's chapter on quality shows beside its tables: charts of the rows, pictures of docs/images."""

import base64
from pathlib import Path

from markupsafe import Markup, escape

from convrot_bench.bars import Rows
from convrot_bench.charts import Chart, bars
from convrot_bench.html import Part
from convrot_bench.quality.images import errors_of
from convrot_bench.quality.tables import all_seeds, most_steps, synthetic

CAPTIONS = {  # file of docs/images -> what it shows
    "quality_sheet.png": "The first captions of the report, a row a method; below each picture its PSNR against BF16",
    "quality_dc_token.png": "The paper's Figure 3: a mean grows 16-fold under Sylvester, not under regular",
    "quality_pareto.png": "Bytes of the saved transformer against error and PSNR",
    "quality_layers.png": "The error of every layer",
}


def charts(rows: Rows) -> list[Chart]:
    """Errors by method, on mini-flux and on generated layers, and the pictures' PSNR."""
    generated = all_seeds(synthetic(rows))
    found = [
        _by_method("Error of layers on mini-flux, median", most_steps(rows), "layer_l2_median", "{:.3f}"),
        _by_method(
            "Error of generated layers of FLUX's shapes, median",
            generated,
            "layer_l2_median",
            "{:.3f}",
        ),
        _by_method("Pictures of mini-flux against BF16", most_steps(rows), "psnr_db", "{:.1f}"),
    ]
    return [chart for chart in found if chart is not None]


def _by_method(title: str, rows: Rows, case: str, form: str) -> Chart | None:
    axis = "PSNR in dB" if case == "psnr_db" else "relative L2"
    values = {facts["title"]: {axis: facts[case]} for facts in errors_of(rows, (case,)).values() if case in facts}
    return bars(title, values, axis, form=form) if values else None


def pictures(folder: Path) -> list[Part]:
    """The pictures that are there, inside the page."""
    return [_figure(folder / name, caption) for name, caption in CAPTIONS.items() if (folder / name).exists()]


def _figure(path: Path, caption: str) -> Part:
    data = base64.b64encode(path.read_bytes()).decode()
    image = f'<img src="data:image/png;base64,{data}" alt="{escape(caption)}" style="max-width: 100%">'
    return Part(Markup(f"<figure>{image}<figcaption>{escape(caption)}</figcaption></figure>"))
