"""The Learn page without its page: a drawn scene, its edits, and whether they happened."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import UInt8

from sflow_jax.evaluation.known import read_outcome, scene_edits
from sflow_jax.measures.metrics import psnr
from sflow_jax.pictures.files import to_uint8, to_unit
from sflow_jax.pipeline import StableFlow
from sflow_jax.studio.desk import Watch
from sflow_jax.toyworld.edits import Edit
from sflow_jax.toyworld.reader import AttributeReader


@dataclass(frozen=True)
class Outcome:
    """An edit beside its right answer. lost: attribute → what it was and what is seen now. decibels: to the answer.

    seen: what the reader sees of the attribute that was to change.
    """

    edit: Edit
    picture: UInt8[np.ndarray, "y x 3"]
    seen: str
    happened: bool
    lost: dict[str, tuple[str, str]]
    decibels: float


def draw_edit(scene: int, family: str) -> Edit:
    """The scene of a number, that training never saw, and its edit of a family."""
    return next(edit for edit in scene_edits(0, scene) if edit.family == family)


def answer(
    flow: StableFlow, reader: AttributeReader, edit: Edit, settings: dict[str, Any], watch: Watch
) -> Outcome:
    """The model's edit of the drawing, and what the reader sees in it. settings: as of `StableFlow.edit`."""
    canvas = flow.info.canvas()
    drawing = edit.source.draw(canvas.height)
    painted = flow.edit(
        edit.source_caption, [edit.edit_caption], image=drawing, progress=watch.progress,
        on_step=watch.preview(flow.painter, canvas), **settings,
    )  # fmt: skip
    picture = to_uint8(painted.images[1])
    # As the file's 8 bits, so that a saved picture gets the same answer.
    image = to_unit(picture)
    seen = reader(image[None]).named[0]
    happened, lost = read_outcome(edit, seen)
    before = edit.source.attributes()
    changed = {name: (before[name], seen[name]) for name in lost}
    decibels = float(psnr(image, to_unit(edit.target.draw(canvas.height))))
    return Outcome(edit, picture, seen[edit.attribute], happened, changed, decibels)
