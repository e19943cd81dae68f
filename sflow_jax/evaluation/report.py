"""The report of an evaluation: one page that opens anywhere, its chart, and the numbers for machines."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from sflow_jax.evaluation.cases import Benchmark, Case
from sflow_jax.evaluation.chart import layers_chart, pareto_chart
from sflow_jax.evaluation.layers import ALONE, LayersAlone, describe, to_csv, to_markdown
from sflow_jax.evaluation.methods import AUTOENCODER
from sflow_jax.evaluation.summary import COVERAGE, Row, Summary
from sflow_jax.pictures.files import open_picture
from sflow_jax.reports.pages import inline, number, picture, render
from sflow_jax.runs.folder import RunFolder
from sflow_jax.storage.files import write_whole
from sflow_jax.vitality.charts import to_inline_svg, to_png, to_svg

# Pictures of each method on the page.
SHOWN = 12
THUMBNAIL = 256
# The row's edited picture, or its painted source, at most so large as the run's folder keeps it.
Pictures = Callable[[Row, bool], UInt8[np.ndarray, "y x 3"]]


def write_report(
    folder: RunFolder,
    benchmark: Benchmark,
    summary: Summary,
    pictures: Pictures,
    alone: Sequence[LayersAlone] = (),
) -> None:
    """Write `report.html`, `summary.json`, `summary.md`, `scores.csv` and `pareto.png`, `pareto.svg` into a run.

    alone: methods with each layer alone; with any, also `layers.md`, `layers.csv`, and `layers-1.png`,
    `layers-1.svg` a method.
    """
    chart = pareto_chart(benchmark, summary)
    files = {
        "pareto.svg": to_svg(chart).encode(),
        "pareto.png": to_png(chart),
        **_layer_files(alone),
        "report.html": report_page(benchmark, summary, pictures, alone).encode(),
        "scores.csv": summary.to_csv().encode(),
        "summary.md": summary.to_markdown().encode(),
        # Last: it tells others that the run is finished.
        "summary.json": summary.to_json().encode(),
    }
    for name, content in files.items():
        write_whole(folder.path / name, content)


def _layer_files(alone: Sequence[LayersAlone]) -> dict[str, bytes]:
    files = {"layers.md": to_markdown(alone).encode(), "layers.csv": to_csv(alone).encode()} if alone else {}
    for i, method in enumerate(alone, 1):
        chart = layers_chart(method)
        files |= {f"layers-{i}.svg": to_svg(chart).encode(), f"layers-{i}.png": to_png(chart)}
    return files


def report_page(
    benchmark: Benchmark, summary: Summary, pictures: Pictures, alone: Sequence[LayersAlone] = ()
) -> str:
    """The text of `report.html`."""
    titles, cells = summary.table()
    described = f"Chart of {len(summary.methods)} methods: {benchmark.chart[0].title} by {benchmark.chart[1].title}"
    cases = {case.name: case for case in benchmark.cases}
    return render(
        "evaluation.html.jinja",
        title=f"Edits: {summary.benchmark}",
        model=str(summary.settings.get("model", "")),
        pictures=len(summary.rows),
        methods=len(summary.methods),
        notes=summary.notes,
        coverage=f"{100 * COVERAGE:g} %",
        chart=inline(to_inline_svg(pareto_chart(benchmark, summary)), described),
        titles=titles,
        cells=cells,
        groups=summary.group_tables(),
        alone=[_alone(method) for method in alone],
        worst=[
            (
                method.method,
                [
                    _shown(benchmark, cases[row.case], row, pictures)
                    for row in worst_rows(benchmark, summary, method.method)
                ],
            )
            for method in summary.methods
            if method.method not in (AUTOENCODER, *_single_layers(summary, alone))
        ],
        settings=summary.settings,
        costs=summary.costs,
    )


def _alone(method: LayersAlone) -> dict[str, Any]:
    """A method's layers, as the page shows them."""
    told = f"{method.method}: {len(method.layers)} layers, each injecting alone"
    correlations = {name: number(value, 2) for name, value in method.rank_correlations.items()}
    return {
        "method": method.method,
        "chart": inline(to_inline_svg(layers_chart(method)), told),
        "table": method.table(),
        "about": describe(method),
        "correlations": correlations,
    }


def _single_layers(summary: Summary, alone: Sequence[LayersAlone]) -> set[str]:
    """Rows of single layers, whose pictures a page with many layers has no room for."""
    names = {method.method for method in alone}
    matches = [(method.method, ALONE.fullmatch(method.method)) for method in summary.methods]
    return {label for label, match in matches if match and match[1] in names and match[2] != "none"}


def worst_rows(benchmark: Benchmark, summary: Summary, method: str) -> list[Row]:
    """The first few rows of a method, the worst first; rows whose badness is not known come last."""

    def key(row: Row) -> float:
        badness = benchmark.badness(row.scores)
        return math.inf if math.isnan(badness) else -badness

    return sorted((row for row in summary.rows if row.method == method), key=key)[:SHOWN]


def _shown(benchmark: Benchmark, case: Case, row: Row, pictures: Pictures) -> Mapping[str, Any]:
    """A source, its edit and the right answer where that is known, and what was measured."""
    source = pictures(row, True) if case.picture is None else _small(open_picture(case.picture))
    images = [("source", source), ("edit", pictures(row, False))]
    if case.answers is not None:
        images.append(("right answer", _small(Image.fromarray(case.answers[row.number]))))
    told = [
        f"{column.title} {number(row.scores[column.name] * column.scale, column.digits)}"
        for column in benchmark.columns
        if not math.isnan(row.scores[column.name])
    ]
    return {
        "prompt": row.prompt,
        "edit": row.edit,
        "group": row.group,
        "case": row.case,
        "remark": row.remark,
        "told": ", ".join(told),
        "images": [(name, picture(pixels, f"{name}: {row.edit}")) for name, pixels in images],
    }


def _small(image: Image.Image) -> UInt8[np.ndarray, "y x 3"]:
    image = image.copy()
    image.thumbnail((THUMBNAIL, THUMBNAIL), Image.Resampling.LANCZOS)
    return np.asarray(image)
