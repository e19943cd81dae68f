"""How little painting finds the same vital layers? Fewer steps, fewer prompts, and `--adaptive`.

    python benchmarks/vitality.py

Full sweeps of the embedded model (64 prompts, every layer) at several numbers of steps are recorded in run folders,
which a second call finds again. Everything else is arithmetic on their tables: subsets of prompts, halves, and
adaptive sweeps in other orders of the prompts. Made-up sweeps of 57 layers are the harder cases. Writes JSON and
Markdown.
"""

import json
from pathlib import Path

import click
import numpy as np

from sflow_jax.catalogue import load_features
from sflow_jax.commands.console import use_compilation_cache
from sflow_jax.pipeline import StableFlow
from sflow_jax.runs.folder import RunFolder
from sflow_jax.storage.paths import cache_folder
from sflow_jax.vitality.adaptive import Elimination, simulate
from sflow_jax.vitality.plan import Plan, make_variants
from sflow_jax.vitality.prompts import load_prompts
from sflow_jax.vitality.scores import Rule, agreement, choose, rank_correlation
from sflow_jax.vitality.sweep import Sweep

RESULTS = Path(__file__).parent / "results" / "vitality.json"
STEPS, GUIDANCE, SIZE, BATCH = (4, 8, 15, 28), 3.5, 64, 8
PROMPTS = (4, 8, 16, 32, 64)
# The paper's number of steps, on which adaptive sweeps are simulated.
PAPER = 15
RULES = (Rule(), Rule("top", 3), Rule("top", 4), Rule("threshold", 0.2))
# What a cheap setting must reach to be called sensible.
RANKS, SETS = 0.95, 0.95


def record(runs: Path) -> dict[int, np.ndarray]:
    """Similarities [p, n] of full sweeps, by steps."""
    flow, dino = StableFlow.load("toyworld"), load_features("toyworld")
    tables = {}
    for steps in STEPS:
        variants = make_variants(range(flow.layers), steps)
        plan = Plan(tuple(load_prompts("toyworld")), 1, steps, GUIDANCE, SIZE, SIZE, BATCH, variants)
        digests = {"checkpoint": flow.info.source_digests, "features": dino.digest, "plan": str(plan)}
        folder = RunFolder(runs / f"toyworld-{steps}-steps", digests)
        tables[steps] = Sweep(flow, {"dino": dino}, plan, folder).exhaustive().values["dino"]
    return tables


def vital(similarities: np.ndarray) -> tuple[int, ...]:
    """The set that a table of similarities makes vital."""
    return tuple(np.flatnonzero(Rule()(1 - similarities.mean(axis=0))).tolist())


def full_figures(similarities: np.ndarray, trials: int, rng: np.random.Generator) -> dict:
    """Vitality and set of a full sweep, and how far two disjoint halves of its prompts agree."""
    ranks, differ = [], []
    for _ in range(trials):
        halves = np.array_split(rng.permutation(len(similarities)), 2)
        first, second = (similarities[half] for half in halves)
        ranks.append(rank_correlation(*(1 - half.mean(axis=0) for half in (first, second))))
        differ.append(len(set(vital(first)) ^ set(vital(second))))
    choice = choose(similarities, range(similarities.shape[1]), Rule())
    return {
        "vitality": (1 - similarities.mean(axis=0)).tolist(),
        "vital": choice.layers,
        "same_set_in_resamples": choice.confidence,
        "halves": {
            "rank_correlation_median": float(np.median(ranks)),
            "rank_correlation_5_percent": float(np.quantile(ranks, 0.05)),
            "same_set": float(np.mean(np.array(differ) == 0)),
            "same_set_but_for_one_layer": float(np.mean(np.array(differ) <= 1)),
        },
    }


def cheap_figures(tables: dict[int, np.ndarray], trials: int, rng: np.random.Generator) -> list[dict]:
    """Fewer steps and prompts against the full run: the most steps, all prompts."""
    full = tables[max(STEPS)]
    truth, rows = 1 - full.mean(axis=0), []
    for steps, table in tables.items():
        for count in PROMPTS:
            # All prompts leave nothing to draw.
            draws = trials if count < len(table) else 1
            drawn = [table[rng.permutation(len(table))[:count]] for _ in range(draws)]
            sets = [vital(part) for part in drawn]
            row = {
                "steps": steps,
                "prompts": count,
                "cost": steps * count / (max(STEPS) * len(full)),
                "rank_correlation": float(np.mean([rank_correlation(1 - x.mean(axis=0), truth) for x in drawn])),
                "agreement": float(np.mean([agreement(found, vital(full)) for found in sets])),
                "same_set": float(np.mean([found == vital(full) for found in sets])),
            }
            rows.append(row)
    return rows


