"""The report of a sweep: one page that opens anywhere, its charts, and the numbers for machines."""

from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import Any

import numpy as np
from etils import epath

from sflow_jax.errors import SettingError
from sflow_jax.reports.pages import inline, layer_list, percent, picture, render
from sflow_jax.runs.folder import RunFolder
from sflow_jax.settings import EDITS
from sflow_jax.storage.files import write_whole
from sflow_jax.storage.paths import absolute
from sflow_jax.vitality.charts import (
    to_inline_svg,
    to_png,
    to_svg,
    unsure,
    vitality_chart,
    window_name,
    windows_chart,
)
from sflow_jax.vitality.pictures import Comparison, KeptFiles, kept_comparisons, kept_files
from sflow_jax.vitality.plan import SweepPlan
from sflow_jax.vitality.scores import COVERAGE, MEASURES, RESAMPLES, SURE, VariantScore
from sflow_jax.vitality.summary import PromptScore, Summary

PROMPTS_SHOWN = 3
# Of the least vital layers; of the most vital at least so many, and all that are called vital.
PICTURES_SHOWN = 4
PAIRS_SHOWN = 20
# Columns of the table of prompts.
LAYERS_BY_PROMPT = 12
GALLERY = "pictures.html"
# Of a sweep by edits, whose folder lies in an evaluation's.
EDITS_REPORT = "../report.html"
FILES = ("scores.json", "scores.csv", "vitality.png", "vitality.svg")


def write_report(folder: RunFolder, plan: SweepPlan, summary: Summary, costs: Mapping[str, Any]) -> None:
    """Write the report of a finished sweep into its folder, with the pictures that it kept."""
    pictures = kept_comparisons(folder, plan, PROMPTS_SHOWN)
    write_report_files(folder.path, summary, pictures, costs, kept_files(folder, plan))


