"""A small world of drawn scenes: pictures, captions, and edits whose right answer is known.

A scene is one animal in one place, perhaps with a hat and an object beside it. What the caption
says is *named* (`ATTRIBUTES`); all else about the picture is *unnamed* (`Details`), so that
keeping a source picture through an edit is a real task. Lengths are fractions of the picture's
side, `x` to the right and `y` down; an animal's own lengths run forward and up from its feet.
"""

import functools
import hashlib
import itertools
import re
from dataclasses import asdict, dataclass, replace
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

Colour = tuple[int, int, int]

COLOURS: dict[str, Colour] = {
    "red": (214, 44, 46),
    "orange": (247, 142, 30),
    "yellow": (250, 218, 62),
    "green": (34, 150, 78),
    "blue": (52, 104, 226),
    "purple": (150, 72, 196),
    "brown": (124, 78, 46),
    "white": (250, 246, 238),
}
THING_COLOURS: dict[str, Colour] = {
    "red": (226, 40, 52),
    "yellow": (255, 214, 40),
    "green": (40, 168, 76),
    "blue": (44, 96, 232),
}

ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "species": ("cat", "dog", "rabbit", "bear"),
    "colour": tuple(COLOURS),
    "pose": ("standing", "sitting", "lying"),
    "hat": ("none", *THING_COLOURS),
    "object": ("none", "ball", "tree", "box", "flower"),
    "object_colour": ("none", *THING_COLOURS),
    "side": ("none", "left", "right"),
    "place": ("meadow", "beach", "snow", "night"),
}
"""Allowed names of each named attribute; `object_colour` and `side` are none without an object."""

SPLITS = ("train", "held-out")
EDIT_FAMILIES = ("non-rigid", "add", "remove", "replace", "recolour", "scene")
_SPLIT_KEYS = ("species", "colour", "pose", "place")
_EDITED = {
    "non-rigid": ("pose",),
    "add": ("hat", "object"),
    "remove": ("hat", "object"),
    "replace": ("species", "object"),
    "recolour": ("colour", "hat", "object_colour"),
    "scene": ("place",),
}

DETAIL_RANGES: dict[str, tuple[float, float]] = {
    "x": (-0.025, 0.025),
    "ground": (0.86, 0.92),
    "size": (0.88, 1.0),
    "lightness": (-1.0, 1.0),
    "warmth": (-1.0, 1.0),
    "stripes": (0.0, 1.0),
    "object_size": (0.88, 1.0),
    "horizon": (0.52, 0.66),
    "sun_x": (0.1, 0.9),
    "sun_y": (0.09, 0.17),
    "cloud_x": (0.15, 0.85),
    "hill_x": (0.0, 0.5),
    "hill_height": (0.08, 0.17),
    "stars": (0.0, 1.0),
}
"""Range of each unnamed detail; stripes are either 0 or 1, all others are uniform."""


class Oval(NamedTuple):
    """An upright ellipse by centre and radii."""

    x: float
    y: float
    rx: float
    ry: float

    def paint(self, pen: "_Pen", fill: Colour, grow: float) -> None:
        (x, y), rx, ry = pen.pixel(self.x, self.y), (self.rx + grow) * pen.unit, (self.ry + grow) * pen.unit
        pen.draw.ellipse((x - rx, y - ry, x + rx, y + ry), fill)


class Limb(NamedTuple):
    """A straight stroke with round ends, `r` its half width."""

    x0: float
    y0: float
    x1: float
    y1: float
    r: float

    def paint(self, pen: "_Pen", fill: Colour, grow: float) -> None:
        ends = pen.pixel(self.x0, self.y0), pen.pixel(self.x1, self.y1)
        pen.draw.line(ends, fill, round(2 * (self.r + grow) * pen.unit))
        for x, y in ((self.x0, self.y0), (self.x1, self.y1)):
            Oval(x, y, self.r, self.r).paint(pen, fill, grow)


class Polygon(NamedTuple):
    """A filled polygon by its corners."""

    corners: tuple[tuple[float, float], ...]

    def paint(self, pen: "_Pen", fill: Colour, grow: float) -> None:
        pen.draw.polygon([pen.pixel(*corner) for corner in self.corners], fill)
        if grow:
            for start, end in itertools.pairwise((*self.corners, self.corners[0])):
                Limb(*start, *end, 0.0).paint(pen, fill, grow)


