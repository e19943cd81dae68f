"""Attention drawn over the picture: how strong where, and whose keys it goes to."""

import numpy as np
from jaxtyping import Float
from PIL import Image

from sflow_jax.pictures.grids import captioned_grid
from sflow_jax.reports.pages import percent
from sflow_jax.results import AttentionAtlas, Query

# Red, green, blue of the source's keys and of the own ones, as the charts have them.
SOURCE, OWN = np.float32([0x1F, 0x5F, 0x99]) / 255, np.float32([0xB4, 0x60, 0x0A]) / 255
# How much of the picture's contrast is left below the colours.
CONTRAST = 0.45
BRIGHTNESS = np.float32([0.299, 0.587, 0.114])
# Pixels of a side, so that many layers fit a page.
LARGEST_SIDE = 256
COLUMNS = 6


def overlay(
    image: Float[np.ndarray, "y x 3"],
    source: Float[np.ndarray, "rows columns"],
    own: Float[np.ndarray, "rows columns"],
    query: Query,
) -> Float[np.ndarray, "y x 3"]:
    """A picture in pale grey; on it blue where the source's keys are attended to, orange for the own ones.

    As strong as the weight is beside the largest one of this map. A point's own token has a dark rim.
    """
    both = source + own
    strength = _to_pixels(both / max(float(both.max()), np.finfo(np.float32).tiny), image)
    share = _to_pixels(source / np.maximum(both, np.finfo(np.float32).tiny), image)
    pale = 1 - CONTRAST * (1 - image @ BRIGHTNESS)[..., None]
    drawn = (1 - strength) * pale + strength * (share * SOURCE + (1 - share) * OWN)
    if query.row is not None:
        _mark(drawn, query.row, query.column, [side // count for side, count in zip(image.shape, both.shape)])
    return np.float32(drawn)


def layer_pictures(atlas: AttentionAtlas, query: int, step: int = 0) -> Float[np.ndarray, "n y x 3"]:
    """One a layer, of one query in one step, at most `LARGEST_SIDE` pixels a side."""
    image = small(atlas.image)
    maps = zip(atlas.source[step, :, query], atlas.own[step, :, query])
    return np.stack([overlay(image, source, own, atlas.queries[query]) for source, own in maps])


def layer_captions(atlas: AttentionAtlas, query: int, step: int = 0) -> list[str]:
    """Which layer, and how its attention is shared."""
    names = ("source", "own", "text") if atlas.source.any() else (None, "own", "text")
    return [
        f"{layer}: " + ", ".join(f"{name} {percent(float(share))}" for name, share in zip(names, row) if name)
        for layer, row in zip(atlas.layer_names, atlas.shares[step, :, query])
    ]


def atlas_grid(atlas: AttentionAtlas, query: int, step: int = 0) -> Image.Image:
    """The picture itself, and one map a layer, each with its caption."""
    images = np.concatenate([small(atlas.image)[None], layer_pictures(atlas, query, step)])
    return captioned_grid(images, [atlas.queries[query].name, *layer_captions(atlas, query, step)], columns=COLUMNS)


def small(image: Float[np.ndarray, "y x 3"]) -> Float[np.ndarray, "y x 3"]:
    """At most `LARGEST_SIDE` pixels a side, by means of whole blocks."""
    height, width = image.shape[:2]
    block = -(-max(height, width) // LARGEST_SIDE)
    while height % block or width % block:
        block += 1
    return image.reshape(height // block, block, width // block, block, 3).mean(axis=(1, 3))


def _to_pixels(tokens: Float[np.ndarray, "rows columns"], image: np.ndarray) -> Float[np.ndarray, "y x 1"]:
    """Every token's number on all of its pixels."""
    sides = (np.arange(side) * count // side for side, count in zip(image.shape, tokens.shape))
    return tokens[np.ix_(*sides)][..., None]


def _mark(drawn: Float[np.ndarray, "y x 3"], row: int, column: int, sides: list[int]) -> None:
    """A dark rim around a token."""
    rows, columns = (slice(at * side, (at + 1) * side) for at, side in zip((row, column), sides))
    token = drawn[rows, columns]
    for edge in (token[0], token[-1], token[:, 0], token[:, -1]):
        edge[:] = 0.0
