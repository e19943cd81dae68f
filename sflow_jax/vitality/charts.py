"""Charts of a sweep: vitality of every layer, layers × windows of steps, and two runs side by side.

They are matplotlib figures of their own: no global state, no window, the same bytes every time.
"""

import io
import re
from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import matplotlib
import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.transforms import blended_transform_factory

from sflow_jax.vitality.scores import COVERAGE, SURE, Choice, Importance, VariantScore

COLOURS = {
    "ink": "#22262b",
    "muted": "#68707a",
    "grid": "#e3e5e8",
    "kind-1": "#1f5f99",
    "kind-1-pale": "#b3cde4",
    "kind-2": "#b4600a",
    "kind-2-pale": "#edcda9",
    "mark": "#efece2",
    "paper": "#ffffff",
}
"""On white. Blue and orange are told apart by every kind of colour vision, vital and pale also in grey print. A
page may give another value to each as a CSS variable, `--chart-ink` and so on."""
# Few enough colours that the bar beside the map stays a drawing; the palest is still seen on white.
COLOUR_MAP = ListedColormap(matplotlib.colormaps["PuBu"](np.linspace(0.06, 1, 32)))
STYLE = matplotlib.rcParamsDefault | {
    "font.size": 9,
    "font.family": ["DejaVu Sans"],
    "text.color": COLOURS["ink"],
    "axes.facecolor": "none",
    "axes.edgecolor": COLOURS["muted"],
    "axes.labelcolor": COLOURS["ink"],
    "axes.linewidth": 0.7,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "grid.color": COLOURS["grid"],
    "xtick.color": COLOURS["muted"],
    "ytick.color": COLOURS["muted"],
    "ytick.labelsize": 8,
    "svg.fonttype": "none",
    # Names inside an SVG are hashes; without a salt they would be random.
    "svg.hashsalt": "sflow_jax",
}
STYLE.pop("backend", None)
# Inches. A layer gets as much as two digits need.
LAYER_WIDTH, LEAST_WIDTH, MARGINS = 0.16, 5.2, 1.0
HEIGHT, WINDOW_HEIGHT = 3.0, 0.3
# From so many layers on, a heat map's cells hold no numbers, and the layers' own are small.
MANY_CELLS, MANY_LAYERS, SMALL_TICKS = 16, 25, 6.5
PNG_DPI = 200
KIND_COLOURS = 2
# Characters. Of a path the end says most.
LONGEST_NAME = 60
# Of layers that some resamples call vital and some do not.
UNSURE_HATCH = "////"


@runtime_checkable
class Swept(Protocol):
    """What charts show of a sweep's findings: `vitality.summary.Summary`."""

    layers: Sequence[VariantScore]
    windows: Sequence[VariantScore]
    choice: Choice

    @property
    def importance(self) -> Importance:
        """What its scores are, in words."""

    @property
    def kinds(self) -> list[str]:
        """Names of the kinds of layers, in global order."""

    def kind_of(self, layer: int) -> str:
        """The kind of a layer."""


@matplotlib.rc_context(STYLE)
def vitality_chart(summary: Swept) -> Figure:
    """One bar a layer, with its interval; vital layers in full colour, unsure ones hatched, the boundary dashed."""
    figure, (axes,) = _stacked(1, len(summary.layers))
    _draw_bars(axes, summary, _numbers(summary))
    _limit_height([axes], summary.layers)
    axes.set_xlabel(summary.importance.tried)
    return figure


@matplotlib.rc_context(STYLE)
def windows_chart(summary: Swept) -> Figure:
    """A heat map, layers × windows of steps, of the vitality of layers bypassed in a part of the steps.

    Numbers stand in the cells where layers are few; SVG files tell each cell's. ValueError if the sweep had no
    windows.
    """
    if not summary.windows:
        raise ValueError("the sweep has no windows of steps to draw")
    layers = sorted({score.layers[0] for score in summary.windows})
    windows = sorted({(score.first, score.last) for score in summary.windows})
    values = np.full((len(windows), len(layers)), np.nan)
    for score in summary.windows:
        values[windows.index((score.first, score.last)), layers.index(score.layers[0])] = score.vitality
    figure = Figure((layers_width(len(layers)), MARGINS + WINDOW_HEIGHT * len(windows)), layout="constrained")
    axes = figure.add_subplot()
    top = np.nanmax(values, initial=0.0) or 1.0
    known = np.ma.masked_invalid(values)
    mesh = axes.pcolormesh(known, cmap=COLOUR_MAP, vmin=0, vmax=top, edgecolors=COLOURS["paper"], linewidth=0.8)
    axes.set_yticks(np.arange(len(windows)) + 0.5, [window_name(*window) for window in windows])
    axes.invert_yaxis()
    _label_layers(axes, layers, summary.choice.layers, shift=0.5)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.set_xlabel("layer bypassed")
    figure.colorbar(mesh, ax=axes, label="vitality", pad=0.02).outline.set_visible(False)
    if len(layers) < MANY_CELLS:
        _write_cells(axes, values, top)
    for (row, column), value in np.ndenumerate(values):
        words = "not measured" if np.isnan(value) else f"vitality {value:.3f}"
        named = f"layer {layers[column]}: {window_name(*windows[row])}, {words}"
        axes.add_patch(Rectangle((column, row), 1, 1, alpha=0, zorder=9, gid=named))
    return figure


