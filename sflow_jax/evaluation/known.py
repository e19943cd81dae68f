"""Known answers: edits of drawn scenes of the embedded world, each with the drawing that is right."""

import dataclasses
import functools
from typing import Any

import numpy as np
from etils import epath
from jaxtyping import UInt8

from sflow_jax.errors import SettingError
from sflow_jax.evaluation.cases import Axis, Case, Column, Scores
from sflow_jax.measures.metrics import MOST_PSNR, psnr
from sflow_jax.pictures.canvas import Canvas
from sflow_jax.pictures.files import to_unit
from sflow_jax.toyworld.edits import Edit, sample_edits
from sflow_jax.toyworld.reader import AttributeReader

# Beside the seed and a scene's number, so that no other part of the package draws the same scenes.
STREAM = 0x5E1F


def scene_edits(seed: int, number: int) -> tuple[Edit, ...]:
    """One edit a family of a scene that training never saw; the same for a seed and number always."""
    return sample_edits(np.random.default_rng([STREAM, seed, number]))


@dataclasses.dataclass(frozen=True)
class KnownAnswers:
    """`scenes` drawn scenes, each edited once a family. size: of the pictures, pixels a side."""

    scenes: int
    seed: int
    size: int

    name = "known answers of the embedded world"
    notes = (
        "happened: the attribute reader sees what the edit asks for; lost: other attributes that it sees changed",
        "dB outside: against the drawing, on pixels that the edit leaves alone",
    )
    share = "happened"
    columns = (
        Column("happened", "happened", higher=True),
        Column("lost", "lost", higher=False),
        Column("answer_db", "dB to the right answer"),
        Column("outside_db", "dB outside"),
    )
    chart = (Axis("happened", "edits that happened"), Axis("outside_db", "PSNR outside the edit (dB)"))

    @classmethod
    def on(cls, canvas: Canvas, scenes: int, seed: int) -> "KnownAnswers":
        """For a model's canvas; SettingError unless it is square."""
        if canvas.height != canvas.width:
            raise SettingError(
                f"drawn scenes are square: `height` and `width` cannot be {canvas.height} and {canvas.width}"
            )
        return cls(scenes, seed, canvas.height)

    @functools.cached_property
    def edits(self) -> dict[str, tuple[Edit, ...]]:
        """Name of a case → its edits."""
        return {f"scene-{number:04d}": scene_edits(self.seed, number) for number in range(self.scenes)}

    @functools.cached_property
    def cases(self) -> tuple[Case, ...]:
        """Drawings and their captions."""
        return tuple(self._case(name, edits) for name, edits in self.edits.items())

    @functools.cached_property
    def reader(self) -> AttributeReader:
        """What sees attributes."""
        return AttributeReader()

    def _case(self, name: str, edits: tuple[Edit, ...]) -> Case:
        return Case(
            name,
            edits[0].source.draw(self.size),
            edits[0].source_caption,
            tuple(edit.edit_caption for edit in edits),
            tuple(edit.family for edit in edits),
            np.stack([edit.target.draw(self.size) for edit in edits]),
        )

    def record(self) -> dict[str, Any]:
        """What the scenes depend on."""
        return {"benchmark": self.name, "scenes": self.scenes, "seed": self.seed, "size": self.size}

    def keep(
        self, folder: epath.Path, method: str, case: Case, pictures: UInt8[np.ndarray, "n y x 3"]
    ) -> np.ndarray:
        """Nothing is written."""
        return pictures

    def score(self, case: Case, pictures: UInt8[np.ndarray, "n y x 3"]) -> tuple[list[Scores], list[str]]:
        """Numbers of every edit, and which other attributes were lost."""
        images, source = to_unit(pictures), to_unit(case.picture)
        scores, remarks = [], []
        for i, (edit, seen) in enumerate(zip(self.edits[case.name], self.reader(images).named, strict=True)):
            happened, lost = read_outcome(edit, seen)
            outside = ~edit.mask(self.size)
            scores.append(
                {
                    "happened": float(happened),
                    "lost": float(len(lost)),
                    "answer_db": _decibels(images[i], to_unit(case.answers[i])),
                    "outside_db": _decibels(images[i][outside], source[outside]) if outside.any() else float("nan"),
                }
            )
            remarks.append(", ".join(lost))
        return scores, remarks

    def badness(self, scores: Scores) -> float:
        """Edits that did not happen before those that did, then by their distance to the right answer."""
        return -scores["answer_db"] - 1000 * scores["happened"]


def read_outcome(edit: Edit, seen: dict[str, str]) -> tuple[bool, list[str]]:
    """From the attributes read off an edited picture: whether the edit happened, and which others were lost.

    Attributes that the edit brings along, such as the colour of an added object, count as neither.
    """
    before, after = edit.source.attributes(), edit.target.attributes()
    unchanged = [name for name in before if before[name] == after[name]]
    return seen[edit.attribute] == after[edit.attribute], [name for name in unchanged if seen[name] != before[name]]


def _decibels(image: np.ndarray, reference: np.ndarray) -> float:
    """PSNR, at most what equal pictures have elsewhere too."""
    return min(psnr(image, reference), MOST_PSNR)
