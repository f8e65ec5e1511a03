"""The typer application: which commands there are, in the order of --help."""

from __future__ import annotations

import signal
from types import FrameType

import typer

from convrot_quant.cli import compare, convert, doctor, generate, inspect, plan, quantize, verify
from convrot_quant.cli.output import sentences

app = typer.Typer(
    name="convrot",
    help="4-bit diffusion transformers: quantize, look inside, generate, compare. No calibration, no retraining.",
    epilog="Exit codes: 0 done, 1 failed (one sentence on stderr), 2 wrong usage, 143 terminated by SIGTERM. "
    "CONVROT_DEBUG=1 shows tracebacks.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
COMMANDS = {"quantize": quantize, "inspect": inspect, "plan": plan, "generate": generate, "compare": compare}
COMMANDS |= {"convert": convert, "verify": verify, "doctor": doctor}
for name, module in COMMANDS.items():
    app.command(name, epilog=module.EXAMPLES)(sentences(module.command))


def main() -> None:
    """Entry point of the `convrot` script. SIGTERM ends it as Ctrl-C does, half-written folders removed: code 143."""
    signal.signal(signal.SIGTERM, _terminate)
    app()


def _terminate(number: int, _frame: FrameType | None) -> None:
    signal.signal(number, signal.SIG_DFL)  # a second one ends the process at once
    raise SystemExit(128 + number)
