"""What it is worth to inject in each layer alone: how much more is kept, and how many fewer edits succeed.

Axes: p pictures (cases), n layers.
"""

import csv
import dataclasses
import io
import re
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Float

from sflow_jax.evaluation.cases import Benchmark
from sflow_jax.evaluation.summary import Row, Summary, markdown_table
from sflow_jax.vitality.scores import RESAMPLES, interval, rank_correlation, resampled_means

# A method's label without injection, or with that of one layer; see `methods.each_layer`.
ALONE = re.compile(r"(.+):layers=(none|\d+)")
DASH = "–"


@dataclasses.dataclass(frozen=True)
class LayerWorth:
    """One layer against no injection, means over pictures, with 95 % intervals over them (bootstrap).

    gained: of what is kept, in the benchmark's unit. lost: of success, points of a hundred where it is a rate.
    worth: gained a point lost; of a rate at least one edit counts as lost, elsewhere it is NaN where nothing is.
    vitality: of a sweep, NaN without one.
    """

    layer: int
    gained: float
    gained_low: float
    gained_high: float
    lost: float
    lost_low: float
    lost_high: float
    worth: float
    vitality: float


@dataclasses.dataclass(frozen=True)
class LayersAlone:
    """One method with each layer alone. success, kept: their titles, and means without injection."""

    method: str
    success: str
    kept: str
    success_without: float
    kept_without: float
    layers: tuple[LayerWorth, ...]

    @property
    def rank_correlations(self) -> dict[str, float]:
        """Of vitality with what is gained, lost, and the worth; empty without a sweep's vitality."""
        known = [layer for layer in self.layers if not np.isnan(layer.vitality)]
        if not known:
            return {}
        vitality = np.array([layer.vitality for layer in known])
        columns = {
            name: np.array([getattr(layer, name) for layer in known]) for name in ("gained", "lost", "worth")
        }
        return {name: _correlation(vitality, values) for name, values in columns.items()}

    def table(self) -> tuple[list[str], list[list[str]]]:
        """Titles and cells: a line a layer."""
        titles = ["layer", "gained (95 %)", "lost (95 %)", "gained a point lost", "vitality"]
        return titles, [
            [
                str(x.layer),
                f"{x.gained:+.2f} ({x.gained_low:+.2f} to {x.gained_high:+.2f})",
                f"{x.lost:+.1f} ({x.lost_low:+.1f} to {x.lost_high:+.1f})",
                _number(x.worth),
                _number(x.vitality),
            ]
            for x in self.layers
        ]


def layers_alone(
    benchmark: Benchmark, summary: Summary, vitality: Mapping[int, float] | None = None
) -> tuple[LayersAlone, ...]:
    """Of every method that a run has without injection and with single layers. vitality: layer → a sweep's."""
    found: dict[str, dict[str, list[Row]]] = {}
    for row in summary.rows:
        if (match := ALONE.fullmatch(row.method)) is not None:
            found.setdefault(match[1], {}).setdefault(match[2], []).append(row)
    return tuple(
        _method(benchmark, name, variants, vitality or {})
        for name, variants in found.items()
        if "none" in variants and len(variants) > 1
    )


def to_csv(methods: Sequence[LayersAlone]) -> str:
    """The text of `layers.csv`: a line a method and layer."""
    lines, names = io.StringIO(), [field.name for field in dataclasses.fields(LayerWorth)]
    writer = csv.writer(lines, lineterminator="\n")
    writer.writerow(["method", *names])
    for method in methods:
        for layer in method.layers:
            numbers = [getattr(layer, name) for name in names]
            writer.writerow([method.method, *("" if np.isnan(x) else f"{x:.6g}" for x in numbers)])
    return lines.getvalue()


