"""What `sflow demo` paints on the embedded model, and what it says of it."""

import contextlib
import dataclasses
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float, UInt8

from sflow_jax.pictures.files import to_unit
from sflow_jax.settings import EMBEDDED
from sflow_jax.toyworld.scenes import Scene, sample_scene

if TYPE_CHECKING:
    from sflow_jax.progress import Progress
    from sflow_jax.results import Edit
    from sflow_jax.toyworld.reader import AttributeReader

SEED = 5
GENERATED = Scene(species="cat", colour="orange", hat="blue", object="ball", object_colour="red", pose="standing")
CHANGES = ({"pose": "sitting"}, {"place": "snow"}, {"hat": "none"}, {"species": "dog"})
DRAWN_SEED = 11
WORDING = 3
# Levels of 255 by which a pixel of two drawings must differ to count as changed.
VISIBLE = 6


@dataclasses.dataclass(frozen=True)
class Row:
    """A source and its edits. what: for captions. outcomes: what happened to each edit. settings: the edits'."""

    name: str
    what: str
    source: Float[np.ndarray, "y x 3"]
    edits: Float[np.ndarray, "n y x 3"]
    prompts: Sequence[str]
    outcomes: list[dict[str, Any]]
    settings: Mapping[str, Any]

    @property
    def captions(self) -> list[str]:
        """Of the source, then of every edit."""
        return [f"{self.what}: {self.prompts[0]}", *self.prompts[1:]]


@dataclasses.dataclass(frozen=True)
class Demo:
    """What was painted, and how long each part took. layers: where the reference injects. model: its record."""

    rows: list[Row]
    layers: tuple[int, ...]
    seconds: dict[str, float]
    model: Mapping[str, Any]

    @property
    def captions(self) -> list[str]:
        """Of all pictures, row by row."""
        return [caption for row in self.rows for caption in row.captions]

    @property
    def figures(self) -> dict[str, Any]:
        """As JSON holds them."""
        return {"layers": self.layers} | {row.name: row.outcomes for row in self.rows}

    @property
    def record(self) -> dict[str, Any]:
        """The same with the settings of every row, and which model painted where."""
        edits = {row.name: dict(row.settings) for row in self.rows}
        return {"command": "demo", **self.figures, "edits": edits, **self.model}


@dataclasses.dataclass(frozen=True)
class Example:
    """A scene, and changes to it, each an edit of its own."""

    scene: Scene
    changes: Sequence[dict[str, str]]

    @property
    def targets(self) -> list[Scene]:
        """What each edit should show."""
        return [self.scene.edited(**change) for change in self.changes]

    @property
    def captions(self) -> list[str]:
        """Of the scene, then of every target."""
        return [scene.caption(WORDING) for scene in (self.scene, *self.targets)]

    def outcomes(self, source: dict[str, str], edits: Sequence[dict[str, str]]) -> list[dict[str, Any]]:
        """From attributes read off pictures: whether each change happened, and which other attributes were lost."""
        return [
            {
                "change": label(change),
                "happened": all(edit[name] == value for name, value in change.items()),
                "lost": [name for name in source if name not in change and edit[name] != source[name]],
            }
            for change, edit in zip(self.changes, edits, strict=True)
        ]


def run_demo(progress: "Progress") -> Demo:
    """Edit a painted picture and a drawing that training never saw, by the default for photos and the reference."""
    from sflow_jax.editing.methods import PHOTO_METHOD, REFERENCE
    from sflow_jax.pipeline import StableFlow
    from sflow_jax.toyworld.reader import AttributeReader

    seconds: dict[str, float] = {}
    with timed(seconds, "convert and load"):
        flow, reader = StableFlow.load(EMBEDDED), AttributeReader()
    scene = sample_scene(np.random.default_rng(DRAWN_SEED), "held-out")
    drawing = scene.draw(flow.info.picture_size)
    painted, drawn = Example(GENERATED, CHANGES), Example(scene, drawn_changes(scene))
    rows = []
    for name, what, example, options in (
        ("painted", "painted", painted, {"method": PHOTO_METHOD}),
        ("drawn", "drawn", drawn, {"method": PHOTO_METHOD, "image": drawing}),
        ("reference", "drawn, by the reference", drawn, {"method": REFERENCE, "image": drawing, "unnudge": True}),
    ):
        source, *edits = example.captions
        with timed(seconds, name):
            edit = flow.edit(source, edits, seed=SEED, edits_at_once=len(edits), progress=progress, **options)
        rows.append(judged(name, what, example, edit, drawing if "image" in options else None, reader))
    return Demo(rows, edit.layers, seconds, flow.painter.record())


