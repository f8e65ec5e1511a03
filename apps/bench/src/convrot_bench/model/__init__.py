"""Whole models: BF16 against ours and against other projects, in one process, from random weights."""

from convrot_bench.model.tables import TABLES, plan, select

__all__ = ["TABLES", "plan", "select"]
