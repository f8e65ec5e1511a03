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

PAGE = Path("docs/report.html")
MODEL_OUT, TINY_OUT = Path("docs/results/model.jsonl"), Path("outputs/model_tiny.jsonl")
TABLES = (
    "step, sizes, peers, families, pipeline, breakdown, loading, lora, branch, attention, conversion, vram or parallel"
)
CASES = (
    "gemm_w4a4, linear_w4a4, linear_w4a4_vs_comfy_kitchen, gemm_step, gemv_w4a16, gemv_step, "
    "rotate_quantize, rotate_quantize_triton, host_cost, weight_bits; "
    "by name only: survey, breakdown, rotations, peers, attention"
)
FAMILIES = "FLUX.1-dev, SD3.5-large, Qwen-Image, Wan2.2-T2V-A14B, Z-Image-Turbo or mini-flux"
Device = Annotated[str, typer.Option(help="auto, cuda or cpu")]


def _device(name: str) -> str:
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return name


@app.command()
def ops(
    out: Annotated[Path, typer.Option(help="JSON lines are appended to this file")] = Path("docs/results/ops.jsonl"),
    case: Annotated[list[str] | None, typer.Option(help=f"{CASES} (repeat); default: those of the bars")] = None,
    family: Annotated[list[str] | None, typer.Option(help=f"{FAMILIES}, of the survey (repeat); default: all")] = None,
    shapes: Annotated[Literal["flux", "mini-flux"], typer.Option(help="whose linears")] = "flux",
    device: Device = "auto",
    repeats: Annotated[int, typer.Option(help="timed calls a case on a CPU; the median counts", min=1)] = 50,
) -> None:
    """Time the ops of every backend that runs here, after checking each against the reference.

    Five minutes on a GPU: sustained, as CUDA graphs, each against its 16-bit counterpart in the same process.
    survey, breakdown, rotations, peers and attention are asked for by name: every op at the shapes of five models,
    what its steps cost by themselves, other projects, and attention in 8 bits; each a minute or two.

    Example:  convrot-bench ops --case gemm_w4a4 --case gemm_step --out outputs/ops.jsonl

    Example:  convrot-bench ops --case survey --family Qwen-Image --out outputs/ops.jsonl

    Example:  convrot-bench ops --case survey --device cpu --out outputs/ops.jsonl
    """
    from rich.progress import track

    from convrot_bench import shapes as data
    from convrot_bench.bench import run
    from convrot_bench.ops import plan, prepare, select
    from convrot_bench.ops.survey import families_of
    from convrot_bench.results import Writer

    sizes = {
        "flux": (data.FLUX_LINEARS, data.FLUX_TOKENS),
        "mini-flux": (data.MINI_FLUX_LINEARS, data.MINI_FLUX_TOKENS),
    }
    where = _device(device)
    cases = select(case or [], where)
    bench = prepare(where, console.print)
    jobs = plan(bench, cases, sizes[shapes], repeats, families_of(family or [], real=where != "cpu"))
    bar = partial(track, description="ops", console=console, disable=not console.is_terminal, transient=True)
    run(Writer(out, "ops"), bench, jobs, bar)


