"""convrot plan: a plan within a budget of bytes or time, for `convrot quantize --plan`."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import torch
import typer
from torch import nn

from convrot_quant.budgets import Budget
from convrot_quant.cli.options import (
    Device,
    DType,
    Dtype,
    Guidance,
    Height,
    Json,
    Keep,
    Model,
    Override,
    Prompt,
    Quiet,
    Seed,
    Steps,
    Width,
    check_globs,
    parse_size,
    read_config,
    read_device,
    read_prompts,
)
from convrot_quant.cli.output import Output, hush
from convrot_quant.cli.plan_result import Result
from convrot_quant.cli.runs import calibrate
from convrot_quant.folders import check_place, replace_file
from convrot_quant.fuse import stacked_layers, unfused_blocks
from convrot_quant.generation import Settings
from convrot_quant.latency import MACHINES, Workload
from convrot_quant.pareto import check_plot
from convrot_quant.patch import plan
from convrot_quant.pipeline import ModelFolder, meta_transformer, open_folder
from convrot_quant.planner import LADDER, Ladder, Problem, check_budget, scheme_names, spend
from convrot_quant.probe import LayerProbe
from convrot_quant.scores import Schemes, Scores, folder_weights, output_scores, schemes_of, weight_scores

EXAMPLES = """Examples:

convrot plan ./FLUX.1-dev --budget 6.5GB -o plan.json

convrot quantize ./FLUX.1-dev -o ./FLUX.1-dev-mixed --plan plan.json

convrot plan ./FLUX.1-dev --budget 7GB --prompts prompts.txt --steps 20 -o plan.json --pareto pareto.png

convrot plan ./FLUX.1-dev --budget 6.5GB --schemes W4A4,W4A8,W8A8 --keep '*.to_v'

convrot plan ./FLUX.1-dev --latency-budget 60ms --machine rtx4090 -o plan.json
"""
MARKS = ("ours", "paper", "paper-mixed", "w4a8", "w8a8")

ByteBudget = Annotated[
    str | None,
    typer.Option("--budget", help="Of the whole transformer: 6.5GB, 6GiB, 500MB.", metavar="SIZE"),
]
LatencyBudget = Annotated[
    str | None,
    typer.Option(
        "--latency-budget", help="Of the linears in one step, as a table of rates estimates it: 45ms.", metavar="TIME"
    ),
]
MachineName = Annotated[
    str,
    typer.Option(
        "--machine",
        help=f"Whose rates: {'; '.join(f'{name}: {m.about}' for name, m in MACHINES.items())}.",
        metavar="NAME",
    ),
]
Tokens = Annotated[int, typer.Option(help="Image tokens, for --latency-budget.", min=1)]
TextTokens = Annotated[int, typer.Option(help="Text tokens, for --latency-budget.", min=1)]
SchemeNames = Annotated[
    str,
    typer.Option(
        "--schemes",
        help="What layers may get; 16 is 16 bits. Modulation layers get the weights' bits alone.",
        metavar="LIST",
    ),
]
AllowW4A8 = Annotated[
    bool,
    typer.Option("--allow-w4a8", help="Add W4A8: the bytes of W4A4, 8-bit activations, slower on GPUs with int4."),
]
PromptsFile = Annotated[
    Path | None,
    typer.Option(
        "--prompts",
        "--prompts-file",
        help="Calibrate on these, one a line; without prompts the weights alone are scored.",
        exists=True,
        dir_okay=False,
    ),
]
Group = Annotated[
    bool,
    typer.Option("--group/--no-group", help="One scheme for layers that a fused block multiplies as one."),
]
Out = Annotated[Path | None, typer.Option("--out", "-o", help="Write the plan to this file (.json).")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an existing plan.")]
ParetoPlot = Annotated[
    Path | None,
    typer.Option("--pareto", help="Plot error against bytes for every budget, with the presets (.png, .svg, .pdf)."),
]


def command(
    model: Model,
    budget: ByteBudget = None,
    latency_budget: LatencyBudget = None,
    out: Out = None,
    schemes: SchemeNames = ",".join(LADDER),
    allow_w4a8: AllowW4A8 = False,
    prompt: Prompt = None,
    prompts: PromptsFile = None,
    steps: Steps = 20,
    seed: Seed = 0,
    guidance: Guidance = None,
    height: Height = None,
    width: Width = None,
    keep: Keep = None,
    override: Override = None,
    group: Group = True,
    machine: MachineName = "h200",
    tokens: Tokens = 4096,
    text_tokens: TextTokens = 512,
    pareto: ParetoPlot = None,
    overwrite: Overwrite = False,
    device: Device = "auto",
    dtype: Dtype = DType.bfloat16,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Choose each layer's bits within a budget: where they remove the most error per byte, or per millisecond.

    The plan is for `convrot quantize --plan`. Layers are scored by their weights alone, which are read one at a time.

    With prompts they are scored by the errors of their outputs instead, for which the 16-bit pipeline runs.
    """
    output = Output(as_json, quiet)
    hush(quiet=quiet)
    limits = _read_budget(budget, latency_budget)
    workload = _read_workload(machine, tokens, text_tokens)
    _check_files(out, pareto, overwrite)
    prompt_texts = read_prompts(prompt, prompts) if prompt or prompts else []
    folder, place = open_folder(model), read_device(device)
    path = _one_transformer(folder)
    empty = meta_transformer(path, dtype.torch)
    ladder = _read_ladder(empty, f"{schemes},W4A8" if allow_w4a8 else schemes, keep, override)
    groups = [names for names in stacked_layers(empty) if group and len(names) > 1]
    check_budget(ladder, limits, groups, workload.seconds)
    marks = {name: plan(empty, name) for name in MARKS} if pareto is not None else {}
    wanted = schemes_of([*ladder.rungs, *marks.values()])
    if prompt_texts:
        settings = Settings(seed, steps, guidance, height, width)
        scores = _score_outputs(output, folder, wanted, prompt_texts, settings, dtype.torch, place)
    else:
        weights = folder_weights(path, (layer for layer in ladder.rungs[0].planned if layer.name in wanted), place)
        scores = weight_scores(weights, wanted, progress=output.progress)
    problem = Problem.of(ladder, scores, groups, workload.seconds)
    planned = spend(problem, limits)
    result = Result(limits, workload, prompt_texts, problem, planned)
    output.show(planned.table(width=output.width), *result.lines(groups, unfused_blocks(empty, planned)))
    data: dict[str, object] = {"model": model, **result.to_dict()}
    if out is not None:
        with output.warnings(), replace_file(out, overwrite=overwrite) as building:
            building.write_text(planned.to_json() + "\n", encoding="utf-8")
        output.show(f"plan: {out}; convrot quantize {model} -o FOLDER --plan {out}")
        data["out"] = str(out)
    if pareto is not None:
        data["pareto"] = result.draw(pareto, marks)
        output.show(f"plot: {pareto}")
    output.result(data)


