"""Picture files ↔ arrays.

Axes: b batch, y rows, x columns.
"""

import contextlib
import io
import logging
import os
from pathlib import Path
from typing import Any

import numpy as np
from etils import epath
from jaxtyping import Float, UInt8
from PIL import Image, ImageCms, ImageOps, PngImagePlugin

from sflow_jax.errors import SettingError

logger = logging.getLogger(__name__)
Picture = str | os.PathLike | Image.Image | np.ndarray
# A profile's colour space → the mode that it describes.
GREYS = ("1", "L", "LA")
PROFILE_MODES = {"GRAY": "L", "CMYK": "CMYK", "Lab": "LAB"}
# EXIF's tag, and what turns a picture upright.
ORIENTATION = 0x0112
TIFF_BITS, TIFF_FORMAT = 258, 339
# Keyword of a PNG's text chunk that says how the picture was painted, and the first bytes of every PNG.
RECORD_KEY, PNG_SIGNATURE = "sflow_jax", b"\x89PNG\r\n\x1a\n"
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def open_picture(picture: Any) -> Image.Image:
    """An upright sRGB picture: EXIF orientation applied, colour profile converted, transparency on white.

    Takes a path (local or remote), a PIL image, or a uint8 array [y, x, 3 or 4] or [y, x]. Greys of 16 and 32 bits
    are scaled by their type's range, floats from 0..1. ValueError for anything else, and whatever a decoder objects
    to.
    """
    if isinstance(picture, str | os.PathLike):
        try:
            return _to_srgb(_decode(picture))
        except ValueError as error:
            raise ValueError(str(error).replace("the picture", f"picture {picture}")) from error
    if isinstance(picture, np.ndarray):
        fits = picture.ndim in (2, 3) and picture.shape[2:] in ((), (3,), (4,)) and picture.size
        if picture.dtype != np.uint8 or not fits:
            raise ValueError(
                f"a picture array must be uint8 [height, width, 3], found {picture.dtype} {list(picture.shape)}"
            )
        return _to_srgb(Image.fromarray(picture))
    if not isinstance(picture, Image.Image):
        raise ValueError(f"a picture is a path, a PIL image or a uint8 array, not {type(picture).__name__}")
    return _to_srgb(picture)


def _decode(name: str | os.PathLike) -> Image.Image:
    """A picture file, all of it; ValueError in one line."""
    if not os.fspath(name):
        raise SettingError("`image` is empty; name a picture file")
    try:
        path = epath.Path(name)
        if not path.exists():
            raise ValueError(f"no picture at {os.fspath(name)}")
    except (KeyError, OSError) as error:
        # A name that is too long, or an address of a kind that epath does not know.
        raise ValueError(
            f"cannot read the picture at {os.fspath(name)[:80]}: {error}; give a local file"
        ) from error
    # A folder, or a pipe or device, which may have no end (epath takes these for files).
    if path.is_dir() or not ("://" in os.fspath(path) or Path(path).is_file()):
        raise ValueError(f"{path} is not a picture file")
    try:
        with path.open("rb") as file, Image.open(file) as opened:
            opened.load()
            return opened
    except Exception as error:  # decoders raise many kinds
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"cannot read picture {path}: {reason}") from error


def _to_srgb(picture: Image.Image) -> Image.Image:
    """8-bit RGB, upright and opaque."""
    turn, profile = TURNS.get(_orientation(picture)), picture.info.get("icc_profile")
    picture = _to_eight_bits(picture)
    if picture.has_transparency_data:
        rgba = picture.convert("RGBA")
        opaque = _convert_profile(rgba.convert("RGB"), profile if picture.mode != "CMYK" else None)
        white = Image.new("RGB", rgba.size, "white")
        picture = Image.composite(opaque, white, rgba.getchannel("A"))
    else:
        picture = _convert_profile(picture, profile)
    return picture.convert("RGB") if turn is None else picture.convert("RGB").transpose(turn)


def _orientation(picture: Image.Image) -> int | None:
    """EXIF's, where it can be read: the rest of it may be broken."""
    with contextlib.suppress(Exception):
        return picture.getexif().get(ORIENTATION)
    return None


def _to_eight_bits(picture: Image.Image) -> Image.Image:
    """Greys of more than 8 bits, which Pillow itself would clip; ValueError for numbers that are not finite."""
    if not picture.mode.startswith(("I", "F")):
        return picture
    levels = np.asarray(picture, np.float64)
    if not np.isfinite(levels).all():
        raise ValueError("the picture has numbers that are not finite")
    return Image.fromarray(np.round(np.clip(levels / _brightest(picture), 0, 1) * 255).astype(np.uint8))


def _brightest(picture: Image.Image) -> float:
    """The level of white in a grey picture of more than 8 bits."""
    if picture.mode == "F":
        return 1.0
    tags = getattr(picture, "tag_v2", {})
    bits, signed = tags.get(TIFF_BITS, (32,))[0], tags.get(TIFF_FORMAT, (1,))[0] == 2
    if bits == 16 and signed:
        return 2.0**15 - 1
    # PNG and PPM have at most 16 bits, which Pillow may open as 32.
    return 2.0**16 - 1 if picture.mode.startswith("I;16") or picture.format in ("PNG", "PPM") else 2.0**31 - 1


def _convert_profile(picture: Image.Image, profile: bytes | None) -> Image.Image:
    """Colours of an embedded profile (Display P3, Adobe RGB, a printer's CMYK …) as sRGB has them."""
    if profile is None:
        return picture
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        mode = PROFILE_MODES.get(source.profile.xcolor_space.strip(), "RGB")
        if mode == "L" and picture.mode not in GREYS:
            raise ValueError("a profile of greys on a picture of colours")
        # A grey picture may carry a profile of colours.
        picture = picture.convert(mode)
        return ImageCms.profileToProfile(picture, source, ImageCms.createProfile("sRGB"), outputMode="RGB")
    except (ImageCms.PyCMSError, OSError, ValueError) as error:
        logger.warning("the picture's colour profile cannot be used (%s); taken as sRGB", error)
        return picture


def png_bytes(picture: Image.Image, record: str | None = None) -> bytes:
    """A PNG file; record: ASCII text (JSON) for its text chunk `RECORD_KEY`."""
    data, chunks = io.BytesIO(), PngImagePlugin.PngInfo()
    if record is not None:
        chunks.add_text(RECORD_KEY, record)
    picture.save(data, "PNG", pnginfo=chunks)
    return data.getvalue()


def read_png_record(path: epath.PathLike) -> str:
    """The text that `png_bytes` put into a PNG; its pixels are not read. ValueError for files without one."""
    try:
        with epath.Path(path).open("rb") as file, Image.open(file, formats=["PNG"]) as opened:
            record = opened.info.get(RECORD_KEY)
    except Exception as error:  # decoders raise many kinds
        raise ValueError(f"{path} is not a PNG that can be read (its chunks are broken)") from error
    if not isinstance(record, str):
        raise ValueError(f"{path} does not say how it was painted (no {RECORD_KEY} text in it)")
    return record


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
