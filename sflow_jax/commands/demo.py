"""`sflow demo`: what the method does, shown on the embedded model in under a minute."""

import dataclasses
import time
from typing import Any

import numpy as np
from jaxtyping import Bool, Float

from sflow_jax.measures.metrics import psnr
from sflow_jax.pipeline import StableFlow
from sflow_jax.toyworld.reader import AttributeReader
from sflow_jax.toyworld.scenes import Scene, sample_scene

SEED = 5
GENERATED = Scene(species="cat", colour="orange", hat="blue", object="ball", object_colour="red", pose="standing")
CHANGES = ({"pose": "sitting"}, {"place": "snow"}, {"hat": "none"}, {"species": "dog"})
DRAWN_SEED = 11
WORDING = 3


@dataclasses.dataclass(frozen=True)
class Demo:
    """Pictures and captions, row by row, and what was measured."""

    images: Float[np.ndarray, "n y x 3"]
    captions: list[str]
    figures: dict[str, Any]


def described(change: dict[str, str]) -> str:
    """`pose → sitting`."""
    return ", ".join(f"{name} → {value}" for name, value in change.items())


def outside(image: np.ndarray, reference: np.ndarray, mask: Bool[np.ndarray, "y x"]) -> float:
    """PSNR in dB over the pixels that an edit should leave alone."""
    return psnr(image[~mask], reference[~mask])


def judged(source: dict[str, str], edit: dict[str, str], change: dict[str, str]) -> dict[str, Any]:
    """What the attribute reader says of an edit: whether it happened, and which other attributes changed."""
    return {
        "happened": all(edit[name] == value for name, value in change.items()),
        "lost": [name for name in source if name not in change and edit[name] != source[name]],
    }


def as_float(picture: np.ndarray) -> np.ndarray:
    """uint8 → float32 in 0..1."""
    return picture.astype(np.float32) / 255


def run_demo(*, progress: bool = True) -> Demo:
    """Generate a picture and edit it four ways; take a drawing that training never saw, and edit that."""
    seconds, start = {}, time.perf_counter()

    def lap(name: str) -> None:
        nonlocal start
        seconds[name], start = round(time.perf_counter() - start, 1), time.perf_counter()

    flow, reader = StableFlow.load("toyworld"), AttributeReader()
    lap("convert and load")
    captions = [GENERATED.caption(WORDING), *(GENERATED.edited(**change).caption(WORDING) for change in CHANGES)]
    generated = flow.edit(captions[0], captions[1:], seed=SEED, edits_at_once=len(CHANGES), progress=progress)
    lap("generate and edit")
    scene = sample_scene(np.random.default_rng(DRAWN_SEED), "held-out")
    targets = [scene.edited(**change) for change in drawn_changes(scene)]
    drawing = scene.draw(flow.info.picture_size)
    prompts = [scene.caption(WORDING), *(target.caption(WORDING) for target in targets)]
    inversion = flow.invert(drawing, prompts[0], progress=progress)
    lap("invert")
    real = flow.edit(
        prompts[0], prompts[1:], inversion=inversion, unnudge=True, edits_at_once=len(CHANGES), progress=progress
    )
    lap("edit the drawing")
    read = reader(np.concatenate([generated.images, real.images])).named
    rows = len(generated.images)
    figures = {
        "layers": generated.layers,
        "generated": [
            {"change": described(change), **judged(read[0], read[i], change)} for i, change in enumerate(CHANGES, 1)
        ],
        "drawn": [
            {
                "change": described(change),
                **judged(scene.attributes(), read[rows + i], change),
                **known_answer(real.images[i], scene, target),
            }
            for i, (change, target) in enumerate(zip(drawn_changes(scene), targets), 1)
        ],
        "seconds": seconds,
    }
    shown = np.concatenate([generated.images, as_float(drawing)[None], real.images[1:]])
    titles = [f"generated: {captions[0]}", *captions[1:], f"drawn: {prompts[0]}", *prompts[1:]]
    return Demo(shown, titles, figures)


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


def known_answer(image: np.ndarray, source: Scene, target: Scene) -> dict[str, float]:
    """An edit against the drawing with that attribute changed, and against the source where nothing should."""
    before, after = (scene.draw(image.shape[0]) for scene in (source, target))
    mask = np.abs(before.astype(int) - after.astype(int)).max(axis=-1) > 6
    figures = {"psnr_to_right_answer_db": psnr(image, as_float(after))}
    if not mask.all():
        figures["psnr_of_what_should_stay_db"] = outside(image, as_float(before), mask)
    return {name: round(value, 1) for name, value in figures.items()}


def told(demo: Demo, out: str) -> str:
    """What happened, in plain words."""
    figures = demo.figures
    lines = [
        "Painted a picture with the embedded model and edited it four ways, then took a drawing that the model",
        "never saw, inverted it and edited it. Keys and values of the source went into layers "
        f"{', '.join(map(str, figures['layers']))}.",
        "",
    ]
    for kind in ("generated", "drawn"):
        for row in figures[kind]:
            fate = "happened" if row["happened"] else "did not happen"
            lost = f"; lost: {', '.join(row['lost'])}" if row["lost"] else ""
            known = f"; {row['psnr_to_right_answer_db']} dB to the right answer" if kind == "drawn" else ""
            lines.append(f"  {kind:9} {row['change']:16} {fate}{lost}{known}")
    taken = ", ".join(f"{name} {value} s" for name, value in figures["seconds"].items())
    lines += [
        "",
        f"Took: {taken}. Look at {out}/grid.png; all figures are in {out}/demo.json.",
        "Next: sflow edit -m toyworld -p 'a red dog on the beach' -e 'a blue dog on the beach' -o dog",
    ]
    return "\n".join(lines)
