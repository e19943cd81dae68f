"""What a scene is described by: named attributes, which captions say, and unnamed details.

Lengths are fractions of the picture's side, `x` to the right and `y` down.
"""

from dataclasses import dataclass

import numpy as np

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


def settable(name: str) -> tuple[str, ...]:
    """The values a scene may be given: the colour and side of an absent object are only hidden."""
    return ATTRIBUTES[name][1:] if name in ("object_colour", "side") else ATTRIBUTES[name]


def one_of(values: tuple[str, ...], rng: np.random.Generator) -> str:
    """Draws one of the values, each as likely."""
    return values[int(rng.integers(len(values)))]
