"""Ovals, limbs and polygons, and the pen that paints them.

Shapes run forward and up of the pen's origin, so that one drawing faces either way.
"""

import itertools
from dataclasses import dataclass, replace
from typing import NamedTuple

from PIL import ImageDraw

from sflow_jax.toyworld.attributes import Colour


class Oval(NamedTuple):
    """An upright ellipse by centre and radii."""

    x: float
    y: float
    rx: float
    ry: float

    def paint(self, pen: "Pen", fill: Colour, grow: float) -> None:
        (x, y), rx, ry = pen.pixel(self.x, self.y), (self.rx + grow) * pen.unit, (self.ry + grow) * pen.unit
        pen.draw.ellipse((x - rx, y - ry, x + rx, y + ry), fill)


class Limb(NamedTuple):
    """A straight stroke with round ends, `r` its half width."""

    x0: float
    y0: float
    x1: float
    y1: float
    r: float

    def paint(self, pen: "Pen", fill: Colour, grow: float) -> None:
        ends = pen.pixel(self.x0, self.y0), pen.pixel(self.x1, self.y1)
        pen.draw.line(ends, fill, round(2 * (self.r + grow) * pen.unit))
        for x, y in ((self.x0, self.y0), (self.x1, self.y1)):
            Oval(x, y, self.r, self.r).paint(pen, fill, grow)


class Polygon(NamedTuple):
    """A filled polygon by its corners."""

    corners: tuple[tuple[float, float], ...]

    def paint(self, pen: "Pen", fill: Colour, grow: float) -> None:
        pen.draw.polygon([pen.pixel(*corner) for corner in self.corners], fill)
        if grow:
            for start, end in itertools.pairwise((*self.corners, self.corners[0])):
                Limb(*start, *end, 0.0).paint(pen, fill, grow)


Shape = Oval | Limb | Polygon
OUTLINE = 0.011  # about 0.7 pixel at 64: parts it from any ground, white on snow included


@dataclass(frozen=True)
class Pen:
    """Draws shapes given forward and up of an origin; `unit` is the pixels of one length."""

    draw: ImageDraw.ImageDraw
    left: float
    top: float
    unit: float
    forward: int = 1

    def pixel(self, x: float, y: float) -> tuple[float, float]:
        return self.left + self.forward * x * self.unit, self.top - y * self.unit

    def at(self, x: float, y: float) -> "Pen":
        left, top = self.pixel(x, y)
        return replace(self, left=left, top=top)

    def flat(self, fill: Colour, *shapes: Shape) -> None:
        for shape in shapes:
            shape.paint(self, fill, 0.0)

    def outlined(self, fill: Colour, *shapes: Shape) -> None:
        """Paints the union of the shapes with one dark line around it."""
        for shape in shapes:
            shape.paint(self, darker(fill, 0.42), OUTLINE)
        self.flat(fill, *shapes)


def darker(colour: Colour, factor: float) -> Colour:
    return tuple(round(channel * factor) for channel in colour)


def mixed(one: Colour, other: Colour, share: float) -> Colour:
    return tuple(round(a + (b - a) * share) for a, b in zip(one, other, strict=True))