Shape = Oval | Limb | Polygon
OUTLINE = 0.011  # about 0.7 pixel at 64: parts it from any ground, white on snow included


@dataclass(frozen=True)
class _Pen:
    """Draws shapes given forward and up of an origin; `unit` is the pixels of one length."""

    draw: ImageDraw.ImageDraw
    left: float
    top: float
    unit: float
    forward: int = 1

    def pixel(self, x: float, y: float) -> tuple[float, float]:
        return self.left + self.forward * x * self.unit, self.top - y * self.unit

    def at(self, x: float, y: float) -> "_Pen":
        left, top = self.pixel(x, y)
        return replace(self, left=left, top=top)

    def flat(self, fill: Colour, *shapes: Shape) -> None:
        for shape in shapes:
            shape.paint(self, fill, 0.0)

    def outlined(self, fill: Colour, *shapes: Shape) -> None:
        """Paints the union of the shapes with one dark line around it."""
        for shape in shapes:
            shape.paint(self, _darker(fill, 0.42), OUTLINE)
        self.flat(fill, *shapes)


def _darker(colour: Colour, factor: float) -> Colour:
    return tuple(round(channel * factor) for channel in colour)


def _mixed(one: Colour, other: Colour, share: float) -> Colour:
    return tuple(round(a + (b - a) * share) for a, b in zip(one, other, strict=True))


class _Pose(NamedTuple):
    """Where the parts of an animal go, forward and up from the middle of its feet."""

    head: tuple[float, float]
    tail: tuple[float, float]
    body: Oval
    far: tuple[Shape, ...]
    joined: tuple[Shape, ...]
    near: tuple[Shape, ...]


_POSES = {
    "standing": _Pose(
        head=(0.17, 0.415),
        tail=(-0.19, 0.27),
        body=Oval(-0.01, 0.245, 0.2, 0.105),
        far=(Limb(-0.1, 0.2, -0.1, 0.03, 0.03), Limb(0.14, 0.2, 0.14, 0.03, 0.03)),
        joined=(
            Limb(-0.16, 0.2, -0.16, 0.02, 0.032),
            Limb(0.08, 0.2, 0.08, 0.02, 0.032),
            Limb(0.12, 0.3, 0.16, 0.36, 0.07),
        ),
        near=(),
    ),
    "sitting": _Pose(
        head=(0.05, 0.45),
        tail=(-0.155, 0.06),
        body=Oval(-0.01, 0.2, 0.125, 0.19),
        far=(Limb(0.12, 0.22, 0.13, 0.025, 0.03),),
        joined=(Oval(-0.05, 0.1, 0.13, 0.1),),
        near=(Limb(-0.03, 0.02, 0.04, 0.02, 0.028), Limb(0.075, 0.22, 0.09, 0.02, 0.03)),
    ),
    "lying": _Pose(
        head=(0.18, 0.235),
        tail=(-0.225, 0.08),
        body=Oval(-0.03, 0.105, 0.22, 0.105),
        far=(Limb(0.12, 0.05, 0.265, 0.045, 0.03),),
        joined=(),
        near=(
            Oval(-0.15, 0.08, 0.085, 0.075),
            Limb(-0.14, 0.022, -0.04, 0.022, 0.027),
            Limb(0.06, 0.025, 0.225, 0.02, 0.03),
        ),
    ),
}


class _Species(NamedTuple):
    """What tells the species apart: ears and face from the head's middle, tail from its root."""

    bulk: float
    legs: float
    head: Oval
    ears: tuple[Shape, ...]
    inner_ears: tuple[Shape, ...]
    hanging_ears: tuple[Shape, ...]
    tail: tuple[Shape, ...]
    muzzle: Oval


