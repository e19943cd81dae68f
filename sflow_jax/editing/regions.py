"""Which part of a picture an edit may change: found by the velocities of both prompts, or drawn by the user.

A region is float32 over a canvas's tokens, 1 where the picture may change and 0 where it stays. Axes: e edits, r
rows and q columns of tokens, n evaluations.
"""

import dataclasses
import os
from typing import Any

import numpy as np
from jaxtyping import Float
from PIL import Image
from scipy import ndimage

from sflow_jax.editing.methods import AUTO_REGION, NO_REGION
from sflow_jax.errors import SettingError
from sflow_jax.pictures.canvas import Canvas
from sflow_jax.pictures.files import fit_picture, open_picture

BORDER = "nearest"
# A pixel of a mask picture counts from this level on, 0…1.
WHITE = 0.5


def is_mask_file(region: Any) -> bool:
    """Whether a region is a file: a text without a dot or a slash is a preset's name."""
    return isinstance(region, os.PathLike) or (isinstance(region, str) and not set("./\\").isdisjoint(region))


@dataclasses.dataclass(frozen=True, kw_only=True)
class RegionRecipe:
    """How the difference of both velocities becomes a region.

    sigmas, noises: the source is noised to every one of these with so many noises. coupled: instead, the difference
    is added up over the middle half of a coupled path (DecFlowEdit). guidance: of both prompts; None is the edit's.

    low, high: quantiles that become 0 and 1, after a mean over smooth × smooth tokens. cut: from there on a token
    belongs to the region; None is Otsu's threshold. width: of a soft cut (a sigmoid); None is a hard one. close:
    holes of so many tokens are filled. grow: tokens added around. soften: deviation of a blur, tokens. invert: the
    region is what does not differ.
    """

    sigmas: tuple[float, ...] = (0.5, 0.7)
    noises: int = 4
    coupled: bool = False
    guidance: float | None = None
    low: float = 0.1
    high: float = 0.98
    smooth: int = 1
    cut: float | None = 0.2
    width: float | None = None
    close: int = 0
    grow: int = 1
    soften: float = 0.0
    invert: bool = False

    def __post_init__(self) -> None:
        if not self.sigmas or not all(0 < sigma <= 1 for sigma in self.sigmas):
            raise SettingError(f"`sigmas` of a region must be above 0 and at most 1, found {self.sigmas}")
        if not 0 <= self.low < self.high <= 1:
            raise SettingError(f"`low` and `high` must be rising quantiles, found {self.low} and {self.high}")
        for name, least in (("noises", 1), ("smooth", 1), ("close", 0), ("grow", 0), ("soften", 0)):
            if getattr(self, name) < least:
                raise SettingError(f"`{name}` of a region must be at least {least}, found {getattr(self, name)}")

    def changed(self, **settings: Any) -> "RegionRecipe":
        """The same with other settings, None of them meaning as it is."""
        return dataclasses.replace(self, **{name: value for name, value in settings.items() if value is not None})


@dataclasses.dataclass(frozen=True)
class DrawnRegion:
    """A region that the user draws. mask: see `read_region`. close, grow, soften, invert: see `RegionRecipe`."""

    mask: Any
    close: int = 0
    grow: int = 0
    soften: float = 0.0
    invert: bool = False


REGIONS: dict[str, RegionRecipe] = {
    AUTO_REGION: RegionRecipe(),
    "decflowedit": RegionRecipe(
        coupled=True, guidance=1.0, smooth=5, low=0.1, high=0.9, cut=0.55, width=0.08, grow=0
    ),
    # The authors cut at every step; here once, before the first.
    "steerflow": RegionRecipe(low=0.02, high=0.98, cut=0.5, width=1 / 13, close=5, grow=0),
    "otsu": RegionRecipe(cut=None, grow=0),
}


def find_recipe(name: "str | RegionRecipe") -> RegionRecipe:
    """A preset by its name, own ones as they are; SettingError for an unknown name."""
    if isinstance(name, RegionRecipe):
        return name
    if name not in REGIONS:
        raise SettingError(f"unknown `region` {name!r}; choose one of {NO_REGION}, {', '.join(REGIONS)}")
    return REGIONS[name]


def region_of_differences(energy: Float[np.ndarray, "r q"], recipe: RegionRecipe) -> Float[np.ndarray, "r q"]:
    """A region from how much both velocities differ at every token."""
    energy = np.asarray(energy, np.float64)
    if recipe.smooth > 1:
        energy = ndimage.uniform_filter(energy, recipe.smooth, mode=BORDER)
    low, high = np.quantile(energy, [recipe.low, recipe.high])
    share = np.clip((energy - low) / max(high - low, np.finfo(np.float32).tiny), 0, 1)
    cut = otsu_threshold(share) if recipe.cut is None else recipe.cut
    if recipe.width is None:
        region = (share >= cut).astype(np.float64)
    else:
        region = 1 / (1 + np.exp(-(share - cut) / recipe.width))
    if recipe.invert:
        region = 1 - region
    return shape_region(region, close=recipe.close, grow=recipe.grow, soften=recipe.soften)


