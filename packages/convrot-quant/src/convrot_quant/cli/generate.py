"""convrot generate: images in 4 bits, and beside them in 16 bits when a sheet is asked for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import typer

from convrot_quant.attention import fp8_attention_
from convrot_quant.cli.machine import machine
from convrot_quant.cli.options import (
    AUTO,
    CudaGraphs,
    Device,
    DType,
    Dtype,
    Fp8Attention,
    Guidance,
    Height,
    Json,
    MaxSequenceLength,
    Model,
    NumImages,
    Prompt,
    PromptsFile,
    Quiet,
    Seed,
    Sheet,
    Steps,
    Vram,
    Width,
    read_config,
    read_device,
    read_prompts,
    read_vram,
)
from convrot_quant.cli.output import Output, figures_table, hush, images_table
from convrot_quant.cli.runs import check_image_file, picture_entries, prepare, preset_variant, write_sheet
from convrot_quant.cli.switches import check_attention, check_fused, check_graphs, takes_graphs
from convrot_quant.compare import Result, Variant, compare, dtype_name
from convrot_quant.config import QuantConfig
from convrot_quant.generation import Picture, Settings
from convrot_quant.generation import generate as generate_images
from convrot_quant.graphs import cuda_graphs_
from convrot_quant.manifest import read_manifest
from convrot_quant.offload import Offload, budget, choose
from convrot_quant.offload import apply as place_pipeline
from convrot_quant.patch import model_bytes
from convrot_quant.pipeline import (
    ModelFolder,
    fill_pipeline,
    load_pipeline,
    load_transformer,
    open_16bit,
    open_folder,
    outline_pipeline,
)
from convrot_quant.presets import PRESETS
from convrot_quant.replicas import World, gather, own_device, share, world

NONE = "none"
EXAMPLES = """Examples:

convrot generate ./FLUX.1-dev-4bit --prompt "a red cube in front of a blue sphere" -o image.png

convrot generate ./FLUX.1-dev --prompts-file prompts.txt --seed 0 --sheet sheet.png -o outputs/

convrot generate ./FLUX.1-dev-4bit --reference ./FLUX.1-dev --prompt "a fox" --sheet sheet.png --json

convrot generate ./FLUX.1-dev --prompt "a fox" --vram 8GB

convrot generate ./FLUX.1-dev-4bit --prompt "a fox" --height 512 --width 512 --cuda-graphs

torchrun --nproc-per-node 4 --no-python convrot generate ./FLUX.1-dev-4bit --prompts-file prompts.txt -o outputs/
"""
Out = Annotated[Path, typer.Option("--out", "-o", help="A folder for images, or one .png for one image.")]
Preset = Annotated[
    str | None,
    typer.Option(
        "--preset", help=f"For a 16-bit MODEL: {', '.join(PRESETS)}; {NONE} leaves it. Default: ours.", metavar="NAME"
    ),
]
Reference = Annotated[
    str | None, typer.Option("--reference", help="With --sheet and a quantized MODEL: the 16-bit one.", metavar="MODEL")
]


@dataclass(frozen=True)
class Run:
    """What a run draws, with what, and where its pictures go."""

    output: Output
    folder: ModelFolder
    preset: str | None
    prompts: Sequence[str]
    settings: Settings
    out: Path
    dtype: DType
    device: str
    vram: int | None  # bytes of a GPU that may be used; None on other devices
    cuda_graphs: bool | None  # None: where they help
    fp8_attention: bool
    here: World

    @property
    def jobs(self) -> list[str]:
        """The prompt of each image; image i has the noise of seed + i, whichever process draws it."""
        return [prompt for prompt in self.prompts for _ in range(self.settings.num_images)]


def command(
    model: Model,
    prompt: Prompt = None,
    prompts_file: PromptsFile = None,
    out: Out = Path("outputs"),
    sheet: Sheet = None,
    preset: Preset = None,
    reference: Reference = None,
    seed: Seed = 0,
    steps: Steps = 20,
    guidance: Guidance = None,
    height: Height = None,
    width: Width = None,
    num_images: NumImages = 1,
    max_sequence_length: MaxSequenceLength = None,
    device: Device = "auto",
    vram: Vram = AUTO,
    cuda_graphs: CudaGraphs = None,
    fp8_attention: Fp8Attention = False,
    dtype: Dtype = DType.bfloat16,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Draw prompts with a quantized model; a 16-bit MODEL is quantized first. Under torchrun each GPU draws a share."""
    here = world()
    output = Output(as_json, quiet) if here.is_main else Output(as_json=False, quiet=True)
    hush(quiet=output.quiet)
    prompts = read_prompts(prompt, prompts_file)
    settings = Settings(seed, steps, guidance, height, width, num_images, max_sequence_length)
    _check_files(out, sheet, len(prompts) * num_images)
    if sheet is not None and vram != AUTO:
        raise typer.BadParameter("--vram goes without --sheet: the 16-bit model of a sheet is not offloaded")
    if sheet is not None and here.size > 1:
        raise typer.BadParameter(f"--sheet is made by one process, and this run has {here.size}; start it without them")
    place = read_device(own_device(device, here))
    check_graphs(cuda_graphs, place, sheet)
    if fp8_attention:
        check_attention(place, sheet)
    memory = budget(place, read_vram(vram, place))
    folder = open_folder(model)
    _check_options(folder, preset, reference, sheet)
    if fp8_attention and preset == NONE and not folder.is_quantized:
        raise typer.BadParameter(f"--fp8-attention is of quantized models: leave it out, or --preset {NONE}")
    run = Run(output, folder, preset, prompts, settings, out, dtype, place, memory, cuda_graphs, fp8_attention, here)
    if sheet is None:
        _draw(run)
    else:
        _draw_both(run, folder if reference is None else open_16bit(reference), sheet)


