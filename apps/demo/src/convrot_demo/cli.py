"""convrot-demo: load a model, serve the page."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import typer

MINI_FLUX = Path("apps/mini-flux/weights")
EXAMPLES = """Examples:

convrot-demo

convrot-demo --model black-forest-labs/FLUX.1-dev --quantized ./FLUX.1-dev-4bit

convrot-demo --model ./FLUX.1-dev --memory offload --port 8000
"""
Model = Annotated[
    str | None,
    typer.Option(
        "--model", help="A pipeline's folder or hub id. Default: the shipped mini-flux.", metavar="PATH_OR_ID"
    ),
]
Quantized = Annotated[
    str | None, typer.Option("--quantized", help="MODEL quantized before, by `convrot quantize`.", metavar="FOLDER")
]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...; auto takes a GPU where there is one.")]
Memory = Annotated[
    str,
    typer.Option(
        help="auto: both models on the GPU if they fit, one at a time if each does, else 4-bit alone; both; 4bit; "
        "offload: BF16 from the CPU's memory, layer by layer."
    ),
]
Vram = Annotated[
    str, typer.Option("--vram", help="GPU memory to use, such as 12GB; auto: what is free.", metavar="SIZE")
]
Host = Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 lets other machines in.")]
Port = Annotated[int | None, typer.Option(help="Default: the first free one from 7860.", min=1, max=65535)]
Share = Annotated[bool, typer.Option("--share", help="A public link through gradio.live: goes online.")]
Mcp = Annotated[bool, typer.Option("--mcp", help="Offer the API as an MCP tool too.")]
Queue = Annotated[int, typer.Option(help="Jobs that may wait in line; more are refused.", min=1, max=1000)]
MaxSteps = Annotated[int, typer.Option(help="Most steps of a job.", min=1, max=1000)]
MaxSize = Annotated[int, typer.Option(help="Largest width and height in pixels.", min=16, max=8192)]


def find_mini_flux() -> Path | None:
    """The weights that ship with the project: below a parent of this file or of the working directory."""
    for root in (*Path(__file__).resolve().parents, Path.cwd(), *Path.cwd().parents):
        if (root / MINI_FLUX / "model_index.json").is_file():
            return root / MINI_FLUX
    return None


def quiet_environment(*, offline: bool) -> None:
    """Before gradio and huggingface_hub are imported: no analytics, and no hub where the model is a local folder."""
    # threads that spin while they wait slow torch down wherever a core is shared, with a browser for one
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
    if offline:
        os.environ["HF_HUB_OFFLINE"] = "1"


def command(
    model: Model = None,
    quantized: Quantized = None,
    device: Device = "auto",
    memory: Memory = "auto",
    vram: Vram = "auto",
    host: Host = "127.0.0.1",
    port: Port = None,
    share: Share = False,
    mcp: Mcp = False,
    queue: Queue = 16,
    max_steps: MaxSteps = 50,
    max_size: MaxSize = 2048,
) -> None:
    """BF16 and 4-bit images of one prompt and one seed, side by side in the browser."""
    name, mini_flux = _model(model)
    quiet_environment(offline=all(Path(given).is_dir() for given in (name, quantized) if given is not None))
    # imported here: the environment is set now, and --help needs none of it
    from convrot_demo.models import Options
    from convrot_demo.placement import read_wish
    from convrot_demo.serve import Server, serve
    from convrot_demo.traits import Limits
    from convrot_quant.cli.options import read_device, read_vram

    place = read_device(device)
    limits = Limits(max_steps, max_size)
    options = Options(name, quantized, place, read_wish(memory), read_vram(vram, place), limits, mini_flux)
    serve(options, Server(host, port, share, mcp, queue))


def _model(model: str | None) -> tuple[str, Path | None]:
    """--model, and the shipped folder if it is that one (the default)."""
    shipped = find_mini_flux()
    if model is not None:
        return model, shipped if shipped is not None and Path(model).resolve() == shipped.resolve() else None
    if shipped is None:
        raise ValueError(f"no {MINI_FLUX} near here: give --model PATH_OR_ID, or start in ConvRot's repository")
    return str(shipped), shipped


def main() -> Any:
    """Entry point of the `convrot-demo` script: errors are one sentence and exit code 1."""
    from convrot_quant.cli.output import sentences

    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command(epilog=EXAMPLES)(sentences(command))
    return app()
