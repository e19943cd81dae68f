"""A small world of drawn scenes: pictures, captions, and edits whose right answer is known.

A scene is one animal in one place, perhaps with a hat and an object beside it. What the caption
says is *named* (`ATTRIBUTES`); all else about the picture is *unnamed* (`Details`), so that
keeping a source picture through an edit is a real task.
"""

import functools
import hashlib
import itertools
from dataclasses import asdict, dataclass, replace

import numpy as np

from sflow_jax.toyworld import drawing
from sflow_jax.toyworld.attributes import ATTRIBUTES, Details, one_of, settable
from sflow_jax.toyworld.captions import Wording, say

SPLITS = ("train", "held-out")
_SPLIT_KEYS = ("species", "colour", "pose", "place")


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
            if getattr(self, name) not in settable(name):
                allowed = ", ".join(settable(name))
                raise ValueError(f"{name} cannot be {getattr(self, name)!r}; allowed: {allowed}")

    @property
    def facing(self) -> int:
        """Which way the animal looks, and where an object stands or would: 1 right, -1 left."""
        return 1 if self.side == "right" else -1

    def draw(self, size: int = 64) -> np.ndarray:
        """Draws the scene with 4 x 4 samples a pixel: uint8 [size, size, 3] of 0 to 255.

        Raises:
            ValueError: the size is below 8.
        """
        return drawing.draw(self.attributes(), self.details, self.facing, size)

    def attributes(self) -> dict[str, str]:
        """The named attributes, in the order of `ATTRIBUTES`."""
        named = {name: getattr(self, name) for name in ATTRIBUTES}
        return named | ({"object_colour": "none", "side": "none"} if self.object == "none" else {})

    def unnamed(self) -> dict[str, float]:
        """The unnamed attributes as numbers, `facing` (-1 left, 1 right) with them."""
        return asdict(self.details) | {"facing": float(self.facing)}

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
        return say(self.attributes(), Wording.sample(np.random.default_rng(wording)))


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
        chosen[name] = "none" if rng.random() < share else one_of(named, rng)
    return Scene(**chosen, details=Details.sample(rng))
