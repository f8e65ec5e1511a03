"""From nothing to a pipeline folder and a judge on one GPU: every stage leaves a file, a second run goes on there."""

import json
import random
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CLIPTokenizer, T5TokenizerFast

from mini_flux.autoencoder import Log, encode, reconstruction_psnr, train_judge, train_vae
from mini_flux.data import Drawn, draw, render_all, token_ids
from mini_flux.flow import Examples, Parts, Trainer
from mini_flux.judge import HEADS, Judge, Verdict, judge_images, labels, load_judge, read, save_judge
from mini_flux.parts import (
    CLIP_LENGTH,
    IMAGE_SIZE,
    T5_LENGTH,
    make_clip_tokenizer,
    make_t5_tokenizer,
    make_text_encoders,
    make_transformer,
    make_vae,
    save_pipeline,
)
from mini_flux.render import place, to_grid
from mini_flux.scenes import caption, held_out_scenes, random_scene


@dataclass(frozen=True)
class Recipe:
    """Everything a run depends on. Seconds are of one H200; together with rendering they make about 18 minutes."""

    scenes: int = 300_000
    captions_each: int = 2
    vae_seconds: float = 150
    judge_seconds: float = 60
    flow_seconds: float = 650
    distill_seconds: float = 60
    batch: int = 512
    learning_rate: float = 8e-4
    compile_blocks: bool = False
    checks: int = 4000  # held-out renderings that the judge is checked on
    previews: int = 256  # held-out captions drawn and judged while training
    seed: int = 0

    def lasting(self, minutes: float) -> "Recipe":
        """The same shares of another total of the timed stages."""
        timed = ("vae_seconds", "judge_seconds", "flow_seconds", "distill_seconds")
        share = minutes * 60 / sum(getattr(self, name) for name in timed)
        return replace(self, **{name: getattr(self, name) * share for name in timed})


def train(work: Path, recipe: Recipe, device: str) -> Path:
    """Runs every stage that has not left its file in `work` yet. Returns the pipeline folder, `work/pipeline`."""
    work.mkdir(parents=True, exist_ok=True)
    log = _logger(work / "train.log")
    torch.manual_seed(recipe.seed)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    torch.backends.cudnn.benchmark = True
    torch.backends.cuda.enable_cudnn_sdp(
        False
    )  # its backward failed with an illegal access at these sizes (torch 2.11)
    drawn = draw(recipe.scenes, recipe.captions_each, recipe.seed)  # forks, so before the device is touched
    log("scenes and captions drawn")
    where = torch.cuda.get_device_name() if device == "cuda" else "cpu"
    log(f"torch {torch.__version__} on {where}: {json.dumps(asdict(recipe))}")
    vae, latents = _pictures(work, recipe, drawn, device, log)
    clip_tokenizer, t5_tokenizer = _tokenizers()
    examples = _examples(drawn, latents, clip_tokenizer, t5_tokenizer)
    log("captions are tokens")
    clip, t5 = make_text_encoders(len(clip_tokenizer), len(t5_tokenizer), clip_tokenizer.eos_token_id)
    parts = Parts(clip.to(device), t5.to(device), make_transformer().to(device))
    trainer = Trainer(parts, examples, work, log, batch=recipe.batch, compile_blocks=recipe.compile_blocks)
    previews = Previews(trainer, vae, work, clip_tokenizer, t5_tokenizer, log, recipe.previews)
    trainer.run(
        "flow",
        recipe.flow_seconds,
        recipe.learning_rate,
        300,
        lambda p: previews.show(trainer.ema, 2.0, f"flow_{p:.2f}"),
    )
    parts.load(trainer.ema.state())
    previews.show(parts, 1.0, "flow")
    previews.show(parts, 2.0, "flow_guided")
    trainer.run("distill", recipe.distill_seconds, 3e-4, 100)
    previews.show(parts, None, "distilled")
    folder = work / "pipeline"
    count = save_pipeline(folder, clip_tokenizer, t5_tokenizer, clip, t5, vae, _uncompiled(parts))
    log(f"saved {count:,} parameters")
    return folder


def _logger(file: Path) -> Log:
    start = time.monotonic()

    def log(text: str) -> None:
        line = f"[{time.monotonic() - start:7.1f} s] {text}"
        print(line, flush=True)  # noqa: T201
        with file.open("a") as f:
            f.write(line + "\n")

    return log


