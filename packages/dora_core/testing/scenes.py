"""A world of pictures: one to four alike things on a two by two grid, drawn by a seed, some scenes kept for testing."""

from __future__ import annotations

import io
import random
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (220, 30, 30),
    "green": (30, 160, 50),
    "blue": (40, 70, 220),
    "yellow": (240, 220, 40),
    "white": (250, 250, 250),
    "pink": (250, 130, 180),
}
FIGURES = ("circle", "square", "triangle", "cross", "ring", "bar")
LETTERS = ("T", "L", "X", "H")
SHAPES = FIGURES + LETTERS
SIZES = ("small", "big")
CORNERS = {(0,): "top left", (1,): "top right", (2,): "bottom left", (3,): "bottom right"}
SIDES = {(0, 1): "top", (2, 3): "bottom", (0, 2): "left", (1, 3): "right"}
PLACINGS = (*CORNERS, *SIDES, (0, 1, 2), (0, 1, 3), (0, 2, 3), (1, 2, 3), (0, 1, 2, 3))
"""Cells of the grid, counted in reading order, that the things of a scene may take."""
ATTRIBUTES = ("colour", "shape", "number", "size", "place")

CELL = 16
"""Pixels of a cell's side."""
PICTURE = 2 * CELL
"""Pixels of a picture's side."""
TESTED = 5
"""One in so many scenes is kept for testing."""

_STROKES: dict[str, tuple[tuple[float, float, float, float], ...]] = {
    "T": ((-1, -1, 1, -1), (0, -1, 0, 1)),
    "L": ((-1, -1, -1, 1), (-1, 1, 1, 1)),
    "X": ((-1, -1, 1, 1), (-1, 1, 1, -1)),
    "H": ((-1, -1, -1, 1), (1, -1, 1, 1), (-1, 0, 1, 0)),
    "cross": ((-1, 0, 1, 0), (0, -1, 0, 1)),
}


@dataclass(frozen=True)
class Scene:
    """Things that differ in their cell alone."""

    shape: str
    colour: str
    size: str
    cells: tuple[int, ...]

    @property
    def for_testing(self) -> bool:
        """Whether no training picture shows this scene; the rule spreads over all values of every attribute."""
        places = (SHAPES.index(self.shape), [*COLOURS].index(self.colour), SIZES.index(self.size))
        return (sum(places) + PLACINGS.index(self.cells)) % TESTED == 0

    @property
    def attributes(self) -> tuple[str, ...]:
        """The attributes that this scene has; three or four things are at no place that has a name."""
        return tuple(name for name in ATTRIBUTES if name != "place" or len(self.cells) < 3)

    def value(self, attribute: str) -> str:
        """Return the value of one of ``attributes``."""
        if attribute == "number":
            return str(len(self.cells))
        return (CORNERS | SIDES)[self.cells] if attribute == "place" else getattr(self, attribute)

    def others(self, attribute: str) -> list[str]:
        """Return the values of the same kind that the scene does not have."""
        values = {
            "colour": tuple(COLOURS),
            "shape": LETTERS if self.shape in LETTERS else FIGURES,
            "number": ("1", "2", "3", "4"),
            "size": SIZES,
            "place": tuple((CORNERS if len(self.cells) == 1 else SIDES).values()),
        }[attribute]
        return [value for value in values if value != self.value(attribute)]


def make_scene(rng: random.Random, *, for_testing: bool, letters: float = 0.2) -> Scene:
    """Draw a scene that is, or is not, kept for testing; ``letters`` is the share of scenes of letters."""
    while True:
        shape = rng.choice(LETTERS if rng.random() < letters else FIGURES)
        number = rng.randint(1, 4)
        cells = rng.choice([cells for cells in PLACINGS if len(cells) == number])
        scene = Scene(shape, rng.choice([*COLOURS]), rng.choice(SIZES), cells)
        if scene.for_testing == for_testing:
            return scene


def draw(scene: Scene, rng: random.Random) -> bytes:
    """Return the scene as a JPEG of ``PICTURE`` pixels a side; things are a little off the middle of their cells."""
    grey = rng.randint(0, 25)
    picture = Image.new("RGB", (PICTURE, PICTURE), (grey, grey, grey))
    canvas = ImageDraw.Draw(picture)
    for cell in scene.cells:
        row, column = divmod(cell, 2)
        x = CELL * column + CELL // 2 + rng.randint(-1, 1)
        y = CELL * row + CELL // 2 + rng.randint(-1, 1)
        _draw_thing(canvas, scene.shape, x, y, 6 if scene.size == "big" else 4, COLOURS[scene.colour])
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=92, subsampling=0)
    return file.getvalue()


def options(scene: Scene, attribute: str, rng: random.Random, number: int) -> tuple[list[str], int]:
    """Return ``number`` values to choose from, and the place of the right one."""
    values = rng.sample(scene.others(attribute), number - 1)
    place = rng.randrange(number)
    values.insert(place, scene.value(attribute))
    return values, place


def perhaps(scene: Scene, attribute: str, rng: random.Random, share: float = 0.5) -> tuple[str, bool]:
    """Return the scene's value, or with the chance ``1 - share`` another one, and whether it is the scene's."""
    right = rng.random() < share
    return (scene.value(attribute) if right else rng.choice(scene.others(attribute))), right


def _draw_thing(
    canvas: ImageDraw.ImageDraw, shape: str, x: int, y: int, radius: int, colour: tuple[int, int, int]
) -> None:
    box = (x - radius, y - radius, x + radius, y + radius)
    if shape == "circle":
        canvas.ellipse(box, fill=colour)
    elif shape == "ring":
        canvas.ellipse(box, outline=colour, width=2)
    elif shape == "square":
        canvas.rectangle(box, fill=colour)
    elif shape == "bar":
        canvas.rectangle((x - radius, y - radius // 3, x + radius, y + radius // 3), fill=colour)
    elif shape == "triangle":
        canvas.polygon(((x, y - radius), (x - radius, y + radius), (x + radius, y + radius)), fill=colour)
    else:
        for x0, y0, x1, y1 in _STROKES[shape]:
            ends: Sequence[float] = (x + radius * x0, y + radius * y0, x + radius * x1, y + radius * y1)
            canvas.line(ends, fill=colour, width=3 if shape == "cross" else 2)
