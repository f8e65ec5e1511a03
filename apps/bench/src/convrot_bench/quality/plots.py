"""Figures of the quality report: each a function of committed rows, or of nothing, that returns a matplotlib figure."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor

from convrot_bench.quality.outliers import amplitude, crest_factor
from convrot_kernels import transforms

PAPER, OURS, RIVAL, PLAIN = "#d0752b", "#1f5fa8", "#7a5195", "#9a948c"
GROUP, TOKENS = 256, 64
SPACING = 0.032  # of names beside a plot, as a share of its height
DC = (0.0, 0.25, 0.5, 1.0, 2.0, 4.0, 7.0, 10.0)  # means of tokens whose other part has a deviation of 1


def new_figure(width: float, height: float, dpi: int = 150) -> Figure:
    """An empty figure that needs no display."""
    figure = Figure(figsize=(width, height), dpi=dpi, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def figure_3_data() -> dict[str, dict[str, list[float]]]:
    """{rotation: {quantity: its value at each mean of DC}} for tokens mean + N(0, 1), K=3072, fixed seed.

    Quantities: amplitude max |x|, median crest factor, and the relative L2 error of absmax int4 codes of the tokens.
    """
    noise = torch.randn(TOKENS, 12 * GROUP, generator=torch.Generator().manual_seed(0))
    matrices = {
        "no rotation": transforms.identity(GROUP),
        "Sylvester-256": transforms.sylvester(GROUP),
        "signed Sylvester-256": transforms.sylvester(GROUP, signs=0),
        "regular-256": transforms.regular(GROUP),
    }
    found: dict[str, dict[str, list[float]]] = {}
    for name, matrix in matrices.items():
        rows = [_quantities(transforms.apply_blockwise(noise + mean, matrix)) for mean in DC]
        found[name] = {key: [row[key] for row in rows] for key in rows[0]}
    peeled = [_quantities(transforms.apply_blockwise(_without_dc(noise + m), matrices["regular-256"])) for m in DC]
    found["regular-256, mean kept apart"] = {key: [row[key] for row in peeled] for key in peeled[0]}
    # the error is of the whole token: what is kept apart is exact
    sizes = [float((noise + m).norm() / _without_dc(noise + m).norm()) for m in DC]
    apart = found["regular-256, mean kept apart"]
    apart["error"] = [error / size for error, size in zip(apart["error"], sizes, strict=True)]
    return found


def _without_dc(x: Tensor) -> Tensor:
    """(M, K) -> (M, K) less the mean of each group."""
    groups = x.unflatten(-1, (-1, GROUP))
    return (groups - groups.mean(-1, keepdim=True)).flatten(-2)


def _quantities(x: Tensor) -> dict[str, float]:
    scale = x.abs().amax(-1, keepdim=True) / 7
    error = (x / scale).round().clamp(-7, 7) * scale - x
    return {
        "amplitude": amplitude(x),
        "crest_factor": float(crest_factor(x).median()),
        "error": float(error.norm() / x.norm()),
    }


def figure_3(data: Mapping[str, Mapping[str, Sequence[float]]]) -> Figure:
    """The paper's Figure 3: a Sylvester matrix turns a mean into a spike of 16 times the mean; regular does not."""
    figure = new_figure(11, 3.6)
    labels = {
        "amplitude": "amplitude max |x| after rotation",
        "crest_factor": "crest factor max |x| / rms, median",
        "error": "relative L2 error of int4 activations",
    }
    for axes, (key, label) in zip(figure.subplots(1, 3), labels.items(), strict=True):
        for name, style in zip(data, ("k:", "s-", "^--", "o-", "d-"), strict=True):
            axes.plot(DC, data[name][key], style, label=name, markersize=4)
        axes.set_xlabel("mean of the token (deviation 1)")
        axes.set_title(label, fontsize=10)
        axes.spines[["top", "right"]].set_visible(False)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=5, frameon=False, fontsize=8)
    return figure


def color_of(name: str) -> str:
    """One colour a family of methods: the paper's, ours, SVDQuant's, other rotations."""
    families = (("paper", PAPER), ("regular", PAPER), ("ours", OURS), ("plan", OURS), ("svdquant", RIVAL))
    return next((color for prefix, color in families if name.startswith(prefix)), PLAIN)