def _pictures(work: Path, recipe: Recipe, drawn: Drawn, device: str, log: Log) -> tuple[AutoencoderKL, Tensor]:
    """Render; train the autoencoder and the judge; encode. Skipped where the files of an earlier run are complete."""
    vae = make_vae()
    if (work / "latents.safetensors").exists():
        vae.load_state_dict(load_file(work / "vae.safetensors"))
        vae.register_to_config(**json.loads((work / "latents.json").read_text()))
        log("autoencoder, judge and latents of an earlier run")
        return vae.to(device).eval(), load_file(work / "latents.safetensors", device=device)["latents"]
    images = render_all(drawn.batch, IMAGE_SIZE, device)
    log(f"rendered {len(images)} pictures")
    if not (work / "judge.safetensors").exists():
        judge = train_judge(images, drawn.labels, recipe.judge_seconds, log)
        figures = check_judge(judge, device, recipe.checks)
        save_judge(judge.cpu(), work / "judge.safetensors", figures)
        log(f"judge on held-out renderings: {json.dumps(figures)}")
    if not (work / "vae.safetensors").exists():
        train_vae(vae, images, recipe.vae_seconds, log)
        save_file({k: v.contiguous() for k, v in vae.state_dict().items()}, work / "vae.safetensors")
    else:
        vae.load_state_dict(load_file(work / "vae.safetensors"))
    vae.to(device).eval()
    log(f"autoencoder on training pictures: {reconstruction_psnr(vae, images[:256]):.2f} dB")
    latents = encode(vae, images)
    scaling = {"scaling_factor": vae.config.scaling_factor, "shift_factor": vae.config.shift_factor}
    (work / "latents.json").write_text(json.dumps(scaling))
    save_file({"latents": latents}, work / "latents.partial")
    (work / "latents.partial").rename(work / "latents.safetensors")
    log(f"encoded {len(latents)} pictures: {scaling}")
    return vae, latents


@torch.no_grad()
def check_judge(judge: Judge, device: str, count: int) -> dict[str, float]:
    """Share of held-out renderings (pairs never trained on) that the judge reads right, by head and all of them."""
    from mini_flux.render import render

    scenes = held_out_scenes(count, seed=1)
    batch, want = place(scenes, "judge check"), labels(scenes)
    seen = torch.cat([read(judge, render(batch[i : i + 50].to(device), IMAGE_SIZE)) for i in range(0, count, 50)])
    right = seen == want
    verdict = judge_images(seen, scenes)
    figures = {name: right[:, i].float().mean().item() for i, name in enumerate(HEADS)}
    figures |= {f"verdict_{k}": v for k, v in asdict(verdict).items()}
    return {k: round(float(v), 4) for k, v in figures.items()}


def _tokenizers() -> tuple[CLIPTokenizer, T5TokenizerFast]:
    rng = random.Random("mini-flux tokenizers")
    scenes = [random_scene(rng) for _ in range(60_000)]
    captions = [caption(s, rng) for s in scenes] + [caption(s) for s in scenes[:20_000]]
    return make_clip_tokenizer(captions), make_t5_tokenizer(captions)


def _examples(drawn: Drawn, latents: Tensor, clip: CLIPTokenizer, t5: T5TokenizerFast) -> Examples:
    captions = [c for each in drawn.captions for c in each]

    def ids(tokenizer: CLIPTokenizer | T5TokenizerFast, texts: list[str]) -> Tensor:
        if tokenizer is clip:
            return token_ids(clip, texts, CLIP_LENGTH, clip.eos_token_id).to(latents.device)
        return token_ids(t5, texts, T5_LENGTH, 0).to(latents.device)

    return Examples(latents, ids(clip, captions), ids(t5, captions), ids(clip, [""]), ids(t5, [""]))


def _uncompiled(parts: Parts) -> torch.nn.Module:
    clean = make_transformer()
    clean.load_state_dict(parts.transformer.state_dict())
    return clean


class Previews:
    """Pictures of held-out captions, judged, while training goes on."""

    def __init__(
        self,
        trainer: Trainer,
        vae: AutoencoderKL,
        work: Path,
        clip: CLIPTokenizer,
        t5: T5TokenizerFast,
        log: Log,
        count: int,
    ) -> None:
        self.trainer, self.vae, self.work, self.log = trainer, vae, work, log
        self.scenes = held_out_scenes(count, seed=2)
        texts = [caption(s) for s in self.scenes]
        device = trainer.device
        self.clip_ids = token_ids(clip, texts, CLIP_LENGTH, clip.eos_token_id).to(device)
        self.t5_ids = token_ids(t5, texts, T5_LENGTH, 0).to(device)
        self.judge = load_judge(work / "judge.safetensors").to(device)

    def show(self, parts: Parts, weight: float | None, name: str) -> Verdict:
        images = self.trainer.sample(parts, self.vae, self.clip_ids, self.t5_ids, weight=weight)
        verdict = judge_images(read(self.judge, images), self.scenes)
        Image.fromarray(to_grid(images[:32]).numpy()).save(self.work / f"{name}.png")
        self.log(f"preview {name}: " + ", ".join(f"{k} {v:.3f}" for k, v in asdict(verdict).items()))
        return verdict
