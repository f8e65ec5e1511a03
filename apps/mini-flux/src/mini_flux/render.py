"""An analytic ray caster in torch: spheres, cubes, cylinders and cones on a floor, one light, hard shadows, gloss.

Vectors are tuples of three tensors, each (B, P) with P rays an image. The scene is lit from the left and darker to the
right on purpose: without that it is nearly mirror-symmetric, and a model trained on it can't tell left from right.
"""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mini_flux.scenes import Scene

Vec = tuple[Tensor, Tensor, Tensor]

FAR = 1e4
EPS = 1e-3
RADIUS = (0.46, 0.77)  # small, large
RGB = (
    (0.80, 0.06, 0.06), (0.08, 0.58, 0.12), (0.08, 0.16, 0.82), (0.92, 0.80, 0.06),
    (0.48, 0.09, 0.62), (0.08, 0.72, 0.78), (0.95, 0.42, 0.04), (0.93, 0.93, 0.93),
)  # fmt: skip
CAMERA = (0.0, -5.9, 4.6)
TARGET = (0.0, -0.15, 0.45)
FOV = 0.365  # half the picture's width over its distance


@dataclass
class Batch:
    """Numbers of B scenes for the renderer: (B, 2) for the two things, (B,) for the scene."""

    shape: Tensor
    color: Tensor
    shiny: Tensor
    radius: Tensor
    x: Tensor
    y: Tensor
    turn: Tensor
    checkered: Tensor
    light_x: Tensor
    light_y: Tensor
    tint: Tensor  # (B, 3)

    def to(self, device: torch.device | str) -> "Batch":
        return Batch(**{k: v.to(device) for k, v in vars(self).items()})

    def __getitem__(self, index: slice) -> "Batch":
        return Batch(**{k: v[index] for k, v in vars(self).items()})


def place(scenes: Sequence[Scene], seed: int | str) -> Batch:
    """Draw positions, light and tint of each scene. A missing second thing gets radius 0."""
    rng = random.Random(f"place {seed}")
    rows = [_place_one(scene, rng) for scene in scenes]
    columns = {k: torch.tensor([r[k] for r in rows], dtype=torch.float32) for k in Batch.__dataclass_fields__}
    flat = ("checkered", "light_x", "light_y")
    return Batch(**{k: v[:, 0] if k in flat else v for k, v in columns.items()})


def _place_one(scene: Scene, rng: random.Random) -> dict[str, list[float]]:
    u = rng.uniform
    things = scene.things if len(scene.things) == 2 else (scene.things[0], scene.things[0])
    cx, cy = u(-0.2, 0.2), u(-0.2, 0.2)
    if len(scene.things) == 1:
        xs, ys = [u(-0.7, 0.7), 0.0], [u(-0.6, 0.6), 0.0]
    else:
        sign = (-1, 1, -1, 1)[scene.relation]
        if scene.relation < 2:
            dx, dy = sign * u(1.95, 2.4), u(-0.3, 0.3)
        else:
            dx, dy = rng.choice((-1, 1)) * u(0.3, 0.75), sign * u(2.3, 2.7)
        xs, ys = [cx + dx / 2, cx - dx / 2], [cy + dy / 2, cy - dy / 2]
    radius = [RADIUS[t.size] * u(0.95, 1.05) for t in things]
    if len(scene.things) == 1:
        radius[1] = 0.0
    return {
        "shape": [t.shape for t in things], "color": [t.color for t in things], "shiny": [t.material for t in things],
        "radius": radius, "x": xs, "y": ys, "turn": [u(0.2, 0.7), u(0.2, 0.7)], "checkered": [scene.floor],
        "light_x": [u(-0.95, -0.6)], "light_y": [u(-0.75, -0.4)], "tint": [u(-0.03, 0.03) for _ in range(3)],
    }  # fmt: skip


def dot(a: Vec, b: Vec) -> Tensor:
    return a[0] * b[0] + a[1] * b[1] + a[2] * b[2]


def along(o: Vec, t: Tensor, d: Vec) -> Vec:
    return o[0] + t * d[0], o[1] + t * d[1], o[2] + t * d[2]


def choose(mask: Tensor, a: Vec, b: Vec) -> Vec:
    return torch.where(mask, a[0], b[0]), torch.where(mask, a[1], b[1]), torch.where(mask, a[2], b[2])


def unit(v: Vec) -> Vec:
    n = torch.rsqrt(dot(v, v).clamp_min(1e-9))
    return v[0] * n, v[1] * n, v[2] * n


def _inv(v: Tensor) -> Tensor:
    return 1.0 / torch.where(v.abs() < 1e-6, torch.full_like(v, 1e-6), v)