def to_markdown(methods: Sequence[LayersAlone]) -> str:
    """The text of `layers.md`."""
    lines = []
    for method in methods:
        correlations = [f"{name} {_number(value)}" for name, value in method.rank_correlations.items()]
        lines += [f"# {method.method}: each layer alone", "", f"- {describe(method)}"]
        lines += [f"- rank correlation with vitality: {', '.join(correlations)}"] if correlations else []
        lines += ["", *markdown_table(*method.table()), ""]
    return "\n".join(lines)


def describe(method: LayersAlone) -> str:
    """What gained and lost are of, and what there is without injection."""
    return (
        f"gained: of {method.kept}, {method.kept_without:.2f} without injection; lost: of {method.success}, "
        f"{method.success_without:.1f} without injection; a point lost counts as one edit at least"
    )


def _method(
    benchmark: Benchmark, name: str, variants: Mapping[str, list[Row]], vitality: Mapping[int, float]
) -> LayersAlone:
    """gained and lost of every layer."""
    success, kept = benchmark.chart
    numbers = sorted(int(layer) for layer in variants if layer != "none")
    values = {}
    for axis in (success, kept):
        column = next(column for column in benchmark.columns if column.name == axis.column)
        scale = 100 if column.name == benchmark.share else column.scale
        # Of what is better low, less is more.
        scale = -scale if column.higher is False else scale
        values[axis.column] = {layer: scale * _of_cases(rows, column.name) for layer, rows in variants.items()}
    gained, lost = (
        np.stack([sign * (values[axis.column][str(n)] - values[axis.column]["none"]) for n in numbers], axis=1)
        for axis, sign in ((kept, 1), (success, -1))
    )
    least = 100 / len(variants["none"]) if benchmark.share == success.column else np.nan
    return LayersAlone(
        name,
        f"{success.title} (%)" if benchmark.share == success.column else success.title,
        kept.title,
        *(_mean(values[axis.column]["none"]) for axis in (success, kept)),
        tuple(_layers(numbers, gained, lost, least, vitality)),
    )


def _layers(
    numbers: Sequence[int],
    gained: Float[np.ndarray, "p n"],
    lost: Float[np.ndarray, "p n"],
    least: float,
    vitality: Mapping[int, float],
) -> list[LayerWorth]:
    """Means and intervals of every layer's differences."""
    columns = []
    for differences in (gained, lost):
        columns += [np.array([_mean(x) for x in differences.T]), *_interval(differences)]
    rows = zip(numbers, *(column.tolist() for column in columns))
    return [LayerWorth(*row, _worth(row[1], row[4], least), vitality.get(row[0], np.nan)) for row in rows]


def _interval(differences: Float[np.ndarray, "p n"]) -> Float[np.ndarray, "2 n"]:
    """Of the means over pictures; NaN where nothing is known."""
    known, ends = ~np.isnan(differences).all(axis=0), np.full((2, differences.shape[1]), np.nan)
    if known.any():
        ends[:, known] = interval(resampled_means(differences[:, known], resamples=RESAMPLES))
    return ends


def _worth(gained: float, lost: float, least: float) -> float:
    lost = lost if np.isnan(least) else max(lost, least)
    return gained / lost if lost > 0 else float("nan")


def _of_cases(rows: Sequence[Row], column: str) -> Float[np.ndarray, " p"]:
    """Mean of each picture's edits: a picture counts once, however many edits it has."""
    cases: dict[str, list[float]] = {}
    for row in rows:
        cases.setdefault(row.case, []).append(row.scores[column])
    return np.array([_mean(np.array(values)) for values in cases.values()])


def _mean(values: Float[np.ndarray, " p"]) -> float:
    """Of what is known; NaN where nothing is."""
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else float("nan")


def _correlation(first: Float[np.ndarray, " n"], second: Float[np.ndarray, " n"]) -> float:
    known = ~np.isnan(second)
    return rank_correlation(first[known], second[known]) if known.any() else float("nan")


def _number(value: float) -> str:
    return DASH if np.isnan(value) else f"{value:.2f}"
