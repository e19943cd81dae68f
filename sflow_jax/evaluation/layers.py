"""What it is worth to inject in each layer alone: how much more is kept, and how many fewer edits succeed.

Axes: p pictures (cases), n layers, r bootstrap resamples.
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
# Share of the successes whose loss halves what a gain is worth.
HALVING = 0.05
DASH = "–"


def worth(
    gained: Float[np.ndarray, "*any"], before: float | Float[np.ndarray, "*one"], after: Float[np.ndarray, "*any"]
) -> Float[np.ndarray, "*any"]:
    """What injecting is worth, in the unit of what is gained: gained / (1 + lost / `HALVING`).

    before, after: success without and with it. lost: the share of it that goes, 1 − after / before, at least 0.
    So it is what is gained a share lost, where everything is charged `HALVING` beforehand (and then times that): a
    single edit more or less decides little, and where nothing is lost it is the gain itself. A loss of what is kept
    (gained below 0) counts as it is. NaN where nothing succeeds without, or it is not known.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        lost = np.where(np.greater(before, 0), np.maximum(1 - after / before, 0), np.nan)
    return np.where(gained > 0, gained / (1 + lost / HALVING), gained + 0 * lost)


@dataclasses.dataclass(frozen=True)
class Effects:
    """One method with each layer alone, means over every picture's edits; a picture counts once.

    layers: their numbers. success, kept: with each layer's injection; success_without, kept_without: with none.
    """

    layers: tuple[int, ...]
    success_without: Float[np.ndarray, " p"]
    kept_without: Float[np.ndarray, " p"]
    success: Float[np.ndarray, "p n"]
    kept: Float[np.ndarray, "p n"]

    @property
    def gained(self) -> Float[np.ndarray, "p n"]:
        """Of what is kept."""
        return self.kept - self.kept_without[:, None]

    @property
    def lost(self) -> Float[np.ndarray, "p n"]:
        """Of success."""
        return self.success_without[:, None] - self.success

    @property
    def worth(self) -> Float[np.ndarray, " n"]:
        """Of the means over pictures."""
        return worth(_means(self.gained), _mean(self.success_without), _means(self.success))

    @property
    def worth_by_picture(self) -> Float[np.ndarray, "p n"]:
        """Of every picture's own edits."""
        return worth(self.gained, self.success_without[:, None], self.success)

    def resampled_worth(self, resamples: int = RESAMPLES) -> Float[np.ndarray, "r n"]:
        """With pictures drawn with replacement."""
        columns = np.concatenate([self.gained, self.success, self.success_without[:, None]], axis=1)
        means, n = resampled_means(columns, resamples=resamples), len(self.layers)
        return worth(means[:, :n], means[:, -1:], means[:, n:-1])

    def of(self, pictures: slice) -> "Effects":
        """Some of the pictures."""
        return Effects(
            self.layers,
            *(x[pictures] for x in (self.success_without, self.kept_without, self.success, self.kept)),
        )


@dataclasses.dataclass(frozen=True)
class LayerWorth:
    """One layer against no injection, means over pictures, with 95 % intervals over them (bootstrap).

    gained: of what is kept, in the benchmark's unit. lost: of success, points of a hundred where it is a rate.
    worth: see the function. vitality: of a sweep, NaN without one.
    """

    layer: int
    gained: float
    gained_low: float
    gained_high: float
    lost: float
    lost_low: float
    lost_high: float
    worth: float
    worth_low: float
    worth_high: float
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
        titles = ["layer", "gained (95 %)", "lost (95 %)", "worth (95 %)", "vitality"]
        return titles, [
            [
                str(x.layer),
                f"{x.gained:+.2f} ({x.gained_low:+.2f} to {x.gained_high:+.2f})",
                f"{x.lost:+.1f} ({x.lost_low:+.1f} to {x.lost_high:+.1f})",
                DASH if np.isnan(x.worth) else f"{x.worth:+.2f} ({x.worth_low:+.2f} to {x.worth_high:+.2f})",
                _number(x.vitality),
            ]
            for x in self.layers
        ]


def layers_alone(
    benchmark: Benchmark, summary: Summary, vitality: Mapping[int, float] | None = None
) -> tuple[LayersAlone, ...]:
    """Of every method that a run has without injection and with single layers. vitality: layer → a sweep's."""
    return tuple(
        _method(benchmark, name, effects, vitality or {})
        for name, effects in layer_effects(benchmark, summary).items()
    )


def layer_effects(benchmark: Benchmark, summary: Summary) -> dict[str, Effects]:
    """Method → what it does with each layer alone, for those that a run has without injection and with layers."""
    found: dict[str, dict[str, list[Row]]] = {}
    for row in summary.rows:
        if (match := ALONE.fullmatch(row.method)) is not None:
            found.setdefault(match[1], {}).setdefault(match[2], []).append(row)
    return {
        name: _effects(benchmark, variants)
        for name, variants in found.items()
        if "none" in variants and len(variants) > 1
    }


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
        f"{method.success_without:.1f} without injection; worth: the gain, halved where {100 * HALVING:g} % of the "
        "success is lost"
    )


def _effects(benchmark: Benchmark, variants: Mapping[str, list[Row]]) -> Effects:
    """Layer or "none" → its rows."""
    numbers = sorted(int(layer) for layer in variants if layer != "none")
    values = [_values(benchmark, axis.column, variants) for axis in benchmark.chart]
    without = [measured["none"] for measured in values]
    return Effects(
        tuple(numbers), *without, *(np.stack([measured[str(n)] for n in numbers], axis=1) for measured in values)
    )


def _values(
    benchmark: Benchmark, name: str, variants: Mapping[str, list[Row]]
) -> dict[str, Float[np.ndarray, " p"]]:
    """Layer → a column, a number a picture, in the unit of tables. What is better low is negative."""
    column = next(column for column in benchmark.columns if column.name == name)
    scale = 100 if column.name == benchmark.share else column.scale
    scale = -scale if column.higher is False else scale
    return {layer: scale * _of_cases(rows, column.name) for layer, rows in variants.items()}


def _method(benchmark: Benchmark, name: str, effects: Effects, vitality: Mapping[int, float]) -> LayersAlone:
    """gained and lost of every layer."""
    success, kept = benchmark.chart
    return LayersAlone(
        name,
        f"{success.title} (%)" if benchmark.share == success.column else success.title,
        kept.title,
        _mean(effects.success_without),
        _mean(effects.kept_without),
        tuple(_layers(effects, vitality)),
    )


def _layers(effects: Effects, vitality: Mapping[int, float]) -> list[LayerWorth]:
    """Means and intervals of every layer."""
    columns = []
    for differences in (effects.gained, effects.lost):
        columns += [_means(differences), *known_interval(resampled_means(differences))]
    columns += [effects.worth, *known_interval(effects.resampled_worth())]
    rows = zip(effects.layers, *(column.tolist() for column in columns))
    return [LayerWorth(*row, vitality.get(row[0], np.nan)) for row in rows]


def known_interval(resampled: Float[np.ndarray, "r n"]) -> Float[np.ndarray, "2 n"]:
    """Lower and upper ends; NaN where nothing is known."""
    known, ends = ~np.isnan(resampled).all(axis=0), np.full((2, resampled.shape[1]), np.nan)
    if known.any():
        ends[:, known] = interval(resampled[:, known])
    return ends


def _means(values: Float[np.ndarray, "p n"]) -> Float[np.ndarray, " n"]:
    return np.array([_mean(column) for column in values.T])


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
