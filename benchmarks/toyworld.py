"""What an embedded model can do, measured against the world it was trained on, whose right answers are known.

    python benchmarks/toyworld.py                  everything: about a quarter of an hour on two cores
    python benchmarks/toyworld.py --part edits     one part
    python benchmarks/toyworld.py --model toyworld-sd3 --out benchmarks/results/sd3/toyworld.json

Parts: `vae` (reconstruction of held-out drawings), `reader` (the attribute reader on held-out drawings),
`generation` (attributes of pictures painted from held-out captions), `vital` (bypass every layer, compare with
DINO's features), `edits` (known-answer edits of drawn and of generated pictures, four layer sets), `nudge`
(latent nudging against reconstruction) and `skip` (skip-layer guidance with vital and other layers). Writes JSON,
where parts that are not measured again stay; Markdown and pictures go beside it. With `--save`, the vital layers
found become the model's own.
"""

import dataclasses
import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import click
import numpy as np
from common import (
    SEED,
    draw_noise,
    happened,
    held_out_edits,
    out_option,
    paint_edit,
    write_json,
    write_text,
)
from tqdm.auto import tqdm

from sflow_jax.commands.console import use_compilation_cache
from sflow_jax.editing.branches import Branches
from sflow_jax.embedded import MODELS, VITAL_LAYERS_FILE
from sflow_jax.measures.metrics import cosine_similarity, psnr
from sflow_jax.painter import Painter
from sflow_jax.pictures.files import to_unit
from sflow_jax.pictures.grids import captioned_grid
from sflow_jax.pipeline import StableFlow
from sflow_jax.runs.folder import RunFolder, read_manifest
from sflow_jax.sampling.control import LayerControl
from sflow_jax.settings import EMBEDDED, EMBEDDED_MODELS, GuidedSettings, SweepSettings
from sflow_jax.toyworld.edits import EDIT_FAMILIES, Edit
from sflow_jax.toyworld.reader import AttributeReader
from sflow_jax.toyworld.scenes import Scene, sample_scene
from sflow_jax.vitality.find import find_vital_layers
from sflow_jax.vitality.pictures import Comparison, kept_comparisons
from sflow_jax.vitality.plan import plan_sweep
from sflow_jax.vitality.summary import Summary

BATCH = 32
NUDGES = (1.0, 1.05, 1.1, 1.15, 1.2, 1.3)
GRID_PICTURES, GRID_COLUMNS = 24, 6

LayerSets = Mapping[str, Sequence[int]]


@dataclasses.dataclass(frozen=True)
class Study:
    """What is measured, with what, and what is known so far.

    pictures: how many to paint; edits a family are an eighth. figures: of every part, by its name. folder: for
    grids of pictures.
    """

    flow: StableFlow
    reader: AttributeReader
    pictures: int
    figures: dict[str, Any]
    folder: Path

    @property
    def painter(self) -> Painter:
        """The model's."""
        return self.flow.painter

    @property
    def size(self) -> int:
        """Height and width of the model's pictures, pixels."""
        return self.flow.info.picture_size

    def save_grid(self, name: str, images: Sequence[np.ndarray], captions: Sequence[str], columns: int) -> None:
        """Write pictures [y, x, 3] in 0..1 with captions as one PNG."""
        self.folder.mkdir(parents=True, exist_ok=True)
        captioned_grid(np.stack(images), captions, columns=columns).save(self.folder / name)


class Edited(NamedTuple):
    """A source picture [y, x, 3] and its edits [sets, y, x, 3], in 0..1."""

    source: np.ndarray
    edits: np.ndarray


def held_out_scenes(count: int, seed: int) -> list[Scene]:
    """Scenes of combinations that training never saw."""
    rng = np.random.default_rng(seed)
    return [sample_scene(rng, "held-out") for _ in range(count)]


def draw(scenes: Sequence[Scene], size: int) -> np.ndarray:
    """Pictures in 0..1, float32 [n, y, x, 3]."""
    return to_unit(np.stack([scene.draw(size) for scene in scenes]))


def shares(readings: list[dict[str, str]], truth: list[dict[str, str]]) -> dict[str, float]:
    """Share of pictures whose attribute is read right, per attribute and for all together."""
    right = {name: [read[name] == true[name] for read, true in zip(readings, truth)] for name in truth[0]}
    together = np.all(list(right.values()), axis=0)
    return {name: float(np.mean(values)) for name, values in right.items()} | {
        "all together": float(together.mean())
    }


