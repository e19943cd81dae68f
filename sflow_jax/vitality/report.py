"""The report of a sweep: one page that opens anywhere, its charts, and the numbers for machines."""

from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import Any

import numpy as np
from etils import epath

from sflow_jax.errors import SettingError
from sflow_jax.reports.pages import inline, layer_list, picture, render
from sflow_jax.runs.folder import RunFolder
from sflow_jax.storage.files import write_whole
from sflow_jax.storage.paths import absolute
from sflow_jax.vitality.charts import to_inline_svg, to_png, to_svg, vitality_chart, windows_chart
from sflow_jax.vitality.pictures import Comparison, kept_comparisons
from sflow_jax.vitality.plan import SweepPlan
from sflow_jax.vitality.scores import COVERAGE, MEASURES, RESAMPLES, SURE
from sflow_jax.vitality.summary import Summary, VariantScore

PROMPTS_SHOWN = 3
# Of the most and of the least vital layers each.
PICTURES_SHOWN = 4
PAIRS_SHOWN = 20


def write_report(folder: RunFolder, plan: SweepPlan, summary: Summary, costs: Mapping[str, Any]) -> None:
    """Write the report of a finished sweep into its folder, with the pictures that it kept."""
    write_report_files(folder.path, summary, kept_comparisons(folder, plan, PROMPTS_SHOWN), costs)


def write_report_files(
    folder: epath.PathLike, summary: Summary, pictures: Sequence[Comparison], costs: Mapping[str, Any]
) -> None:
    """Write `report.html`, `scores.json`, `scores.csv`, `vitality.png` and `vitality.svg` into a folder.

    pictures: what was kept, perhaps none; the first few are shown. costs: label → text or number. Each file is
    there whole or not at all, also when several workers write the same report. SettingError if the folder is a
    file, OSError if it cannot be written.
    """
    folder = absolute(folder)
    if folder.exists() and not folder.is_dir():
        raise SettingError(f"{folder} is a file; choose another folder for the report")
    chart = vitality_chart(summary)
    files = {
        "vitality.svg": to_svg(chart).encode(),
        "vitality.png": to_png(chart),
        "report.html": report_page(summary, pictures, costs).encode(),
        "scores.csv": summary.to_csv().encode(),
        # Last: it tells others that the sweep is finished.
        "scores.json": summary.to_json().encode(),
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        write_whole(folder / name, content)


def report_page(summary: Summary, pictures: Sequence[Comparison], costs: Mapping[str, Any]) -> str:
    """The text of `report.html`."""
    vital = layer_list(summary.choice.layers)
    described = f"Bar chart of the vitality of {len(summary.layers)} layers; vital: {vital}"
    return render(
        "report.html.jinja",
        summary=summary,
        choice=summary.choice,
        bounded=bool(np.isfinite(summary.choice.boundary)),
        settings=summary.settings,
        costs=costs,
        model=_model_name(summary.settings),
        rule=_rule(summary.choice.rule),
        coverage=f"{100 * COVERAGE:g} %",
        resamples=RESAMPLES,
        sure=SURE,
        columns=PICTURES_SHOWN,
        prompts=_prompts(summary.layers),
        measures=[name for name in MEASURES[1:] if not all(np.isnan(getattr(s, name)) for s in summary.layers)],
        chart=inline(to_inline_svg(vitality_chart(summary)), described),
        windows=summary.windows
        and inline(to_inline_svg(windows_chart(summary)), "Heat map of vitality, layers by windows of steps"),
        rows=sorted(zip(summary.layers, summary.choice.membership), key=lambda row: row[0].layers),
        kind_of=summary.kind_of,
        pairs=sorted(summary.pairs, key=lambda pair: -np.nan_to_num(abs(pair.interaction)))[:PAIRS_SHOWN],
        own={score.layers[0]: score.vitality for score in summary.layers},
        pictures=[_shown(summary, comparison) for comparison in pictures[:PROMPTS_SHOWN]],
    )


def _shown(summary: Summary, comparison: Comparison) -> dict[str, Any]:
    """A prompt's reference, and its pictures without the most and without the least vital layers."""
    known = [s for s in summary.layers if s.layers[0] in comparison.bypassed and not np.isnan(s.vitality)]
    ranked = sorted(known, key=lambda score: -score.vitality)
    half = min(PICTURES_SHOWN, (len(ranked) + 1) // 2)

    def cells(scores: Sequence[VariantScore]) -> list[tuple[VariantScore, str]]:
        return [(s, picture(comparison.bypassed[s.layers[0]], f"without layer {s.layers[0]}")) for s in scores]

    rows = {"most vital": cells(ranked[:half]), "least vital": cells(ranked[half:][-half:][::-1])}
    return {
        "prompt": comparison.prompt,
        "seed": comparison.seed,
        "reference": picture(comparison.reference, "all layers"),
        "rows": {name: row for name, row in rows.items() if row},
    }


def _prompts(scores: Sequence[VariantScore]) -> str:
    """How many prompts the layers were measured with; an adaptive sweep spends fewer on clear cases."""
    fewest, most = min(score.prompts for score in scores), max(score.prompts for score in scores)
    counted = str(most) if fewest == most else f"{fewest} to {most}"
    return f"{counted} prompt" if most == 1 else f"{counted} prompts"


def _model_name(settings: Mapping[str, Any]) -> str:
    """`flux-dev` of `checkpoints/flux-dev`; empty where the settings do not tell the model."""
    return PurePath(str(settings.get("model", ""))).name


def _rule(rule: str) -> str:
    """The rule of a choice in words."""
    kind, _, value = rule.partition(" ")
    return {
        "top": f"rank, the first {value} by vitality",
        "threshold": f"a vitality of at least {value}",
        "auto": "the split of the layers into two groups that differ most",
    }.get(kind, rule)
