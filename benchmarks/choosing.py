"""Does `--choose` pick well? Its choice among the tried methods, judged by the known answers of drawn edits.

    python benchmarks/choosing.py --scenes 8 --seed 4000

Every edit of every scene is tried with all methods of `--try`. Rows: each method for all edits, the choice edit by
edit, and the best that a choice could be, by the right answer itself. Writes JSON.
"""

from pathlib import Path

import click
import numpy as np
from common import out_option, versions, write_json
from tqdm.auto import tqdm

from sflow_jax import StableFlow
from sflow_jax.commands.console import use_compilation_cache
from sflow_jax.editing.choosing import TRIED, Candidates
from sflow_jax.evaluation.cases import Case, Scores
from sflow_jax.evaluation.known import KnownAnswers
from sflow_jax.evaluation.summary import Rate
from sflow_jax.pictures.files import to_uint8
from sflow_jax.settings import EMBEDDED

CHOSEN, BEST = "chosen", "best possible"
# Row → scores of all edits.
Rows = dict[str, list[Scores]]


def try_all(flow: StableFlow, case: Case, seed: int) -> list[Candidates]:
    """All methods on every edit of a scene."""
    asked = {"image": case.picture, "seed": seed, "progress": False}
    return [flow.try_edits(case.prompt, edit, **asked) for edit in case.edits]


def score_rows(
    bench: KnownAnswers, case: Case, tried: list[Candidates]
) -> tuple[dict[str, list[Scores]], list[str]]:
    """Row → scores of every edit; and which method was chosen for each."""
    rows = {
        method: bench.score(case, np.stack([to_uint8(one.candidates[number].image) for one in tried]))[0]
        for number, method in enumerate(TRIED)
    }
    picks = [TRIED[one.chosen] for one in tried]
    edits = range(len(tried))
    best = [max(TRIED, key=lambda method: rows[method][i]["answer_db"]) for i in edits]
    return rows | {CHOSEN: [rows[picks[i]][i] for i in edits], BEST: [rows[best[i]][i] for i in edits]}, picks


def summary(scores: Rows) -> dict[str, dict[str, object]]:
    """Row → rate of edits that happened, with its interval, and means."""

    def mean(values: list[Scores], name: str) -> float:
        return round(float(np.nanmean([score[name] for score in values])), 2)

    return {
        row: {
            "edits": len(values),
            "happened": str(Rate.of([value["happened"] for value in values])),
            **{
                name: round(float(np.nanmean([x[name] for x in values])), 2) for name in ("answer_db", "outside_db")
            },
        }
        for row, values in scores.items()
    }


@click.command()
@click.option("--scenes", default=8, show_default=True, help="Drawn scenes, each edited once a family.")
@click.option("--seed", default=4000, show_default=True, help="Of the scenes and of the noise.")
@out_option("choosing.json")
def main(scenes: int, seed: int, out: Path) -> None:
    """Try, choose, and judge the choice."""
    use_compilation_cache()
    flow = StableFlow.load(EMBEDDED)
    bench = KnownAnswers.on(flow.info.canvas(), scenes, seed)
    scores: Rows = {}
    picks: list[str] = []
    for number, case in enumerate(tqdm(bench.cases, desc="scenes")):
        rows, chosen = score_rows(bench, case, try_all(flow, case, seed + number))
        picks += chosen
        for row, values in rows.items():
            scores.setdefault(row, []).extend(values)
    counts = {method: picks.count(method) for method in TRIED}
    result = {"scenes": scenes, "seed": seed, "rows": summary(scores), "picks": counts}
    write_json(out, result | {"versions": versions("jax", "sflow_jax")})
    for row, values in result["rows"].items():
        click.echo(f"{row}: {values}")
    click.echo(f"chosen: {counts}")


if __name__ == "__main__":
    main()