_SPECIES = {
    "cat": _Species(
        bulk=0.92,
        legs=0.85,
        head=Oval(0.0, 0.0, 0.125, 0.108),
        ears=tuple(Polygon(((s * 0.124, 0.0), (s * 0.138, 0.2), (s * 0.02, 0.085))) for s in (-1, 1)),
        inner_ears=tuple(
            Polygon(((s * 0.106, 0.06), (s * 0.121, 0.15), (s * 0.062, 0.085))) for s in (-1, 1)
        ),
        hanging_ears=(),
        tail=(
            Limb(0.02, 0.0, -0.06, 0.05, 0.017),
            Limb(-0.06, 0.05, -0.08, 0.13, 0.017),
            Limb(-0.08, 0.13, -0.05, 0.19, 0.017),
        ),
        muzzle=Oval(0.02, -0.045, 0.05, 0.035),
    ),
    "dog": _Species(
        bulk=1.0,
        legs=1.0,
        head=Oval(0.0, 0.0, 0.112, 0.115),
        ears=(),
        inner_ears=(),
        hanging_ears=tuple(Limb(s * 0.1, 0.06, s * 0.128, -0.075, 0.036) for s in (-1, 1)),
        tail=(Limb(0.02, 0.0, -0.08, 0.1, 0.026),),
        muzzle=Oval(0.025, -0.05, 0.062, 0.05),
    ),
    "rabbit": _Species(
        bulk=0.95,
        legs=0.95,
        head=Oval(0.0, 0.0, 0.112, 0.105),
        ears=tuple(Limb(s * 0.05, 0.08, s * 0.078, 0.275, 0.033) for s in (-1, 1)),
        inner_ears=tuple(Limb(s * 0.055, 0.1, s * 0.078, 0.26, 0.013) for s in (-1, 1)),
        hanging_ears=(),
        tail=(Oval(-0.02, 0.015, 0.052, 0.052),),
        muzzle=Oval(0.02, -0.045, 0.045, 0.035),
    ),
    "bear": _Species(
        bulk=1.18,
        legs=1.4,
        head=Oval(0.0, 0.0, 0.132, 0.118),
        ears=tuple(Oval(s * 0.118, 0.08, 0.052, 0.052) for s in (-1, 1)),
        inner_ears=tuple(Oval(s * 0.12, 0.082, 0.026, 0.026) for s in (-1, 1)),
        hanging_ears=(),
        tail=(Oval(-0.02, 0.01, 0.034, 0.034),),
        muzzle=Oval(0.02, -0.045, 0.062, 0.048),
    ),
}


def _animal(pen: _Pen, scene: "Scene") -> None:
    """Draws the animal from back to front; the pen stands between its feet."""
    pose, kind, details = _POSES[scene.pose], _SPECIES[scene.species], scene.details
    fur = _shade(COLOURS[scene.colour], details.lightness, details.warmth)
    dark = _darker(fur, 0.76)
    body = pose.body._replace(rx=pose.body.rx * kind.bulk**0.5, ry=pose.body.ry * kind.bulk)

    def built(parts: tuple[Shape, ...]) -> list[Shape]:
        return [part._replace(r=part.r * kind.legs) if isinstance(part, Limb) else part for part in parts]

    tail = COLOURS["white"] if scene.species == "rabbit" else dark
    pen.outlined(dark, *built(pose.far))
    pen.at(*pose.tail).outlined(tail, *kind.tail)
    pen.outlined(fur, body, *built(pose.joined))
    if details.stripes:
        pen.flat(_darker(fur, 0.62), *_stripes(body, scene.pose))
    for part in built(pose.near):
        pen.outlined(_mixed(fur, dark, 0.35), part)
    head = pen.at(*pose.head)
    _head(head, kind, fur)
    if scene.hat != "none":
        _hat(head.at(0.0, kind.head.ry - 0.006), THING_COLOURS[scene.hat])


def _stripes(body: Oval, pose: str) -> list[Limb]:
    """Three bands on the animal's back, across the length of its body."""
    if pose == "sitting":
        edges = [(share, body.rx * (1 - share**2) ** 0.5) for share in (0.0, 0.3, 0.6)]
        return [
            Limb(
                body.x - 0.9 * edge,
                body.y + share * body.ry,
                body.x - 0.25 * edge,
                body.y + share * body.ry,
                0.013,
            )
            for share, edge in edges
        ]
    edges = [(share, body.ry * (1 - share**2) ** 0.5) for share in (-0.65, -0.3, 0.05)]
    return [
        Limb(
            body.x + share * body.rx,
            body.y + 0.87 * edge,
            body.x + share * body.rx,
            body.y + 0.05 * edge,
            0.013,
        )
        for share, edge in edges
    ]


