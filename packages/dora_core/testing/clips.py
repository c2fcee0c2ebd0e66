"""A world of clips: one or two coloured things move on a coarse grid; drawn by a seed, some clips kept for testing.

A clip is eight beats long, and within a beat nothing changes. Which way a thing goes, where it turns round, which
colours it shows and whether two things bounce or pass is spread over the beats: where things are at any one of them,
and in which colour, is almost as likely under one answer as under another.
"""

from __future__ import annotations

import random
import zlib
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import numpy as np

from dora_core.testing import scenes

COLOURS: dict[str, tuple[int, int, int]] = {
    name: scenes.COLOURS[name] for name in ("red", "green", "blue", "yellow", "white")
}
BASIC = ("red", "green", "blue")
"""The colours that a thing of which one colour may be missing takes by turns."""
PAIR = ("red", "blue")
"""The colours of two things; which of them is on the left is left to chance."""
SHAPES = ("circle", "square", "triangle", "cross")
WAYS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
ALONE = {"goes": (0, 0, 1, 1, 1, 1, 2, 2), "turns": (0, 1, 1, 2, 2, 1, 1, 0), "stays": (0, 0, 0, 0, 0, 0, 0, 0)}
"""What a thing alone does, with its distance from where it began in cells, beat by beat."""
TOGETHER = {"pass": (-2, -1, 1, 2), "bounce": (-2, -1, -1, -2), "go left": (0, 0, -1, -1), "go right": (0, 0, 1, 1)}
"""What two things in one row do, with the steps in half cells of the one that is on the left at first."""
SOURCES = ("tv", "how2", "yc2")
SPLITS = ("train", "val", "test")

NUM_BEATS = 8
BEAT_S = 1.5
NUM_CELLS = 4
"""Cells of a row and of a column; a thing alone fills one of the sixteen."""
HALF = 6
"""Pixels of half a cell; places are counted in half cells from the top left."""
PICTURE = 2 * NUM_CELLS * HALF
"""Pixels of a frame's side."""
TESTED = 5
"""One in so many clips is kept for testing."""
_MIDDLE = NUM_CELLS - 1
_MOST = 2 * (NUM_CELLS - 1)


class Seen(NamedTuple):
    """What can be seen of a thing at one beat; column and row are those of its top left corner, in half cells."""

    column: int
    row: int
    colour: str
    shape: str


@dataclass(frozen=True)
class Thing:
    """A shape with its colour and its place (column, row in half cells), beat by beat."""

    shape: str
    colours: tuple[str, ...]
    places: tuple[tuple[int, int], ...]

    def at(self, beat: int) -> Seen:
        """Return what is seen of it at a beat."""
        return Seen(*self.places[beat], self.colours[beat], self.shape)


@dataclass(frozen=True)
class Clip:
    """One thing with what it does, of ``ALONE``, and which way, of ``WAYS`` or empty; or two with one of ``TOGETHER``.

    The first of two things is the one that is on the left at first.
    """

    things: tuple[Thing, ...]
    deed: str
    way: str = ""

    @property
    def for_testing(self) -> bool:
        """Whether no clip to train on shows the same.

        A checksum over all that is seen decides; a rule that adds up attributes would let one frame of a tested clip
        tell what the others must be.
        """
        return zlib.crc32(repr(self.things).encode()) % TESTED == 0

    @property
    def missing(self) -> str:
        """The first of ``BASIC`` that the clip never shows, or ``none``."""
        shown = {colour for thing in self.things for colour in thing.colours}
        return next((colour for colour in BASIC if colour not in shown), "none")

    def seen(self, beat: int) -> tuple[Seen, ...]:
        """Return all that is seen at a beat, from left to right."""
        return tuple(sorted(thing.at(beat) for thing in self.things))


class Plot(NamedTuple):
    """What a clip must show; an empty way is drawn, and so are the colours where none is said to be missing."""

    deed: str
    way: str = ""
    missing: str = ""


@cache
def plots(source: str) -> tuple[Plot, ...]:
    """Return the plots that take turns in a source's clips, so that each answer to a question is as frequent."""
    moves = (*(Plot(deed, way) for deed in ("goes", "turns") for way in WAYS), Plot("stays"))
    together = [Plot(deed) for deed in TOGETHER]
    if source == "how2":
        alone = [Plot("", missing=missing) for missing in (*BASIC, "none")]
        return tuple(plot for both in zip(alone, together, strict=True) for plot in both)
    return moves if source == "tv" else (*moves, *together)


def make_clip(source: str, number: int, rng: random.Random, for_testing: bool | None = None) -> Clip:
    """Draw a clip with the ``number``-th plot of a source; ``for_testing`` says whether it is kept for testing or not.

    With None it may be either. Raises ValueError for a source that is none of ``SOURCES``.
    """
    if source not in SOURCES:
        raise ValueError(f"source={source!r} was given; one of {', '.join(SOURCES)} is allowed; change it")
    plot = plots(source)[number % len(plots(source))]
    while True:
        clip = _together(rng, plot.deed) if plot.deed in TOGETHER else _alone(rng, plot)
        if for_testing in (None, clip.for_testing):
            return clip


def clip_name(source: str, split: str, number: int) -> str:
    """Return the name under which ``named_clip`` finds a clip."""
    return f"{source}_{split}_{number:05d}"