def error_by_method(figures: Mapping[str, Mapping[str, Any]], title: str) -> Figure:
    """{method: {title, layer_l2_median, layer_l2_p95}} -> a bar a method: the median, and if there, a whisker."""
    names = list(figures)
    figure = new_figure(9, 0.24 * len(names) + 1.2)
    axes = figure.add_subplot()
    medians = [figures[n]["layer_l2_median"] for n in names]
    over = [max(figures[n].get("layer_l2_p95", m) - m, 0.0) for n, m in zip(names, medians, strict=True)]
    labels = [f"{figures[n]['title']}  {m:.3f}" for n, m in zip(names, medians, strict=True)]
    colors, whiskers = [color_of(n) for n in names], {"linewidth": 0.8, "ecolor": "#444444"}
    axes.barh(labels, medians, xerr=[[0.0] * len(names), over], color=colors, error_kw=whiskers)
    axes.tick_params("y", labelsize=8)
    axes.margins(y=0.01)
    axes.invert_yaxis()
    axes.set_xlabel("relative L2 error of a layer's output: median, whisker to the 95th percentile")
    axes.set_title(title, fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def error_by_layer(layers: Mapping[str, Mapping[str, float]], title: str) -> Figure:
    """{method's title: {layer: error}} -> a line a method over the layers, in the model's order."""
    names = list(dict.fromkeys(layer for errors in layers.values() for layer in errors))
    figure = new_figure(11, 5)
    axes = figure.add_subplot()
    for method, errors in layers.items():
        axes.plot(range(len(names)), [errors.get(n, float("nan")) for n in names], "o-", markersize=3, label=method)
    axes.set_xticks(range(len(names)), names, rotation=90, fontsize=6)
    axes.set_ylabel("relative L2 error")
    axes.set_ylim(bottom=0)
    axes.set_title(title, fontsize=10)
    axes.legend(frameon=False, fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def pareto(figures: Mapping[str, Mapping[str, Any]], title: str) -> Figure:
    """{method: {title, bytes, layer_l2_median, psnr_db}} -> error and PSNR over bytes, what nothing beats in a line."""
    figure = new_figure(12, 5)
    panels = (("layer_l2_median", "median relative L2 error of layers", 1), ("psnr_db", "PSNR in dB", -1))
    for axes, (case, label, sign) in zip(figure.subplots(1, 2), panels, strict=True):
        points = {n: (f["bytes"] / 1e6, f[case]) for n, f in figures.items() if case in f and "bytes" in f}
        for name, (x, y) in points.items():
            axes.plot(x, y, "o", color=color_of(name), markersize=5)
        axes.plot(*_front(list(points.values()), sign), "-", color="#444444", linewidth=0.8, zorder=0)
        axes.set_xlabel("MB of the saved transformer")
        axes.set_ylabel(label)
        axes.spines[["top", "right"]].set_visible(False)
        _label(axes, {figures[name]["title"]: point for name, point in points.items()})
    figure.suptitle(title, fontsize=10)
    return figure


def _label(axes: Any, points: Mapping[str, tuple[float, float]]) -> None:
    """Names in a column right of the axes, in the points' order from below, each with a line to its point."""
    low, high = axes.get_ylim()
    names = sorted(points, key=lambda name: points[name][1])
    places = [(points[name][1] - low) / (high - low) for name in names]
    for i in range(1, len(places)):  # up from the lowest, then down from the top, so that all stay beside the axes
        places[i] = max(places[i], places[i - 1] + SPACING)
    for i in reversed(range(len(places))):
        places[i] = min(places[i], places[i + 1] - SPACING if i + 1 < len(places) else 1.0)
    for name, place in zip(names, places, strict=True):
        axes.annotate(
            name, points[name], xytext=(1.04, place), textcoords="axes fraction", fontsize=6, va="center",
            arrowprops={"arrowstyle": "-", "linewidth": 0.3, "color": "#999999", "relpos": (0, 0.5)},
        )  # fmt: skip


def _front(points: Sequence[tuple[float, float]], sign: int) -> tuple[list[float], list[float]]:
    """The points that no other is both smaller and better than, by size; `sign` 1: less is better."""
    best: list[tuple[float, float]] = []
    for x, y in sorted(points, key=lambda p: (p[0], sign * p[1])):
        if not best or sign * y < sign * best[-1][1]:
            best.append((x, y))
    return [x for x, _ in best], [y for _, y in best]


def contact_sheet(pictures: Mapping[str, Sequence[Tensor]], notes: Mapping[str, Sequence[str]]) -> Figure:
    """{title: uint8 (3, H, W) each} -> a row a method, a column a prompt, a note under each picture."""
    rows, columns = len(pictures), max(len(images) for images in pictures.values())
    # 128 x 128 pictures hardly enlarged: the file stays small
    figure = new_figure(1.5 * columns + 1.6, 1.75 * rows, dpi=96)
    grid = figure.subplots(rows, columns, squeeze=False)
    for row, (title, images) in zip(grid, pictures.items(), strict=True):
        row[0].set_ylabel(title, rotation=0, ha="right", va="center", fontsize=8)
        for axes, image, note in zip(row, images, notes[title], strict=False):
            axes.imshow(image.permute(1, 2, 0).cpu().numpy())
            axes.set_xlabel(note, fontsize=7)
        for axes in row:
            axes.set_xticks([])
            axes.set_yticks([])
            axes.spines[:].set_visible(False)
    return figure
