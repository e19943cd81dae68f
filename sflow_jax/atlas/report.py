"""The atlas as one page that opens anywhere, pictures, and the numbers for machines."""

from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from sflow_jax.atlas.pictures import atlas_grid, layer_captions, layer_pictures, small
from sflow_jax.pictures.files import to_uint8
from sflow_jax.reports.pages import inline, picture, render
from sflow_jax.results import AttentionAtlas
from sflow_jax.storage.folders import Folder
from sflow_jax.vitality.charts import (
    COLOUR_MAP,
    COLOURS,
    SMALL_TICKS,
    STYLE,
    layers_width,
    tick_size,
    to_inline_svg,
)

# Who is attended to, in the order of `AttentionAtlas.shares`, and how bars show it.
PARTS = {"source": "kind-1", "own": "kind-2", "text": "kind-2-pale"}
# Inches.
LAYER_WIDTH, HEIGHT, MARGIN, STEP_HEIGHT = 0.2, 2.4, 1.0, 0.16
DIGITS = 5


def write_atlas(folder: Folder, atlas: AttentionAtlas, *, by_step: bool) -> None:
    """Write a grid a query, with by_step one a step too, the pictures themselves, and `atlas.html`."""
    mean = atlas.mean()
    names = ["source.png", "edit-1.png"] if len(atlas.result.images) > 1 else ["picture-1.png"]
    for name, image in zip(names, atlas.result.images):
        folder.picture(name, image, atlas.result.record)
    for query in range(len(atlas.queries)):
        folder.image(f"attention-{query + 1}.png", atlas_grid(mean, query))
        for step in range(len(atlas.text) if by_step else 0):
            number = atlas.first_step + step
            folder.image(f"attention-{query + 1}-step-{number:02d}.png", atlas_grid(atlas, query, step))
    folder.text("atlas.html", atlas_page(atlas, by_step=by_step))


def atlas_record(atlas: AttentionAtlas, *, by_step: bool) -> dict[str, Any]:
    """What atlas.json says: how the picture was painted, the layers, and what every point and word attends to."""
    kinds = {"layer_kinds": atlas.layer_kinds, "first_step": atlas.first_step}
    return {**atlas.result.record, "command": "atlas", **kinds, "queries": query_records(atlas, by_step=by_step)}


def query_records(atlas: AttentionAtlas, *, by_step: bool) -> list[dict[str, Any]]:
    """Shares of every query a layer, the mean over steps, and by step [t, n] if asked."""
    shares, told = atlas.shares, []
    for i, query in enumerate(atlas.queries):
        one = {"name": query.name, "tokens": query.tokens, "mean": _named(shares[:, :, i].mean(axis=0))}
        told.append(one | ({"steps": _named(shares[:, :, i])} if by_step else {}))
    return told


def _named(shares: np.ndarray) -> dict[str, Any]:
    return {name: np.round(shares[..., i].astype(float), DIGITS).tolist() for i, name in enumerate(PARTS)}


def atlas_page(atlas: AttentionAtlas, *, by_step: bool) -> str:
    """The text of `atlas.html`."""
    record = atlas.result.record
    return render(
        "atlas.html.jinja",
        prompts=record["prompts"] if "prompts" in record else [record["prompt"], *record["edits"]],
        pictures=[
            (name, picture(to_uint8(small(image)), name))
            for name, image in zip(["source", "edit"], atlas.result.images)
        ],
        steps=len(atlas.text),
        first_step=atlas.first_step,
        layers=len(atlas.layer_names),
        has_source=bool(atlas.source.any()),
        by_step=by_step,
        queries=[_shown(atlas, query, by_step) for query in range(len(atlas.queries))],
        settings=record,
    )


def _shown(atlas: AttentionAtlas, query: int, by_step: bool) -> dict[str, Any]:
    """A query's maps, and its charts."""
    name, mean = atlas.queries[query].name, atlas.mean()
    maps = zip(layer_captions(mean, query), layer_pictures(mean, query))
    chart = inline(to_inline_svg(shares_chart(atlas, query)), f"{name}: shares of attention in every layer")
    steps = inline(to_inline_svg(steps_chart(atlas, query)), f"{name}: shares by step") if by_step else None
    return {
        "name": name,
        "chart": chart,
        "steps": steps,
        "maps": [(caption, picture(to_uint8(image), f"{name}, layer {caption}")) for caption, image in maps],
    }


@matplotlib.rc_context(STYLE)
def shares_chart(atlas: AttentionAtlas, query: int) -> Figure:
    """A bar a layer, the mean over steps: what goes to the source's tokens, the own ones, and text."""
    shares, layers = atlas.shares[:, :, query].mean(axis=0), len(atlas.layer_names)
    figure = Figure((layers_width(layers, LAYER_WIDTH), HEIGHT), layout="constrained")
    axes, base = figure.add_subplot(), np.zeros(layers)
    for i, (name, colour) in enumerate(PARTS.items()):
        axes.bar(np.arange(layers), shares[:, i], 0.8, bottom=base, color=COLOURS[colour], label=name)
        base = base + shares[:, i]
    axes.set(xlabel="layer", ylabel="share of attention", xlim=(-0.6, layers - 0.4), ylim=(0, 1))
    axes.set_xticks(np.arange(layers), list(map(str, range(layers))), fontsize=tick_size(layers))
    axes.tick_params(length=0)
    figure.legend(loc="outside upper left", ncols=len(PARTS), frameon=False, fontsize=8)
    return figure


@matplotlib.rc_context(STYLE)
def steps_chart(atlas: AttentionAtlas, query: int) -> Figure:
    """Heat maps, layers × steps: shares of the source's tokens (where there are any) and of text."""
    names = [name for name in PARTS if name == "text" or (name == "source" and atlas.source.any())]
    steps, layers = atlas.shares.shape[:2]
    size = layers_width(layers, LAYER_WIDTH), len(names) * (MARGIN + STEP_HEIGHT * steps)
    figure = Figure(size, layout="constrained")
    for axes, name in zip(figure.subplots(len(names), squeeze=False)[:, 0], names):
        values = atlas.shares[:, :, query, list(PARTS).index(name)]
        mesh = axes.pcolormesh(values, cmap=COLOUR_MAP, vmin=0, vmax=1, edgecolors=COLOURS["paper"], linewidth=0.4)
        axes.set(ylabel="step", title=f"{name}: share of attention")
        axes.set_xticks(np.arange(layers) + 0.5, list(map(str, range(layers))), fontsize=SMALL_TICKS)
        axes.set_yticks(np.arange(0, steps, 5) + 0.5, [str(atlas.first_step + i) for i in range(0, steps, 5)])
        axes.invert_yaxis()
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
        figure.colorbar(mesh, ax=axes, pad=0.02).outline.set_visible(False)
    axes.set_xlabel("layer")
    return figure
