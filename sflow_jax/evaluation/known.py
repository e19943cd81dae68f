"""Known answers: edits of scenes of the embedded world; where they are drawn, with the drawing that is right."""

import dataclasses
import functools
from typing import Any

import numpy as np
from etils import epath
from jaxtyping import UInt8

from sflow_jax.errors import SettingError
from sflow_jax.evaluation.cases import Axis, Case, Column, Scores
from sflow_jax.measures.metrics import bounded_psnr
from sflow_jax.pictures.canvas import Canvas
from sflow_jax.pictures.files import to_unit
from sflow_jax.settings import DRAWN, PAINTED
from sflow_jax.toyworld.edits import EDIT_FAMILIES, Edit, sample_edits, sample_turns
from sflow_jax.toyworld.reader import AttributeReader

# Beside the seed and a scene's number, so that no other part of the package draws the same scenes.
STREAM = 0x5E1F


def scene_edits(seed: int, number: int, turns: int = 1) -> tuple[Edit, ...]:
    """One edit a family of a scene that training never saw, or some in a row; the same for the numbers always."""
    draw = np.random.default_rng([STREAM, seed, number])
    return sample_edits(draw) if turns == 1 else sample_turns(draw, turns)


@dataclasses.dataclass(frozen=True)
class KnownAnswers:
    """`scenes` scenes, each edited once a family. size: of the pictures, pixels a side.

    turns: instead, so many edits in a row, each of the last one's result. sources: drawn, or painted by the model
    from their captions: no right answer is known then, and the reader sees where everything is that an edit leaves
    alone. SettingError for more turns than families, and for turns of painted sources.
    """

    scenes: int
    seed: int
    size: int
    turns: int = 1
    sources: str = DRAWN

    name = "known answers of the embedded world"
    share = "happened"
    chart = (Axis("happened", "edits that happened"), Axis("outside_db", "PSNR outside the edit (dB)"))

    def __post_init__(self) -> None:
        if self.turns > len(EDIT_FAMILIES):
            raise SettingError(f"`turns` must be at most {len(EDIT_FAMILIES)}, one a family, found {self.turns}")
        if self.turns > 1 and self.painted:
            raise SettingError("`turns` are of drawn sources: leave `sources` out")

    @property
    def painted(self) -> bool:
        """Whether the model paints the sources."""
        return self.sources == PAINTED

    @property
    def notes(self) -> tuple[str, ...]:
        """What a reader of the table must know."""
        before = "the picture that the method painted" if self.painted else "what was right before the edit"
        return (
            "happened: the attribute reader sees what the edit asks for; lost: other attributes that it sees "
            "changed",
            f"dB outside: against {before}, on pixels that the edit leaves alone",
        )

    @property
    def columns(self) -> tuple[Column, ...]:
        """No distance to right answers where there are none."""
        return (
            Column("happened", "happened", higher=True),
            Column("lost", "lost", higher=False),
            *(() if self.painted else (Column("answer_db", "dB to the right answer"),)),
            Column("outside_db", "dB outside"),
        )

    @classmethod
    def on(cls, canvas: Canvas, scenes: int, seed: int, turns: int = 1, sources: str = DRAWN) -> "KnownAnswers":
        """For a model's canvas; SettingError unless it is square."""
        if canvas.height != canvas.width:
            raise SettingError(
                f"drawn scenes are square: `height` and `width` cannot be {canvas.height} and {canvas.width}"
            )
        return cls(scenes, seed, canvas.height, turns, sources)

    @functools.cached_property
    def edits(self) -> dict[str, tuple[Edit, ...]]:
        """Name of a case → its edits."""
        return {f"scene-{number:04d}": scene_edits(self.seed, number, self.turns) for number in range(self.scenes)}

    @functools.cached_property
    def cases(self) -> tuple[Case, ...]:
        """Drawings and their captions; or the captions alone."""
        return tuple(self._case(name, edits) for name, edits in self.edits.items())

    @functools.cached_property
    def reader(self) -> AttributeReader:
        """What sees attributes."""
        return AttributeReader()

    def _case(self, name: str, edits: tuple[Edit, ...]) -> Case:
        chained = self.turns > 1
        return Case(
            name,
            None if self.painted else edits[0].source.draw(self.size),
            edits[0].source_caption,
            tuple(edit.edit_caption for edit in edits),
            tuple(f"turn {i}" if chained else edit.family for i, edit in enumerate(edits, 1)),
            None if self.painted else np.stack([edit.target.draw(self.size) for edit in edits]),
            chained,
        )

    def record(self) -> dict[str, Any]:
        """What the scenes depend on."""
        own = {"turns": self.turns} if self.turns > 1 else {}
        own |= {"sources": self.sources} if self.painted else {}
        return {"benchmark": self.name, "scenes": self.scenes, "seed": self.seed, "size": self.size} | own

    def keep(
        self, folder: epath.Path, method: str, case: Case, pictures: UInt8[np.ndarray, "n y x 3"]
    ) -> np.ndarray:
        """Nothing is written."""
        return pictures

    def score(self, case: Case, pictures: UInt8[np.ndarray, "n y x 3"]) -> tuple[list[Scores], list[str]]:
        """Numbers of every edit, and which other attributes were lost."""
        images, edits = to_unit(pictures), self.edits[case.name]
        if self.painted:
            source = to_unit(case.picture)
            (scene,) = self.reader.scenes(source[None])
            edits = tuple(edit.of(scene) for edit in edits)
        scores, remarks = [], []
        for i, (edit, seen) in enumerate(zip(edits, self.reader(images).named, strict=True)):
            happened, lost = read_outcome(edit, seen)
            # Of a drawing after some turns, the last one's right answer.
            before = source if self.painted else to_unit(edit.source.draw(self.size))
            outside = ~edit.mask(self.size)
            score = {
                "happened": float(happened),
                "lost": float(len(lost)),
                "outside_db": bounded_psnr(images[i][outside], before[outside]),
            }
            if case.answers is not None:
                score["answer_db"] = bounded_psnr(images[i], to_unit(case.answers[i]))
            scores.append(score)
            remarks.append(", ".join(lost))
        return scores, remarks

    def badness(self, scores: Scores) -> float:
        """Edits that did not happen before those that did, then by their distance to what is right."""
        return -scores["outside_db" if self.painted else "answer_db"] - 1000 * scores["happened"]


def read_outcome(edit: Edit, seen: dict[str, str]) -> tuple[bool, list[str]]:
    """From the attributes read off an edited picture: whether the edit happened, and which others were lost.

    Attributes that the edit brings along, such as the colour of an added object, count as neither.
    """
    before, after = edit.source.attributes(), edit.target.attributes()
    unchanged = [name for name in before if before[name] == after[name]]
    return seen[edit.attribute] == after[edit.attribute], [name for name in unchanged if seen[name] != before[name]]
