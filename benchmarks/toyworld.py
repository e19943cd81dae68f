"""What the embedded model can do, measured against the world it was trained on, whose right answers are known.

    python benchmarks/toyworld.py                  everything: about a quarter of an hour on two cores
    python benchmarks/toyworld.py --part edits     one part

Parts: `vae` (reconstruction of held-out drawings), `reader` (the attribute reader on held-out drawings),
`generation` (attributes of pictures painted from held-out captions), `vital` (bypass every layer, compare with
DINO's features), `edits` (known-answer edits of drawn and of generated pictures, four layer sets) and `nudge`
(latent nudging against reconstruction). Figures go to `results/toyworld.json`, pictures beside it. With `--save`,
the vital layers found become the embedded model's.
"""

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import numpy as np
from tqdm import tqdm

from sflow_jax.catalogue import ASSETS, VITAL_LAYERS_FILE, load_features
from sflow_jax.commands.console import use_compilation_cache
from sflow_jax.measures.metrics import cosine_similarity, psnr
from sflow_jax.pictures.grids import captioned_grid
from sflow_jax.pipeline import StableFlow
from sflow_jax.runs.folder import RunFolder
from sflow_jax.sampling.control import LayerControl
from sflow_jax.toyworld.edits import EDIT_FAMILIES, Edit, sample_edit
from sflow_jax.toyworld.reader import AttributeReader, Reading
from sflow_jax.toyworld.scenes import Scene, sample_scene
from sflow_jax.vitality.plan import Plan, make_variants
from sflow_jax.vitality.prompts import load_prompts
from sflow_jax.vitality.scores import Rule, Variant
from sflow_jax.vitality.summary import summarise
from sflow_jax.vitality.sweep import Sweep

RESULTS = Path(__file__).parent / "results"
# Not the seeds of training's own held-out previews.
SEED = 20_000
BATCH = 32
SIZE = 64
# The paper's scan: 15 steps, guidance 3.5.
SCAN_STEPS, SCAN_GUIDANCE = 15, 3.5
NUDGES = (1.0, 1.05, 1.1, 1.15, 1.2, 1.3)


def held_out(count: int, seed: int) -> list[Scene]:
    """Scenes of combinations that training never saw."""
    rng = np.random.default_rng(seed)
    return [sample_scene(rng, "held-out") for _ in range(count)]


def drawn(scenes: list[Scene]) -> np.ndarray:
    """Pictures in 0..1, float32 [n, y, x, 3]."""
    return np.stack([scene.draw(SIZE) for scene in scenes]).astype(np.float32) / 255


def shares(found: list[dict[str, str]], truth: list[dict[str, str]]) -> dict[str, float]:
    """Share of pictures whose attribute is right, per attribute and for all together."""
    right = {name: [f[name] == t[name] for f, t in zip(found, truth)] for name in truth[0]}
    every = np.all(list(right.values()), axis=0)
    return {name: float(np.mean(values)) for name, values in right.items()} | {"all together": float(every.mean())}


def paint(
    flow: StableFlow,
    captions: list[str],
    noise: np.ndarray,
    control: Callable[[int], LayerControl],
    guidance: float,
) -> np.ndarray:
    """Pictures of captions, each from its own noise, in batches of one shape."""
    images = []
    for start in tqdm(range(0, len(captions), BATCH), desc="painting", leave=False):
        rows = np.minimum(np.arange(start, start + BATCH), len(captions) - 1)
        latents = flow.denoise(
            noise[rows],
            flow.encode_prompts([captions[i] for i in rows]),
            control(len(rows)),
            guidance=np.full(len(rows), guidance, np.float32),
            height=SIZE,
            width=SIZE,
            groups=len(rows),
        )
        images.append(flow.decode(latents, height=SIZE, width=SIZE)[: len(captions) - start])
    return np.concatenate(images)


def draw_noise(flow: StableFlow, count: int, seed: int) -> np.ndarray:
    """Packed noise [n, s, c]."""
    tokens = SIZE * SIZE // (flow.autoencoder.config.downsampling * 2) ** 2
    return np.random.default_rng(seed).standard_normal(
        (count, tokens, flow.transformer.config.in_channels), np.float32
    )