@app.command()
def model(
    table: Annotated[list[str] | None, typer.Option(help=f"{TABLES} (repeat); default: all")] = None,
    out: Annotated[Path | None, typer.Option(help=f"JSON lines are appended; default: {MODEL_OUT}")] = None,
    size: Annotated[list[int] | None, typer.Option(help="pixels, of the table sizes (repeat); default: all")] = None,
    batch: Annotated[list[int] | None, typer.Option(help="of the table sizes (repeat); default: all")] = None,
    peer: Annotated[list[str] | None, typer.Option(help="of the table peers (repeat); default: all")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="half the steps, and medians over fewer")] = False,
    tiny: Annotated[bool, typer.Option("--tiny", help="a toy of the same form, in seconds; never a result")] = False,
    device: Device = "auto",
) -> None:
    """Time whole models of real size with random weights, BF16 against ours and other projects against ours.

    Each table says on stderr which phase it is in, and writes a row once it is measured. With --quick most take a
    minute or so on an H200; sizes and peers take that for each of theirs.

    Example:  convrot-bench model --table step --quick --out outputs/model.jsonl

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
    scale = select(where, tiny=tiny, quick=quick, sizes=size or (), batches=batch or (), peers=peer or ())
    jobs = plan(scale, table or [])
    bar = partial(track, description="model", console=console, disable=not console.is_terminal, transient=True)
    run(Writer(target, "model"), prepare(where, console.print), jobs, bar)


@app.command()
def quality(
    model: Annotated[str, typer.Argument(help="pipeline folder or hub id; `synthetic` for generated layers alone")],
    judge: Annotated[Path | None, typer.Option(help="mini-flux's judge: its captions", exists=True)] = None,
    prompts: Annotated[Path | None, typer.Option(help="one a line, or MJHQ's meta_data.json", exists=True)] = None,
    calibration: Annotated[Path | None, typer.Option(help="other prompts, to calibrate on", exists=True)] = None,
    out: Annotated[
        Path | None, typer.Option(help="JSON lines are appended; default: docs/results/quality.jsonl")
    ] = None,
    captions: Annotated[int | None, typer.Option(help="how many; default: 500, or the whole file", min=2)] = None,
    split: Annotated[Literal["report", "tuning"], typer.Option(help="constants are chosen on tuning")] = "report",
    steps: Annotated[list[int] | None, typer.Option(help="sampling steps (repeat); default: 20", min=1)] = None,
    method: Annotated[list[str] | None, typer.Option(help="only these (repeat); default: all")] = None,
    batch: Annotated[int, typer.Option(help="pictures at a time", min=1)] = 20,
    device: Device = "auto",
    seed: Annotated[int, typer.Option(help="of the first of --prompts")] = 0,
    height: Annotated[int | None, typer.Option(help="pixels; default: the model's")] = None,
    width: Annotated[int | None, typer.Option(help="pixels; default: the model's")] = None,
    guidance: Annotated[float | None, typer.Option(help="default: the pipeline's")] = None,
    pictures: Annotated[Path | None, typer.Option(help="folder of drawn pictures; a later run goes on there")] = None,
    sheet: Annotated[Path | None, typer.Option(help="write the first pictures of every method here (PNG)")] = None,
    reference_images: Annotated[Path | None, typer.Option(help="FID against these; default: against BF16")] = None,
    lpips_weights: Annotated[Path | None, typer.Option(help="torchvision's file of AlexNet's weights")] = None,
    clip_model: Annotated[str | None, typer.Option(help="folder or hub id of the CLIP score's model")] = None,
) -> None:
    """Draw prompts in 16 bits and under every method: errors of layers and of pictures, and what a judge reads.

    Goes on where it was stopped, and under torchrun shares the prompts among GPUs.

    Example:  convrot-bench quality apps/mini-flux/weights --judge apps/mini-flux/judge.safetensors --steps 8 --steps 20

    Example:  convrot-bench quality synthetic

    Example:  torchrun --nproc-per-node 8 -m convrot_bench.cli quality black-forest-labs/FLUX.1-dev --prompts mjhq.json
    """
    from convrot_bench.quality.command import Options, measure
    from convrot_bench.quality.networks import CLIP_MODEL, Networks

    say = partial(console.print, markup=False)
    networks = Networks(lpips_weights, clip_model or CLIP_MODEL, reference_images)
    drawing = {"height": height, "width": width, "guidance": guidance}
    many = {"steps": tuple(steps or (20,)), "methods": tuple(method or ())}
    plain = {"captions": captions, "split": split, "batch": batch, "device": device, "seed": seed}
    files = {"judge": judge, "prompts": prompts, "calibration": calibration, "pictures": pictures, "sheet": sheet}
    measure(Options(model, out, networks=networks, drawing=drawing, **files, **plain, **many), say)  # type: ignore[arg-type]


@app.command()
def report(
    pages: Annotated[list[Path] | None, typer.Argument(help="Markdown pages with <!-- results:NAME --> marks")] = None,
    results: Annotated[Path, typer.Option(help="folder of JSON lines", exists=True, file_okay=False)] = Path(
        "docs/results"
    ),
    images: Annotated[Path, typer.Option(help="folder of pictures", file_okay=False)] = Path("docs/images"),
    html: Annotated[Path | None, typer.Option(help=f"make this page; alone, nothing else. Default: {PAGE}")] = None,
    check: Annotated[bool, typer.Option(help="change nothing; exit code 1 if a page is out of date")] = False,
    compare: Annotated[tuple[Path, Path] | None, typer.Option(help="OLD and NEW rows: say what changed")] = None,
    baseline: Annotated[str | None, typer.Option(help="a commit among the results: say what changed since")] = None,
    threshold: Annotated[float, typer.Option(help="per cent that count as a regression", min=0)] = 5.0,
    fail_on_regression: Annotated[bool, typer.Option(help="exit code 1 if there is one")] = False,
) -> None:
    """Fill the tables of README and docs, draw where a step goes, and make the HTML page, from the committed results.

    With --compare or --baseline nothing of that: what changed is printed, and stands in the page of --html.

    Example:  convrot-bench report README.md docs/quality.md

    Example:  convrot-bench report --html outputs/report.html

    Example:  convrot-bench report --compare old.jsonl new.jsonl --fail-on-regression

    Example:  convrot-bench report --baseline 941a5a3760f2 --html outputs/changes.html
    """
    from convrot_bench import html as page
    from convrot_bench.breakdown_plot import draw
    from convrot_bench.compare import changes_table, compare_commits, compare_files
    from convrot_bench.quality.images import draw as draw_quality
    from convrot_bench.report import update
    from convrot_bench.results import load
    from convrot_bench.sections import SECTIONS

    files = sorted(results.glob("*.jsonl"))
    if compare and baseline:
        raise ValueError("report: --compare names two files, --baseline a commit among the results; give one of them")
    if compare or baseline:
        found = (
            compare_files(*compare, threshold) if compare else compare_commits(load(files), baseline or "", threshold)
        )
        typer.echo(changes_table(found))
        if html:
            source = page.gather(html, [compare[1]] if compare else files, images=None, changes=found)
            page.update(html, source, SECTIONS, check=False)
        if found.regressions and fail_on_regression:
            raise typer.Exit(1)
        return
    changed: list[Path] = []
    if pages or not html:
        everywhere = [Path("README.md"), Path("packages/convrot-quant/README.md"), *sorted(Path("docs").glob("*.md"))]
        changed += update(files, pages or everywhere, check=check)
        changed += draw(load(files), images, check=check) + draw_quality(load(files), images, check=check)
    if target := html or (None if pages else PAGE):
        changed += page.update(target, page.gather(target, files, images=images), SECTIONS, check=check)
    for made in changed:
        console.print(f"{made}: {'out of date, run convrot-bench report' if check else 'made new'}")
    if check and changed:
        raise typer.Exit(1)


def main() -> None:
    """Errors that the user can mend are one sentence and exit code 1."""
    try:
        app()
    except (ValueError, RuntimeError, OSError) as error:
        console.print(f"convrot-bench: {error}", style="red")
        sys.exit(1)


if __name__ == "__main__":
    main()
