"""Picture files ↔ arrays.

Axes: b batch, y rows, x columns.
"""

import os
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image, ImageOps, UnidentifiedImageError

Picture = str | os.PathLike | Image.Image | np.ndarray


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


def to_unit(pictures: UInt8[np.ndarray, "*b y x 3"]) -> Float[np.ndarray, "*b y x 3"]:
    """uint8 → float32 in 0..1."""
    return pictures.astype(np.float32) / np.float32(255)