def _check_files(out: Path, sheet: Path | None, count: int) -> None:
    """-o and --sheet against what is to be written there."""
    check_image_file(sheet, "--sheet")
    single = _is_file(out)
    if single and count * (1 if sheet is None else 2) > 1:
        more = f"{count} images" if sheet is None else "16-bit and quantized images"
        raise typer.BadParameter(f"-o {out} is one file, but {more} are to be made: give a folder")
    check_image_file(out if single else out / "000.png", "-o")


def _is_file(out: Path) -> bool:
    """Whether -o names one image: it has a suffix and is no folder yet."""
    return bool(out.suffix) and not out.is_dir()


def _check_options(folder: ModelFolder, preset: str | None, reference: str | None, sheet: Path | None) -> None:
    if folder.is_quantized and preset not in (None, NONE):
        raise typer.BadParameter(f"--preset {preset}: {folder.root} is quantized already")
    if folder.is_quantized and sheet is not None and reference is None:
        raise typer.BadParameter("--sheet of a quantized MODEL needs its 16-bit original: --reference MODEL")
    if reference is not None and not (folder.is_quantized and sheet is not None):
        raise typer.BadParameter("--reference goes with --sheet and a quantized MODEL")
    if sheet is not None and preset == NONE:
        raise typer.BadParameter("--sheet compares with a quantized model: leave out --preset none")
    if preset not in (None, NONE):
        read_config(preset, None, None)


def _draw(run: Run) -> None:
    """Load what fits where it fits and draw: each process its share of the images, all of which the first one saves."""
    config = None if run.folder.is_quantized or run.preset == NONE else read_config(run.preset or "ours", None, None)
    pipe = outline_pipeline(run.folder, config, dtype=run.dtype.torch)
    arguments = prepare(run.output, pipe, run.prompts, run.settings)
    offload = _offload(run, pipe)
    graphed = takes_graphs(run.cuda_graphs, arguments, offload)
    if run.fp8_attention:
        check_fused(pipe, run.folder.transformers, offload)
    jobs = share(list(enumerate(run.jobs)), run.here)
    name, size = _load(run, pipe, config, offload, graphed) if jobs else ("", 0)
    pictures = gather(_drawn(run, pipe, jobs, name) if jobs else (), run.here)
    if not run.here.is_main:
        return
    result = Result(name, pictures, size)
    switches = {"cuda_graphs": graphed, "fp8_attention": run.fp8_attention}
    saved = {"images": _save(pictures, run.out, ""), **switches, "offload": offload and offload.to_dict()}
    run.output.show(figures_table([result]))
    _finish(run, arguments, [result], saved)


