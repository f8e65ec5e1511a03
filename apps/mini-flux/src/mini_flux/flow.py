"""Training of the transformer and its text encoders: rectified flow, guidance distillation; sampling for previews."""

import copy
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, FluxTransformer2DModel
from torch import Tensor, nn

from mini_flux.autoencoder import Log, timed_cosine
from mini_flux.parts import LATENT_TOKENS, T5_LENGTH, flux_forward, image_ids, unpack_latents

# FluxPipeline's default text length; every LONG_EVERY-th step trains at it, so that both give nearly one picture
LONG = 512
LONG_EVERY = 24
SAVE_EVERY_SECONDS = 120


@dataclass
class Parts:
    """What is trained together."""

    clip: nn.Module
    t5: nn.Module
    transformer: FluxTransformer2DModel

    def modules(self) -> tuple[nn.Module, nn.Module, nn.Module]:
        return self.clip, self.t5, self.transformer

    def parameters(self) -> list[nn.Parameter]:
        return [p for m in self.modules() for p in m.parameters()]

    def copy(self) -> "Parts":
        parts = Parts(*(copy.deepcopy(m) for m in self.modules()))
        for m in parts.modules():
            m.requires_grad_(False).eval()
        return parts

    def state(self) -> list[Tensor]:
        return [p.detach() for p in self.parameters()]

    def load(self, state: list[Tensor]) -> None:
        with torch.no_grad():
            for p, q in zip(self.parameters(), state, strict=True):
                p.copy_(q)


