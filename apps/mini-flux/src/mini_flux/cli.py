"""`mini-flux`: train the pipeline again from nothing, evaluate it, draw scenes."""

from pathlib import Path
from typing import Annotated

import torch
import typer

app = typer.Typer(no_args_is_help=True, add_completion=False, help=__doc__, rich_markup_mode=None)


def _device(name: str) -> str:
    if name != "auto":
        return name
    return "cuda" if torch.cuda.is_available() else "cpu"


@app.command()
def train(
    work: Annotated[Path, typer.Argument(help="folder for checkpoints and results; a second run goes on from it")],
    device: Annotated[str, typer.Option(help="auto, cuda or cpu")] = "auto",
    minutes: Annotated[float | None, typer.Option(help="length of the timed stages together; default: 15.3")] = None,
    scenes: Annotated[int, typer.Option(help="rendered scenes")] = 300_000,
    batch: Annotated[int, typer.Option(help="pictures a training step")] = 512,
    compile_blocks: Annotated[
        bool | None, typer.Option(help="torch.compile the transformer's blocks; default: on a GPU")
    ] = None,
) -> None:
    """Render, train autoencoder, judge and transformer, distil guidance, save.

    Example:  mini-flux train work
    """
    from dataclasses import replace

    from mini_flux.train import Recipe
    from mini_flux.train import train as run

    where = _device(device)
    compiled = where == "cuda" if compile_blocks is None else compile_blocks
    recipe = replace(Recipe(), scenes=scenes, batch=batch, compile_blocks=compiled)
    run(work, recipe if minutes is None else recipe.lasting(minutes), where)


@app.command()
def evaluate(
    pipeline: Annotated[Path, typer.Argument(help="pipeline folder", exists=True, file_okay=False)],
    judge: Annotated[Path, typer.Option(help="the judge's file", exists=True, dir_okay=False)],
    captions: Annotated[int, typer.Option(help="held-out captions", min=2)] = 500,
    steps: Annotated[int, typer.Option(help="sampling steps", min=1)] = 20,
    device: Annotated[str, typer.Option(help="auto, cuda or cpu")] = "auto",
    out: Annotated[Path | None, typer.Option(help="write the figures here as JSON, too")] = None,
    sheet: Annotated[Path | None, typer.Option(help="write the first 48 pictures with captions here (PNG)")] = None,
) -> None:
    """Draw held-out captions in BF16 and count how often shapes, colours and relation are right.

    Example:  mini-flux evaluate apps/mini-flux/weights --judge apps/mini-flux/judge.safetensors --captions 100
    """
    import json

    from mini_flux.evaluate import evaluate as run

    figures = json.dumps(
        run(pipeline, judge, captions=captions, steps=steps, device=_device(device), sheet=sheet), indent=2
    )
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(figures + "\n")
    typer.echo(figures)


@app.command()
def scenes(
    out: Annotated[Path, typer.Argument(help="PNG to write")],
    count: Annotated[int, typer.Option(help="how many", min=1, max=256)] = 32,
    seed: Annotated[int, typer.Option()] = 0,
) -> None:
    """Render random training scenes into one picture.

    Example:  mini-flux scenes scenes.png --count 16
    """
    import random

    from PIL import Image

    from mini_flux.render import place, render, to_grid
    from mini_flux.scenes import random_scene

    rng = random.Random(seed)
    drawn = [random_scene(rng) for _ in range(count)]
    Image.fromarray(to_grid(render(place(drawn, seed))).numpy()).save(out)


def main() -> None:
    app()


if __name__ == "__main__":
    main()
