"""Draws a scene: the place, then the object, then the animal, each from back to front.

Lengths are fractions of the picture's side; an animal's own run forward and up from its feet.
"""

from dataclasses import replace
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw

from sflow_jax.toyworld.attributes import COLOURS, THING_COLOURS, Colour, Details
from sflow_jax.toyworld.shapes import Limb, Oval, Pen, Polygon, Shape, darker, mixed


def draw(named: dict[str, str], details: Details, facing: int, size: int) -> np.ndarray:
    """Draws a scene with 4 x 4 samples a pixel: uint8 [size, size, 3] of 0 to 255.

    `named` holds a value of every attribute. Its side is none without an object, so `facing` says
    which way the animal looks: 1 to the right, -1 to the left.

    Raises:
        ValueError: the size is below 8.
    """
    if size < 8:
        raise ValueError(f"size cannot be {size}; allowed: 8 and above")
    pixels = 4 * size
    image = background(named["place"], details, pixels)
    ground = darker(_PLACES[named["place"]].ground, 0.84)
    middle = (0.5 + facing * (details.x - 0.115)) * pixels
    animal = Pen(ImageDraw.Draw(image), middle, details.ground * pixels, details.size * pixels, facing)
    reach = 0.18 if named["pose"] == "sitting" else 0.27
    animal.flat(ground, Oval(0.0, 0.0, reach, 0.03))
    if named["object"] != "none":
        thing = replace(
            animal,
            left=(0.5 + facing * 0.365) * pixels,
            top=(details.ground + 0.01) * pixels,
            unit=details.object_size * pixels,
        )
        thing.flat(ground, Oval(0.0, 0.0, 0.11, 0.022))
        _object(thing, named["object"], THING_COLOURS[named["object_colour"]])
    _animal(animal, named, details)
    return np.array(image.reduce(4))


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
        inner_ears=tuple(Polygon(((s * 0.106, 0.06), (s * 0.121, 0.15), (s * 0.062, 0.085))) for s in (-1, 1)),
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


def _animal(pen: Pen, named: dict[str, str], details: Details) -> None:
    """Draws the animal from back to front; the pen stands between its feet."""
    pose, kind = _POSES[named["pose"]], _SPECIES[named["species"]]
    fur = _shade(COLOURS[named["colour"]], details.lightness, details.warmth)
    dark = darker(fur, 0.76)
    body = pose.body._replace(rx=pose.body.rx * kind.bulk**0.5, ry=pose.body.ry * kind.bulk)

    def built(parts: tuple[Shape, ...]) -> list[Shape]:
        return [part._replace(r=part.r * kind.legs) if isinstance(part, Limb) else part for part in parts]

    tail = COLOURS["white"] if named["species"] == "rabbit" else dark
    pen.outlined(dark, *built(pose.far))
    pen.at(*pose.tail).outlined(tail, *kind.tail)
    pen.outlined(fur, body, *built(pose.joined))
    if details.stripes:
        pen.flat(darker(fur, 0.62), *_stripes(body, named["pose"]))
    for part in built(pose.near):
        pen.outlined(mixed(fur, dark, 0.35), part)
    head = pen.at(*pose.head)
    _head(head, kind, fur)
    if named["hat"] != "none":
        _hat(head.at(0.0, kind.head.ry - 0.006), THING_COLOURS[named["hat"]])


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


def _head(pen: Pen, kind: _Species, fur: Colour) -> None:
    """Draws ears and face; the pen stands in the middle of the head."""
    pale, ink = mixed(fur, (255, 248, 236), 0.72), (34, 26, 30)
    pen.outlined(fur, kind.head, *kind.ears)
    pen.flat(mixed(fur, (255, 170, 175), 0.75), *kind.inner_ears)
    for ear in kind.hanging_ears:
        pen.outlined(darker(fur, 0.68), ear)
    muzzle = kind.muzzle
    pen.flat(pale, muzzle)
    pen.flat(ink, Oval(muzzle.x, muzzle.y + 0.5 * muzzle.ry, 0.02, 0.014))
    pen.flat(ink, Limb(muzzle.x, muzzle.y + 0.4 * muzzle.ry, muzzle.x, muzzle.y - 0.4 * muzzle.ry, 0.004))
    for x in (muzzle.x - 0.05, muzzle.x + 0.05):
        pen.flat(pale, Oval(x, 0.022, 0.023, 0.028))
        pen.flat(ink, Oval(x, 0.022, 0.018, 0.024))
        pen.flat((255, 255, 255), Oval(x + 0.006, 0.032, 0.007, 0.007))