def _sphere(r: Tensor, o: Vec, d: Vec) -> tuple[Tensor, Vec]:
    c = (o[0], o[1], o[2] - r)
    b = dot(c, d)
    disc = b * b - (dot(c, c) - r * r)
    t = -b - disc.clamp_min(0).sqrt()
    t = torch.where((disc > 0) & (t > EPS), t, FAR)
    return t, along(c, t, d)


def _cube(r: Tensor, o: Vec, d: Vec) -> tuple[Tensor, Vec]:
    h = 0.8 * r
    lo, hi = (-h, -h, torch.zeros_like(h)), (h, h, 2 * h)
    inv = [_inv(q) for q in d]
    t1 = [(lo[i] - o[i]) * inv[i] for i in range(3)]
    t2 = [(hi[i] - o[i]) * inv[i] for i in range(3)]
    near = [torch.minimum(a, b) for a, b in zip(t1, t2, strict=True)]
    enter = torch.maximum(near[0], torch.maximum(near[1], near[2]))
    leave = torch.minimum(
        torch.maximum(t1[0], t2[0]), torch.minimum(torch.maximum(t1[1], t2[1]), torch.maximum(t1[2], t2[2]))
    )
    hit = (enter < leave) & (enter > EPS)
    on_x, on_z = near[0] == enter, near[2] == enter
    n = (
        torch.where(on_x, -d[0].sign(), 0.0),
        torch.where(~on_x & ~on_z, -d[1].sign(), 0.0),
        torch.where(on_z & ~on_x, -d[2].sign(), 0.0),
    )
    return torch.where(hit, enter, FAR), n


def _cylinder(r: Tensor, o: Vec, d: Vec) -> tuple[Tensor, Vec]:
    rc, h = 0.72 * r, 1.7 * r
    a = (d[0] * d[0] + d[1] * d[1]).clamp_min(1e-6)
    b = o[0] * d[0] + o[1] * d[1]
    disc = b * b - a * (o[0] * o[0] + o[1] * o[1] - rc * rc)
    t = (-b - disc.clamp_min(0).sqrt()) / a
    z = o[2] + t * d[2]
    t = torch.where((disc > 0) & (t > EPS) & (z > 0) & (z < h), t, FAR)
    top = (h - o[2]) * _inv(d[2])
    px, py = o[0] + top * d[0], o[1] + top * d[1]
    top = torch.where((top > EPS) & (px * px + py * py < rc * rc), top, FAR)
    is_top, best = top < t, torch.minimum(t, top)
    p = along(o, best, d)
    return best, (torch.where(is_top, 0.0, p[0]), torch.where(is_top, 0.0, p[1]), is_top.float())


def _cone(r: Tensor, o: Vec, d: Vec) -> tuple[Tensor, Vec]:
    k, h = 0.5, 1.9 * r  # slope: radius of the foot over the height
    w = h - o[2]
    a = d[0] * d[0] + d[1] * d[1] - k * k * d[2] * d[2]
    b = o[0] * d[0] + o[1] * d[1] + k * k * w * d[2]
    disc = b * b - a * (o[0] * o[0] + o[1] * o[1] - k * k * w * w)
    root, ia = disc.clamp_min(0).sqrt(), _inv(a)

    def inside(t: Tensor) -> Tensor:
        z = o[2] + t * d[2]
        return torch.where((disc > 0) & (t > EPS) & (z > 0) & (z < h), t, FAR)

    t = torch.minimum(inside((-b - root) * ia), inside((-b + root) * ia))
    p = along(o, t, d)
    return t, (p[0], p[1], k * k * (h - p[2]))


def _thing(s: Batch, i: int, o: Vec, d: Vec) -> tuple[Tensor, Vec]:
    """Distance and unit normal of thing i along rays in world coordinates."""
    c, n, r = s.turn[:, i, None].cos(), s.turn[:, i, None].sin(), s.radius[:, i, None]

    def local(v: Vec) -> Vec:
        return c * v[0] + n * v[1], c * v[1] - n * v[0], v[2]

    lo, ld = local((o[0] - s.x[:, i, None], o[1] - s.y[:, i, None], o[2])), local(d)
    hits = [f(r, lo, ld) for f in (_sphere, _cube, _cylinder, _cone)]
    t, normal = hits[0]
    for kind in range(1, 4):
        mask = s.shape[:, i, None] == kind
        t, normal = torch.where(mask, hits[kind][0], t), choose(mask, hits[kind][1], normal)
    normal = unit(normal)
    t = torch.where(r > 0, t, FAR)
    return t, (c * normal[0] - n * normal[1], n * normal[0] + c * normal[1], normal[2])