@dataclass
class Examples:
    """Latents (count, 64, 64) bf16; token ids (captions_each * count, length) int16; those of the empty caption."""

    latents: Tensor
    clip_ids: Tensor
    t5_ids: Tensor
    clip_empty: Tensor
    t5_empty: Tensor

    def batch(self, size: int, text_length: int, drop: float) -> tuple[Tensor, Tensor, Tensor]:
        """Random latents and one of each one's captions, emptied with probability `drop`."""
        device = self.latents.device
        image = torch.randint(len(self.latents), (size,), device=device)
        which = torch.randint(len(self.clip_ids) // len(self.latents), (size,), device=device)
        row = image + which * len(self.latents)
        empty = torch.rand(size, 1, device=device) < drop
        clip_ids = torch.where(empty, self.clip_empty, self.clip_ids[row])
        t5_ids = torch.where(empty, self.t5_empty, self.t5_ids[row])
        return self.latents[image].float(), clip_ids, F.pad(t5_ids, (0, text_length - T5_LENGTH))


def encode_text(parts: Parts, clip_ids: Tensor, t5_ids: Tensor) -> tuple[Tensor, Tensor]:
    """(B, clip length), (B, T5 length) -> (B, T5 length, 256), (B, 128). No mask, as FluxPipeline does it."""
    pooled = parts.clip(input_ids=clip_ids.long()).pooler_output
    return parts.t5(input_ids=t5_ids.long())[0], pooled


class Trainer:
    """Runs timed, resumable training phases over one set of parts, keeping an exponential moving average of them."""

    def __init__(
        self, parts: Parts, examples: Examples, work: Path, log: Log, *, batch: int, compile_blocks: bool
    ) -> None:
        self.parts, self.ema, self.examples, self.work, self.log = parts, parts.copy(), examples, work, log
        self.batch, self.device = batch, examples.latents.device
        ids = image_ids().to(self.device)
        rope = parts.transformer.pos_embed
        self.rope = {n: rope(torch.cat([torch.zeros(n, 3, device=self.device), ids])) for n in (T5_LENGTH, LONG)}
        self.compile_blocks = compile_blocks
        if compile_blocks:
            torch._dynamo.config.cache_size_limit = 64
            for block in [*parts.transformer.transformer_blocks, *parts.transformer.single_transformer_blocks]:
                block.compile(dynamic=False)

    def velocity(self, parts: Parts, x: Tensor, text: tuple[Tensor, Tensor], t: Tensor, g: Tensor) -> Tensor:
        # compiled for the one shape of ordinary training steps; every other shape would compile anew
        usual = torch.is_grad_enabled() and text[0].shape[1] == T5_LENGTH
        stance = "default" if usual or not self.compile_blocks else "force_eager"
        with torch.compiler.set_stance(stance), torch.autocast(self.device.type, dtype=torch.bfloat16):
            return flux_forward(parts.transformer, x, *text, t, g, self.rope[text[0].shape[1]]).float()

    def text(self, parts: Parts, clip_ids: Tensor, t5_ids: Tensor) -> tuple[Tensor, Tensor]:
        with torch.autocast(self.device.type, dtype=torch.bfloat16):
            return encode_text(parts, clip_ids, t5_ids)

    def noisy(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """t in 0..1 drawn towards the noisy end, where what stands where is decided; noise; their mixture."""
        t = torch.sigmoid(torch.randn(len(x), device=self.device) * 1.15 + 0.5)
        noise = torch.randn_like(x)
        return t, noise, torch.lerp(x, noise, t[:, None, None])

    def guidance(self, count: int) -> Tensor:
        return 1 + 4 * torch.rand(count, device=self.device)

    def flow_loss(self, size: int, text_length: int) -> Tensor:
        """Rectified flow: the velocity from picture to noise. The guidance input is fed but means nothing yet."""
        x, clip_ids, t5_ids = self.examples.batch(size, text_length, 0.1)
        t, noise, mixed = self.noisy(x)
        v = self.velocity(self.parts, mixed, self.text(self.parts, clip_ids, t5_ids), t, self.guidance(size))
        return (v - (noise - x)).pow(2).mean()

    def distill_loss(self, size: int, text_length: int) -> Tensor:
        """One pass with guidance g imitates classifier-free guidance of weight 1 + 0.4 (g - 1) by the average."""
        x, clip_ids, t5_ids = self.examples.batch(size, text_length, 0.05)
        t, _, mixed = self.noisy(x)
        g = self.guidance(size)
        with torch.no_grad():
            target = self.guided(self.ema, mixed, clip_ids, t5_ids, t, 1 + 0.4 * (g - 1))
        return (self.velocity(self.parts, mixed, self.text(self.parts, clip_ids, t5_ids), t, g) - target).pow(2).mean()

    def guided(self, parts: Parts, x: Tensor, clip_ids: Tensor, t5_ids: Tensor, t: Tensor, weight: Tensor) -> Tensor:
        """Classifier-free guidance: unconditional + weight * (conditional - unconditional), weight (B,)."""
        n, extra = len(x), t5_ids.shape[1] - T5_LENGTH
        empty = self.examples.clip_empty.expand(n, -1), F.pad(self.examples.t5_empty, (0, extra)).expand(n, -1)
        text = self.text(parts, torch.cat([clip_ids, empty[0]]), torch.cat([t5_ids, empty[1]]))
        both = self.velocity(parts, x.repeat(2, 1, 1), text, t.repeat(2), torch.full((2 * n,), 3.0, device=self.device))
        conditional, unconditional = both.chunk(2)
        return torch.lerp(unconditional, conditional, weight[:, None, None])

    def run(
        self, phase: str, seconds: float, peak: float, warmup: int, previews: Callable[[float], object] | None = None
    ) -> None:
        """Train for `seconds` in all, going on from the phase's checkpoint if there is one."""
        loss_of = {"flow": self.flow_loss, "distill": self.distill_loss}[phase]
        params = self.parts.parameters()
        groups = [
            {"params": [p for p in params if p.dim() > 1], "weight_decay": 0.01},
            {"params": [p for p in params if p.dim() < 2], "weight_decay": 0.0},
        ]
        optimizer = torch.optim.AdamW(groups, lr=peak, betas=(0.9, 0.98), fused=self.device.type == "cuda")
        step, spent = self._resume(phase, optimizer)
        start, saved, shown, running = time.monotonic() - spent, spent, spent / seconds, 0.0
        for m in self.parts.modules():
            m.train()
        while (progress := (time.monotonic() - start) / seconds) < 1:
            timed_cosine(optimizer, peak, 0.02, step, warmup, progress)
            long = step % LONG_EVERY == LONG_EVERY - 1
            loss = loss_of(self.batch // 8 if long else self.batch, LONG if long else T5_LENGTH)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(params, 1.0)
            optimizer.step()
            step += 1
            if phase == "flow" and step % 4 == 0:
                torch._foreach_lerp_(self.ema.state(), self.parts.state(), 1 - min(0.997, step / (step + 100)))
            if step % 100 == 0:
                running = loss.item() if running == 0 else 0.8 * running + 0.2 * loss.item()
            if step % 250 == 0:
                self.log(f"{phase} step {step} progress {progress:.2f} loss {running:.4f}")
            if time.monotonic() - start - saved > SAVE_EVERY_SECONDS:
                saved = time.monotonic() - start
                self._save(phase, optimizer, step, saved)
            if previews and progress - shown > 0.2:
                shown = progress
                previews(progress)
        for m in self.parts.modules():
            m.eval()
        self._save(phase, optimizer, step, seconds)
        self.log(f"{phase}: {step} steps of {self.batch}, loss {running:.4f}")

    def _resume(self, phase: str, optimizer: torch.optim.Optimizer) -> tuple[int, float]:
        file = self.work / f"{phase}.pt"
        if not file.exists():
            return 0, 0.0
        state = torch.load(file, map_location=self.device, weights_only=True)
        self.parts.load(state["parts"])
        self.ema.load(state["ema"])
        optimizer.load_state_dict(state["optimizer"])
        self.log(f"{phase}: going on from step {state['step']}, {state['spent']:.0f} s in")
        return state["step"], state["spent"]

    def _save(self, phase: str, optimizer: torch.optim.Optimizer, step: int, spent: float) -> None:
        state = {
            "parts": self.parts.state(),
            "ema": self.ema.state(),
            "optimizer": optimizer.state_dict(),
            "step": step,
            "spent": spent,
        }
        partial = self.work / f"{phase}.pt.tmp"
        torch.save(state, partial)
        partial.replace(self.work / f"{phase}.pt")

    @torch.no_grad()
    def sample(
        self,
        parts: Parts,
        vae: AutoencoderKL,
        clip_ids: Tensor,
        t5_ids: Tensor,
        *,
        weight: float | None,
        steps: int = 20,
    ) -> Tensor:
        """Pictures (B, 3, 128, 128) in 0..1. `weight`: classifier-free guidance; None: distilled, guidance 3.5."""
        n = len(clip_ids)
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(n, LATENT_TOKENS, 64, generator=generator).to(self.device)
        text = self.text(parts, clip_ids, t5_ids)
        for now, after in _steps(steps):
            t = torch.full((n,), now, device=self.device)
            if weight is None:
                v = self.velocity(parts, x, text, t, torch.full((n,), 3.5, device=self.device))
            else:
                v = self.guided(parts, x, clip_ids, t5_ids, t, torch.full((n,), weight, device=self.device))
            x = x + (after - now) * v
        z = unpack_latents(x) / vae.config.scaling_factor + vae.config.shift_factor
        with torch.autocast(self.device.type, dtype=torch.bfloat16):
            return (vae.decode(z).sample.float() / 2 + 0.5).clamp(0, 1)


def _steps(count: int) -> Iterator[tuple[float, float]]:
    sigmas = [*torch.linspace(1, 1 / count, count).tolist(), 0.0]
    return pairwise(sigmas)
