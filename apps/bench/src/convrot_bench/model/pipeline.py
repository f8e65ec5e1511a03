"""A whole image of FLUX.1-dev: text encoders, all steps, VAE, picture. Real sizes, random weights, no tokenizer."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from convrot_bench.bench import Bench
from convrot_bench.model import build
from convrot_bench.model.configs import SCHEDULER, Scale
from convrot_bench.model.flux import flux_sides, shape_of
from convrot_bench.model.phases import Phases
from convrot_bench.model.sides import BF16, COMPILED, ENTRIES, OURS, Side, check_finite, facts
from convrot_bench.model.timing import WALL, time_rounds, versus
from convrot_bench.results import Figure

Encoders = dict[str, Any]  # components of a FluxPipeline


def pipeline(bench: Bench, scale: Scale) -> Iterator[Figure]:
    """Both pipelines share text encoders and VAE; their transformers are compiled."""
    torch._dynamo.reset()
    phase = Phases("pipeline")
    sides = flux_sides(bench, scale, phase, BF16, OURS)
    phase("building text encoders and VAE")
    shared = shared_parts(scale, bench.device)
    more = facts(bench, scale, fused=build.is_fused(sides[OURS].model), how=COMPILED, baseline_how=COMPILED)
    more["timing"] = WALL
    draws = {}
    for side in sides.values():
        phase(f"compiling and drawing once: {side.name}")
        side.compile(bench.device)
        draws[side.name] = drawer(side, shared, scale, bench.device)
        with torch._dynamo.config.patch(recompile_limit=ENTRIES):  # for what a pipeline may pass otherwise than a step
            check_finite(f"pipeline, {side.name}", draws[side.name](scale.pipeline_steps[0], "pt")[0])
    for count in scale.pipeline_steps:
        phase(f"timing images of {count} steps")
        images = {name: _image(draw, count) for name, draw in draws.items()}
        spreads = time_rounds(images, bench.device, scale.images, wall=True)
        shape = shape_of(scale.side) | {"steps": count}
        case = f"flux_pipeline_{count}"
        yield versus(case, shape, spreads[OURS], spreads[BF16], "BF16 compiled", more, "s/image")


def _image(draw: Callable[[int, str], Any], count: int) -> Callable[[], Any]:
    return lambda: draw(count, "pil")


def shared_parts(scale: Scale, device: str) -> Encoders:
    """T5, CLIP and VAE at the scale's size."""
    from diffusers import AutoencoderKL
    from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

    t5 = T5Config(**scale.t5, is_encoder_decoder=False, use_cache=False, tie_word_embeddings=False)
    return {
        "text_encoder": build.build(lambda: CLIPTextModel(CLIPTextConfig(**scale.clip)), device),
        "text_encoder_2": build.build(lambda: T5EncoderModel(t5), device),
        "vae": build.build(lambda: AutoencoderKL(**scale.vae), device),
    }


def drawer(side: Side, shared: Encoders, scale: Scale, device: str) -> Callable[[int, str], Any]:
    """-> a function of (steps, output type): encode random tokens, denoise from one seed, decode."""
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline

    scheduler = FlowMatchEulerDiscreteScheduler(**SCHEDULER)
    pipe = FluxPipeline(scheduler=scheduler, transformer=side.model, tokenizer=None, tokenizer_2=None, **shared)
    pipe.set_progress_bar_config(disable=True)
    ids = {"text_encoder": _token_ids(scale, "clip", device), "text_encoder_2": _token_ids(scale, "flux", device)}

    def draw(steps: int, output_type: str) -> Any:
        pooled = pipe.text_encoder(ids["text_encoder"]).pooler_output
        text = pipe.text_encoder_2(ids["text_encoder_2"])[0]
        return pipe(
            prompt_embeds=text,
            pooled_prompt_embeds=pooled,
            height=scale.side,
            width=scale.side,
            num_inference_steps=steps,
            generator=torch.Generator(device).manual_seed(0),
            output_type=output_type,
        ).images

    return draw


def _token_ids(scale: Scale, encoder: str, device: str) -> Tensor:
    """(1, T): what a tokenizer would give, at the full length that the pipeline pads to."""
    vocabulary = (scale.clip if encoder == "clip" else scale.t5)["vocab_size"]
    generator = torch.Generator(device).manual_seed(0)
    length = scale.text_tokens[encoder]
    return torch.randint(vocabulary, (1, length), device=device, generator=generator)
