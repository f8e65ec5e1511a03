"""What `convrot-bench quality MODEL` does: the subject, its figures, where pictures are kept, and the run."""

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor

from convrot_bench.quality import synthetic_suite
from convrot_bench.quality.calibration import PROMPTS
from convrot_bench.quality.metrics import JudgeFeatures, Metrics, Running, feature_distance, plain
from convrot_bench.quality.networks import Networks, available, for_any_model, lpips
from convrot_bench.quality.pictures import Folder, Memory, Store, picture_files, read_picture
from convrot_bench.quality.run import run, select
from convrot_bench.quality.sheet import SHOWN, save_sheet
from convrot_bench.quality.subjects import Subject, any_model, mini_flux, read_prompts
from convrot_bench.quality.suite import Suite
from convrot_bench.results import Writer, machine_facts
from convrot_quant.generation import Settings, call_arguments
from convrot_quant.replicas import World, own_device, share, world

RESULTS, OWN = Path("docs/results/quality.jsonl"), Path("outputs/quality")
REFERENCE_AT_ONCE = 16  # reference pictures in one call of Inception


@dataclass(frozen=True)
class Options:
    """The command line. With `judge` the model is mini-flux and captions are made here; else `prompts` has them."""

    model: str
    out: Path | None = None  # None: among the committed results; of a user's model, beside its pictures
    judge: Path | None = None
    prompts: Path | None = None
    calibration: Path | None = None
    captions: int | None = None
    split: str = "report"
    steps: tuple[int, ...] = (20,)
    methods: tuple[str, ...] = ()
    batch: int = 20
    device: str = "auto"
    seed: int = 0
    pictures: Path | None = None
    sheet: Path | None = None
    networks: Networks = field(default_factory=Networks)
    drawing: dict[str, Any] = field(default_factory=dict)  # height, width, guidance, max_sequence_length


def measure(options: Options, say: Callable[[str], None]) -> None:
    """Run it; under torchrun or accelerate, this process's share of it. Rank 0 writes the rows."""
    here = world()
    methods = select(options.methods)
    device = _device(options.device, here)
    if options.model == synthetic_suite.MODEL:
        if here.size > 1:
            raise ValueError("quality: generated layers are measured by one process; start it without a launcher")
        out = Writer(options.out or RESULTS, "quality")
        return synthetic_suite.run(out, device, say, methods=methods, split=options.split)
    subject = _subject(options, device)
    if len(subject.prompts) < here.size:
        raise ValueError(f"quality: {len(subject.prompts)} prompts for {here.size} processes; use fewer processes")
    mine = share(range(len(subject.prompts)), here)
    running, unmeasured = _on_every_process(*_figures(options, subject, here))
    store = _store(options, subject)
    suite = Suite(subject, Metrics(running, device), store, options.steps, options.batch, mine)
    more = {"device": device.split(":")[0], "processes": here.size, "unmeasured": unmeasured} | _fid_facts(options)
    speak = say if here.is_main else _silent
    for case, why in unmeasured.items():
        speak(f"{case} is not measured: {why}")
    try:
        run(suite, Writer(_rows_file(options, subject), "quality") if here.is_main else None, methods, more, speak)
    finally:
        if options.sheet is not None and here.is_main:
            save_sheet(options.sheet, store, methods, max(options.steps))


def _rows_file(options: Options, subject: Subject) -> Path:
    return options.out or (RESULTS if options.judge is not None else OWN / f"{subject.name}.jsonl")


def _silent(_text: str) -> None:
    """What other processes say: the first one speaks."""


def _device(name: str, here: World) -> str:
    name = own_device(name, here)
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return name


def _subject(options: Options, device: str) -> Subject:
    if options.judge is not None:
        if options.prompts is not None:
            raise ValueError("quality: --judge makes mini-flux's captions itself; leave out --prompts, or --judge")
        captions = options.captions or 500
        return mini_flux(Path(options.model), options.judge, captions, options.split, device, PROMPTS)
    if options.prompts is None:
        raise ValueError("quality: say what to draw: --prompts FILE, or --judge FILE for mini-flux's captions")
    prompts = read_prompts(options.prompts, options.captions)
    calibration = read_prompts(options.calibration) if options.calibration else []
    if both := set(prompts) & set(calibration):
        raise ValueError(f"quality: {sorted(both)[0]!r} is measured and in --calibration; calibrate on other prompts")
    drawing = {key: value for key, value in options.drawing.items() if value is not None}
    subject = any_model(options.model, prompts, options.seed, options.split, device, calibration, drawing)
    call_arguments(subject.pipe, Settings(**drawing))  # refuses what the pipeline cannot draw, before the work
    return subject


def _figures(options: Options, subject: Subject, here: World) -> tuple[list[Running], dict[str, str]]:
    """(figures, {case: why it is not measured})."""
    networks = options.networks
    if subject.judge is not None:
        found, missing = available([("lpips", lambda: lpips(networks.lpips_weights))])
        return [*plain(), feature_distance(JudgeFeatures(subject.judge)), *found], missing
    reference = None
    if networks.reference_images is not None:
        reference = _reference(share(picture_files(networks.reference_images), here), subject)
    found, missing = for_any_model(networks, reference)
    return [*plain(), *found], missing


def _on_every_process(found: list[Running], missing: dict[str, str]) -> tuple[list[Running], dict[str, str]]:
    """Figures that every process can make: one that misses a file or a download would leave the others waiting."""
    whole: dict[str, str] = {}
    for other in gather_object([missing]):
        whole |= {case: why for case, why in other.items() if case not in whole}
    return [one for one in found if one.case not in whole], whole


def _reference(files: list[Path], subject: Subject) -> Iterator[Tensor]:
    """Reference pictures at the size of the drawn ones, uint8 (B, 3, H, W)."""
    arguments = call_arguments(subject.pipe, Settings(**subject.options))
    size = (arguments["height"], arguments["width"]) if "height" in arguments else (1024, 1024)
    for start in range(0, len(files), REFERENCE_AT_ONCE):
        yield torch.stack([read_picture(path, size) for path in files[start : start + REFERENCE_AT_ONCE]])


def _fid_facts(options: Options) -> dict[str, str]:
    """What the Frechet distance of the rows is a distance of."""
    against = "reference images" if options.networks.reference_images is not None else "16-bit pictures"
    return {"fid_features": "judge" if options.judge else "Inception v3, 2048", "fid_against": against}


def _store(options: Options, subject: Subject) -> Store:
    """Files where a run may go on later; mini-flux draws faster than it would read."""
    if options.pictures is None and options.judge is not None:
        return Memory(SHOWN if options.sheet else 0)
    folder = options.pictures or OWN / subject.name
    prompts = hashlib.sha256("\n".join(subject.prompts).encode()).hexdigest()[:16]
    settings = subject.shape | {"prompts_sha256": prompts, "first_seed": subject.seeds[0], **subject.options}
    # pictures of other code are no pictures of this method
    return Folder(folder, settings | {"commit": machine_facts()["commit"]})