def paint(
    painter: Painter,
    captions: Sequence[str],
    noise: np.ndarray,
    *,
    guidance: float | None = None,
    skip: Sequence[int] = (),
) -> np.ndarray:
    """Pictures of captions at the model's defaults, each from its own noise, in batches of one shape.

    skip: layers of skip-layer guidance, at its own defaults.
    """
    defaults, canvas, images = painter.defaults, painter.info.canvas(), []
    branches = Branches.of(painter, BATCH, GuidedSettings(skip_layers=list(skip)))
    control = branches.on(LayerControl.none(defaults.steps, BATCH, painter.layers))
    scale = np.full(BATCH, defaults.guidance if guidance is None else guidance, np.float32)
    for start in tqdm(range(0, len(captions), BATCH), desc="painting", leave=False):
        rows = np.minimum(np.arange(start, start + BATCH), len(captions) - 1)
        latents = painter.denoise(
            noise[rows],
            painter.encode_prompts([captions[row] for row in rows]),
            control,
            canvas,
            guidance=scale,
            groups=BATCH,
            negative=branches.conditioning(painter),
        )
        images.append(painter.decode(latents, canvas)[: len(captions) - start])
    return np.concatenate(images)


def measure_vae(study: Study) -> dict[str, Any]:
    """PSNR of held-out drawings through the autoencoder."""
    scenes, painter = held_out_scenes(study.pictures, SEED), study.painter
    canvas, values = painter.info.canvas(), []
    for scene, drawing in zip(tqdm(scenes, "vae"), draw(scenes, study.size)):
        latents = painter.encode_image(scene.draw(study.size), canvas)
        values.append(psnr(painter.decode(latents, canvas)[0], drawing))
    return {"pictures": len(scenes), "psnr_db": float(np.mean(values)), "psnr_db_worst": float(np.min(values))}


def measure_reader(study: Study) -> dict[str, Any]:
    """Share of attributes read right off held-out drawings."""
    scenes = held_out_scenes(4 * study.pictures, SEED + 1)
    truth = [scene.attributes() for scene in scenes]
    return {"pictures": len(scenes), "right": shares(study.reader(draw(scenes, study.size)).named, truth)}


def measure_generation(study: Study) -> dict[str, Any]:
    """Attributes of pictures painted from held-out captions, at the model's default settings."""
    scenes, defaults = held_out_scenes(study.pictures, SEED + 2), study.flow.defaults
    captions = [scene.caption(number) for number, scene in enumerate(scenes)]
    images = paint(study.painter, captions, draw_noise(study.painter, len(scenes), SEED))
    study.save_grid("generated.png", images[:GRID_PICTURES], captions[:GRID_PICTURES], GRID_COLUMNS)
    right = shares(study.reader(images).named, [scene.attributes() for scene in scenes])
    return {"pictures": len(scenes), "steps": defaults.steps, "guidance": defaults.guidance, "right": right}


def sweep(painter: Painter) -> tuple[Summary, Comparison]:
    """A search for vital layers as `sflow vital` makes it, and the first prompt's pictures."""
    settings = SweepSettings(batch=BATCH, keep_images="all")
    with tempfile.TemporaryDirectory() as temporary:
        run = Path(temporary) / "run"
        summary = find_vital_layers(painter, settings, run)
        plan = plan_sweep(settings, painter.info, painter.checkpoint)
        (comparison,) = kept_comparisons(RunFolder(run, read_manifest(run)), plan, prompts=1)
    return summary, comparison


def measure_vital(study: Study) -> dict[str, Any]:
    """The vital layers, and as many of the least vital ones."""
    summary, comparison = sweep(study.painter)
    vitality, vital = summary.vitality.tolist(), list(summary.choice.layers)
    captions = ["reference", *(f"without {layer}: {value:.3f}" for layer, value in enumerate(vitality))]
    pictures = [comparison.reference, *(picture for _, picture in sorted(comparison.bypassed.items()))]
    study.save_grid("bypass.png", to_unit(np.stack(pictures)), captions, columns=7)
    return {
        "prompts": len(summary.settings["prompts"]),
        "steps": summary.settings["steps"],
        "guidance": summary.settings["guidance"],
        "vitality": vitality,
        "vital": vital,
        "least vital": sorted(np.argsort(vitality)[: len(vital)].tolist()),
    }


def layer_sets(figures: Mapping[str, Any], layers: int) -> LayerSets:
    """The four sets of the paper's ablation, by what the part `vital` found."""
    if "vital" not in figures:
        raise click.UsageError("no vital layers measured yet: run --part vital first")
    vital = figures["vital"]
    return {"none": [], "all": list(range(layers)), "vital": vital["vital"], "least vital": vital["least vital"]}


