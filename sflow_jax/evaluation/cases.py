"""What a benchmark is: pictures with edits, and the columns by which the edited pictures are judged."""

import dataclasses
from collections.abc import Sequence
from typing import Annotated, Any, Protocol, runtime_checkable

import msgspec
import numpy as np
from etils import epath
from jaxtyping import UInt8

from sflow_jax.pictures.files import Picture
from sflow_jax.settings import LONGEST_PROMPT

# Name → number of one edited picture; NaN where it is not known.
Scores = dict[str, float]
# What a benchmark's file may have for a prompt.
Prompt = Annotated[str, msgspec.Meta(pattern=r"\S", max_length=LONGEST_PROMPT)]


@dataclasses.dataclass(frozen=True)
class Case:
    """A source picture and its edits, which go through a model in one batch.

    name: unique in its benchmark. picture: uint8 or a file; None where the model paints it from the prompt, which
    then stands in the case that is judged. prompt: what it shows. edits: what each edit shows. groups: the family
    of each edit, by which results are also told. answers: the right answers [edits, y, x, 3], where they are known.
    chained: whether each edit begins at the last one's result, instead of at the picture.
    """

    name: str
    picture: Picture | None
    prompt: str
    edits: tuple[str, ...]
    groups: tuple[str, ...]
    answers: UInt8[np.ndarray, "edits y x 3"] | None = None
    chained: bool = False

    @property
    def sources(self) -> tuple[str, ...]:
        """What the source of each edit shows."""
        before = (self.prompt, *self.edits[:-1])
        return before if self.chained else (self.prompt,) * len(self.edits)


@dataclasses.dataclass(frozen=True)
class Column:
    """One number a picture.

    name: in files. title: in tables. digits: after the point, there. scale: what tables multiply it by. higher:
    whether higher is better; None for what is neither.
    """

    name: str
    title: str
    digits: int = 2
    scale: float = 1.0
    higher: bool | None = True


@dataclasses.dataclass(frozen=True)
class Axis:
    """An axis of the chart: a column, or the share where there is one."""

    column: str
    title: str


@runtime_checkable
class Benchmark(Protocol):
    """Cases, and how the pictures that a method makes of one are judged.

    name: in a line. notes: what a reader of the table must know, such as which networks judge. share: the column of
    zeros and ones that is told as a rate with an interval, where there is one. chart: success, then preservation.
    """

    name: str
    notes: tuple[str, ...]
    cases: Sequence[Case]
    columns: tuple[Column, ...]
    share: str | None
    chart: tuple[Axis, Axis]

    def record(self) -> dict[str, Any]:
        """Everything that the scores depend on, beside the model and the methods; as JSON may hold it."""

    def keep(
        self, folder: epath.Path, method: str, case: Case, pictures: UInt8[np.ndarray, "n y x 3"]
    ) -> np.ndarray:
        """See edited pictures before they are judged: may write them for others to read, and returns what was
        written."""

    def score(self, case: Case, pictures: UInt8[np.ndarray, "n y x 3"]) -> tuple[list[Scores], list[str]]:
        """Numbers of every edited picture, one a column, and a remark on each, perhaps empty."""

    def badness(self, scores: Scores) -> float:
        """How bad a picture is, to show the worst first."""
