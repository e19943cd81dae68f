"""What it saves that edits of one photo take the source's keys and values from a bank.

    python benchmarks/bank.py

The embedded model on this machine, all edits of a call in one batch: with a row for the source as ever, and from a
bank; in turns, so that a machine whose speed drifts slows both alike. The bank is what an earlier edit of an
inversion filled, or, with exact replay, what the photo's inversion in the same call fills. Seconds are those of
this process on all cores, which others on the machine change least. Prints tables and writes JSON.
"""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import jax
import jax.numpy as jnp
import numpy as np
from common import held_out_edits, out_option, versions, write_json
from jax import Array

from sflow_jax import SourceBank, StableFlow
from sflow_jax.commands.console import use_compilation_cache
from sflow_jax.results import Edit
from sflow_jax.settings import EMBEDDED

FAMILY = "scene"
# A method of exact replay.
EXACT = "directedit"
EDITS = (1, 3, 8)


class Edits:
    """So many edits of one source, with its row and from a bank. asked: the source and the way to edit it."""

    def __init__(self, flow: StableFlow, prompts: list[str], **asked: Any):
        self.flow, self.prompts, self.count, self.asked = flow, prompts, len(prompts) - 1, asked

    def __call__(self, kv_cache: str | SourceBank = "off") -> tuple[Edit, float]:
        """The edits, and the seconds that all cores together took."""
        source, *edits = self.prompts
        start = time.process_time()
        edit = self.flow.edit(
            source, edits, **self.asked, edits_at_once=self.count, kv_cache=kv_cache, progress=False
        )
        return edit, time.process_time() - start

    def figures(self, runs: int, bank: str | SourceBank) -> dict[str, Any]:
        """Medians; the ratio is the median of each pair's own. filling: of an edit that fills a bank."""
        expected = self()[0]
        for _ in range(2):
            found = self(bank)[0]
        seconds = np.array([[self()[1], self(bank)[1]] for _ in range(runs)])
        filling = {} if isinstance(bank, str) else {"filling_seconds": self(SourceBank(bank.asked))[1]}
        return {
            "edits": self.count,
            "with_row_passes": expected.evaluations,
            "from_bank_passes": found.evaluations,
            "with_row_seconds": float(np.median(seconds[:, 0])),
            "from_bank_seconds": float(np.median(seconds[:, 1])),
            "ratio": float(np.median(seconds[:, 1] / seconds[:, 0])),
            "difference": relative(found.latents, expected.latents),
            **filling,
        }


def relative(found: Array, expected: Array) -> float:
    """Relative distance."""
    return float(jnp.linalg.norm(found - expected) / jnp.linalg.norm(expected))


def describe(results: dict[str, Any]) -> Iterator[str]:
    """The results in lines."""
    yield f"{results['steps']} steps, {results['side']}² pixels, bank on the {results['place']}"
    for kind in ("rows", "exact"):
        yield ("edits of an inversion" if kind == "rows" else f"{EXACT} from the photo, whose inversion fills it")
        yield f"{'edits':>5} {'passes':>12} {'with row s':>11} {'from bank s':>12} {'ratio':>6}"
        for row in results[kind]:
            passes = f"{row['with_row_passes']} → {row['from_bank_passes']}"
            filling = f", filling {row['filling_seconds']:.2f} s" if kind == "rows" else ""
            yield (
                f"{row['edits']:>5} {passes:>12} {row['with_row_seconds']:11.2f} {row['from_bank_seconds']:12.2f} "
                f"{row['ratio']:6.2f}{filling}, latents differ by {row['difference']:.0e}"
            )


@click.command()
@click.option("--runs", default=5, show_default=True, help="Pairs of edits side by side.")
@click.option("--steps", default=10, show_default=True, help="Steps of the inversion and its edits.")
@click.option("--side", default=128, show_default=True, help="Height and width in pixels.")
@click.option("--place", default="device", show_default=True, help="Where the bank is.")
@out_option("bank.json")
def main(runs: int, steps: int, side: int, place: str, out: Path) -> None:
    """Time edits of one inversion with and without the source's row."""
    use_compilation_cache()
    flow, scenes = StableFlow.load(EMBEDDED), held_out_edits(FAMILY, max(EDITS), seed=0)
    photo, prompt = scenes[0].source.draw(side), scenes[0].source_caption
    sizes = {"steps": steps, "height": side, "width": side}
    inversion = flow.invert(photo, prompt, **sizes, progress=False)
    prompts = [prompt, *(scene.edit_caption for scene in scenes)]
    rows, exact = [], []
    for count in EDITS:
        some = prompts[: 1 + count]
        rows.append(Edits(flow, some, inversion=inversion).figures(runs, SourceBank(place)))
        exact.append(Edits(flow, some, image=photo, method=EXACT, **sizes).figures(runs, place))
    results = {
        "device": str(jax.devices()[0]),
        "versions": versions("jax"),
        "steps": steps,
        "side": side,
        "place": place,
        "rows": rows,
        "exact": exact,
    }
    for line in describe(results):
        click.echo(line)
    write_json(out, results)


if __name__ == "__main__":
    main()
