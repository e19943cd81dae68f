"""Pictures ↔ arrays ↔ packed latents, position ids, noise.

Axes: b batch, y rows, x columns, c channels; s image tokens; a token packs 2×2 latents.
"""

import dataclasses
import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image, ImageOps, UnidentifiedImageError

from sflow_jax.arrays import AnyArray

PATCH = 2
Picture = str | os.PathLike | Image.Image | np.ndarray


def pack(latents: Float[AnyArray, "b y x c"]) -> Float[AnyArray, "b s packed"]:
    """2×2 latents → one token; channel order (c, row in patch, column in patch), as the published models."""
    batch, rows, columns, channels = latents.shape
    x = latents.reshape(batch, rows // PATCH, PATCH, columns // PATCH, PATCH, channels)  # b y p x q c
    return x.transpose(0, 1, 3, 5, 2, 4).reshape(batch, -1, channels * PATCH * PATCH)


def unpack(tokens: Float[AnyArray, "b s packed"], rows: int, columns: int) -> Float[AnyArray, "b y x c"]:
    """Inverse of `pack` for a picture of `rows` × `columns` latents."""
    batch, _, packed = tokens.shape
    x = tokens.reshape(batch, rows // PATCH, columns // PATCH, packed // PATCH**2, PATCH, PATCH)  # b y x c p q
    return x.transpose(0, 1, 4, 2, 5, 3).reshape(batch, rows, columns, -1)


def position_ids(rows: int, columns: int) -> Float[np.ndarray, "s 3"]:
    """(0, row, column) of every image token of a picture of `rows` × `columns` latents."""
    grid = np.indices((rows // PATCH, columns // PATCH), dtype=np.float32).reshape(2, -1).T
    return np.concatenate([np.zeros((len(grid), 1), np.float32), grid], axis=1)


def draw_noise(seed: int, tokens: int, channels: int) -> Float[np.ndarray, "s c"]:
    """Standard normal packed noise, float32, the same on every platform and mesh."""
    return np.asarray(jax.random.normal(jax.random.key(seed), (tokens, channels), jnp.float32))


@dataclasses.dataclass(frozen=True)
class Canvas:
    """A picture's size in pixels, and in rows and columns of latents."""

    height: int
    width: int
    rows: int
    columns: int

    @classmethod
    def of(cls, height: int, width: int, downsampling: int) -> "Canvas":
        """ValueError unless both sides are positive multiples of a token's side (16 for FLUX.1)."""
        side = downsampling * PATCH
        if min(height, width) < side or height % side or width % side:
            near = [max(side, round(length / side) * side) for length in (height, width)]
            raise ValueError(
                f"size {height}x{width} does not fit: height and width must be multiples of {side}, "
                f"for example {near[0]}x{near[1]}"
            )
        return cls(height, width, height // downsampling, width // downsampling)

    @property
    def tokens(self) -> int:
        """Number of image tokens s."""
        return self.rows * self.columns // PATCH**2


def open_picture(picture: Any) -> Image.Image:
    """An upright RGB picture: EXIF orientation applied, transparency composited on white.

    Takes a path, a PIL image, or a uint8 array [y, x, 3 or 4] or [y, x]; ValueError for anything else.
    """
    if isinstance(picture, str | os.PathLike):
        path = Path(picture)
        try:
            with Image.open(path) as opened:
                opened.load()
                picture = opened
        except FileNotFoundError as error:
            raise ValueError(f"no picture at {path}") from error
        except (UnidentifiedImageError, OSError, Image.DecompressionBombError) as error:
            raise ValueError(f"cannot read picture {path}: {error}") from error
    elif isinstance(picture, np.ndarray):
        if picture.dtype != np.uint8 or picture.ndim not in (2, 3) or picture.shape[2:] not in ((), (3,), (4,)):
            raise ValueError(
                f"a picture array must be uint8 [height, width, 3], found {picture.dtype} {list(picture.shape)}"
            )
        picture = Image.fromarray(picture)
    elif not isinstance(picture, Image.Image):
        raise ValueError(f"a picture is a path, a PIL image or a uint8 array, not {type(picture).__name__}")
    picture = ImageOps.exif_transpose(picture)
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        white = Image.new("RGBA", picture.size, "white")
        picture = Image.alpha_composite(white, picture)
    return picture.convert("RGB")


def fit_picture(picture: Image.Image, height: int, width: int) -> UInt8[np.ndarray, "y x 3"]:
    """Scale a picture until it just covers height × width (Lanczos), then cut the centre out."""
    return np.asarray(ImageOps.fit(picture, (width, height), Image.Resampling.LANCZOS))


def to_network(pictures: UInt8[np.ndarray, "b y x 3"]) -> Float[np.ndarray, "b y x 3"]:
    """uint8 → float32 in −1..1."""
    return pictures.astype(np.float32) / np.float32(127.5) - np.float32(1)


def to_uint8(images: Float[np.ndarray, "*b y x 3"]) -> UInt8[np.ndarray, "*b y x 3"]:
    """float32 in 0..1 → uint8, rounded."""
    return np.round(np.clip(images, 0, 1) * 255).astype(np.uint8)
