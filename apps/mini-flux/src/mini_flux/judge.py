"""The judge: a small classifier, trained on rendered images only, that reads two-thing scenes back from a picture."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mini_flux.scenes import COLORS, FLOORS, MATERIALS, SHAPES, SIZES, Scene

# what is read: the axis (left-right or front-behind), then for the first and second thing along it their attributes
HEADS = {"axis": 2, "floor": len(FLOORS)} | {
    f"{what}{i}": n
    for i in (0, 1)
    for what, n in (("shape", len(SHAPES)), ("color", len(COLORS)), ("material", len(MATERIALS)), ("size", len(SIZES)))
}


class Judge(nn.Module):
    """(B, 3, 128, 128) in 0..1 -> logits of HEADS, concatenated. About 0.4 M parameters."""

    def __init__(self, widths: Sequence[int] = (24, 48, 72, 96, 96)) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        cin = 3
        for w in widths:
            layers += [nn.Conv2d(cin, w, 3, 2, 1, bias=False), nn.BatchNorm2d(w), nn.ReLU(inplace=True)]
            layers += [nn.Conv2d(w, w, 3, 1, 1, bias=False), nn.BatchNorm2d(w), nn.ReLU(inplace=True)]
            cin = w
        self.features = nn.Sequential(*layers)
        self.pool = nn.Conv2d(cin, 32, 1)  # keeps the place of things: no global average
        self.head = nn.Sequential(
            nn.Flatten(), nn.Linear(32 * 16, 160), nn.ReLU(inplace=True), nn.Linear(160, sum(HEADS.values()))
        )

    def forward(self, images: Tensor) -> Tensor:
        return self.head(F.relu(self.pool(self.features(images * 2 - 1))))


def labels(scenes: Sequence[Scene]) -> Tensor:
    """(B, len(HEADS)) int64, in the order of HEADS."""
    rows = []
    for s in scenes:
        axis, a, b = s.canonical()
        rows.append([axis, s.floor, a.shape, a.color, a.material, a.size, b.shape, b.color, b.material, b.size])
    return torch.tensor(rows)


def loss(logits: Tensor, target: Tensor) -> Tensor:
    parts = logits.float().split(list(HEADS.values()), 1)
    return sum(
        (F.cross_entropy(p, target[:, i], label_smoothing=0.02) for i, p in enumerate(parts)),
        start=logits.new_zeros(()),
    )


@torch.no_grad()
def read(judge: Judge, images: Tensor) -> Tensor:
    """(B, 3, 128, 128) in 0..1 -> (B, len(HEADS)) int64: what the judge sees."""
    judge.eval()
    p = next(judge.parameters())
    return torch.stack([q.argmax(1) for q in judge(images.to(p)).split(list(HEADS.values()), 1)], 1).cpu()


@dataclass(frozen=True)
class Verdict:
    """Shares of images, each in 0..1. `object`: both shapes right; `color`: both colours; `relation`: the axis and the
    order along it; `all`: these three at once. Things are matched to the caption in the order that agrees with it best,
    by shape and colour; where both orders agree equally well, the relation counts as wrong."""

    object: float
    color: float
    relation: float
    all: float
    material: float
    size: float
    floor: float
    images: int


def judge_images(seen: Tensor, scenes: Sequence[Scene]) -> Verdict:
    """What was read, against what the captions say."""
    want = labels(scenes)
    ok = [_one(s.tolist(), w.tolist()) for s, w in zip(seen, want, strict=True)]
    names = ("object", "color", "relation", "all", "material", "size", "floor")
    share = {name: sum(column) / len(ok) for name, column in zip(names, zip(*ok, strict=True), strict=True)}
    return Verdict(**share, images=len(ok))


def _one(seen: list[int], want: list[int]) -> tuple[bool, ...]:
    things = (seen[2:6], seen[6:10])
    wanted = (want[2:6], want[6:10])

    def agreement(pair: tuple[list[int], list[int]]) -> int:
        return sum((p[0] == q[0]) + (p[1] == q[1]) for p, q in zip(pair, wanted, strict=True))

    straight, crossed = agreement(things), agreement(things[::-1])
    if crossed > straight:
        things = things[::-1]
    right = [[p[i] == q[i] for p, q in zip(things, wanted, strict=True)] for i in range(4)]
    shape, color, material, size = (all(r) for r in right)
    relation = seen[0] == want[0] and straight > crossed
    return shape, color, relation, shape and color and relation, material, size, seen[1] == want[1]


def save_judge(judge: Judge, path: Path, figures: dict[str, float]) -> None:
    state = {k: v.half().contiguous() if v.is_floating_point() else v for k, v in judge.state_dict().items()}
    save_file(state, path, metadata={"format": "pt", "held_out_renderings": json.dumps(figures)})


def load_judge(path: Path) -> Judge:
    judge = Judge()
    judge.load_state_dict({k: v.float() if v.is_floating_point() else v for k, v in load_file(path).items()})
    return judge.eval()