def _head(pen: _Pen, kind: _Species, fur: Colour) -> None:
    """Draws ears and face; the pen stands in the middle of the head."""
    pale, ink = _mixed(fur, (255, 248, 236), 0.72), (34, 26, 30)
    pen.outlined(fur, kind.head, *kind.ears)
    pen.flat(_mixed(fur, (255, 170, 175), 0.75), *kind.inner_ears)
    for ear in kind.hanging_ears:
        pen.outlined(_darker(fur, 0.68), ear)
    muzzle = kind.muzzle
    pen.flat(pale, muzzle)
    pen.flat(ink, Oval(muzzle.x, muzzle.y + 0.5 * muzzle.ry, 0.02, 0.014))
    pen.flat(ink, Limb(muzzle.x, muzzle.y + 0.4 * muzzle.ry, muzzle.x, muzzle.y - 0.4 * muzzle.ry, 0.004))
    for x in (muzzle.x - 0.05, muzzle.x + 0.05):
        pen.flat(pale, Oval(x, 0.022, 0.023, 0.028))
        pen.flat(ink, Oval(x, 0.022, 0.018, 0.024))
        pen.flat((255, 255, 255), Oval(x + 0.006, 0.032, 0.007, 0.007))


def _hat(pen: _Pen, colour: Colour) -> None:
    crown = Polygon(((-0.056, 0.0), (-0.062, 0.115), (0.062, 0.115), (0.056, 0.0)))
    pen.outlined(colour, crown, Limb(-0.084, 0.0, 0.084, 0.0, 0.018))
    pen.flat((255, 250, 240), Polygon(((-0.057, 0.024), (-0.058, 0.047), (0.058, 0.047), (0.057, 0.024))))


def _object(pen: _Pen, kind: str, colour: Colour) -> None:
    """Draws the object; the pen stands in the middle of where it meets the ground."""
    cream, bark = (255, 248, 232), (132, 86, 52)
    if kind == "ball":
        pen.outlined(colour, Oval(0.0, 0.1, 0.1, 0.1))
        pen.flat(cream, Limb(-0.085, 0.07, 0.085, 0.07, 0.014), Oval(-0.035, 0.145, 0.024, 0.024))
    elif kind == "tree":
        pen.outlined(bark, Limb(0.0, 0.02, 0.0, 0.25, 0.024))
        crown = (Oval(-0.045, 0.3, 0.07, 0.075), Oval(0.045, 0.3, 0.07, 0.075), Oval(0.0, 0.4, 0.082, 0.085))
        pen.outlined(colour, *crown)
        pen.flat(_mixed(colour, cream, 0.35), Oval(-0.025, 0.425, 0.026, 0.026))
    elif kind == "box":
        pen.outlined(colour, Polygon(((-0.09, 0.0), (-0.09, 0.14), (0.09, 0.14), (0.09, 0.0))))
        pen.flat(cream, Polygon(((-0.02, 0.0), (-0.02, 0.16), (0.02, 0.16), (0.02, 0.0))))
        pen.outlined(colour, Polygon(((-0.105, 0.135), (-0.105, 0.175), (0.105, 0.175), (0.105, 0.135))))
        pen.outlined(cream, Oval(-0.03, 0.2, 0.026, 0.016), Oval(0.03, 0.2, 0.026, 0.016))
    else:
        stem = (52, 128, 62)
        pen.outlined(
            stem,
            Limb(0.0, 0.0, 0.0, 0.17, 0.013),
            Oval(-0.045, 0.06, 0.042, 0.02),
            Oval(0.045, 0.08, 0.042, 0.02),
        )
        turns = np.arange(5) * (2 * np.pi / 5) + np.pi / 2
        petals = [Oval(0.062 * np.cos(t), 0.23 + 0.062 * np.sin(t), 0.042, 0.042) for t in turns]
        pen.outlined(colour, *petals)
        pen.flat((88, 54, 34), Oval(0.0, 0.23, 0.036, 0.036))