def _load(run: Run, pipe: Any, config: QuantConfig | None, offload: Offload | None, graphed: bool) -> tuple[str, int]:
    """Fill the outline of a pipeline, a 16-bit model being quantized while it is read: (its name, its bytes)."""
    home = "cpu" if offload is not None and offload.method != "none" else run.device
    dtype, progress = run.dtype.torch, run.output.progress
    fill_pipeline(pipe, run.folder, config, dtype=dtype, device=run.device, home=home, progress=progress)
    model = pipe.transformer
    name = "quantized" if run.folder.is_quantized else dtype_name(model) if config is None else run.preset or "ours"
    size = model_bytes(model)  # before offloading takes it apart
    if offload is None:
        pipe.to(run.device)
    else:
        place_pipeline(pipe, offload, run.device)
    for component in run.folder.transformers:
        if run.fp8_attention:
            fp8_attention_(getattr(pipe, component))
        if graphed:
            cuda_graphs_(getattr(pipe, component))
    return name, size


def _drawn(run: Run, pipe: Any, jobs: Sequence[tuple[int, str]], name: str) -> list[Picture]:
    """Neighbouring (number of the image, prompt) of the run, each with the noise that it has in one process."""
    label = name if run.here.size == 1 else f"{name}, {run.here.rank + 1} of {run.here.size} processes"
    settings = replace(run.settings, seed=run.settings.seed + jobs[0][0], num_images=1)
    return generate_images(pipe, [job[1] for job in jobs], settings, progress=run.output.progress, label=label)


def _offload(run: Run, pipe: Any) -> Offload | None:
    """What has to leave a GPU for the run to fit, said in one line; None where the run is on no GPU."""
    if run.vram is None:
        return None
    offload = choose(pipe, run.vram, run.settings)
    run.output.show(str(offload))
    return offload


def _draw_both(run: Run, base: ModelFolder, sheet: Path) -> None:
    """The 16-bit model of `base`, then the quantized one on the same prompts and noise; the sheet shows both."""
    pipe = load_pipeline(base, dtype=run.dtype.torch, device=run.device)
    arguments = prepare(run.output, pipe, run.prompts, run.settings)
    variant = _variant(run, pipe)
    results = compare(pipe, [variant], run.prompts, run.settings, progress=run.output.progress)
    saved = {
        "images": _save(results[1].pictures, run.out, ""),
        "images_16bit": _save(results[0].pictures, run.out, f"_{results[0].name.lower()}"),
    }
    write_sheet(sheet, results, type(pipe.transformer).__name__, run.settings, arguments)
    run.output.show(images_table(results), figures_table(results))
    _finish(run, arguments, results, saved | {"sheet": str(sheet)})


def _variant(run: Run, pipe: Any) -> Variant:
    """The quantized model of --sheet: MODEL itself, or MODEL quantized by the preset."""
    path, dtype = run.folder.transformers["transformer"], run.dtype.torch
    if run.folder.is_quantized:
        stored = read_manifest(path).plan
        return Variant("quantized", stored, lambda: load_transformer(path, dtype=dtype, device=run.device))
    return preset_variant(path, pipe, run.preset or "ours", dtype, run.device, run.output.progress)


def _save(pictures: Sequence[Picture], out: Path, suffix: str) -> list[str]:
    """Write pictures as 000.png, 001.png, ... in a folder, or the only one as the file `out`."""
    single = _is_file(out)
    (out.parent if single else out).mkdir(parents=True, exist_ok=True)
    paths = [out if single else out / f"{i:03d}{suffix}.png" for i in range(len(pictures))]
    for picture, path in zip(pictures, paths, strict=True):
        picture.image.save(path)
    return [str(path) for path in paths]


def _finish(run: Run, arguments: dict[str, Any], results: Sequence[Result], saved: dict[str, Any]) -> None:
    """Say where everything is, or all of it as JSON."""
    where = saved["images"][0] if len(saved["images"]) == 1 else str(Path(saved["images"][0]).parent)
    run.output.show(f"images: {where}" + (f" (by {run.here.size} processes)" if run.here.size > 1 else ""))
    if "sheet" in saved:
        run.output.show(f"sheet: {saved['sheet']}")
    data = {"settings": asdict(run.settings), "arguments": arguments, "pictures": picture_entries(results[0])}
    figures = [result.to_dict(results[0]) for result in results]
    run.output.result({"machine": machine(run.device), "processes": run.here.size, **data, **saved, "results": figures})