@matplotlib.rc_context(STYLE)
def comparison_chart(runs: Sequence[Swept], names: Sequence[str]) -> Figure:
    """The vitality charts of runs one above the other; layers that only some of them choose are marked."""
    layers = sorted({number for run in runs for number in _numbers(run)})
    chosen = [{*run.choice.layers} for run in runs]
    disputed = set.union(*chosen) - set.intersection(*chosen)
    figure, panels = _stacked(len(runs), len(layers))
    for axes, summary, name in zip(panels, runs, names):
        _draw_bars(axes, summary, layers)
        shown = name if len(name) <= LONGEST_NAME else f"…{name[1 - LONGEST_NAME :]}"
        axes.set_title(shown, fontsize=10, fontweight="bold", loc="left", pad=18, parse_math=False)
        for at in (layers.index(layer) for layer in disputed):
            axes.axvspan(at - 0.5, at + 0.5, color=COLOURS["mark"], zorder=0)
    for importance in {run.importance for run in runs}:
        alike = [i for i, run in enumerate(runs) if run.importance == importance]
        _limit_height([panels[i] for i in alike], [score for i in alike for score in runs[i].layers])
    for axes, run in zip(panels, runs):
        if run is runs[-1] or len({run.importance for run in runs}) > 1:
            axes.set_xlabel(run.importance.tried)
    return figure


@matplotlib.rc_context(STYLE)
def to_png(figure: Figure) -> bytes:
    """A PNG file on white, for print."""
    data = io.BytesIO()
    figure.savefig(data, format="png", dpi=PNG_DPI, facecolor="white", metadata={"Software": None})
    return data.getvalue()


@matplotlib.rc_context(STYLE)
def to_svg(figure: Figure) -> str:
    """An SVG file on white; its text is text."""
    return _svg(figure, facecolor="white")


@matplotlib.rc_context(STYLE)
def to_inline_svg(figure: Figure) -> str:
    """An `<svg>` element for an HTML page: no background, and colours that the page may change (see `COLOURS`)."""
    text = _svg(figure, facecolor="none")
    text = text[text.index("<svg") :]
    # Several charts share a page: names that nothing inside refers to would only collide.
    used = set(re.findall(r"#([\w-]+)", " ".join(re.findall(r'url\(#[^)]*\)|href="#[^"]*"', text))))
    text = re.sub(r'(<[^<>]*) id="([^"]*)"', lambda match: match[0] if match[2] in used else match[1], text)
    for name, colour in COLOURS.items():
        text = re.sub(f"(fill|stroke): {colour}", rf"\1: var(--chart-{name}, {colour})", text)
    return text


def window_name(first: int, last: int) -> str:
    """`steps 0–4` of steps 0 up to but not including 5."""
    return f"step {first}" if last == first + 1 else f"steps {first}–{last - 1}"


def unsure(share: float) -> bool:
    """Whether a layer that this share of resamples chooses is neither surely vital nor surely not."""
    return 1 - SURE < share < SURE


def _svg(figure: Figure, facecolor: str) -> str:
    data = io.StringIO()
    unsaid = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    figure.savefig(data, format="svg", facecolor=facecolor, metadata=unsaid)
    # What a pointer reads; an identifier could not hold such words.
    return re.sub(r'<g id="(layer \d+: [^"]*)">', r"<g><title>\1</title>", data.getvalue())


def _numbers(summary: Swept) -> list[int]:
    return sorted(score.layers[0] for score in summary.layers)


def layers_width(layers: int, each: float = LAYER_WIDTH) -> float:
    """Inches that a chart of so many layers takes."""
    return max(LEAST_WIDTH, MARGINS + each * layers)


def tick_size(layers: int) -> float:
    """Points of the layers' numbers."""
    return SMALL_TICKS if layers >= MANY_LAYERS else 9.0


def _stacked(panels: int, layers: int) -> tuple[Figure, list[Axes]]:
    figure = Figure((layers_width(layers), panels * HEIGHT), layout="constrained")
    figure.get_layout_engine().set(hspace=0.06)
    return figure, list(figure.subplots(panels, squeeze=False)[:, 0])


