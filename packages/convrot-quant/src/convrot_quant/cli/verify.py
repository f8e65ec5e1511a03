"""convrot verify: names, shapes, codes, scales and checksums of a quantized file or folder."""

from __future__ import annotations

import typer
from rich import box
from rich.table import Table

from convrot_quant.cli.convert import Config, GroupSize, Source
from convrot_quant.cli.options import Json, Quiet
from convrot_quant.cli.output import Output, hush
from convrot_quant.convert import config_from
from convrot_quant.verify import Report, verify

EXAMPLES = """Examples:

convrot verify flux1-dev-convrot.safetensors

convrot verify ./FLUX.1-dev-4bit --json > checksums.json
"""
WORDS = {True: "ok", False: "FAILED", None: "not checked"}


def command(
    source: Source,
    config: Config = None,
    group_size: GroupSize = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Read all of a quantized model and say whether it is whole. Exit code 1 where a check fails.

    With --json, each tensor's SHA-256 too: two files of one model can be compared by it.
    """
    output = Output(as_json, quiet)
    hush(quiet=quiet)
    known = None if config is None else config_from(config)
    report = verify(source, config=known, group_size=group_size, progress=output.progress)
    output.show(_table(source, report))
    checks = [{"name": c.name, "passed": c.passed, "detail": c.detail} for c in report.checks]
    schemes = {name: scheme.to_dict() for name, scheme in report.schemes.items()}
    data = {"source": source, "passed": report.passed, "checks": checks, "layers": schemes}
    output.result({**data, "tensors": dict(report.tensors)})
    if not report.passed:
        failed = [check for check in report.checks if check.passed is False]
        typer.echo(f"convrot: {source}: {failed[0].name}: {failed[0].detail}", err=True)
        raise typer.Exit(1)


def _table(source: str, report: Report) -> Table:
    table = Table(title=source, box=box.SIMPLE_HEAD, pad_edge=False, title_style="bold")
    table.add_column("check", no_wrap=True)
    table.add_column("", no_wrap=True)
    table.add_column("", overflow="fold")
    for check in report.checks:
        table.add_row(check.name, WORDS[check.passed], check.detail)
    return table
