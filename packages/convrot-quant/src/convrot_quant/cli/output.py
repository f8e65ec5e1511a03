"""What commands say: tables and text for people, one JSON object for programs, one sentence for errors."""

from __future__ import annotations

import functools
import json
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import typer
from rich import box
from rich.console import Console, RenderableType
from rich.table import Table
from safetensors import SafetensorError

from convrot_kernels import BackendError
from convrot_quant.compare import Result
from convrot_quant.generation import SettingsError
from convrot_quant.plans import size_text

WIDTH = 120  # where the output is no terminal
ERRORS = (("psnr_db_mean", 2), ("ssim_mean", 4), ("layer_l2_median", 4))  # key of Result.to_dict, digits
MACHINE_ERRORS = (  # what torch says, in a plain RuntimeError, of a machine that is too small or has no such device
    "out of memory",
    "not enough memory",
    "can't allocate memory",
    "CUDA error",
    "CUDA driver",
    "No CUDA GPUs",
)
Command = TypeVar("Command", bound=Callable[..., None])


@dataclass(frozen=True)
class Output:
    """--json prints one object and nothing else on stdout; --quiet prints nothing but that. Progress is on stderr."""

    as_json: bool
    quiet: bool

    @property
    def progress(self) -> bool:
        """Whether to draw progress bars."""
        return not self.quiet

    @property
    def width(self) -> int:
        """Columns of the terminal, or what suits a file."""
        return Console().width if sys.stdout.isatty() else WIDTH

    def show(self, *renderables: RenderableType) -> None:
        """Text and tables for people."""
        if not (self.as_json or self.quiet):
            console = Console(width=self.width, highlight=False)
            for renderable in renderables:
                console.print(renderable, soft_wrap=isinstance(renderable, str), markup=False)

    def warn(self, text: str) -> None:
        """One line on stderr, also beside --json; not with --quiet."""
        if not self.quiet:
            typer.echo(f"convrot: warning: {text}", err=True)

    @contextmanager
    def warnings(self) -> Iterator[None]:
        """What the library warns of inside, one line each."""
        with warnings.catch_warnings():
            warnings.filterwarnings("default", category=UserWarning, module="convrot_quant")
            warnings.showwarning = lambda message, *_: self.warn(str(message))
            yield

    def result(self, data: dict[str, Any]) -> None:
        """The command's result as JSON, when that was asked for."""
        if self.as_json:
            typer.echo(json.dumps(data, indent=2, allow_nan=False))


def sentences(command: Command) -> Command:
    """Turn the errors that a user can meet into one sentence on stderr and exit code 1."""

    @functools.wraps(command)
    def run(*arguments: Any, **options: Any) -> None:
        try:
            command(*arguments, **options)
        except Exception as error:
            if os.environ.get("CONVROT_DEBUG") or not _is_expected(error):
                raise
            if isinstance(error, SettingsError):
                raise typer.BadParameter(str(error)) from None
            typer.echo(f"convrot: {' '.join(str(error).split()) or 'out of memory'}", err=True)
            raise typer.Exit(1) from None

    return run  # type: ignore[return-value]  # functools.wraps keeps the signature that typer reads


def _is_expected(error: BaseException) -> bool:
    """Whether the input or the machine is at fault; any other error is one of this program and keeps its traceback."""
    if isinstance(error, (ValueError, OSError, ImportError, BackendError, SafetensorError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in MACHINE_ERRORS)


def hush(*, quiet: bool) -> None:
    """Leave stderr to this command: no log lines or bars of the libraries below, no downloads' bars when quiet."""
    import diffusers
    import huggingface_hub
    import transformers

    for library in (transformers, diffusers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()
    if quiet:
        huggingface_hub.utils.disable_progress_bars()


def figures_table(results: Sequence[Result]) -> Table:
    """One row a model: bytes, time, and, where there are several, errors against the first, the 16-bit one."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, caption_justify="left", caption_style="dim")
    table.add_column("model")
    alone = len(results) == 1
    for name in ("transformer", "s/image", *(() if alone else ("smaller", "PSNR dB", "SSIM", "layer L2"))):
        table.add_column(name, justify="right", no_wrap=True)
    for result in results:
        figures = result.to_dict(results[0])
        cells = [size_text(result.transformer_bytes), f"{result.seconds:.2f}"]
        if not alone:
            cells.append(f"{figures['times_smaller']:.2f}x")
            cells += [_number(figures.get(key), digits) for key, digits in ERRORS]
        table.add_row(result.name, *cells)
    if not alone:
        table.caption = "PSNR, SSIM: mean over images.\nlayer L2: median over layers of the relative error."
    return table


def images_table(results: Sequence[Result]) -> Table:
    """One row a picture: prompt, seed, and each quantized model's PSNR and SSIM."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("prompt", overflow="fold")
    table.add_column("seed", justify="right")
    for result in results[1:]:
        table.add_column(f"{result.name}\nPSNR dB", justify="right", no_wrap=True)
        table.add_column("\nSSIM", justify="right", no_wrap=True)
    for i, picture in enumerate(results[0].pictures):
        cells = [cell for r in results[1:] for cell in (_number(r.psnr_db[i], 2), _number(r.ssim[i], 4))]
        table.add_row(picture.prompt, str(picture.seed), *cells)
    return table


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"
