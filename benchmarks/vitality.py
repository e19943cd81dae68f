"""How little painting finds the same vital layers? Fewer steps, fewer prompts, and `--adaptive`.

    python benchmarks/vitality.py

Full sweeps of the embedded model (all prompts, every layer) at several numbers of steps are recorded in run
folders, which a second call finds again. Everything else is arithmetic on their tables: subsets of prompts, halves,
and adaptive sweeps in other orders of the prompts. Made-up sweeps of FLUX.1-dev's size are the harder cases. Writes
JSON and Markdown.

Axes: p prompts, n layers.
"""

from pathlib import Path
from typing import Any

import click
import numpy as np
from common import out_option, write_json, write_text

from sflow_jax.catalogue import load_features
from sflow_jax.commands.console import use_compilation_cache
from sflow_jax.families.flux1 import FLUX1, FLUX_DEV_PAPER
from sflow_jax.models.flux1 import FluxConfig
from sflow_jax.painter import Painter
from sflow_jax.planning.costs import SWEEP_PROMPTS
from sflow_jax.progress import as_progress
from sflow_jax.runs.folder import RunFolder
from sflow_jax.settings import EMBEDDED, SweepSettings
from sflow_jax.storage.paths import cache_folder
from sflow_jax.vitality.adaptive import Elimination, simulate
from sflow_jax.vitality.find import manifest_of
from sflow_jax.vitality.plan import plan_sweep
from sflow_jax.vitality.scores import Rule, agreement, choose, rank_correlation
from sflow_jax.vitality.sweep import Sweep

DEFAULTS = FLUX1.defaults("dev")
# The paper's, on which adaptive sweeps are simulated.
PAPER_STEPS = DEFAULTS.sweep_steps
STEPS = (4, 8, PAPER_STEPS, DEFAULTS.steps)
PROMPTS = (4, 8, 16, 32, SWEEP_PROMPTS)
RULES = (Rule(), Rule("top", 3), Rule("top", 4), Rule("threshold", 0.2))
MADE_UP_LAYERS, MADE_UP_VITAL = FluxConfig.dev().layers, len(FLUX_DEV_PAPER)
MADE_UP_RULES = (Rule(), Rule("top", MADE_UP_VITAL), Rule("threshold", 0.3))
# What a cheap setting must reach to be called sensible.
RANKS, SETS = 0.95, 0.95


def record(runs: Path) -> dict[int, np.ndarray]:
    """Similarities [p, n] of full sweeps, by steps."""
    painter, features = Painter.load(EMBEDDED), {"dino": load_features(EMBEDDED)}
    tables = {}
    for steps in STEPS:
        settings = SweepSettings(steps=steps)
        plan = plan_sweep(settings, painter.info, EMBEDDED)
        manifest = manifest_of(painter, features, plan, settings, None)
        # Another model of the same name is another sweep.
        folder = RunFolder(runs / f"{EMBEDDED}-{manifest['checkpoint']}-{steps}-steps", manifest)
        sweep = Sweep(painter, features, plan, folder, progress=as_progress(True))
        tables[steps] = sweep.exhaustive().values["dino"]
    return tables


def vitality_of(similarities: np.ndarray) -> np.ndarray:
    """Of every layer [n], from similarities [p, n]."""
    return 1 - similarities.mean(axis=0)


def vital_set(similarities: np.ndarray) -> tuple[int, ...]:
    """Layers that similarities [p, n] make vital."""
    return tuple(np.flatnonzero(Rule()(vitality_of(similarities))).tolist())


def full_figures(similarities: np.ndarray, trials: int, rng: np.random.Generator) -> dict[str, Any]:
    """Vitality and set of a full sweep [p, n], and how far two disjoint halves of its prompts agree."""
    correlations, differing = [], []
    for _ in range(trials):
        halves = [similarities[half] for half in np.array_split(rng.permutation(len(similarities)), 2)]
        first, second = map(set, map(vital_set, halves))
        correlations.append(rank_correlation(*map(vitality_of, halves)))
        differing.append(len(first ^ second))
    choice = choose(similarities, range(similarities.shape[1]), Rule())
    return {
        "vitality": vitality_of(similarities).tolist(),
        "vital": choice.layers,
        "same_set_in_resamples": choice.confidence,
        "halves": {
            "rank_correlation_median": float(np.median(correlations)),
            "rank_correlation_5_percent": float(np.quantile(correlations, 0.05)),
            "same_set": float(np.mean(np.array(differing) == 0)),
            "same_set_but_for_one_layer": float(np.mean(np.array(differing) <= 1)),
        },
    }