def _hat(pen: Pen, colour: Colour) -> None:
    crown = Polygon(((-0.056, 0.0), (-0.062, 0.115), (0.062, 0.115), (0.056, 0.0)))
    pen.outlined(colour, crown, Limb(-0.084, 0.0, 0.084, 0.0, 0.018))
    pen.flat((255, 250, 240), Polygon(((-0.057, 0.024), (-0.058, 0.047), (0.058, 0.047), (0.057, 0.024))))


def _object(pen: Pen, kind: str, colour: Colour) -> None:
    """Draws the object; the pen stands in the middle of where it meets the ground."""
    cream, bark = (255, 248, 232), (132, 86, 52)
    if kind == "ball":
        pen.outlined(colour, Oval(0.0, 0.1, 0.1, 0.1))
        pen.flat(cream, Limb(-0.085, 0.07, 0.085, 0.07, 0.014), Oval(-0.035, 0.145, 0.024, 0.024))
    elif kind == "tree":
        pen.outlined(bark, Limb(0.0, 0.02, 0.0, 0.25, 0.024))
        crown = (Oval(-0.045, 0.3, 0.07, 0.075), Oval(0.045, 0.3, 0.07, 0.075), Oval(0.0, 0.4, 0.082, 0.085))
        pen.outlined(colour, *crown)
        pen.flat(mixed(colour, cream, 0.35), Oval(-0.025, 0.425, 0.026, 0.026))
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


def background(place: str, details: Details, pixels: int) -> Image.Image:
    """Paints the place behind the animal: [pixels, pixels] RGB."""
    colours = _PLACES[place]
    rows = np.linspace(0.0, 1.0, pixels)[:, None, None] / details.horizon
    sky = colours.high + (np.array(colours.low) - colours.high) * np.minimum(rows, 1.0)
    image = Image.fromarray(sky.round().astype(np.uint8)).resize((pixels, pixels), Image.Resampling.NEAREST)
    pen = Pen(ImageDraw.Draw(image), 0.0, 0.0, float(pixels))
    sun = Oval(details.sun_x, -details.sun_y, 0.062, 0.062)
    pen.flat(mixed(colours.high, colours.light, 0.3), sun._replace(rx=0.085, ry=0.085))
    pen.flat(colours.light, sun)
    if colours.specks:
        near = [(x - details.stars, y) for x, y in _SPECKS if 0.0 < x - details.stars < 1.0]
        pen.flat(colours.specks, *(Oval(x, -y, 0.009, 0.009) for x, y in near))
    if colours.cloud:
        x, y = details.cloud_x, -0.27
        puffs = (
            Oval(x, y, 0.11, 0.028),
            Oval(x - 0.03, y + 0.025, 0.05, 0.04),
            Oval(x + 0.04, y + 0.015, 0.04, 0.03),
        )
        pen.flat(colours.cloud, *puffs)
    _land(pen, colours, details)
    return image


def _land(pen: Pen, place: _Place, details: Details) -> None:
    """Paints hills (islands at sea), the sea, and the ground up to the horizon."""
    land, height = -details.horizon, details.hill_height
    shore = land - 0.12 if place.sea else land
    width = 0.14 if place.sea else 0.36
    pen.flat(place.hills, Oval(details.hill_x, land, width, height if not place.sea else 0.5 * height))
    if not place.sea:
        pen.flat(mixed(place.hills, place.ground, 0.45), Oval(details.hill_x + 0.6, land, 0.42, 0.7 * height))
    else:
        pen.flat(place.sea, Polygon(((0.0, land), (1.0, land), (1.0, shore), (0.0, shore))))
        pen.flat((240, 248, 250), Limb(0.0, shore, 1.0, shore, 0.011))
    pen.flat(place.ground, Polygon(((0.0, shore), (1.0, shore), (1.0, -1.0), (0.0, -1.0))))


def _shade(colour: Colour, lightness: float, warmth: float) -> Colour:
    """Moves a colour within its name: at most 12 of 255 lighter and 7 warmer, either way."""
    moved = (channel + 12 * lightness + 7 * warmth * tint for channel, tint in zip(colour, (1, 0, -1), strict=True))
    return tuple(round(min(max(channel, 0), 255)) for channel in moved)