def measure_vae(flow: StableFlow, reader: AttributeReader, count: int) -> dict[str, Any]:
    """PSNR of held-out drawings through the autoencoder."""
    scenes = held_out(count, SEED)
    pictures = drawn(scenes)
    made = [
        flow.decode(flow.encode_image(scene.draw(SIZE)), height=SIZE, width=SIZE)[0]
        for scene in tqdm(scenes, "vae")
    ]
    values = [psnr(image, truth) for image, truth in zip(made, pictures)]
    return {"pictures": count, "psnr_db": float(np.mean(values)), "psnr_db_worst": float(np.min(values))}


def measure_reader(flow: StableFlow, reader: AttributeReader, count: int) -> dict[str, Any]:
    """Share of attributes read right off held-out drawings."""
    scenes = held_out(4 * count, SEED + 1)
    truth = [scene.attributes() for scene in scenes]
    return {"pictures": len(scenes), "right": shares(reader(drawn(scenes)).named, truth)}


def measure_generation(flow: StableFlow, reader: AttributeReader, count: int) -> dict[str, Any]:
    """Attributes of pictures painted from held-out captions, at the model's default settings."""
    scenes = held_out(count, SEED + 2)
    captions = [scene.caption(i) for i, scene in enumerate(scenes)]
    steps, guidance = flow.defaults.steps, flow.defaults.guidance
    noise = draw_noise(flow, count, SEED)
    images = paint(flow, captions, noise, lambda b: LayerControl.none(steps, b, flow.layers), guidance)
    captioned_grid(images[:24], captions[:24], columns=6).save(RESULTS / "generated.png")
    right = shares(reader(images).named, [scene.attributes() for scene in scenes])
    return {"pictures": count, "steps": steps, "guidance": guidance, "right": right}


def measure_vital(flow: StableFlow, reader: AttributeReader, count: int) -> dict[str, Any]:
    """The vital layers as `sflow vital -m toyworld` finds them, and the first prompt's pictures."""
    plan = Plan(
        tuple(load_prompts("toyworld")), 1, SCAN_STEPS, SCAN_GUIDANCE, SIZE, SIZE, BATCH,
        make_variants(range(flow.layers), SCAN_STEPS),
    )  # fmt: skip
    shown: dict[int, np.ndarray] = {}

    def keep(reference: int, variant: Variant | None, picture: np.ndarray) -> None:
        if reference == 0:
            shown[-1 if variant is None else variant.layers[0]] = picture.astype(np.float32) / 255

    with tempfile.TemporaryDirectory() as temporary:
        folder = RunFolder(Path(temporary) / "run", {"plan": str(plan)})
        table = Sweep(flow, {"dino": load_features("toyworld")}, plan, folder, keep=keep).exhaustive()
    summary = summarise(table, {"steps": SCAN_STEPS}, Rule())
    vitality, vital = summary.vitality.tolist(), list(summary.choice.layers)
    titles = ["reference", *(f"without {i}: {v:.3f}" for i, v in enumerate(vitality))]
    captioned_grid(np.stack([shown[i] for i in sorted(shown)]), titles, columns=7).save(RESULTS / "bypass.png")
    return {
        "prompts": len(plan.prompts),
        "steps": SCAN_STEPS,
        "guidance": SCAN_GUIDANCE,
        "vitality": vitality,
        "vital": vital,
        "least vital": sorted(np.argsort(vitality)[: len(vital)].tolist()),
    }


def layer_sets(vital: dict[str, Any], layers: int) -> dict[str, list[int]]:
    """The four sets of the paper's ablation."""
    return {"none": [], "all": list(range(layers)), "vital": vital["vital"], "least vital": vital["least vital"]}


