"""Edits of drawn scenes whose right answer is known: picture, caption and mask."""

from dataclasses import dataclass, replace

import numpy as np
from PIL import Image, ImageFilter

from sflow_jax.toyworld.attributes import ATTRIBUTES, one_of, settable
from sflow_jax.toyworld.captions import Wording, say
from sflow_jax.toyworld.scenes import Scene, sample_scene

# The attributes that an edit of each family may change.
_EDITED = {
    "non-rigid": ("pose",),
    "add": ("hat", "object"),
    "remove": ("hat", "object"),
    "replace": ("species", "object"),
    "recolour": ("colour", "hat", "object_colour"),
    "scene": ("place",),
}
EDIT_FAMILIES = tuple(_EDITED)


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

    def of(self, scene: Scene) -> "Edit":
        """The same change of another scene, such as one that a picture was read as; captions stay."""
        # What an added object brings along.
        brought = ("object_colour", "side") if self.attribute == "object" and scene.object == "none" else ()
        changes = {name: getattr(self.target, name) for name in (self.attribute, *brought)}
        return replace(self, source=scene, target=replace(scene, **changes))

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
    attribute = one_of(_EDITED[family], rng)
    source = _prepared(sample_scene(rng, split), family, attribute, rng)
    target = _target(source, family, attribute, rng)
    return _captioned(family, attribute, source, target, Wording.sample(rng))


def sample_edits(rng: np.random.Generator, split: str = "held-out") -> tuple[Edit, ...]:
    """Draws one edit of every family, all of one source, which wears a hat or stands by an object, never both.

    Raises:
        ValueError: unknown split.
    """
    present, absent = ("hat", "object") if rng.random() < 0.5 else ("object", "hat")
    source = sample_scene(rng, split)
    if getattr(source, present) == "none":
        source = source.edited(**{present: one_of(ATTRIBUTES[present][1:], rng)})
    source = source.edited(**{absent: "none"})
    wording, shown, edits = Wording.sample(rng), source.attributes(), []
    for family, attributes in _EDITED.items():
        visible = tuple(name for name in attributes if shown[name] != "none")
        attribute = absent if family == "add" else one_of(visible, rng)
        edits.append(_captioned(family, attribute, source, _target(source, family, attribute, rng), wording))
    return tuple(edits)


def sample_turns(rng: np.random.Generator, turns: int, split: str = "held-out") -> tuple[Edit, ...]:
    """Draws edits in a row, each of the last one's right answer and of another family, at most one a family.

    Raises:
        ValueError: unknown split, or more turns than families.
    """
    if not 1 <= turns <= len(_EDITED):
        raise ValueError(f"there are 1 to {len(_EDITED)} turns, found {turns}")
    first = sample_edits(rng, split)[0]
    scene, wording, edits = first.source, Wording.sample(rng), []
    for family in rng.permutation(EDIT_FAMILIES)[:turns].tolist():
        shown = scene.attributes()
        # What is to be added is not there yet; everything else is.
        fitting = [name for name in _EDITED[family] if (shown[name] == "none") == (family == "add")]
        attribute = one_of(tuple(fitting), rng)
        edits.append(_captioned(family, attribute, scene, _target(scene, family, attribute, rng), wording))
        scene = edits[-1].target
    return tuple(edits)


def _target(source: Scene, family: str, attribute: str, rng: np.random.Generator) -> Scene:
    """The source with another value of an attribute, or without it."""
    current = getattr(source, attribute)
    others = tuple(value for value in settable(attribute) if value not in (current, "none"))
    return source.edited(**{attribute: "none" if family == "remove" else one_of(others, rng)})


def _captioned(family: str, attribute: str, source: Scene, target: Scene, wording: Wording) -> Edit:
    captions = (say(scene.attributes(), wording) for scene in (source, target))
    return Edit(family, attribute, source, target, *captions)


def _prepared(scene: Scene, family: str, attribute: str, rng: np.random.Generator) -> Scene:
    """Gives a scene the hat or object that its edit needs there, or needs away."""
    part = "object" if attribute == "object_colour" else attribute
    if part not in ("hat", "object"):
        return scene
    if family == "add":
        return scene.edited(**{part: "none"})
    if getattr(scene, part) == "none":
        return scene.edited(**{part: one_of(ATTRIBUTES[part][1:], rng)})
    return scene