class _Place(NamedTuple):
    """Colours of a place from top to bottom; `light` is its sun or moon, `specks` stars or flakes."""

    high: Colour
    low: Colour
    light: Colour
    hills: Colour
    ground: Colour
    cloud: Colour | None = None
    sea: Colour | None = None
    specks: Colour | None = None


_PLACES = {
    "meadow": _Place(
        (128, 198, 244),
        (214, 238, 250),
        (255, 232, 130),
        (126, 190, 98),
        (164, 212, 108),
        cloud=(250, 253, 255),
    ),
    "beach": _Place(
        (104, 192, 240),
        (252, 232, 206),
        (255, 236, 150),
        (98, 160, 130),
        (242, 218, 168),
        cloud=(255, 252, 248),
        sea=(50, 148, 196),
    ),
    "snow": _Place(
        (176, 196, 222),
        (226, 232, 242),
        (255, 247, 222),
        (206, 218, 234),
        (244, 248, 252),
        specks=(255, 255, 255),
    ),
    "night": _Place(
        (16, 18, 54), (54, 52, 104), (244, 240, 214), (30, 46, 72), (44, 72, 76), specks=(255, 246, 200)
    ),
}
# Two pictures' widths of scattered points, so that a window sliding over them is one plain number.
_SPECKS = tuple(zip(*np.random.default_rng(7).uniform((0, 0.03), (2, 0.48), (40, 2)).T.tolist(), strict=True))


def _background(pixels: int, place: _Place, details: "Details") -> Image.Image:
    """Paints the place behind the animal: [pixels, pixels] RGB."""
    rows = np.linspace(0.0, 1.0, pixels)[:, None, None] / details.horizon
    sky = place.high + (np.array(place.low) - place.high) * np.minimum(rows, 1.0)
    image = Image.fromarray(sky.round().astype(np.uint8)).resize((pixels, pixels), Image.Resampling.NEAREST)
    pen = _Pen(ImageDraw.Draw(image), 0.0, 0.0, float(pixels))
    sun = Oval(details.sun_x, -details.sun_y, 0.062, 0.062)
    pen.flat(_mixed(place.high, place.light, 0.3), sun._replace(rx=0.085, ry=0.085))
    pen.flat(place.light, sun)
    if place.specks:
        near = [(x - details.stars, y) for x, y in _SPECKS if 0.0 < x - details.stars < 1.0]
        pen.flat(place.specks, *(Oval(x, -y, 0.009, 0.009) for x, y in near))
    if place.cloud:
        x, y = details.cloud_x, -0.27
        puffs = (
            Oval(x, y, 0.11, 0.028),
            Oval(x - 0.03, y + 0.025, 0.05, 0.04),
            Oval(x + 0.04, y + 0.015, 0.04, 0.03),
        )
        pen.flat(place.cloud, *puffs)
    _land(pen, place, details)
    return image


def _land(pen: _Pen, place: _Place, details: "Details") -> None:
    """Paints hills (islands at sea), the sea, and the ground up to the horizon."""
    land, height = -details.horizon, details.hill_height
    shore = land - 0.12 if place.sea else land
    width = 0.14 if place.sea else 0.36
    pen.flat(place.hills, Oval(details.hill_x, land, width, height if not place.sea else 0.5 * height))
    if not place.sea:
        pen.flat(
            _mixed(place.hills, place.ground, 0.45), Oval(details.hill_x + 0.6, land, 0.42, 0.7 * height)
        )
    else:
        pen.flat(place.sea, Polygon(((0.0, land), (1.0, land), (1.0, shore), (0.0, shore))))
        pen.flat((240, 248, 250), Limb(0.0, shore, 1.0, shore, 0.011))
    pen.flat(place.ground, Polygon(((0.0, shore), (1.0, shore), (1.0, -1.0), (0.0, -1.0))))


def _shade(colour: Colour, lightness: float, warmth: float) -> Colour:
    """Moves a colour within its name: at most 12 of 255 lighter and 7 warmer, either way."""
    moved = (
        channel + 12 * lightness + 7 * warmth * tint for channel, tint in zip(colour, (1, 0, -1), strict=True)
    )
    return tuple(round(min(max(channel, 0), 255)) for channel in moved)


