"""Says the named attributes of a scene in words, in one of many wordings."""

import itertools
import re
from dataclasses import dataclass

import numpy as np

from sflow_jax.toyworld.attributes import ATTRIBUTES

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


def say(named: dict[str, str], wording: Wording) -> str:
    """The caption of a scene with these named attributes; "none" says what it goes without."""
    no_hat = _NO_HAT[wording.hat] if wording.says_no_hat else ""
    no_object = _NO_OBJECT[wording.object] if wording.says_no_object else ""
    absent = named["object"] == "none"
    clauses = {
        "animal": _ANIMAL[wording.animal],
        "hat": no_hat if named["hat"] == "none" else _HAT[wording.hat],
        "object": no_object if absent else _OBJECT[wording.object],
        "lead": "" if absent else _LEAD[wording.object],
        "place": _PLACE[named["place"]][wording.place],
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
    values = [value for name in ATTRIBUTES for value in ATTRIBUTES[name] if name != "place" and value != "none"]
    return tuple(sorted(set(words(" ".join([*said, *values, *itertools.chain(*_PLACE.values()), "an"])))))
