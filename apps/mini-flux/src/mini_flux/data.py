"""The training set: scenes and captions drawn on the CPU cores, pictures rendered on the device."""

import multiprocessing
import os
import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from mini_flux.judge import labels
from mini_flux.render import Batch, place, render
from mini_flux.scenes import Scene, caption, random_scene

CHUNK = 5_000


@dataclass
class Drawn:
    """`count` scenes: where things stand, what the judge has to read (-1 for single things), and captions a scene."""

    batch: Batch
    labels: Tensor  # (count, heads)
    captions: list[list[str]]  # captions_each lists of count


def _draw_chunk(job: tuple[int, int, int, int]) -> tuple[dict[str, object], object, list[list[str]]]:
    index, count, captions_each, seed = job
    torch.set_num_threads(1)
    rng = random.Random(f"mini-flux train {seed} {index}")
    scenes = [random_scene(rng) for _ in range(count)]
    batch = place(scenes, f"{seed} {index}")
    # numpy arrays cross the process boundary by value; tensors would be shared memory files
    return (
        {k: v.numpy() for k, v in vars(batch).items()},
        _labels(scenes).numpy(),
        [[caption(s, rng) for s in scenes] for _ in range(captions_each)],
    )


def _labels(scenes: Sequence[Scene]) -> Tensor:
    pairs = [i for i, s in enumerate(scenes) if len(s.things) == 2]
    known = labels([scenes[i] for i in pairs])
    out = torch.full((len(scenes), known.shape[1]), -1)
    out[pairs] = known
    return out


def draw(count: int, captions_each: int, seed: int) -> Drawn:
    """The same scenes for the same arguments, however many cores there are."""
    jobs = [(i, min(CHUNK, count - i * CHUNK), captions_each, seed) for i in range(-(-count // CHUNK))]
    workers = min(len(jobs), max(1, (os.cpu_count() or 2) - 2))
    if workers == 1:
        parts = [_draw_chunk(j) for j in jobs]
    else:
        with multiprocessing.get_context("fork").Pool(workers) as pool:
            parts = list(tqdm(pool.imap(_draw_chunk, jobs), total=len(jobs), desc="scenes", mininterval=5))
    fields = {k: torch.cat([torch.as_tensor(p[0][k]) for p in parts]) for k in Batch.__dataclass_fields__}
    captions = [[c for p in parts for c in p[2][i]] for i in range(captions_each)]
    return Drawn(Batch(**fields), torch.cat([torch.as_tensor(p[1]) for p in parts]), captions)


@torch.no_grad()
def render_all(batch: Batch, size: int, device: str, at_once: int = 48) -> Tensor:
    """(count, 3, size, size) uint8 on the device."""
    count = len(batch.x)
    images = torch.empty(count, 3, size, size, dtype=torch.uint8, device=device)
    for i in tqdm(range(0, count, at_once), desc="render", mininterval=5):
        images[i : i + at_once] = (render(batch[i : i + at_once].to(device), size) * 255).round().to(torch.uint8)
    return images


def token_ids(tokenizer: PreTrainedTokenizerBase, captions: Sequence[str], length: int, pad: int) -> Tensor:
    """(len(captions), length) int16, padded. A caption that does not fit is an error, never cut."""
    fast = tokenizer.backend_tokenizer
    fast.no_truncation()
    fast.no_padding()
    out = torch.full((len(captions), length), pad, dtype=torch.int16)
    for start in range(0, len(captions), 50_000):
        for row, encoded in enumerate(fast.encode_batch(list(captions[start : start + 50_000])), start):
            if len(encoded.ids) > length:
                raise ValueError(
                    f"token_ids: a caption needs {len(encoded.ids)} tokens, at most {length} fit: {captions[row]!r}"
                )
            out[row, : len(encoded.ids)] = torch.tensor(encoded.ids, dtype=torch.int16)
    return out