@dataclass(frozen=True)
class Details:
    """The unnamed attributes of a scene, each within `DETAIL_RANGES`; never in a caption."""

    x: float = 0.0
    ground: float = 0.89
    size: float = 0.94
    lightness: float = 0.0
    warmth: float = 0.0
    stripes: float = 0.0
    object_size: float = 0.94
    horizon: float = 0.6
    sun_x: float = 0.25
    sun_y: float = 0.13
    cloud_x: float = 0.6
    hill_x: float = 0.25
    hill_height: float = 0.12
    stars: float = 0.5

    @classmethod
    def sample(cls, rng: np.random.Generator) -> "Details":
        low, high = np.array(list(DETAIL_RANGES.values())).T
        drawn = dict(zip(DETAIL_RANGES, rng.uniform(low, high).tolist(), strict=True))
        return cls(**drawn | {"stripes": float(drawn["stripes"] < 0.4)})


@dataclass(frozen=True)
class Scene:
    """One drawn scene, by its named attributes and its unnamed details.

    The animal faces the object. Without an object, `object_colour` and `side` still keep the room
    for one (and which way the animal faces), so that adding an object moves nothing else.

    Raises:
        ValueError: an attribute has a value that `ATTRIBUTES` does not allow.
    """

    species: str = "cat"
    colour: str = "orange"
    pose: str = "sitting"
    hat: str = "none"
    object: str = "none"
    object_colour: str = "red"
    side: str = "right"
    place: str = "meadow"
    details: Details = Details()

    def __post_init__(self) -> None:
        for name in ATTRIBUTES:
            if getattr(self, name) not in _settable(name):
                allowed = ", ".join(_settable(name))
                raise ValueError(f"{name} cannot be {getattr(self, name)!r}; allowed: {allowed}")

    def draw(self, size: int = 64) -> np.ndarray:
        """Draws the scene with 4 x 4 samples a pixel: uint8 [size, size, 3] of 0 to 255.

        Raises:
            ValueError: the size is below 8.
        """
        if size < 8:
            raise ValueError(f"size cannot be {size}; allowed: 8 and above")
        details, pixels = self.details, 4 * size
        image = _background(pixels, _PLACES[self.place], details)
        facing = 1 if self.side == "right" else -1
        ground = _darker(_PLACES[self.place].ground, 0.84)
        middle = (0.5 + facing * (details.x - 0.115)) * pixels
        animal = _Pen(ImageDraw.Draw(image), middle, details.ground * pixels, details.size * pixels, facing)
        reach = 0.18 if self.pose == "sitting" else 0.27
        animal.flat(ground, Oval(0.0, 0.0, reach, 0.03))
        if self.object != "none":
            beside = replace(
                animal,
                left=(0.5 + facing * 0.365) * pixels,
                top=(details.ground + 0.01) * pixels,
                unit=details.object_size * pixels,
            )
            beside.flat(ground, Oval(0.0, 0.0, 0.11, 0.022))
            _object(beside, self.object, THING_COLOURS[self.object_colour])
        _animal(animal, self)
        return np.array(image.reduce(4))

    def attributes(self) -> dict[str, str]:
        """The named attributes, in the order of `ATTRIBUTES`."""
        named = {name: getattr(self, name) for name in ATTRIBUTES}
        return named | ({"object_colour": "none", "side": "none"} if self.object == "none" else {})

    def unnamed(self) -> dict[str, float]:
        """The unnamed attributes as numbers, `facing` (-1 left, 1 right) with them."""
        return asdict(self.details) | {"facing": 1.0 if self.side == "right" else -1.0}

    def edited(self, **changes: str) -> "Scene":
        """This scene with the given named attributes changed and all else as it was.

        A changed side mirrors where the animal and its object stand. Without an object there is
        no object's colour or side to change.

        Raises:
            ValueError: unknown attribute, a value not allowed, or the colour or side of no object.
        """
        for name in changes:
            if name not in ATTRIBUTES:
                raise ValueError(f"unknown attribute {name!r}; allowed: {', '.join(ATTRIBUTES)}")
        scene = replace(self, **changes)
        if scene.object == "none" and changes.keys() & {"object_colour", "side"}:
            raise ValueError(
                "no object has a colour or side to change; allowed: species, colour, pose, hat, object, place"
            )
        return scene

    def caption(self, wording: int | np.random.Generator = 0) -> str:
        """Says every named attribute, lower-case, in at most 24 words.

        The wording (a seed, or a generator to draw it from) decides all but the attributes' own
        words: scenes that differ in one attribute get captions that differ in its words alone.
        """
        return _say(self, Wording.sample(np.random.default_rng(wording)))


