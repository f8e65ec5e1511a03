"""How often the pipeline draws what the caption says, by the judge's reading, with the level of chance beside it."""

import json
import os
import subprocess
import sys
import textwrap
from collections.abc import Sequence
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from mini_flux.judge import Judge, Verdict, judge_images, load_judge, read
from mini_flux.parts import IMAGE_SIZE, T5_LENGTH, load_pipeline
from mini_flux.scenes import Scene, caption, held_out_scenes

SEED = 100  # the first image's; tuning elsewhere keeps to seeds below
CHANCE_SHIFTS = range(1, 21)


def draw_captions(
    pipe: Any, captions: Sequence[str], *, steps: int = 20, seed: int = SEED, batch: int = 20, guidance: float = 3.5
) -> Tensor:
    """Pictures (B, 3, 128, 128) in 0..1 by the stock FluxPipeline; picture i has the noise of seed + i in any batch."""
    pipe.set_progress_bar_config(disable=True)
    images = []
    for start in tqdm(range(0, len(captions), batch), desc=f"{steps}-step pictures, {batch} at a time"):
        some = list(captions[start : start + batch])
        generators = [torch.Generator("cpu").manual_seed(seed + start + i) for i in range(len(some))]
        with torch.inference_mode():
            out = pipe(
                some, height=IMAGE_SIZE, width=IMAGE_SIZE, num_inference_steps=steps, guidance_scale=guidance,
                max_sequence_length=T5_LENGTH, generator=generators, output_type="np",
            )  # fmt: skip
        images.append(torch.from_numpy(np.asarray(out.images)).permute(0, 3, 1, 2).float())
    return torch.cat(images)


def chance(seen: Tensor, scenes: Sequence[Scene]) -> Verdict:
    """The same pictures against captions of other pictures: the mean over shifts of the list."""
    shifted = [judge_images(seen, [*scenes[k:], *scenes[:k]]) for k in CHANCE_SHIFTS if k < len(scenes)]
    mean = {f: round(sum(getattr(v, f) for v in shifted) / len(shifted), 4) for f in Verdict.__dataclass_fields__}
    return Verdict(**mean | {"images": len(scenes)})


def read_images(judge: Judge, images: Tensor, at_once: int = 100) -> Tensor:
    """(B, 3, 128, 128) -> (B, heads), a hundred pictures at a time."""
    return torch.cat([read(judge, images[i : i + at_once]) for i in range(0, len(images), at_once)])


def evaluate(
    folder: Path, judge_file: Path, *, captions: int, steps: int, device: str, sheet: Path | None = None
) -> dict[str, Any]:
    """BF16 figures of a pipeline folder over held-out captions; `sheet`: a PNG of the first 48 pictures."""
    pipe = load_pipeline(folder, device)
    scenes = held_out_scenes(captions)
    images = draw_captions(pipe, [caption(s) for s in scenes], steps=steps)
    seen = read_images(load_judge(judge_file), images)
    if sheet is not None:
        save_sheet(images[:48], scenes[:48], sheet)
    return {
        "pipeline": folder.name, "dtype": "bfloat16", "steps": steps, "captions": captions, "seed": SEED,
        "accuracy": asdict(judge_images(seen, scenes)), "chance": asdict(chance(seen, scenes)),
        "judge_on_held_out_renderings": judge_figures(judge_file), "made_with": facts(device),
    }  # fmt: skip


def facts(device: str) -> dict[str, str]:
    """The machine, the versions, the commit and the command behind a figure."""
    import diffusers

    git = subprocess.run(["git", "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, check=False)
    return {
        "device": torch.cuda.get_device_name() if device.startswith("cuda") else f"CPU, {os.cpu_count()} cores",
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "commit": git.stdout.strip() or "unknown",
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
    }


def judge_figures(judge_file: Path) -> dict[str, float]:
    """What the judge scored on held-out renderings when it was trained: kept in its file."""
    from safetensors import safe_open

    with safe_open(judge_file, "pt") as f:
        figures: dict[str, float] = json.loads(f.metadata()["held_out_renderings"])
    return figures


def save_sheet(images: Tensor, scenes: Sequence[Scene], path: Path, columns: int = 8) -> None:
    """Pictures with their captions under them, as one PNG."""
    from PIL import Image, ImageDraw, ImageFont

    size, gap, line, lines = 160, 14, 15, 4
    font = ImageFont.load_default(size=12)
    width, height = size + gap, size + gap + lines * line
    rows = -(-len(images) // columns)
    sheet = Image.new("RGB", (width * columns + gap, height * rows + gap), "white")
    draw = ImageDraw.Draw(sheet)
    for i, (picture, scene) in enumerate(zip(images, scenes, strict=True)):
        x, y = gap + i % columns * width, gap + i // columns * height
        pixels = (picture.clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
        sheet.paste(Image.fromarray(pixels).resize((size, size), Image.Resampling.LANCZOS), (x, y))
        for n, words in enumerate(textwrap.wrap(caption(scene), 27)[:lines]):
            draw.text((x, y + size + 3 + n * line), words, fill="#222222", font=font)
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path, optimize=True)