def adaptive_figures(similarities: np.ndarray, trials: int, rng: np.random.Generator) -> list[dict]:
    """Adaptive sweeps of a recorded one in other orders of its prompts."""
    prompts, layers = similarities.shape
    rows = []
    for rule in RULES:
        elimination, whole = Elimination(rule, prompts), prompts * (1 + layers)
        found = [simulate(elimination, similarities[rng.permutation(prompts)]) for _ in range(trials)]
        truth = rule(1 - similarities.mean(axis=0))
        rows.append(
            {
                "rule": str(rule),
                "same_set": float(np.mean([np.array_equal(chosen, truth) for chosen, _ in found])),
                "share_of_generations": float(np.mean([count / whole for _, count in found])),
            }
        )
    return rows


def made_up_figures(trials: int, rng: np.random.Generator) -> list[dict]:
    """Adaptive sweeps of 57 layers × 64 prompts whose similarities are drawn anew each time.

    clear: 10 layers around .5, the rest around .1. smooth: vitalities fall evenly, with no gap anywhere.
    """
    rows = []
    kinds = {
        "57 layers, clear gap": lambda: np.append(rng.uniform(0.4, 0.6, 10), rng.uniform(0.02, 0.2, 47)),
        "57 layers, no gap": lambda: rng.uniform(0.02, 0.6, 57),
    }
    for kind, draw in kinds.items():
        for rule in (Rule(), Rule("top", 10), Rule("threshold", 0.3)):
            same, shares = [], []
            for _ in range(trials):
                vitality = draw()
                similarities = 1 - np.clip(rng.normal(vitality, 0.3 * np.sqrt(vitality), (64, 57)), 0, 1)
                chosen, count = simulate(Elimination(rule, 64), similarities)
                same.append(np.array_equal(chosen, rule(1 - similarities.mean(axis=0))))
                shares.append(count / (64 * 58))
            rows.append(
                {
                    "sweep": kind,
                    "rule": str(rule),
                    "same_set": float(np.mean(same)),
                    "share_of_generations": float(np.mean(shares)),
                }
            )
    return rows


def sensible(rows: list[dict]) -> dict | None:
    """The cheapest setting that keeps the ranking and the set, or None."""
    good = [row for row in rows if row["rank_correlation"] >= RANKS and row["same_set"] >= SETS]
    return min(good, key=lambda row: row["cost"], default=None)


def markdown(told: dict) -> str:
    """Tables of all figures."""
    lines = []
    for title, rows in (
        ("Fewer steps and prompts, against 28 steps and 64 prompts", told["cheap"]),
        ("Adaptive sweeps of the recorded one, error 0.05", told["adaptive"]),
        ("Adaptive sweeps of made-up vitalities, error 0.05", told["made_up"]),
    ):
        names = list(rows[0])
        lines += [f"## {title}", "", f"| {' | '.join(name.replace('_', ' ') for name in names)} |"]
        lines += ["|" + " --- |" * len(names)]
        for row in rows:
            cells = (f"{value:.3f}" if isinstance(value, float) else str(value) for value in row.values())
            lines.append(f"| {' | '.join(cells)} |")
        lines.append("")
    return "\n".join(lines)


@click.command()
@click.option("--runs", type=click.Path(path_type=Path), help="Where the sweeps are recorded [the cache].")
@click.option("--trials", default=200, show_default=True, help="Random subsets, halves and orders of prompts.")
@click.option("--out", default=RESULTS, show_default=True, type=click.Path(path_type=Path), help="JSON file.")
def main(runs: Path | None, trials: int, out: Path) -> None:
    """Measure how little painting finds the embedded model's vital layers."""
    use_compilation_cache()
    tables, rng = record(runs or cache_folder() / "benchmarks"), np.random.default_rng(0)
    told = {
        "trials": trials,
        "full": {str(steps): full_figures(table, trials, rng) for steps, table in tables.items()},
        "cheap": cheap_figures(tables, trials, rng),
        "adaptive": adaptive_figures(tables[PAPER], trials, rng),
        "made_up": made_up_figures(trials, rng),
    }
    told["sensible"] = sensible(told["cheap"])
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(told, indent=1) + "\n")
    out.with_suffix(".md").write_text(markdown(told))
    for steps, figures in told["full"].items():
        click.echo(f"{steps} steps: vital {figures['vital']}, halves {figures['halves']}")
    click.echo(markdown(told))
    click.echo(f"cheapest that keeps ranks ({RANKS}) and set ({SETS:.0%} of draws): {told['sensible']}")


if __name__ == "__main__":
    main()
