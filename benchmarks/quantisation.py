"""What eight-bit blocks change, on the embedded model: latents, pictures, and known-answer edits.

    python benchmarks/quantisation.py

The same captions, noise and edits with float32, bfloat16, int8 and fp8 blocks (the last two beside bfloat16).
Latents and pictures are compared with float32's; an edit counts as happened if the attribute reader finds it. The
transformer and T5 are quantised together, as --quantize does. Writes JSON.
"""

import json
from pathlib import Path
from typing import Any

import click
import numpy as np
from common import SEED, draw_noise, happened, held_out_edits, out_option, paint_edit, write_json
from tqdm.auto import tqdm

from sflow_jax.commands.console import use_compilation_cache
from sflow_jax.measures.metrics import psnr
from sflow_jax.painter import Painter
from sflow_jax.settings import EMBEDDED, Placement
from sflow_jax.toyworld.edits import EDIT_FAMILIES, Edit
from sflow_jax.toyworld.reader import AttributeReader

EXACT = "float32"
FORMS = {
    EXACT: Placement(dtype="float32"),
    "bfloat16": Placement(dtype="bfloat16"),
    "int8": Placement(dtype="bfloat16", quantisation="int8"),
    "fp8": Placement(dtype="bfloat16", quantisation="fp8"),
}
# Family → seed of its edits and of their noise.
SEEDS = {family: SEED + 50 + number for number, family in enumerate(EDIT_FAMILIES)}


def edits_by_family(each: int) -> dict[str, list[Edit]]:
    """So many edits of each family."""
    return {family: held_out_edits(family, each, seed) for family, seed in SEEDS.items()}


def paint(form: str, edits: dict[str, list[Edit]]) -> tuple[np.ndarray, np.ndarray]:
    """Latents [edits, 2, s, c] and pictures [edits, 2, y, x, 3] of all edits, each after its source."""
    painter = Painter.load(EMBEDDED, FORMS[form])
    layer_sets, defaults = {"vital": painter.info.resolve_layers("vital")}, painter.defaults
    latents, pictures = [], []
    for family, members in tqdm(edits.items(), desc=form):
        for edit, noise in zip(members, draw_noise(painter, len(members), SEEDS[family])):
            painted = paint_edit(
                painter, edit, layer_sets, noise, steps=defaults.edit_steps, guidance=(defaults.guidance,) * 2
            )
            latents.append(np.asarray(painted, np.float32))
            pictures.append(painter.decode(painted, painter.info.canvas()))
    return np.stack(latents), np.stack(pictures)


def success(pictures: np.ndarray, edits: dict[str, list[Edit]], reader: AttributeReader) -> dict[str, float]:
    """Family → share of edits that the reader finds. pictures: as `paint` gives them."""
    attributes = iter(reader(pictures[:, 1]).named)
    return {
        family: float(np.mean([happened(edit, next(attributes)) for edit in members]))
        for family, members in edits.items()
    }


def compare(
    painted: tuple[np.ndarray, np.ndarray], exact: tuple[np.ndarray, np.ndarray], families: dict[str, float]
) -> dict[str, Any]:
    """A row: latents and pictures against those of exact numbers, and how many edits happened."""
    (latents, pictures), (exact_latents, exact_pictures) = painted, exact
    errors = np.linalg.norm(latents - exact_latents, axis=(2, 3)) / np.linalg.norm(exact_latents, axis=(2, 3))
    pairs = zip(*(x.reshape(-1, *x.shape[2:]) for x in (pictures, exact_pictures)))
    return {
        "latents": float(np.median(errors)),
        "psnr_db": None if painted is exact else float(np.median([psnr(*pair) for pair in pairs])),
        "edits": float(np.mean(list(families.values()))),
        "families": families,
    }


@click.command()
@click.option("--each", default=16, show_default=True, help="Edits of each family.")
@out_option("quantisation.json")
def main(each: int, out: Path) -> None:
    """Compare float32, bfloat16, int8 and fp8 on the embedded model."""
    use_compilation_cache()
    edits, reader = edits_by_family(each), AttributeReader()
    painted = {form: paint(form, edits) for form in FORMS}
    rows = {}
    for form, results in painted.items():
        rows[form] = compare(results, painted[EXACT], success(results[1], edits, reader))
        click.echo(f"{form:9} {json.dumps(rows[form])}")
    write_json(out, {"edits_per_family": each, "rows": rows})
    click.echo(f"written to {out}")


if __name__ == "__main__":
    main()