def _read_budget(size: str | None, time: str | None) -> Budget:
    """--budget and --latency-budget; one of them is needed."""
    if size is None and time is None:
        raise typer.BadParameter("give --budget SIZE, --latency-budget TIME or both, for example --budget 6.5GB")
    if size is not None and not parse_size(size):
        raise typer.BadParameter(f"--budget must be a size such as 6.5GB, 6GiB or 500MB; got {size!r}")
    match = re.fullmatch(r"([0-9]{1,9}(?:\.[0-9]{1,9})?) ?(m?s)", time.strip().lower()) if time else None
    seconds = float(match[1]) * (1e-3 if match[2] == "ms" else 1) if match else 0.0
    if time is not None and not seconds:
        raise typer.BadParameter(f"--latency-budget must be a time such as 45ms or 0.2s; got {time!r}")
    return Budget(parse_size(size) if size else None, seconds or None)


def _read_workload(machine: str, tokens: int, text_tokens: int) -> Workload:
    found = MACHINES.get(machine.strip().lower())
    if found is None:
        raise typer.BadParameter(f"--machine must be one of {', '.join(MACHINES)}; got {machine!r}")
    return Workload(found, tokens, text_tokens)


def _check_files(out: Path | None, pareto: Path | None, overwrite: bool) -> None:
    """What is to be written can be, before the work."""
    if out is not None and out.exists() and not overwrite:
        raise FileExistsError(f"{out} exists; choose another destination, or overwrite it (--overwrite)")
    if pareto is not None:
        check_plot(pareto)
    for path in filter(None, (out, pareto)):
        check_place(path)


def _one_transformer(folder: ModelFolder) -> Path:
    if folder.is_quantized:
        raise ValueError(f"{folder.root} is quantized already; plan the 16-bit model")
    if len(folder.transformers) > 1:
        names = " and ".join(str(path) for path in folder.transformers.values())
        raise ValueError(f"{folder.root} has several transformers: plan {names}, each with its own budget")
    return next(iter(folder.transformers.values()))


def _read_ladder(model: nn.Module, schemes: str, keep: list[str] | None, override: list[str] | None) -> Ladder:
    """--schemes, --keep and --override."""
    given = read_config("ours", None, override).overrides
    check_globs([model], keep, override)
    try:
        names = scheme_names(schemes.split(","))
    except ValueError as error:
        raise typer.BadParameter(f"--schemes: {error}") from None
    overrides = {glob: given[glob] for glob in (item.rpartition("=")[0] for item in override or ())}
    return Ladder.of(model, names, keep or (), overrides)


def _score_outputs(
    output: Output,
    folder: ModelFolder,
    wanted: Schemes,
    prompts: Sequence[str],
    settings: Settings,
    dtype: torch.dtype,
    device: str,
) -> Scores:
    """Run the 16-bit pipeline on the prompts and measure each layer on inputs that it saw."""

    def listen(model: nn.Module, calls: int) -> LayerProbe:
        return LayerProbe(model, wanted, calls)

    model, probe = calibrate(output, folder, prompts, settings, dtype, device, listen)
    scores = output_scores(model, probe, wanted, progress=output.progress)
    idle = [name for name, count in scores.weights.items() if not count]
    if idle:
        output.warn(f"{len(idle)} layers, such as {idle[0]!r}, did not run on these prompts: they get the fewest bits")
    return scores