def judged(
    name: str,
    what: str,
    example: Example,
    edit: "Edit",
    drawing: UInt8[np.ndarray, "y x 3"] | None,
    reader: "AttributeReader",
) -> Row:
    """A row of the demo; where its source is a drawing, with distances to the right answers."""
    before, *after = reader(edit.images).named
    outcomes = example.outcomes(before if drawing is None else example.scene.attributes(), after)
    source, edits = edit.images[0] if drawing is None else to_unit(drawing), edit.images[1:]
    if drawing is not None:
        answers = (known_answer(image, example.scene, target) for image, target in zip(edits, example.targets))
        outcomes = [outcome | answer for outcome, answer in zip(outcomes, answers)]
    return Row(name, what, source, edits, example.captions, outcomes, edit.record)


def drawn_changes(scene: Scene) -> list[dict[str, str]]:
    """Four edits that change something, whatever the scene shows."""

    def other(name: str, *values: str) -> dict[str, str]:
        return {name: next(value for value in values if getattr(scene, name) != value)}

    return [
        other("pose", "lying", "standing"),
        other("hat", "yellow", "none"),
        other("colour", "purple", "yellow"),
        other("place", "night", "beach"),
    ]


def known_answer(image: Float[np.ndarray, "y x 3"], source: Scene, target: Scene) -> dict[str, float]:
    """An edit against the drawing with that attribute changed, and against the source where nothing should."""
    from sflow_jax.measures.metrics import psnr

    before, after = (scene.draw(image.shape[0]) for scene in (source, target))
    changed = np.abs(before.astype(int) - after.astype(int)).max(axis=-1) > VISIBLE
    decibels = {"psnr_to_right_answer_db": psnr(image, to_unit(after))}
    if not changed.all():
        decibels["psnr_of_what_should_stay_db"] = psnr(image[~changed], to_unit(before)[~changed])
    return {name: round(value, 1) for name, value in decibels.items()}


@contextlib.contextmanager
def timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    """Note how long a block takes."""
    start = time.perf_counter()
    yield
    seconds[name] = round(time.perf_counter() - start, 1)


def label(change: dict[str, str]) -> str:
    """`pose → sitting`."""
    return ", ".join(f"{name} → {value}" for name, value in change.items())


def summary(demo: Demo, out: str) -> str:
    """What happened, in plain words."""
    durations = ", ".join(f"{name} {value} s" for name, value in demo.seconds.items())
    lines = [
        "Painted a picture with the embedded model and edited it four ways, then edited a drawing that the model",
        "never saw: by the method that photos are edited with, and by the paper's, which puts keys and values of",
        f"the source into layers {', '.join(map(str, demo.layers))}.",
        "",
        *(outcome_line(row.name, outcome) for row in demo.rows for outcome in row.outcomes),
        "",
        f"Took: {durations}. Look at {out}/grid.png; all figures are in {out}/demo.json.",
        "How often edits happen: sflow evaluate -m toyworld --known-answers --methods coupled,reference -o known",
        "Next: sflow edit -m toyworld -p 'a red dog on the beach' -e 'a blue dog on the beach' -o dog",
    ]
    return "\n".join(lines)


def outcome_line(kind: str, outcome: dict[str, Any]) -> str:
    """What happened to one edit."""
    fate = "happened" if outcome["happened"] else "did not happen"
    lost = f"; lost: {', '.join(outcome['lost'])}" if outcome["lost"] else ""
    decibels = outcome.get("psnr_to_right_answer_db")
    known = "" if decibels is None else f"; {decibels} dB to the right answer"
    return f"  {kind:9} {outcome['change']:16} {fate}{lost}{known}"