def _settable(name: str) -> tuple[str, ...]:
    """The values a scene may be given: the colour and side of an absent object are only hidden."""
    return ATTRIBUTES[name][1:] if name in ("object_colour", "side") else ATTRIBUTES[name]


# Each clause in its wordings; "" below stands for an absence left unsaid.
_ORDERS = (
    "{animal} {hat} {place} {object}",
    "{animal} {hat} {object} {place}",
    "{animal} {place} {hat} {object}",
    "{place} , {animal} {hat} {object}",
    "{lead} , {animal} {hat} {place}",
    "{place} , {lead} , {animal} {hat}",
)
_ANIMAL = (
    "a {pose} {colour} {species}",
    "a {colour} {species} {pose}",
    "a {colour} {species} is {pose}",
    "there is a {pose} {colour} {species}",
)
_HAT = ("with a {hat} hat", "in a {hat} hat", "wearing a {hat} hat")
_NO_HAT = ("with no hat", "without a hat", "wearing no hat")
_OBJECT = (
    "with a {object_colour} {object} on its {side}",
    "next to a {object_colour} {object} on the {side}",
    "and a {object_colour} {object} to the {side}",
    "and to its {side} a {object_colour} {object}",
)
_NO_OBJECT = ("with nothing else", "with nothing next to it", "and nothing else", "and nothing more")
_LEAD = (
    "on the {side} a {object_colour} {object}",
    "on the {side} is a {object_colour} {object}",
    "a {object_colour} {object} on the {side}",
    "to the {side} a {object_colour} {object}",
)
_PLACE = {
    "meadow": ("in a meadow", "in the meadow", "on a grassy meadow"),
    "beach": ("on a beach", "on the beach", "on a sandy beach"),
    "snow": ("in snow", "in the snow", "in deep snow"),
    "night": ("at night", "in the night", "on a dark night"),
}


@dataclass(frozen=True)
class Wording:
    """How a caption says what it says, whatever the scene: an index into each clause's wordings."""

    order: int
    animal: int
    hat: int
    object: int
    place: int
    says_no_hat: bool
    says_no_object: bool

    @classmethod
    def sample(cls, rng: np.random.Generator) -> "Wording":
        counts = (len(_ORDERS), len(_ANIMAL), len(_HAT), len(_OBJECT), len(_PLACE["night"]), 5, 5)
        *clauses, no_hat, no_object = rng.integers(counts).tolist()
        return cls(*clauses, says_no_hat=no_hat == 0, says_no_object=no_object == 0)


def _say(scene: Scene, wording: Wording) -> str:
    named = scene.attributes()
    no_hat = _NO_HAT[wording.hat] if wording.says_no_hat else ""
    no_object = _NO_OBJECT[wording.object] if wording.says_no_object else ""
    absent = scene.object == "none"
    clauses = {
        "animal": _ANIMAL[wording.animal],
        "hat": no_hat if scene.hat == "none" else _HAT[wording.hat],
        "object": no_object if absent else _OBJECT[wording.object],
        "lead": "" if absent else _LEAD[wording.object],
        "place": _PLACE[scene.place][wording.place],
    }
    text = _ORDERS[wording.order].format(**clauses).format(**named)
    text = re.sub(r"\ba (?=orange\b)", "an ", " ".join(text.split()))
    return text.replace(" , , ", " , ").removeprefix(", ").replace(" ,", ",")


def words(caption: str) -> list[str]:
    """Splits a caption into words and commas.

    "at night, a cat" -> ["at", "night", ",", "a", "cat"]
    """
    return re.findall(r"[a-z]+|,", caption)


def vocabulary() -> tuple[str, ...]:
    """Every word and punctuation mark a caption can hold, sorted."""
    clauses = (*_ORDERS, *_ANIMAL, *_HAT, *_NO_HAT, *_OBJECT, *_NO_OBJECT, *_LEAD)
    said = [re.sub(r"\{\w+\}", " ", clause) for clause in clauses]
    values = [
        value for name in ATTRIBUTES for value in ATTRIBUTES[name] if name != "place" and value != "none"
    ]
    return tuple(sorted(set(words(" ".join([*said, *values, *itertools.chain(*_PLACE.values()), "an"])))))