def write_report_files(
    folder: epath.PathLike,
    summary: Summary,
    pictures: Sequence[Comparison],
    costs: Mapping[str, Any],
    kept: Sequence[KeptFiles] = (),
) -> None:
    """Write `report.html`, `scores.json`, `scores.csv`, `vitality.png` and `vitality.svg` into a folder.

    pictures: what was kept, perhaps none; the first few are shown. costs: label → text or number. kept: files of
    all that was kept; `pictures.html` shows them. Each file is there whole or not at all, also when several workers
    write the same report. SettingError if the folder is a file, OSError if it cannot be written.
    """
    folder = absolute(folder)
    if folder.exists() and not folder.is_dir():
        raise SettingError(f"{folder} is a file; choose another folder for the report")
    chart = vitality_chart(summary)
    files = {
        "vitality.svg": to_svg(chart).encode(),
        "vitality.png": to_png(chart),
        "report.html": report_page(summary, pictures, costs, gallery=bool(kept)).encode(),
        **({GALLERY: gallery_page(summary, kept).encode()} if kept else {}),
        "scores.csv": summary.to_csv().encode(),
        # Last: it tells others that the sweep is finished.
        "scores.json": summary.to_json().encode(),
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        write_whole(folder / name, content)


def report_page(
    summary: Summary, pictures: Sequence[Comparison], costs: Mapping[str, Any], gallery: bool = False
) -> str:
    """The text of `report.html`. gallery: whether it links to `pictures.html`."""
    vital = layer_list(summary.choice.layers)
    importance = summary.importance
    described = f"Bar chart of the {importance.name} of {len(summary.layers)} layers; vital: {vital}"
    return render(
        "report.html.jinja",
        summary=summary,
        choice=summary.choice,
        bounded=bool(np.isfinite(summary.choice.boundary)),
        hatched=any(map(unsure, summary.choice.membership)),
        settings=summary.settings,
        costs=costs,
        model=_model_name(summary.settings),
        rule=_rule(summary.choice.rule, importance.name),
        by_edits=summary.by == EDITS,
        importance=importance,
        coverage=percent(COVERAGE),
        resamples=RESAMPLES,
        sure=SURE,
        columns=PICTURES_SHOWN,
        prompts=_prompts(summary.layers, importance.case),
        measures=[name for name in MEASURES[1:] if not all(np.isnan(getattr(s, name)) for s in summary.layers)],
        chart=inline(to_inline_svg(vitality_chart(summary)), described),
        windows=summary.windows
        and inline(to_inline_svg(windows_chart(summary)), "Heat map of vitality, layers by windows of steps"),
        by_prompt=_prompt_rows(summary),
        by_window=_window_rows(summary),
        files=[*([GALLERY] if gallery else []), *([EDITS_REPORT] if summary.by == EDITS else []), *FILES],
        file_names={GALLERY: "all pictures", EDITS_REPORT: "all edits"},
        rows=sorted(zip(summary.layers, summary.choice.membership), key=lambda row: row[0].layers),
        kind_of=summary.kind_of,
        pairs=sorted(summary.pairs, key=lambda pair: -np.nan_to_num(abs(pair.interaction)))[:PAIRS_SHOWN],
        own={score.layers[0]: score.vitality for score in summary.layers},
        pictures=[_shown(summary, comparison) for comparison in pictures[:PROMPTS_SHOWN]],
    )


def gallery_page(summary: Summary, kept: Sequence[KeptFiles]) -> str:
    """The text of `pictures.html`: every layer and prompt that was kept, beside the picture with all layers."""
    by_prompt = {scores.prompt: scores for scores in summary.by_prompt}
    mean = {score.layers[0]: score.vitality for score in summary.layers}
    rows = [(files, _own_vitality(summary, by_prompt.get(files.number))) for files in kept]
    return render(
        "gallery.html.jinja",
        model=_model_name(summary.settings),
        vital=summary.choice.layers,
        rows=rows,
        mean=mean,
        layers=sorted({layer for files in kept for layer in files.bypassed}),
    )


def _own_vitality(summary: Summary, scores: PromptScore | None) -> dict[int, float]:
    """Layer → its vitality for one prompt; NaN where that is not known."""
    values = (float("nan"),) * len(summary.layers) if scores is None else scores.vitality
    return {score.layers[0]: value for score, value in zip(summary.layers, values)}


def _prompt_rows(summary: Summary) -> dict[str, Any]:
    """Vitality prompt by prompt: of the vital layers, or the most vital of many, and the others' mean."""
    vital = [score for score in summary.layers if score.layers[0] in summary.choice.layers]
    shown = sorted(vital, key=lambda score: -score.vitality)[:LAYERS_BY_PROMPT]
    columns = sorted(score.layers[0] for score in shown)
    prompts, rows = summary.settings.get("prompts", []), []
    for scores in summary.by_prompt:
        own = _own_vitality(summary, scores)
        others = [value for layer, value in own.items() if layer not in columns and not np.isnan(value)]
        text = prompts[scores.prompt] if scores.prompt < len(prompts) else ""
        mean = float(np.mean(others)) if others else float("nan")
        rows.append((scores.prompt, text, [own[layer] for layer in columns], mean))
    return {"columns": columns, "rows": rows}


def _window_rows(summary: Summary) -> dict[str, Any]:
    """The map of windows as a table: layer → vitality by window of steps."""
    windows = sorted({(score.first, score.last) for score in summary.windows})
    values = {(score.layers[0], score.first, score.last): score.vitality for score in summary.windows}
    layers = sorted({score.layers[0] for score in summary.windows})
    rows = [(layer, [values.get((layer, *window), float("nan")) for window in windows]) for layer in layers]
    return {"columns": [window_name(*window) for window in windows], "rows": rows}


def _shown(summary: Summary, comparison: Comparison) -> dict[str, Any]:
    """A prompt's reference, and its pictures without the most and without the least vital layers."""
    known = [s for s in summary.layers if s.layers[0] in comparison.bypassed and not np.isnan(s.vitality)]
    ranked = sorted(known, key=lambda score: -score.vitality)
    vital = sum(score.layers[0] in summary.choice.layers for score in known)
    half = max(vital, min(PICTURES_SHOWN, (len(ranked) + 1) // 2))

    def cells(scores: Sequence[VariantScore]) -> list[tuple[VariantScore, str]]:
        return [(s, picture(comparison.bypassed[s.layers[0]], f"without layer {s.layers[0]}")) for s in scores]

    rows = {"most vital": cells(ranked[:half]), "least vital": cells(ranked[half:][-PICTURES_SHOWN:][::-1])}
    return {
        "prompt": comparison.prompt,
        "seed": comparison.seed,
        "reference": picture(comparison.reference, "all layers"),
        "rows": {name: row for name, row in rows.items() if row},
    }


def _prompts(scores: Sequence[VariantScore], case: str) -> str:
    """How many prompts the layers were measured with; an adaptive sweep spends fewer on clear cases."""
    fewest, most = min(score.prompts for score in scores), max(score.prompts for score in scores)
    counted = str(most) if fewest == most else f"{fewest} to {most}"
    return f"{counted} {case}" if most == 1 else f"{counted} {case}s"


def _model_name(settings: Mapping[str, Any]) -> str:
    """`flux-dev` of `checkpoints/flux-dev`; empty where the settings do not tell the model."""
    return PurePath(str(settings.get("model", ""))).name


def _rule(rule: str, name: str) -> str:
    """The rule of a choice in words."""
    kind, _, value = rule.partition(" ")
    return {
        "top": f"rank, the first {value} by {name}",
        "threshold": f"a {name} of at least {value}",
        "auto": "the split of the layers into two groups that differ most",
    }.get(kind, rule)
