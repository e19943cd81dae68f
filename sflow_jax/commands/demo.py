"""`sflow demo`: what the method does, shown on the embedded model in under a minute."""

import contextlib
import dataclasses
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import click
import numpy as np
from jaxtyping import Float, UInt8

from sflow_jax.commands.console import Command, say
from sflow_jax.commands.options import record
from sflow_jax.pictures.files import to_unit
from sflow_jax.pictures.grids import captioned_grid
from sflow_jax.settings import EMBEDDED
from sflow_jax.storage.folders import output_folder
from sflow_jax.toyworld.scenes import Scene, sample_scene

if TYPE_CHECKING:
    from sflow_jax.pipeline import StableFlow
    from sflow_jax.results import Edit

SEED = 5
GENERATED = Scene(species="cat", colour="orange", hat="blue", object="ball", object_colour="red", pose="standing")
CHANGES = ({"pose": "sitting"}, {"place": "snow"}, {"hat": "none"}, {"species": "dog"})
DRAWN_SEED = 11
WORDING = 3
# Levels of 255 by which a pixel of two drawings must differ to count as changed.
VISIBLE = 6


@click.command(cls=Command, epilog="sflow demo")
@click.option("--out", "-o", default="sflow-demo", show_default=True, help="Folder for the results.")
def demo(out: str) -> None:
    """See the method at work on the embedded model, in under a minute: grid.png, demo.json."""
    with output_folder(out, "demo.json") as folder:
        shown = run_demo()
        folder.image("grid.png", captioned_grid(shown.images, shown.captions, columns=1 + len(CHANGES)))
        folder.json("demo.json", record(EMBEDDED, shown.figures, shown.seconds))
    say(summary(shown, out))


@dataclasses.dataclass(frozen=True)
class Demo:
    """Pictures and captions, row by row; what was measured; and how long each part took."""

    images: Float[np.ndarray, "n y x 3"]
    captions: list[str]
    figures: dict[str, Any]
    seconds: dict[str, float]


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


def run_demo(*, progress: bool = True) -> Demo:
    """Generate a picture and edit it four ways; take a drawing that training never saw, and edit that."""
    # Imported late, so that `--help` is quick.
    from sflow_jax.pipeline import StableFlow
    from sflow_jax.toyworld.reader import AttributeReader

    seconds: dict[str, float] = {}
    with timed(seconds, "convert and load"):
        flow, reader = StableFlow.load(EMBEDDED), AttributeReader()
    generated = Example(GENERATED, CHANGES)
    source, *edits = generated.captions
    with timed(seconds, "generate and edit"):
        painted = flow.edit(source, edits, seed=SEED, edits_at_once=len(edits), progress=progress)
    scene = sample_scene(np.random.default_rng(DRAWN_SEED), "held-out")
    drawn, drawing = Example(scene, drawn_changes(scene)), scene.draw(flow.info.picture_size)
    redrawn = edit_drawing(flow, drawing, drawn, seconds, progress)
    of_painted, of_redrawn = (reader(edit.images).named for edit in (painted, redrawn))
    answers = (known_answer(image, scene, target) for image, target in zip(redrawn.images[1:], drawn.targets))
    outcomes = drawn.outcomes(scene.attributes(), of_redrawn[1:])
    figures = {
        "layers": painted.layers,
        "generated": generated.outcomes(of_painted[0], of_painted[1:]),
        "drawn": [outcome | answer for outcome, answer in zip(outcomes, answers)],
    }
    images = np.concatenate([painted.images, to_unit(drawing)[None], redrawn.images[1:]])
    captions = [f"generated: {source}", *edits, f"drawn: {drawn.captions[0]}", *drawn.captions[1:]]
    return Demo(images, captions, figures, seconds)


def edit_drawing(
    flow: "StableFlow",
    drawing: UInt8[np.ndarray, "y x 3"],
    example: Example,
    seconds: dict[str, float],
    progress: bool,
) -> "Edit":
    """Invert a drawing, then edit it in all of the example's ways."""
    source, *edits = example.captions
    with timed(seconds, "invert"):
        inversion = flow.invert(drawing, source, progress=progress)
    with timed(seconds, "edit the drawing"):
        return flow.edit(
            source, edits, inversion=inversion, unnudge=True, edits_at_once=len(edits), progress=progress
        )


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
        "Painted a picture with the embedded model and edited it four ways, then took a drawing that the model",
        "never saw, inverted it and edited it. Keys and values of the source went into layers "
        f"{', '.join(map(str, demo.figures['layers']))}.",
        "",
        *(outcome_line(kind, outcome) for kind in ("generated", "drawn") for outcome in demo.figures[kind]),
        "",
        f"Took: {durations}. Look at {out}/grid.png; all figures are in {out}/demo.json.",
        "Next: sflow edit -m toyworld -p 'a red dog on the beach' -e 'a blue dog on the beach' -o dog",
    ]
    return "\n".join(lines)


def outcome_line(kind: str, outcome: dict[str, Any]) -> str:
    """What happened to one edit."""
    fate = "happened" if outcome["happened"] else "did not happen"
    lost = f"; lost: {', '.join(outcome['lost'])}" if outcome["lost"] else ""
    known = f"; {outcome['psnr_to_right_answer_db']} dB to the right answer" if kind == "drawn" else ""
    return f"  {kind:9} {outcome['change']:16} {fate}{lost}{known}"