def edit_drawn(study: Study, edit: Edit, sets: LayerSets) -> Edited:
    """An inverted drawing, edited once a layer set; the nudge is undone at decoding."""
    inversion = study.flow.invert(edit.source.draw(study.size), edit.source_caption, progress=False)
    defaults, painter = study.flow.defaults, study.painter
    latents = paint_edit(
        painter,
        edit,
        sets,
        inversion.trajectory[-1],
        steps=inversion.settings["steps"],
        guidance=(defaults.real_source_guidance, defaults.real_edit_guidance),
        inversion=inversion,
    )
    images = painter.decode(latents / inversion.settings["nudge"], painter.info.canvas())
    return Edited(draw([edit.source], study.size)[0], images[1:])


def edit_generated(study: Study, edit: Edit, sets: LayerSets, noise: np.ndarray) -> Edited:
    """The same of a picture painted from the source's caption. noise: [s, c]."""
    defaults, painter = study.flow.defaults, study.painter
    guidance = (defaults.guidance, defaults.guidance)
    latents = paint_edit(painter, edit, sets, noise, steps=defaults.edit_steps, guidance=guidance)
    images = painter.decode(latents, painter.info.canvas())
    return Edited(images[0], images[1:])


def judge(study: Study, edit: Edit, pictures: Edited, drawn: bool) -> list[dict[str, float]]:
    """Figures of one edit, a row a layer set; pixel masks and right answers only exist for drawings."""
    source, size = pictures.source, study.size
    reading, before = study.reader(pictures.edits), study.reader(source[None])
    target, mask = edit.target.attributes(), edit.mask(size)
    unchanged = [name for name, value in edit.source.attributes().items() if target[name] == value]
    rows = []
    for i, image in enumerate(pictures.edits):
        others = [reading.named[i][name] == before.named[0][name] for name in unchanged]
        row = {
            "success": float(happened(edit, reading.named[i])),
            "others kept": float(np.mean(others)),
            "dino": float(cosine_similarity(reading.features[i : i + 1], before.features)[0]),
            "details moved": float(np.abs(reading.unnamed[i] - before.unnamed[0]).mean()),
            "psnr to source": psnr(image, source),
        }
        if drawn:
            row["psnr outside"] = psnr(image[~mask], source[~mask])
            row["psnr to answer"] = psnr(image, draw([edit.target], size)[0])
        rows.append(row)
    return rows


def mean_rows(edits: list[list[dict[str, float]]], names: Sequence[str]) -> dict[str, dict[str, float]]:
    """Name of a layer set → means of its figures over edits [edits][sets]."""
    by_set = dict(zip(names, zip(*edits)))
    return {
        name: {key: float(np.mean([row[key] for row in rows])) for key in rows[0]} for name, rows in by_set.items()
    }


def measure_family(
    study: Study, family: str, sets: LayerSets, drawn: bool
) -> tuple[dict[str, Any], list[tuple[np.ndarray, str]]]:
    """Figures of one family's edits by layer set; pictures and captions of its first edit."""
    count, seed = edits_a_family(study.pictures), SEED + 10 + EDIT_FAMILIES.index(family)
    edits, noises = held_out_edits(family, count, seed), draw_noise(study.painter, count, seed)
    judged, shown = [], []
    for edit, noise in zip(tqdm(edits, desc=f"{'drawn' if drawn else 'generated'}, {family}"), noises):
        pictures = edit_drawn(study, edit, sets) if drawn else edit_generated(study, edit, sets, noise)
        captions = [edit.source_caption, *(f"{name}: {edit.edit_caption}" for name in sets)]
        shown = shown or list(zip([pictures.source, *pictures.edits], captions))
        judged.append(judge(study, edit, pictures, drawn))
    return mean_rows(judged, list(sets)), shown