def edit_drawn(flow: StableFlow, edit: Edit, sets: dict[str, list[int]]) -> tuple[np.ndarray, np.ndarray]:
    """Source row and one row a layer set, of an inverted drawing; the nudge is undone at decoding."""
    inversion = flow.invert(edit.source.draw(SIZE), edit.source_caption, progress=False)
    steps, defaults = inversion.settings["steps"], flow.defaults
    guidance = [defaults.real_source_guidance, *[defaults.real_edit_guidance] * len(sets)]
    noise = np.repeat(inversion.trajectory[-1:], 1 + len(sets), axis=0)
    latents = run_edit(flow, edit, sets, noise, steps, guidance, inversion.trajectory)
    images = flow.decode(latents / inversion.settings["nudge"], height=SIZE, width=SIZE)
    return drawn([edit.source])[0], images[1:]


def edit_generated(flow: StableFlow, edit: Edit, sets: dict[str, list[int]], noise: np.ndarray):
    """The same of a picture painted from the source's caption."""
    guidance = [flow.defaults.guidance] * (1 + len(sets))
    rows = np.repeat(noise[None], 1 + len(sets), axis=0)
    latents = run_edit(flow, edit, sets, rows, flow.defaults.edit_steps, guidance, None)
    images = flow.decode(latents, height=SIZE, width=SIZE)
    return images[0], images[1:]


def run_edit(flow, edit: Edit, sets: dict[str, list[int]], noise, steps: int, guidance: list[float], trajectory):
    """One batch: the source, and the same edit once per layer set."""
    control = LayerControl.none(steps, 1 + len(sets), flow.layers)
    for row, layers in enumerate(sets.values(), 1):
        control = control.injecting(layers, elements=[row])
    return flow.denoise(
        noise,
        flow.encode_prompts([edit.source_caption, *[edit.edit_caption] * len(sets)]),
        control,
        guidance=np.asarray(guidance, np.float32),
        height=SIZE,
        width=SIZE,
        trajectory=trajectory,
    )


def judge(edit: Edit, source: np.ndarray, images: np.ndarray, read: Callable[[np.ndarray], Reading], real: bool):
    """Figures of one edit, a row a layer set; pixel masks only exist for drawings."""
    reading, before = read(images), read(source[None])
    target, mask = edit.target.attributes(), edit.mask(SIZE)
    kept = [name for name in target if target[name] == edit.source.attributes()[name]]
    rows = []
    for i, image in enumerate(images):
        row = {
            "success": float(reading.named[i][edit.attribute] == target[edit.attribute]),
            "others kept": float(np.mean([reading.named[i][name] == before.named[0][name] for name in kept])),
            "dino": float(cosine_similarity(reading.features[i : i + 1], before.features)[0]),
            "details moved": float(np.abs(reading.unnamed[i] - before.unnamed[0]).mean()),
            "psnr to source": psnr(image, source),
        }
        if real:
            row["psnr outside"] = psnr(image[~mask], source[~mask])
            row["psnr to answer"] = psnr(image, drawn([edit.target])[0])
        rows.append(row)
    return rows