def _backdrop(s: Batch, o: Vec, d: Vec) -> tuple[list[Tensor], Tensor]:
    """Colour of floor or wall along rays, and the distance to the floor."""
    down = d[2] < -1e-4
    t = torch.where(down, -o[2] / torch.where(down, d[2], -1.0), FAR)
    x, y = o[0] + t * d[0], o[1] + t * d[1]
    tiles = torch.remainder(torch.floor(x / 1.15) + torch.floor(y / 1.15), 2.0)
    base = torch.where(s.checkered[:, None] == 1, 0.36 + 0.36 * tiles, 0.58)
    haze = torch.exp(-0.035 * t.clamp_max(50.0))
    lamp = 1.0 - 0.30 * torch.tanh(0.45 * torch.where(down, x, 6.0 * d[0]))  # bright on the left, dark on the right
    grey = torch.where(down, base * haze + 0.62 * (1 - haze), 0.62 + 0.25 * d[2].clamp(-1, 1)) * lamp
    cool = (0.97, 1.0, 1.06)
    return [torch.where(down, grey + s.tint[:, j, None], grey * cool[j]) for j in range(3)], t


def _rays(size: int, device: torch.device) -> Vec:
    u = (torch.arange(size, device=device) + 0.5) / size * 2 - 1
    v, u = (q.reshape(1, -1) for q in torch.meshgrid(-u, u, indexing="ij"))
    forward = [b - a for a, b in zip(CAMERA, TARGET, strict=True)]
    norm = math.hypot(*forward)
    _, fy, fz = (q / norm for q in forward)  # the camera looks along +y, so up is (0, -fz, fy)
    return unit((FOV * u, fy - FOV * v * fz, fz + FOV * v * fy))


def render(s: Batch, size: int = 128, supersample: int = 2) -> Tensor:
    """B scenes -> (B, 3, size, size) float in 0..1."""
    n, count = size * supersample, len(s.x)
    zero = s.x.new_zeros(count, n * n)
    d0 = _rays(n, s.x.device)
    d: Vec = (d0[0] + zero, d0[1] + zero, d0[2] + zero)
    o: Vec = (zero + CAMERA[0], zero + CAMERA[1], zero + CAMERA[2])
    ground, t_floor = _backdrop(s, o, d)
    (ta, na), (tb, nb) = (_thing(s, i, o, d) for i in range(2))
    first = ta < tb
    t_thing = torch.where(first, ta, tb)
    hit = t_thing < t_floor
    normal = choose(hit, choose(first, na, nb), (zero, zero, zero + 1))
    p = along(along(o, torch.where(hit, t_thing, t_floor).clamp_max(60.0), d), zero + 2e-3, normal)
    light = unit((s.light_x[:, None] + zero, s.light_y[:, None] + zero, zero + 1.1))
    lit = torch.ones_like(zero)
    for i in range(2):
        lit = torch.where(_thing(s, i, p, light)[0] < 1e3, 0.0, lit)
    return _shade(s, d, p, normal, light, lit, first, hit, ground, t_floor, n, supersample)


def _shade(
    s: Batch, d: Vec, p: Vec, normal: Vec, light: Vec, lit: Tensor, first: Tensor, hit: Tensor, ground: list[Tensor],
    t_floor: Tensor, n: int, supersample: int,
) -> Tensor:  # fmt: skip
    diffuse = dot(normal, light).clamp_min(0) * lit
    dn = dot(d, normal)
    mirror = along(d, -2 * dn, normal)
    around, _ = _backdrop(s, (p[0], p[1], p[2].clamp_min(EPS)), mirror)
    glint = dot(mirror, light).clamp_min(0).pow(30) * lit
    shiny = torch.where(first, s.shiny[:, 0, None], s.shiny[:, 1, None]) > 0
    fresnel = 0.16 + 0.55 * (1 + dn).clamp(0, 1).pow(3)
    palette = torch.tensor(RGB, device=d[0].device)
    ca, cb = palette[s.color[:, 0].long()], palette[s.color[:, 1].long()]
    out = []
    for j in range(3):
        color = torch.where(first, ca[:, j, None], cb[:, j, None])
        matte = color * (0.34 + 0.74 * diffuse)
        gloss = color * (0.30 + 0.66 * diffuse) * (1 - fresnel) + fresnel * around[j] * 1.25 + 1.1 * glint
        floor = ground[j] * torch.where(t_floor < 1e3, 0.55 + 0.45 * lit, 1.0)
        out.append(torch.where(hit, torch.where(shiny, gloss, matte), floor))
    image = torch.stack(out, 1).clamp(0, 1).reshape(-1, 3, n, n)
    return torch.nn.functional.avg_pool2d(image, supersample)


def to_grid(images: Tensor, columns: int = 8) -> Tensor:
    """(B, 3, H, W) in 0..1 -> one uint8 (H', W', 3) picture, row by row."""
    b, c, h, w = images.shape
    rows = -(-b // columns)
    grid = images.new_ones(rows * columns, c, h, w)
    grid[:b] = images
    grid = grid.reshape(rows, columns, c, h, w).permute(0, 3, 1, 4, 2).reshape(rows * h, columns * w, c)
    return (grid.float().clamp(0, 1) * 255).round().to(torch.uint8).cpu()
