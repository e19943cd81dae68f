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
import jax.numpy as jnp
import numpy as np
from toyworld import RESULTS, SEED, SIZE, draw_noise, run_edit
from tqdm.auto import tqdm

from sflow_jax.commands.console import use_compilation_cache
from sflow_jax.measures.metrics import psnr
from sflow_jax.pipeline import StableFlow
from sflow_jax.toyworld.edits import EDIT_FAMILIES, sample_edit
from sflow_jax.toyworld.reader import AttributeReader

FORMS: dict[str, dict[str, Any]] = {
    "float32": {"dtype": jnp.float32},
    "bfloat16": {"dtype": jnp.bfloat16},
    "int8": {"dtype": jnp.bfloat16, "quantisation": "int8"},
    "fp8": {"dtype": jnp.bfloat16, "quantisation": "fp8"},
}


def paint(form: str, each: int) -> tuple[np.ndarray, np.ndarray]:
    """Latents [edits, 2, s, c] and pictures [edits, 2, y, x, 3] of every family's edits, each beside its source."""
    flow = StableFlow.load("toyworld", **FORMS[form])
    sets = {"vital": list(flow.resolve_layers("vital"))}
    latents, pictures = [], []
    for number, family in enumerate(tqdm(EDIT_FAMILIES, desc=form)):
        rng = np.random.default_rng(SEED + 50 + number)
        for noise in draw_noise(flow, each, SEED + 50 + number):
            edit, rows = sample_edit(family, rng), np.repeat(noise[None], 2, axis=0)
            guidance = [flow.defaults.guidance] * 2
            made = run_edit(flow, edit, sets, rows, flow.defaults.edit_steps, guidance, None)
            latents.append(np.asarray(made, np.float32))
            pictures.append(flow.decode(made, height=SIZE, width=SIZE))
    return np.stack(latents), np.stack(pictures)


def happened(pictures: np.ndarray, each: int) -> dict[str, float]:
    """Family → share of edits that the reader finds."""
    read, found = AttributeReader(), {}
    for number, family in enumerate(EDIT_FAMILIES):
        rng, wins = np.random.default_rng(SEED + 50 + number), []
        for picture in pictures[number * each : (number + 1) * each, 1]:
            edit = sample_edit(family, rng)
            wins.append(read(picture[None]).named[0][edit.attribute] == edit.target.attributes()[edit.attribute])
        found[family] = float(np.mean(wins))
    return found


@click.command()
@click.option("--each", default=16, show_default=True, help="Edits of each family.")
@click.option("--out", default=RESULTS / "quantisation.json", type=click.Path(path_type=Path), help="JSON file.")
def main(each: int, out: Path) -> None:
    """Compare float32, bfloat16, int8 and fp8 on the embedded model."""
    use_compilation_cache()
    made = {form: paint(form, each) for form in FORMS}
    exact, truth = made["float32"]
    rows = {}
    for form, (latents, pictures) in made.items():
        errors = np.linalg.norm(latents - exact, axis=(2, 3)) / np.linalg.norm(exact, axis=(2, 3))
        families = happened(pictures, each)
        rows[form] = {
            "latents": float(np.median(errors)),
            "psnr_db": None if form == "float32" else float(np.median([psnr(*pair) for pair in zip(
                pictures.reshape(-1, SIZE, SIZE, 3), truth.reshape(-1, SIZE, SIZE, 3))])),
            "edits": float(np.mean(list(families.values()))),
            "families": families,
        }  # fmt: skip
        click.echo(f"{form:9} {json.dumps(rows[form])}")
    out.write_text(json.dumps({"edits_per_family": each, "rows": rows}, indent=2) + "\n")
    click.echo(f"written to {out}")


if __name__ == "__main__":
    main()