def measure_edits(flow: StableFlow, reader: AttributeReader, count: int) -> dict[str, Any]:
    """Known-answer edits of drawn and generated pictures, per family and layer set."""
    sets = layer_sets(stored_vital(), flow.layers)
    figures: dict[str, Any] = {"per_family": max(1, count // 8), "layers": sets}
    for kind in ("drawn", "generated"):
        figures[kind], shown, titles = {}, [], []
        for number, family in enumerate(EDIT_FAMILIES):
            rng = np.random.default_rng(SEED + 10 + number)
            noises = draw_noise(flow, figures["per_family"], SEED + 10 + number)
            rows = []
            for noise in tqdm(noises, desc=f"{kind}, {family}"):
                edit = sample_edit(family, rng)
                made = edit_drawn(flow, edit, sets) if kind == "drawn" else edit_generated(flow, edit, sets, noise)
                if not rows:
                    shown += [made[0], *made[1]]
                    titles += [edit.source_caption, *(f"{name}: {edit.edit_caption}" for name in sets)]
                rows.append(judge(edit, *made, reader, kind == "drawn"))
            figures[kind][family] = {
                name: {key: float(np.mean([row[i][key] for row in rows])) for key in rows[0][i]}
                for i, name in enumerate(sets)
            }
        captioned_grid(np.stack(shown), titles, columns=1 + len(sets)).save(RESULTS / f"edits-{kind}.png")
    return figures


def measure_nudge(flow: StableFlow, reader: AttributeReader, count: int) -> dict[str, Any]:
    """PSNR of drawings inverted and painted again with their own caption, per nudge, undone or not at decoding."""
    scenes = held_out(max(4, count // 16), SEED + 4)
    figures = {}
    for nudge in tqdm(NUDGES, desc="nudging"):
        values = []
        for i, scene in enumerate(scenes):
            picture = scene.draw(SIZE)
            inversion = flow.invert(picture, scene.caption(i), nudge=nudge, progress=False)
            settings = inversion.settings
            again = flow.generate(
                [settings["prompt"]],
                steps=settings["steps"],
                guidance=settings["guidance"],
                noise=inversion.trajectory[-1],
                progress=False,
            )
            undone = flow.decode(again.latents / nudge, height=SIZE, width=SIZE)
            values.append([psnr(image[0], picture.astype(np.float32) / 255) for image in (again.images, undone)])
        kept, undone = np.mean(values, axis=0)
        figures[str(nudge)] = {"psnr_db": float(kept), "psnr_db_undone": float(undone)}
    return {"pictures": len(scenes), "nudges": figures}


PARTS = {
    "vae": measure_vae,
    "reader": measure_reader,
    "generation": measure_generation,
    "vital": measure_vital,
    "edits": measure_edits,
    "nudge": measure_nudge,
}


def stored_vital() -> dict[str, Any]:
    """The layer sets that the part `vital` found."""
    try:
        return json.loads((RESULTS / "toyworld.json").read_text())["vital"]
    except (OSError, KeyError) as error:
        raise click.UsageError("no vital layers measured yet: run --part vital first") from error


def tables(figures: dict[str, Any]) -> str:
    """The figures as Markdown, for the README."""
    lines = []
    for part in ("reader", "generation"):
        if part in figures:
            right = figures[part]["right"]
            lines += [f"{part}, {figures[part]['pictures']} pictures", "", "| " + " | ".join(right) + " |"]
            lines += ["|" + " --- |" * len(right), "| " + " | ".join(f"{v:.1%}" for v in right.values()) + " |", ""]
    for kind in ("drawn", "generated"):
        for family, sets in figures.get("edits", {}).get(kind, {}).items():
            keys = list(next(iter(sets.values())))
            lines += [
                f"{kind}, {family}",
                "",
                "| layers | " + " | ".join(keys) + " |",
                "|" + " --- |" * (1 + len(keys)),
            ]
            lines += [
                f"| {name} | " + " | ".join(f"{row[key]:.2f}" for key in keys) + " |" for name, row in sets.items()
            ]
            lines.append("")
    return "\n".join(lines)


@click.command()
@click.option(
    "--part", "parts", multiple=True, type=click.Choice(list(PARTS)), help="Only these parts; repeat for more."
)
@click.option(
    "--pictures", default=512, show_default=True, help="Pictures painted; edits per family are an eighth."
)
@click.option("--save", is_flag=True, help="Record the vital layers found in the embedded model.")
def main(parts: tuple[str, ...], pictures: int, save: bool) -> None:
    """Measure the embedded model on its world."""
    use_compilation_cache()
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / "toyworld.json"
    figures = json.loads(path.read_text()) if path.exists() else {}
    flow, reader = StableFlow.load("toyworld"), AttributeReader()
    for part in parts or PARTS:
        figures[part] = PARTS[part](flow, reader, pictures)
        path.write_text(json.dumps(figures, indent=1) + "\n")
        click.echo(f"{part}: {json.dumps(figures[part])}")
        if part == "vital" and save:
            origin = f"measured on {figures[part]['prompts']} held-out captions by benchmarks/toyworld.py"
            told = {"layers": figures[part]["vital"], "origin": origin}
            (ASSETS / VITAL_LAYERS_FILE).write_text(json.dumps(told, indent=1) + "\n")
    (RESULTS / "toyworld.md").write_text(tables(figures))


if __name__ == "__main__":
    main()
