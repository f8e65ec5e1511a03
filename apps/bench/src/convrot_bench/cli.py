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
    from convrot_bench.ops import plan, prepare, run, select
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
    from convrot_bench.quality import Suite, run, select
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
    check: Annotated[bool, typer.Option(help="change nothing; exit code 1 if a page is out of date")] = False,
) -> None:
    """Fill the tables of README and docs from the committed results.

    Example:  convrot-bench report README.md docs/quality.md
    """
    from convrot_bench.report import update

    targets = pages or [Path("README.md"), *sorted(Path("docs").glob("*.md"))]
    changed = update(sorted(results.glob("*.jsonl")), targets, check=check)
    for page in changed:
        console.print(f"{page}: {'out of date, run convrot-bench report' if check else 'filled'}")
    if check and changed:
        raise typer.Exit(1)


def main() -> None:
    """Errors that the user can mend are one sentence and exit code 1."""
    try:
        app()
    except (ValueError, RuntimeError, OSError) as error:
        console.print(f"convrot-bench: {error}", style="red")
        sys.exit(1)
