"""`convrot-bench`: measure, write JSON lines, make the tables."""

import sys
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import torch
import typer
from rich.console import Console

app = typer.Typer(no_args_is_help=True, add_completion=False, help=__doc__, rich_markup_mode=None)
console = Console(stderr=True, highlight=False)

MODEL_OUT, TINY_OUT = Path("docs/results/model.jsonl"), Path("outputs/model_tiny.jsonl")
TABLES = "step, sizes, peers, families, pipeline, breakdown, loading or lora"
Device = Annotated[str, typer.Option(help="auto, cuda or cpu")]


def _device(name: str) -> str:
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return name


@app.command()
def ops(
    out: Annotated[Path, typer.Option(help="JSON lines are appended to this file")] = Path("docs/results/ops.jsonl"),
    case: Annotated[list[str] | None, typer.Option(help="only these (repeat); default: all")] = None,
    shapes: Annotated[Literal["flux", "mini-flux"], typer.Option(help="whose linears")] = "flux",
    device: Device = "auto",
    repeats: Annotated[int, typer.Option(help="timed calls a case on a CPU; the median counts", min=1)] = 50,
) -> None:
    """Time the ops of every backend that runs here, after checking each against the reference.

    Five minutes on a GPU: sustained, as CUDA graphs, each against its 16-bit counterpart in the same process.

    Example:  convrot-bench ops --case gemm_w4a4 --case gemm_step --out outputs/ops.jsonl
    """
    from rich.progress import track

    from convrot_bench import shapes as data
    from convrot_bench.bench import run
    from convrot_bench.ops import plan, prepare, select
    from convrot_bench.results import Writer

    sizes = {
        "flux": (data.FLUX_LINEARS, data.FLUX_TOKENS),
        "mini-flux": (data.MINI_FLUX_LINEARS, data.MINI_FLUX_TOKENS),
    }
    where = _device(device)
    cases = select(case or [], where)
    bench = prepare(where, console.print)
    jobs = plan(bench, cases, sizes[shapes], repeats)
    bar = partial(track, description="ops", console=console, disable=not console.is_terminal, transient=True)
    run(Writer(out, "ops"), bench, jobs, bar)


@app.command()
def model(
    table: Annotated[list[str] | None, typer.Option(help=f"{TABLES} (repeat); default: all")] = None,
    out: Annotated[Path | None, typer.Option(help=f"JSON lines are appended; default: {MODEL_OUT}")] = None,
    size: Annotated[list[int] | None, typer.Option(help="pixels, of the table sizes (repeat); default: all")] = None,
    batch: Annotated[list[int] | None, typer.Option(help="of the table sizes (repeat); default: all")] = None,
    peer: Annotated[list[str] | None, typer.Option(help="of the table peers (repeat); default: all")] = None,
    tiny: Annotated[bool, typer.Option("--tiny", help="a toy of the same form, in seconds; never a result")] = False,
    device: Device = "auto",
) -> None:
    """Time whole models of real size with random weights, BF16 against ours and other projects against ours.

    Each table stays below ten minutes on an H200 by itself.

    Example:  convrot-bench model --table step --out outputs/model.jsonl

    Example:  convrot-bench model --table sizes --size 2048 --batch 1 --out outputs/model.jsonl

    Example:  convrot-bench model --table peers --peer torchao_fp8 --out outputs/model.jsonl

    Example:  convrot-bench model --tiny --device cpu
    """
    from rich.progress import track

    from convrot_bench.bench import run
    from convrot_bench.model import plan, select
    from convrot_bench.ops import prepare
    from convrot_bench.results import Writer

    where, target = _device(device), out or (TINY_OUT if tiny else MODEL_OUT)
    if tiny and target.resolve().is_relative_to(MODEL_OUT.parent.resolve()):
        raise ValueError(f"model: --tiny measures no real model, and {target} is among results; use another --out")
    scale = select(where, tiny=tiny, sizes=size or (), batches=batch or (), peers=peer or ())
    jobs = plan(scale, table or [])
    bar = partial(track, description="model", console=console, disable=not console.is_terminal, transient=True)
    run(Writer(target, "model"), prepare(where, console.print), jobs, bar)


@app.command()
def quality(
    model: Annotated[Path, typer.Argument(help="mini-flux pipeline folder", exists=True, file_okay=False)],
    judge: Annotated[Path, typer.Option(help="the judge's file", exists=True, dir_okay=False)],
    out: Annotated[Path, typer.Option(help="JSON lines are appended to this file")] = Path(
        "docs/results/quality.jsonl"
    ),
    captions: Annotated[int, typer.Option(help="held-out captions", min=2)] = 500,
    steps: Annotated[int, typer.Option(help="sampling steps", min=1)] = 20,
    method: Annotated[list[str] | None, typer.Option(help="only these (repeat); default: all")] = None,
    batch: Annotated[int, typer.Option(help="pictures at a time", min=1)] = 20,
    device: Device = "auto",
) -> None:
    """Draw held-out captions in 16 bits and under every method; caption accuracy, PSNR, SSIM, per-layer error.

    Example:  convrot-bench quality apps/mini-flux/weights --judge apps/mini-flux/judge.safetensors --captions 100
    """
    from convrot_bench.quality.suite import Suite, run, select
    from convrot_bench.results import Writer

    methods = select(method or [])
    suite = Suite(model, judge, captions, steps, _device(device), batch)
    run(suite, Writer(out, "quality"), methods, console.print)


@app.command()
def report(
    pages: Annotated[list[Path] | None, typer.Argument(help="Markdown pages with <!-- results:NAME --> marks")] = None,
    results: Annotated[Path, typer.Option(help="folder of JSON lines", exists=True, file_okay=False)] = Path(
        "docs/results"
    ),
    images: Annotated[Path, typer.Option(help="folder of pictures", file_okay=False)] = Path("docs/images"),
    check: Annotated[bool, typer.Option(help="change nothing; exit code 1 if a page is out of date")] = False,
) -> None:
    """Fill the tables of README and docs, and draw where a step goes, from the committed results.

    Example:  convrot-bench report README.md docs/quality.md
    """
    from convrot_bench.breakdown_plot import draw
    from convrot_bench.report import update
    from convrot_bench.results import load

    targets = pages or [Path("README.md"), Path("packages/convrot-quant/README.md"), *sorted(Path("docs").glob("*.md"))]
    files = sorted(results.glob("*.jsonl"))
    changed = update(files, targets, check=check) + draw(load(files), images, check=check)
    for page in changed:
        console.print(f"{page}: {'out of date, run convrot-bench report' if check else 'made new'}")
    if check and changed:
        raise typer.Exit(1)


def main() -> None:
    """Errors that the user can mend are one sentence and exit code 1."""
    try:
        app()
    except (ValueError, RuntimeError, OSError) as error:
        console.print(f"convrot-bench: {error}", style="red")
        sys.exit(1)