def split_of(scene: Scene) -> str:
    """The split a scene belongs to, by a stable hash of its species, colour, pose and place.

    About one in ten of these 384 combinations is held out as a whole, with any hat and object: a
    model that never trains on them has seen each of their parts, but never together.
    """
    return _split_of(tuple(getattr(scene, key) for key in _SPLIT_KEYS))


def _split_of(combination: tuple[str, ...]) -> str:
    digest = hashlib.sha256("|".join(combination).encode()).digest()
    return "held-out" if digest[0] < 26 else "train"


@functools.cache
def _combinations(split: str) -> tuple[tuple[str, ...], ...]:
    every = itertools.product(*(ATTRIBUTES[key] for key in _SPLIT_KEYS))
    return tuple(combination for combination in every if _split_of(combination) == split)


def _one_of(names: tuple[str, ...], rng: np.random.Generator) -> str:
    return names[int(rng.integers(len(names)))]


def sample_scene(rng: np.random.Generator, split: str = "train") -> Scene:
    """Draws a scene of a split; two in five wear no hat, three in ten have no object.

    Raises:
        ValueError: unknown split.
    """
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}; allowed: {', '.join(SPLITS)}")
    combinations = _combinations(split)
    chosen = dict(zip(_SPLIT_KEYS, combinations[int(rng.integers(len(combinations)))], strict=True))
    for name, share in (("hat", 0.4), ("object", 0.3), ("object_colour", 0.0), ("side", 0.0)):
        named = tuple(value for value in ATTRIBUTES[name] if value != "none")
        chosen[name] = "none" if rng.random() < share else _one_of(named, rng)
    return Scene(**chosen, details=Details.sample(rng))


@dataclass(frozen=True)
class Edit:
    """An edit whose right answer is known.

    Attributes:
        family: one of `EDIT_FAMILIES`.
        attribute: the one named attribute that changes.
        source: the scene before the edit.
        target: the right answer: the source with that attribute changed.
        source_caption: what the source's picture shows.
        edit_caption: what the target's shows, in the same wording.
    """

    family: str
    attribute: str
    source: Scene
    target: Scene
    source_caption: str
    edit_caption: str

    def mask(self, size: int = 64) -> np.ndarray:
        """The pixels that should change, and a margin of size/32 around them: bool [size, size]."""
        before, after = (scene.draw(size).astype(np.int16) for scene in (self.source, self.target))
        differs = Image.fromarray((np.abs(before - after).max(axis=-1) > 6).astype(np.uint8))
        return np.asarray(differs.filter(ImageFilter.MaxFilter(2 * max(1, size // 32) + 1))) > 0


def sample_edit(family: str, rng: np.random.Generator, split: str = "held-out") -> Edit:
    """Draws an edit of a family, its source from the given split (its target may leave it).

    Raises:
        ValueError: unknown family or split.
    """
    if family not in EDIT_FAMILIES:
        raise ValueError(f"unknown family {family!r}; allowed: {', '.join(EDIT_FAMILIES)}")
    attribute = _one_of(_EDITED[family], rng)
    source = _prepared(sample_scene(rng, split), family, attribute, rng)
    current = getattr(source, attribute)
    others = tuple(value for value in _settable(attribute) if value not in (current, "none"))
    target = source.edited(**{attribute: "none" if family == "remove" else _one_of(others, rng)})
    wording = Wording.sample(rng)
    return Edit(family, attribute, source, target, _say(source, wording), _say(target, wording))


def _prepared(scene: Scene, family: str, attribute: str, rng: np.random.Generator) -> Scene:
    """Gives a scene the hat or object that its edit needs there, or needs away."""
    part = "object" if attribute == "object_colour" else attribute
    if part not in ("hat", "object"):
        return scene
    if family == "add":
        return scene.edited(**{part: "none"})
    if getattr(scene, part) == "none":
        return scene.edited(**{part: _one_of(ATTRIBUTES[part][1:], rng)})
    return scene