def shape_region(
    region: Float[np.ndarray, "r q"], *, close: int = 0, grow: int = 0, soften: float = 0.0
) -> Float[np.ndarray, "r q"]:
    """Close holes of `close` tokens, add `grow` tokens around, blur with a deviation of `soften` tokens."""
    region = np.asarray(region, np.float64)
    if close > 1:
        region = ndimage.minimum_filter(ndimage.maximum_filter(region, close, mode=BORDER), close, mode=BORDER)
    if grow:
        region = ndimage.maximum_filter(region, 2 * grow + 1, mode=BORDER)
    if soften:
        region = ndimage.gaussian_filter(region, soften, mode=BORDER)
    return np.float32(np.clip(region, 0, 1))


def otsu_threshold(share: Float[np.ndarray, "r q"], bins: int = 256) -> float:
    """The cut of values in 0…1 that leaves the least variance on both of its sides."""
    counts, edges = np.histogram(share, bins, (0.0, 1.0))
    middles = (edges[:-1] + edges[1:]) / 2
    below, above = np.cumsum(counts), np.cumsum(counts[::-1])[::-1]
    mean_below = np.cumsum(counts * middles) / np.maximum(below, 1)
    mean_above = np.cumsum((counts * middles)[::-1])[::-1] / np.maximum(above, 1)
    between = below[:-1] * above[1:] * (mean_below[:-1] - mean_above[1:]) ** 2
    # Between two heaps all cuts are as good: the middle one.
    return float(edges[1:-1][between == between.max()].mean())


def read_region(mask: Any, canvas: Canvas) -> Float[np.ndarray, "r q"]:
    """A region from a mask: a file or picture whose white parts may change, or an array.

    Arrays are of the canvas's tokens or of its pixels: true or false, 0…1, or levels of 255. A token belongs to the
    region if any pixel of it does. SettingError for other shapes and numbers.
    """
    if isinstance(mask, DrawnRegion):
        region = read_region(mask.mask, canvas)
        region = 1 - region if mask.invert else region
        return shape_region(region, close=mask.close, grow=mask.grow, soften=mask.soften)
    if isinstance(mask, str | os.PathLike | Image.Image):
        levels = fit_picture(open_picture(mask), canvas.height, canvas.width).mean(axis=-1) / 255
    else:
        levels = _as_shares(np.asarray(mask))
    if levels.shape == (canvas.rows, canvas.columns):
        return np.float32(levels)
    if levels.shape != (canvas.height, canvas.width):
        raise SettingError(
            f"`region` must be [rows, columns] of tokens [{canvas.rows}, {canvas.columns}] or of pixels "
            f"[{canvas.height}, {canvas.width}], found {list(levels.shape)}"
        )
    tiles = levels.reshape(canvas.rows, canvas.height // canvas.rows, canvas.columns, -1)
    return np.float32(tiles.max(axis=(1, 3)) >= WHITE)


def _as_shares(mask: np.ndarray) -> np.ndarray:
    """Numbers in 0…1."""
    shares = mask / 255 if mask.dtype == np.uint8 else mask.astype(np.float64)
    if not (np.isfinite(shares).all() and shares.min(initial=0) >= 0 and shares.max(initial=0) <= 1):
        raise SettingError("`region` must hold numbers from 0 to 1, true or false, or bytes")
    return shares


def to_pixels(region: Float[np.ndarray, "r q"], height: int, width: int) -> Float[np.ndarray, "y x"]:
    """A region over pixels: 0 in all tokens outside it, and blended over the half token within its edge."""
    enlarged = Image.fromarray(np.float32(region)).resize((width, height), Image.Resampling.BILINEAR)
    return np.clip(2 * np.asarray(enlarged, np.float32) - 1, 0, 1)


def paste(
    edits: Float[np.ndarray, "e y x 3"], photo: Float[np.ndarray, "y x 3"], regions: Float[np.ndarray, "e r q"]
) -> Float[np.ndarray, "e y x 3"]:
    """Edits whose pixels outside their region are the photo's own."""
    height, width = photo.shape[:2]
    pasted = []
    for edit, region in zip(edits, regions, strict=True):
        share = to_pixels(region, height, width)[..., None]
        pasted.append(share * edit + (1 - share) * photo)
    return np.float32(np.stack(pasted))