def _draw_bars(axes: Axes, summary: Swept, layers: Sequence[int]) -> None:
    """Bars of a run's layers, each at its place among `layers`."""
    vital = summary.choice.layers
    for score, share in zip(summary.layers, summary.choice.membership):
        (number,), at = score.layers, layers.index(score.layers[0])
        _add_hover(axes, at, score, share, summary.importance.name)
        if np.isnan(score.vitality):
            axes.text(at, 0, "–", ha="center", va="bottom", color=COLOURS["muted"])
            continue
        colour = COLOURS[_colour(summary, number) + ("" if number in vital else "-pale")]
        axes.bar(at, score.vitality, width=0.8, color=colour)
        if unsure(share):
            hatched = {"hatch": UNSURE_HATCH, "edgecolor": COLOURS["paper"], "linewidth": 0}
            axes.bar(at, score.vitality, width=0.8, color="none", **hatched)
        # The line is seen on a dark bar too, by its pale rim.
        axes.vlines(at, score.low, score.high, color=COLOURS["paper"], linewidth=2.4)
        axes.vlines(at, score.low, score.high, color=COLOURS["ink"], linewidth=0.9)
    _label_layers(axes, layers, vital)
    axes.set_xlim(-0.6, len(layers) - 0.4)
    axes.set_ylabel(f"{summary.importance.title}, {100 * COVERAGE:g} % interval")
    axes.grid(axis="y", linewidth=0.6)
    axes.tick_params(length=0)
    axes.spines["left"].set_visible(False)
    _divide_kinds(axes, summary, layers)
    if np.isfinite(summary.choice.boundary):
        axes.axhline(summary.choice.boundary, color=COLOURS["ink"], linewidth=0.9, linestyle=(0, (4, 3)))
        right_of_axes = blended_transform_factory(axes.transAxes, axes.transData)
        label = f"boundary\n{summary.choice.boundary:.3g}"
        axes.text(1.005, summary.choice.boundary, label, transform=right_of_axes, va="center", fontsize=8)


def _add_hover(axes: Axes, at: int, score: VariantScore, share: float, name: str) -> None:
    """An unseen band over a layer's whole height, which SVG files tell the numbers of."""
    words = f"{name} {score.vitality:.3f}, from {score.low:.3f} to {score.high:.3f}, chosen by {share:.0%}"
    if np.isnan(score.vitality):
        words = "not measured"
    axes.axvspan(at - 0.5, at + 0.5, alpha=0, zorder=9, gid=f"layer {score.layers[0]}: {words}")


def _colour(summary: Swept, layer: int) -> str:
    """Kinds of layers take the colours in turn."""
    return f"kind-{1 + summary.kinds.index(summary.kind_of(layer)) % KIND_COLOURS}"


def _divide_kinds(axes: Axes, summary: Swept, layers: Sequence[int]) -> None:
    """Name the kinds of layers above the bars, and part them by lines."""
    above, runs = axes.get_xaxis_transform(), []
    for kind in summary.kinds:
        places = [at for at, layer in enumerate(layers) if summary.kind_of(layer) == kind]
        if places:
            runs.append((kind, places[0], places[-1]))
    for kind, first, last in runs:
        # The last kind stands at the right end, so that its name has room.
        at_end = last == len(layers) - 1 and len(runs) > 1
        at, align = (last + 0.4, "right") if at_end else (first - 0.4, "left")
        colour = COLOURS[_colour(summary, layers[first])]
        axes.text(at, 1.03, f"{kind} blocks", transform=above, color=colour, ha=align)
    for _, first, _ in runs[1:]:
        axes.axvline(first - 0.5, color=COLOURS["muted"], linewidth=0.7)


def _label_layers(axes: Axes, layers: Sequence[int], vital: Sequence[int], shift: float = 0.0) -> None:
    axes.set_xticks(np.arange(len(layers)) + shift, list(map(str, layers)), fontsize=tick_size(len(layers)))
    for layer, label in zip(layers, axes.get_xticklabels()):
        if layer in vital:
            label.set(fontweight="bold", color=COLOURS["ink"])


def _limit_height(panels: Sequence[Axes], scores: Sequence[VariantScore]) -> None:
    """One scale for all panels: from 0 (or below, if an interval goes there) to just above the highest interval."""
    ends = [end for score in scores for end in (score.low, score.vitality, score.high) if np.isfinite(end)]
    for axes in panels:
        axes.set_ylim(min([0.0, *ends]), 1.05 * max([0.0, *ends]) or 1.0)


def _write_cells(axes: Axes, values: Float[np.ndarray, "w n"], top: float) -> None:
    for (row, column), value in np.ndenumerate(values):
        # Not the theme's colours: a cell keeps its own on a dark page.
        colour = "#fefefe" if value > 0.55 * top else "#111111"
        text = "" if np.isnan(value) else f"{value:.2f}".replace("0.", ".", 1)
        axes.text(column + 0.5, row + 0.5, text, ha="center", va="center", fontsize=8, color=colour)