def named_clip(name: str, seed: int = 0) -> Clip:
    """Return the clip that a name of ``clip_name`` and the seed of its world stand for.

    Raises ValueError for another name.
    """
    source, split, number, *others = [*name.split("_"), "", ""]
    if source not in SOURCES or split not in SPLITS or not number.isdecimal() or any(others):
        raise ValueError(
            f"name={name!r} was given; a name has the form <source>_<split>_<number> with a source of "
            f"{', '.join(SOURCES)} and a split of {', '.join(SPLITS)}; take a name that clip_name returns"
        )
    return make_clip(source, int(number), random.Random(f"{seed}/{name}"), for_testing=split != "train")


def render(clip: Clip) -> np.ndarray:
    """Return the picture of every beat in RGB, on black, uint8 ``[NUM_BEATS, PICTURE, PICTURE, 3]``."""
    pictures = np.zeros((NUM_BEATS, PICTURE, PICTURE, 3), np.uint8)
    for beat, picture in enumerate(pictures):
        for column, row, colour, shape in clip.seen(beat):
            top, left = HALF * row, HALF * column
            picture[top : top + 2 * HALF, left : left + 2 * HALF][mask(shape)] = COLOURS[colour]
    return pictures


def recognize(picture: np.ndarray) -> tuple[Seen, ...]:
    """Return what a decoded frame of a clip, uint8 ``[PICTURE, PICTURE, 3]``, shows by its pixels, from left to right.

    Raises ValueError where that is not what a clip can show.
    """
    values = picture.astype(float)
    bright, redder = values.max(2) > 100, values[..., 0] - values[..., 2]
    parts = [bright & (redder > 0), bright & (redder < 0)] if redder.max() > 60 > -60 > redder.min() else [bright]
    found = []
    for part in parts:
        looks, masks = _looks()
        differing = masks.sum(1) + part.sum() - 2 * masks @ part.ravel()
        best = int(differing.argmin())
        if differing[best] > 20:
            raise ValueError(
                "a picture with an unknown thing was given; frames of clips are allowed; give one of those"
            )
        mean = values[part].mean(0)
        away = {name: np.abs(mean / mean.max() - np.array(rgb) / max(rgb)).sum() for name, rgb in COLOURS.items()}
        column, row, shape = looks[best]
        found.append(Seen(column, row, min(away, key=away.__getitem__), shape))
    return tuple(sorted(found))


@cache
def _looks() -> tuple[list[tuple[int, int, str]], np.ndarray]:
    """Return column, row and shape of all that may be seen, and the pixels that each takes, ``[n, PICTURE ** 2]``."""
    looks = [(column, row, shape) for column in range(_MOST + 1) for row in range(_MOST + 1) for shape in SHAPES]
    masks = np.zeros((len(looks), PICTURE, PICTURE))
    for pixels, (column, row, shape) in zip(masks, looks, strict=True):
        pixels[HALF * row :, HALF * column :][: 2 * HALF, : 2 * HALF] = mask(shape)
    return looks, masks.reshape(len(looks), -1)


@cache
def mask(shape: str) -> np.ndarray:
    """Return which pixels of a cell a shape covers, bool ``[2 * HALF, 2 * HALF]``.

    The shapes differ in the share that they cover, so that a few pixels, each the mean of many, still tell them apart.
    A video has one colour for two by two pixels: the cross, whose bars are that thin, is off the middle to fill them.
    """
    y, x = np.mgrid[: 2 * HALF, : 2 * HALF] + 0.5 - HALF
    return {
        "circle": x**2 + y**2 <= HALF**2,
        "square": np.ones_like(x, dtype=bool),
        "triangle": 2 * np.abs(x) <= y + HALF,
        "cross": (np.abs(x - 1) < 1) | (np.abs(y - 1) < 1),
    }[shape]


def _alone(rng: random.Random, plot: Plot) -> Clip:
    deed = plot.deed or rng.choice([*ALONE])
    way = "" if deed == "stays" else plot.way or rng.choice([*WAYS])
    directions = WAYS.get(way, (0, 0))
    far = max(ALONE[deed])
    starts = [rng.randint(-far * min(to, 0), NUM_CELLS - 1 - far * max(to, 0)) for to in directions]
    cells = ([start + to * step for start, to in zip(starts, directions, strict=True)] for step in ALONE[deed])
    colours = rng.sample([*COLOURS], rng.randint(1, 2))
    if plot.missing:
        colours = [colour for colour in BASIC if colour != plot.missing]
        rng.shuffle(colours)
    by_beat = tuple(colours[beat * len(colours) // NUM_BEATS] for beat in range(NUM_BEATS))
    places = tuple((2 * column, 2 * row) for column, row in cells)
    return Clip((Thing(rng.choice(SHAPES), by_beat, places),), deed, way)


def _together(rng: random.Random, deed: str) -> Clip:
    """Draw two things in the middle row that begin at any beat, so that no beat is the one at which they are near."""
    waited = rng.randint(1, NUM_BEATS - 3)
    stages = (0,) * waited + (1, 2) + (3,) * (NUM_BEATS - waited - 2)
    steps = [TOGETHER[deed][stage] for stage in stages]
    if deed in ("pass", "bounce"):
        middle = rng.randint(2, _MOST - 2)
        sides = [[middle + step for step in steps], [middle - step for step in steps]]
    else:
        apart = rng.choice((1, 2, 2, 2))
        middle = rng.randint(apart - min(steps), _MOST - apart - max(steps))
        sides = [[middle + side + step for step in steps] for side in (-apart, apart)]
    colours = rng.sample(PAIR, 2)
    things = (
        Thing(rng.choice(SHAPES), (colour,) * NUM_BEATS, tuple((column, _MIDDLE) for column in columns))
        for colour, columns in zip(colours, sides, strict=True)
    )
    return Clip(tuple(things), deed)
