"""Training of the autoencoder and of the judge, both on rendered pictures."""

import math
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Tensor, nn

from mini_flux import judge as judge_module
from mini_flux.judge import HEADS, Judge

Log = Callable[[str], None]


def timed_cosine(
    optimizer: torch.optim.Optimizer, peak: float, floor: float, step: int, warmup: int, progress: float
) -> None:
    """Learning rate: linear warm-up over steps, then a cosine from `peak` to `floor * peak` over progress 0..1."""
    lr = (
        peak
        * min(1.0, (step + 1) / warmup)
        * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress))))
    )
    for group in optimizer.param_groups:
        group["lr"] = lr


def pick_images(images: Tensor, index: Tensor) -> Tensor:
    """uint8 (count, 3, H, W) -> float (len(index), 3, H, W) in 0..1."""
    return images[index].float() / 255


def vae_loss(vae: AutoencoderKL, x: Tensor) -> tuple[Tensor, Tensor]:
    """x (B, 3, H, W) in -1..1 -> (loss, mean squared error). L1 + L2 + half the L1 of gradients + a little KL."""
    with torch.autocast(x.device.type, dtype=torch.bfloat16):
        mean, logvar = vae.encoder(x).float().chunk(2, 1)
        logvar = logvar.clamp(-20, 10)
        y = vae.decoder(mean + torch.exp(0.5 * logvar) * torch.randn_like(mean)).float()
    d = y - x
    gradients = (d[..., 1:] - d[..., :-1]).abs().mean() + (d[..., 1:, :] - d[..., :-1, :]).abs().mean()
    kl = 0.5 * (mean.pow(2) + logvar.exp() - 1 - logvar).mean()
    mse = d.pow(2).mean()
    return d.abs().mean() + mse + 0.5 * gradients + 3e-4 * kl, mse.detach()


def train_vae(vae: AutoencoderKL, images: Tensor, seconds: float, log: Log, batch: int = 64) -> None:
    """Trains in place for `seconds`; leaves the exponential moving average of the weights in `vae`, in eval mode."""
    vae.to(images.device, memory_format=torch.channels_last).train()
    optimizer = torch.optim.AdamW(vae.parameters(), lr=6e-4, betas=(0.9, 0.99), weight_decay=1e-3, fused=images.is_cuda)
    ema = {k: v.clone() for k, v in vae.state_dict().items()}
    start, step = time.monotonic(), 0
    while (progress := (time.monotonic() - start) / seconds) < 1:
        timed_cosine(optimizer, 6e-4, 0.03, step, 200, progress)
        x = pick_images(images, torch.randint(len(images), (batch,), device=images.device)) * 2 - 1
        loss, mse = vae_loss(vae, x.contiguous(memory_format=torch.channels_last))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        step += 1
        if step % 4 == 0:
            torch._foreach_lerp_(
                list(ema.values()), list(vae.state_dict().values()), 1 - min(0.995, step / (step + 100))
            )
        if step % 200 == 0:
            log(f"autoencoder step {step} progress {progress:.2f} psnr {10 * math.log10(4 / mse.item()):.2f} dB")
    vae.load_state_dict(ema)
    vae.to(memory_format=torch.contiguous_format).eval()
    log(f"autoencoder: {step} steps")


@torch.no_grad()
def encode(vae: AutoencoderKL, images: Tensor, at_once: int = 256) -> Tensor:
    """uint8 pictures -> (count, 64, 64) packed latents, shifted and scaled to zero mean and unit deviation, bf16.

    Writes the shift and the scale into the autoencoder's configuration.
    """
    from mini_flux.parts import pack_latents

    means = []
    for i in range(0, len(images), at_once):
        with torch.autocast(images.device.type, dtype=torch.bfloat16):
            mean = vae.encoder(images[i : i + at_once].float() / 127.5 - 1).float().chunk(2, 1)[0]
        means.append(pack_latents(mean).to(torch.bfloat16))
    latents = torch.cat(means)
    sample = latents[:: max(1, len(latents) // 50_000)].double()
    shift, scale = sample.mean().item(), 1 / sample.std().item()
    vae.register_to_config(scaling_factor=scale, shift_factor=shift)
    for i in range(0, len(latents), 10_000):
        latents[i : i + 10_000] = ((latents[i : i + 10_000].float() - shift) * scale).to(torch.bfloat16)
    return latents


@torch.no_grad()
def reconstruction_psnr(vae: AutoencoderKL, images: Tensor) -> float:
    """Mean over the pictures' squared errors, in dB against the range 0..1."""
    with torch.autocast(images.device.type, dtype=torch.bfloat16):
        x = images.float() / 127.5 - 1
        y = vae.decoder(vae.encoder(x).float().chunk(2, 1)[0]).float()
    return 10 * math.log10(4 / (y - x).pow(2).mean().item())


def _augment(x: Tensor) -> Tensor:
    """What pictures of an autoencoder may look like: softer, noisier, a little brighter or darker."""
    b = len(x)

    def per_image() -> Tensor:
        return torch.rand(b, 1, 1, 1, device=x.device)

    soft = F.interpolate(F.avg_pool2d(x, 2), scale_factor=2, mode="bilinear")
    x = torch.lerp(x, soft, (per_image() * 1.4 - 0.4).clamp_min(0))
    x = x + torch.randn_like(x) * 0.04 * per_image()
    return (x * (0.88 + 0.24 * per_image()) + 0.08 * (per_image() - 0.5)).clamp(0, 1)


def train_judge(images: Tensor, labels: Tensor, seconds: float, log: Log, batch: int = 384) -> Judge:
    """On the two-thing pictures only (labels >= 0)."""
    pairs = (labels[:, 0] >= 0).nonzero()[:, 0].to(images.device)
    labels = labels.to(images.device)
    judge = Judge().to(images.device).to(memory_format=torch.channels_last).train()  # type: ignore[call-overload]
    optimizer = torch.optim.AdamW(judge.parameters(), lr=3e-3, weight_decay=0.02, fused=images.is_cuda)
    start, step = time.monotonic(), 0
    while (progress := (time.monotonic() - start) / seconds) < 1:
        timed_cosine(optimizer, 3e-3, 0.0, step, 100, progress)
        index = pairs[torch.randint(len(pairs), (batch,), device=images.device)]
        with torch.autocast(images.device.type, dtype=torch.bfloat16):
            logits = judge(_augment(pick_images(images, index)).contiguous(memory_format=torch.channels_last))
        loss = judge_module.loss(logits, labels[index])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        step += 1
        if step % 200 == 0:
            log(f"judge step {step} progress {progress:.2f} loss {loss.item() / len(HEADS):.4f} a head")
    log(f"judge: {step} steps")
    trained: Judge = judge.to(memory_format=torch.contiguous_format).eval()
    return trained