def edits_a_family(pictures: int) -> int:
    """How many edits of each family go with so many pictures."""
    return max(1, pictures // 8)


def measure_edits(study: Study) -> dict[str, Any]:
    """Known-answer edits of drawn and generated pictures, per family and layer set."""
    sets = layer_sets(study.figures, study.flow.layers)
    figures: dict[str, Any] = {"per_family": edits_a_family(study.pictures), "layers": sets}
    for kind in ("drawn", "generated"):
        figures[kind], shown = {}, []
        for family in EDIT_FAMILIES:
            figures[kind][family], examples = measure_family(study, family, sets, drawn=kind == "drawn")
            shown += examples
        images, captions = zip(*shown)
        study.save_grid(f"edits-{kind}.png", images, captions, columns=1 + len(sets))
    return figures


def reconstruct(study: Study, scene: Scene, caption: str, nudge: float) -> tuple[float, float]:
    """PSNR of a drawing inverted and painted again with its caption: as it is, and with the nudge undone."""
    picture, flow = scene.draw(study.size), study.flow
    inversion = flow.invert(picture, caption, nudge=nudge, progress=False)
    again = flow.generate(
        [caption],
        steps=inversion.settings["steps"],
        guidance=inversion.settings["guidance"],
        noise=inversion.trajectory[-1],
        progress=False,
    )
    undone = flow.decode(again.latents / nudge)
    return tuple(psnr(images[0], to_unit(picture)) for images in (again.images, undone))


def measure_nudge(study: Study) -> dict[str, Any]:
    """PSNR of drawings inverted and painted again with their own caption, per nudge, undone or not at decoding."""
    scenes, figures = held_out_scenes(max(4, study.pictures // 16), SEED + 4), {}
    for nudge in tqdm(NUDGES, desc="nudging"):
        values = [reconstruct(study, scene, scene.caption(i), nudge) for i, scene in enumerate(scenes)]
        nudged, undone = np.mean(values, axis=0).tolist()
        figures[str(nudge)] = {"psnr_db": nudged, "psnr_db_undone": undone}
    return {"pictures": len(scenes), "nudges": figures}


def measure_skip(study: Study) -> dict[str, Any]:
    """Attributes of pictures painted with skip-layer guidance, by guidance scale and the layers left out."""
    scenes = held_out_scenes(max(BATCH, study.pictures // 4), SEED + 2)
    captions, truth = [scene.caption(i) for i, scene in enumerate(scenes)], [scene.attributes() for scene in scenes]
    noise = draw_noise(study.painter, len(scenes), SEED)
    sets = layer_sets(study.figures, study.flow.layers)
    figures: dict[str, Any] = {"pictures": len(scenes), "right": {}}
    for guidance in (1.0, study.flow.defaults.guidance):
        for name in ("none", "vital", "least vital"):
            images = paint(study.painter, captions, noise, guidance=guidance, skip=sets[name])
            right = shares(study.reader(images).named, truth)
            figures["right"].setdefault(str(guidance), {})[name] = right
    return figures


PARTS = {
    "vae": measure_vae,
    "reader": measure_reader,
    "generation": measure_generation,
    "vital": measure_vital,
    "edits": measure_edits,
    "nudge": measure_nudge,
    "skip": measure_skip,
}


def table(title: str, names: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of Markdown."""
    cells = (f"| {' | '.join(row)} |" for row in rows)
    return [title, "", f"| {' | '.join(names)} |", "|" + " --- |" * len(names), *cells, ""]


def tables(figures: Mapping[str, Any]) -> Iterator[str]:
    """The figures as lines of Markdown, for the README."""
    for part in ("reader", "generation"):
        if part in figures:
            right = figures[part]["right"]
            title = f"{part}, {figures[part]['pictures']} pictures"
            yield from table(title, list(right), [[f"{share:.1%}" for share in right.values()]])
    for guidance, sets in figures.get("skip", {}).get("right", {}).items():
        rows = [[name, *(f"{share:.1%}" for share in right.values())] for name, right in sets.items()]
        title = f"skip-layer guidance at guidance {guidance}, {figures['skip']['pictures']} pictures"
        yield from table(title, ["layers left out", *sets["none"]], rows)
    for kind in ("drawn", "generated"):
        for family, sets in figures.get("edits", {}).get(kind, {}).items():
            names = list(next(iter(sets.values())))
            rows = [[name, *(f"{row[key]:.2f}" for key in names)] for name, row in sets.items()]
            yield from table(f"{kind}, {family}", ["layers", *names], rows)


def save_vital(model: str, vital: Mapping[str, Any]) -> None:
    """Record what the part `vital` found in an embedded model."""
    origin = f"measured on {vital['prompts']} held-out captions by benchmarks/toyworld.py"
    write_json(MODELS[model].own / VITAL_LAYERS_FILE, {"layers": vital["vital"], "origin": origin})


@click.command()
@click.option(
    "--part", "parts", multiple=True, type=click.Choice(list(PARTS)), help="Only these parts; repeat for more."
)
@click.option(
    "--pictures", default=512, show_default=True, help="Pictures painted; edits per family are an eighth."
)
@click.option("--save", is_flag=True, help="Record the vital layers found in the embedded model.")
@click.option("--model", type=click.Choice(EMBEDDED_MODELS), default=EMBEDDED, show_default=True)
@out_option("toyworld.json")
def main(parts: tuple[str, ...], pictures: int, save: bool, model: str, out: Path) -> None:
    """Measure an embedded model on its world."""
    use_compilation_cache()
    figures = json.loads(out.read_text()) if out.exists() else {}
    study = Study(StableFlow.load(model), AttributeReader(), pictures, figures, out.parent)
    for part in parts or PARTS:
        figures[part] = PARTS[part](study)
        write_json(out, figures)
        click.echo(f"{part}: {json.dumps(figures[part])}")
        if part == "vital" and save:
            save_vital(model, figures[part])
    write_text(out.with_suffix(".md"), "\n".join(tables(figures)))
    click.echo(f"written to {out}")


if __name__ == "__main__":
    main()