def cheap_figures(tables: dict[int, np.ndarray], trials: int, rng: np.random.Generator) -> list[dict[str, float]]:
    """Fewer steps and prompts against the full run: the most steps, all prompts."""
    full = tables[max(tables)]
    full_vitality, full_set, rows = vitality_of(full), vital_set(full), []
    for steps, table in tables.items():
        for count in PROMPTS:
            # All prompts leave nothing to draw.
            draws = trials if count < len(table) else 1
            subsets = [table[rng.permutation(len(table))[:count]] for _ in range(draws)]
            correlations = [rank_correlation(vitality_of(subset), full_vitality) for subset in subsets]
            sets = [vital_set(subset) for subset in subsets]
            row = {
                "steps": steps,
                "prompts": count,
                "cost": steps * count / (max(tables) * len(full)),
                "rank_correlation": float(np.mean(correlations)),
                "agreement": float(np.mean([agreement(layers, full_set) for layers in sets])),
                "same_set": float(np.mean([layers == full_set for layers in sets])),
            }
            rows.append(row)
    return rows


def simulated(rule: Rule, sweeps: list[np.ndarray]) -> dict[str, Any]:
    """How often adaptive sweeps choose what full ones [p, n] do, and what share of their pictures they paint."""
    same, shares = [], []
    for similarities in sweeps:
        prompts, layers = similarities.shape
        chosen, pictures = simulate(Elimination(rule, prompts), similarities)
        same.append(np.array_equal(chosen, rule(vitality_of(similarities))))
        shares.append(pictures / (prompts * (1 + layers)))
    return {
        "rule": str(rule),
        "same_set": float(np.mean(same)),
        "share_of_generations": float(np.mean(shares)),
    }


def adaptive_figures(similarities: np.ndarray, trials: int, rng: np.random.Generator) -> list[dict[str, Any]]:
    """Adaptive sweeps of a recorded one in other orders of its prompts."""
    prompts = len(similarities)
    return [simulated(rule, [similarities[rng.permutation(prompts)] for _ in range(trials)]) for rule in RULES]


def clear_gap(rng: np.random.Generator) -> np.ndarray:
    """Vitalities of which as many as in the paper are around .5, and the rest around .1."""
    rest = MADE_UP_LAYERS - MADE_UP_VITAL
    return np.append(rng.uniform(0.4, 0.6, MADE_UP_VITAL), rng.uniform(0.02, 0.2, rest))


def no_gap(rng: np.random.Generator) -> np.ndarray:
    """Vitalities that fall evenly."""
    return rng.uniform(0.02, 0.6, MADE_UP_LAYERS)


def made_up_sweep(vitality: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Similarities [p, n] that scatter the more the more vital a layer is, as recorded ones do."""
    size = (SWEEP_PROMPTS, len(vitality))
    return 1 - np.clip(rng.normal(vitality, 0.3 * np.sqrt(vitality), size), 0, 1)


def made_up_figures(trials: int, rng: np.random.Generator) -> list[dict[str, Any]]:
    """Adaptive sweeps whose similarities are drawn anew each time."""
    rows = []
    for gap, draw in (("clear gap", clear_gap), ("no gap", no_gap)):
        for rule in MADE_UP_RULES:
            sweeps = [made_up_sweep(draw(rng), rng) for _ in range(trials)]
            rows.append({"sweep": f"{MADE_UP_LAYERS} layers, {gap}", **simulated(rule, sweeps)})
    return rows


def sensible(rows: list[dict[str, float]]) -> dict[str, float] | None:
    """The cheapest setting that keeps the ranking and the set, or None."""
    good = [row for row in rows if row["rank_correlation"] >= RANKS and row["same_set"] >= SETS]
    return min(good, key=lambda row: row["cost"], default=None)


def markdown(results: dict[str, Any]) -> str:
    """Tables of all figures."""
    lines, error = [], f"error {Elimination.error:g}"
    for title, rows in (
        (f"Fewer steps and prompts, against {max(STEPS)} steps and {max(PROMPTS)} prompts", results["cheap"]),
        (f"Adaptive sweeps of the recorded one, {error}", results["adaptive"]),
        (f"Adaptive sweeps of made-up vitalities, {error}", results["made_up"]),
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
@out_option("vitality.json")
def main(runs: Path | None, trials: int, out: Path) -> None:
    """Measure how little painting finds the embedded model's vital layers."""
    use_compilation_cache()
    tables, rng = record(runs or cache_folder() / "benchmarks"), np.random.default_rng(0)
    results = {
        "trials": trials,
        "full": {str(steps): full_figures(table, trials, rng) for steps, table in tables.items()},
        "cheap": cheap_figures(tables, trials, rng),
        "adaptive": adaptive_figures(tables[PAPER_STEPS], trials, rng),
        "made_up": made_up_figures(trials, rng),
    }
    results["sensible"] = sensible(results["cheap"])
    write_json(out, results)
    write_text(out.with_suffix(".md"), markdown(results))
    for steps, figures in results["full"].items():
        click.echo(f"{steps} steps: vital {figures['vital']}, halves {figures['halves']}")
    click.echo(markdown(results))
    click.echo(f"cheapest that keeps ranks ({RANKS}) and set ({SETS:.0%} of draws): {results['sensible']}")


if __name__ == "__main__":
    main()
