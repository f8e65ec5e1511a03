"""Scenes: what is in them, how they are drawn at random, which combinations are held out, and their captions."""

import hashlib
import random
from dataclasses import dataclass
from functools import cache

SHAPES = ("sphere", "cube", "cylinder", "cone")
COLORS = ("red", "green", "blue", "yellow", "purple", "cyan", "orange", "white")
MATERIALS = ("matte", "shiny")
SIZES = ("small", "large")
RELATIONS = ("left of", "right of", "in front of", "behind")
FLOORS = ("plain", "checkered")
OPPOSITE = (1, 0, 3, 2)

# one in this many pairs of (colour, shape) things never occurs in training, in whatever order, relation, size, material
HELD_OUT_ONE_IN = 10

SYNONYMS = {
    "sphere": ("sphere", "sphere", "sphere", "ball"),
    "cube": ("cube", "cube", "cube", "box"),
    "small": ("small", "small", "small", "little"),
    "large": ("large", "large", "large", "big"),
    "shiny": ("shiny", "shiny", "shiny", "glossy"),
    "left of": ("left of", "left of", "to the left of"),
    "right of": ("right of", "right of", "to the right of"),
}


@dataclass(frozen=True)
class Thing:
    """One object; every field is an index into the tuple of its name."""

    shape: int
    color: int
    material: int
    size: int

    def words(self) -> list[str]:
        return [SIZES[self.size], MATERIALS[self.material], COLORS[self.color], SHAPES[self.shape]]


@dataclass(frozen=True)
class Scene:
    """One or two things; `relation` is of the first to the second (ignored with one thing)."""

    things: tuple[Thing, ...]
    relation: int
    floor: int

    def canonical(self) -> tuple[int, Thing, Thing]:
        """(axis, first, second) of two things: axis 0 = left then right, axis 1 = front then behind."""
        a, b = self.things
        first_is_a = self.relation in (0, 2)
        return self.relation // 2, *((a, b) if first_is_a else (b, a))


@cache
def held_out(a: tuple[int, int], b: tuple[int, int]) -> bool:
    """Whether the unordered pair of (colour, shape) is kept for testing. A hash, so that it never depends on a seed."""
    key = "|".join(f"{COLORS[c]} {SHAPES[s]}" for c, s in sorted((a, b)))
    return hashlib.sha256(key.encode()).digest()[0] % HELD_OUT_ONE_IN == 0


def is_held_out(scene: Scene) -> bool:
    a, b = ((t.color, t.shape) for t in scene.things)
    return held_out(a, b)


def random_scene(rng: random.Random, *, test: bool = False, single: float = 0.15) -> Scene:
    """A training scene, or with `test` a two-thing scene whose pair of (colour, shape) is held out.

    Two things always differ in colour or shape, so that the relation can be told from the picture.
    """

    def thing() -> Thing:
        return Thing(rng.randrange(4), rng.randrange(8), rng.randrange(2), rng.randrange(2))

    relation, floor = rng.randrange(4), rng.randrange(2)
    if not test and rng.random() < single:
        return Scene((thing(),), relation, floor)
    while True:
        a, b = thing(), thing()
        if (a.color, a.shape) != (b.color, b.shape) and held_out((a.color, a.shape), (b.color, b.shape)) == test:
            return Scene((a, b), relation, floor)


def caption(scene: Scene, rng: random.Random | None = None) -> str:
    """The full plain caption; with `rng` a varied one: synonyms, dropped attributes, the two things in either order."""
    if rng is None:
        names = [_named(t.words()) for t in scene.things]
        joint = f" {RELATIONS[scene.relation]} " if len(names) == 2 else ""
        return f"{joint.join(names)} on a {FLOORS[scene.floor]} floor"

    def pick(word: str) -> str:
        return rng.choice(SYNONYMS.get(word, (word,)))

    def name(t: Thing) -> str:
        size, material, color, shape = (pick(w) for w in t.words())
        return _named([size] * (rng.random() > 0.1) + [material] * (rng.random() > 0.12) + [color, shape])

    things, relation = list(scene.things), scene.relation
    if len(things) == 2 and rng.random() < 0.5:
        things, relation = things[::-1], OPPOSITE[relation]
    joint = f" {pick(RELATIONS[relation])} " if rng.random() > 0.03 else " and "
    prefix = rng.choice(("a photo of ", "a render of ", "an image of ")) if rng.random() < 0.15 else ""
    floor = f" on a {FLOORS[scene.floor]} floor" if rng.random() > 0.1 else ""
    return prefix + joint.join(name(t) for t in things) + floor


def _named(words: list[str]) -> str:
    return ("an " if words[0][0] in "aeiou" else "a ") + " ".join(words)


def held_out_scenes(count: int, seed: int = 0) -> list[Scene]:
    """`count` different held-out scenes, the same ones for the same seed."""
    rng, found = random.Random(f"mini-flux test {seed}"), dict[Scene, None]()
    while len(found) < count:
        found[random_scene(rng, test=True)] = None
    return list(found)
