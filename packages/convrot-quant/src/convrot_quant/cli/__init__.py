"""The `convrot` command: quantize, inspect, generate, compare, convert, verify, doctor. One file per command."""

from convrot_quant.cli.app import app, main

__all__ = ["app", "main"]
