"""make_job: what a form or an API call gives -> a checked job; record: an outcome -> what is saved and answered."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from typing import Any

from convrot_demo import lora
from convrot_demo.comparison import Job, Outcome
from convrot_demo.errors import UserError
from convrot_demo.inputs import SEEDS, check
from convrot_demo.models import Models
from convrot_quant.cli.machine import machine


def make_job(models: Models, values: Mapping[str, Any]) -> Job:
    """`values`: the fields of Inputs, random_seed, picture (PIL) and lora (where gradio has put an upload)."""
    seed = secrets.randbelow(SEEDS) if values["random_seed"] else values["seed"]
    inputs = check({**values, "seed": seed}, models.bounds)
    if not values["lora"]:
        return Job(inputs, values["picture"])
    if not models.traits.has_lora:
        raise UserError(f"{models.traits.pipeline} takes no LoRA: leave the file out.")
    return Job(inputs, values["picture"], lora.read(values["lora"]))


def record(models: Models, outcome: Outcome) -> dict[str, Any]:
    """Settings, figures, model and machine, ready for JSON."""
    traits = models.traits
    about = {"model": traits.name, "pipeline": traits.pipeline, "memory": models.way}
    return {**about, **outcome.to_dict(), "machine": machine(models.options.device)}
