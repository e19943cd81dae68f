"""The chart of an evaluation: what methods change as asked, against what they keep."""

import dataclasses
from collections.abc import Sequence

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from sflow_jax.evaluation.cases import Benchmark
from sflow_jax.evaluation.layers import ALONE, LayersAlone
from sflow_jax.evaluation.methods import AUTOENCODER
from sflow_jax.evaluation.summary import MethodSummary, Summary
from sflow_jax.vitality.charts import COLOURS, STYLE, layers_width, tick_size

# Inches.
SIZE = (6.4, 3.8)
LABEL_SHIFT = (5, 4)
# Names that find room beside the chart.
MOST_BESIDE = 24
PANEL_HEIGHT = 1.6


@dataclasses.dataclass(frozen=True)
class Point:
    """A method in the chart. kept: along x. success: along y. low, high: its interval, where it has one."""

    name: str
    kept: float
    success: float
    low: float
    high: float


def chart_points(benchmark: Benchmark, summary: Summary) -> list[Point]:
    """Every method of which both numbers are known."""
    success, kept = benchmark.chart
    scales = {column.name: column.scale for column in benchmark.columns}
    points = []
    alone = [match[1] for method in summary.methods if (match := ALONE.fullmatch(method.method))]
    for method in summary.methods:
        value, low, high = _success(method, success.column, scales[success.column], benchmark.share)
        # Of one method's many layers a chart has room for the numbers alone.
        short = method.method.rpartition("=")[2] if len(alone) > 2 and len(set(alone)) == 1 else method.method
        point = Point(short, method.means[kept.column] * scales[kept.column], value, low, high)
        if not np.isnan([point.kept, point.success]).any():
            points.append(point)
    return points


def _success(method: MethodSummary, column: str, scale: float, share: str | None) -> tuple[float, float, float]:
    if column == share and method.rate is not None:
        return 100 * method.rate.share, 100 * method.rate.low, 100 * method.rate.high
    value = method.means[column] * scale
    return value, value, value


def pareto(points: Sequence[Point]) -> list[Point]:
    """Points that no other beats in one and equals in the other, by what they keep."""
    return sorted(
        (
            point
            for point in points
            if not any(
                other.kept >= point.kept
                and other.success >= point.success
                and (other.kept, other.success) != (point.kept, point.success)
                for other in points
            )
        ),
        key=lambda point: point.kept,
    )


@matplotlib.rc_context(STYLE)
def pareto_chart(benchmark: Benchmark, summary: Summary) -> Figure:
    """Success above what is kept; the best methods joined, the right answers through the autoencoder hollow."""
    figure = Figure(SIZE, layout="constrained")
    axes = figure.add_subplot()
    points = chart_points(benchmark, summary)
    methods = [point for point in points if point.name != AUTOENCODER]
    best = pareto(methods)
    axes.plot([p.kept for p in best], [p.success for p in best], color=COLOURS["kind-1-pale"], linewidth=1.4)
    for point in points:
        _draw_point(axes, point, best=point in best, hollow=point.name == AUTOENCODER)
    _name_points(axes, points)
    percent = benchmark.share is not None
    axes.set_ylabel(benchmark.chart[0].title + (" (%)" if percent else ""))
    axes.set_xlabel(benchmark.chart[1].title)
    axes.grid(linewidth=0.6)
    axes.margins(0.06, 0.12)
    if percent:
        axes.set_ylim(min([point.low for point in points], default=0) - 4, 104)
    return figure


@matplotlib.rc_context(STYLE)
def layers_chart(alone: LayersAlone) -> Figure:
    """A bar a layer, with its interval: what is gained, what is lost, and vitality where it is known."""
    layers, known = alone.layers, any(not np.isnan(layer.vitality) for layer in alone.layers)
    panels = [(f"gained: {alone.kept}", "gained", "kind-1"), (f"lost: {alone.success}", "lost", "kind-2")]
    panels += [("vitality", "vitality", "muted")] if known else []
    figure = Figure((layers_width(len(layers)), PANEL_HEIGHT * len(panels)), layout="constrained")
    for axes, (title, name, colour) in zip(figure.subplots(len(panels), sharex=True), panels):
        at = np.arange(len(layers))
        axes.bar(at, [getattr(layer, name) for layer in layers], 0.8, color=COLOURS[colour])
        if name != "vitality":
            ends = ([getattr(layer, f"{name}_{end}") for layer in layers] for end in ("low", "high"))
            axes.vlines(at, *ends, color=COLOURS["ink"], linewidth=0.9)
        axes.axhline(0, color=COLOURS["muted"], linewidth=0.7)
        axes.set_title(title, loc="left", fontsize=9)
        axes.grid(axis="y", linewidth=0.6)
        axes.tick_params(length=0)
    axes.set_xticks(at, [str(layer.layer) for layer in layers], fontsize=tick_size(len(layers)))
    axes.set_xlabel("the only layer that injects")
    return figure


def _draw_point(axes: Axes, point: Point, *, best: bool, hollow: bool) -> None:
    """A dot with its interval."""
    colour = COLOURS["kind-1" if best else "kind-2"]
    if point.high > point.low:
        axes.vlines(point.kept, point.low, point.high, color=COLOURS["muted"], linewidth=0.9)
    face = COLOURS["paper"] if hollow else colour
    axes.plot(point.kept, point.success, "o", color=colour, markersize=6, markerfacecolor=face)


def _name_points(axes: Axes, points: Sequence[Point]) -> None:
    """Names beside the chart from top to bottom, each joined with its point; near it where they are too many."""
    ordered = sorted(points, key=lambda point: (-point.success, -point.kept))
    line = {"arrowstyle": "-", "color": COLOURS["muted"], "linewidth": 0.4, "alpha": 0.6, "relpos": (0.0, 0.5)}
    line |= {"shrinkA": 1, "shrinkB": 4}
    for point, height in zip(ordered, np.linspace(1, 0, len(ordered))):
        place, style = (point.kept, point.success), {"fontsize": 8, "parse_math": False}
        if len(points) > MOST_BESIDE:
            axes.annotate(point.name, place, LABEL_SHIFT, textcoords="offset points", **style)
        else:
            beside = (1.03, height)
            axes.annotate(
                point.name, place, beside, textcoords="axes fraction", va="center", arrowprops=line, **style
            )
