"""Results on disk: pictures, captioned grids, JSON; all of a command's files or none."""

import contextlib
import io
import json
import math
import tempfile
import textwrap
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from etils import epath
from jaxtyping import Float
from PIL import Image, ImageDraw, ImageFont

from sflow_jax.latents import to_uint8
from sflow_jax.paths import absolute, is_remote

MARGIN = 8
# Small pictures are enlarged (hard pixels) until a grid cell is about this wide, so that captions fit.
CELL_WIDTH = 224
CAPTION_SIZE = 14


class Folder:
    """Files of one command, written elsewhere until they are complete."""

    def __init__(self, path: epath.Path):
        self.path = path

    def picture(self, name: str, image: Float[np.ndarray, "y x 3"]) -> None:
        """Save a float picture in 0..1 as PNG."""
        self.image(name, Image.fromarray(to_uint8(image)))

    def image(self, name: str, image: Image.Image) -> None:
        """Save a PIL image as PNG."""
        data = io.BytesIO()
        image.save(data, "PNG")
        (self.path / name).write_bytes(data.getvalue())

    def json(self, name: str, content: dict[str, Any]) -> None:
        """Save a dictionary as indented JSON."""
        (self.path / name).write_text(json.dumps(content, indent=2, ensure_ascii=False, default=_plain) + "\n")


@contextlib.contextmanager
def output_folder(destination: epath.PathLike | None) -> Iterator[Folder]:
    """A folder to write into; its files move to `destination` when the block ends well, else vanish.

    None: they vanish anyway (processes that do not report). Raises ValueError at once if the destination cannot be
    a folder.
    """
    if destination is None:
        with tempfile.TemporaryDirectory() as temporary:
            yield Folder(epath.Path(temporary))
        return
    # Resolved, since "." and ".." have no name to put a sibling beside.
    destination = absolute(destination)
    if destination.exists() and not destination.is_dir():
        raise ValueError(f"{destination} is a file; choose another folder for --out")
    if is_remote(destination):
        # Object stores have no folders to rename, and each file appears there whole.
        with tempfile.TemporaryDirectory() as temporary:
            yield Folder(epath.Path(temporary))
            for file in sorted(epath.Path(temporary).iterdir()):
                (destination / file.name).write_bytes(file.read_bytes())
        return
    partial = destination.with_name(f".{destination.name}.partial")
    if partial.exists():
        partial.rmtree()
    made = [parent for parent in partial.parents if not parent.exists()]
    partial.mkdir(parents=True)
    try:
        yield Folder(partial)
        destination.mkdir(parents=True, exist_ok=True)
        for file in sorted(partial.iterdir()):
            file.replace(destination / file.name)
        partial.rmdir()
    except BaseException:
        partial.rmtree(missing_ok=True)
        for parent in made:
            parent.rmdir()
        raise


def captioned_grid(
    images: Float[np.ndarray, "n y x 3"], captions: Sequence[str], columns: int | None = None
) -> Image.Image:
    """Pictures (0..1, one size) side by side with a caption under each, on white."""
    height, width = images[0].shape[:2]
    scale = max(1, CELL_WIDTH // width)
    cell = width * scale
    columns = columns or min(len(images), 4)
    rows = math.ceil(len(images) / columns)
    font = ImageFont.load_default(size=CAPTION_SIZE)
    letters = max(8, int(cell / font.getlength("n")))
    wrapped = [textwrap.wrap(caption, letters) or [""] for caption in captions]
    caption_height = max(map(len, wrapped)) * (CAPTION_SIZE + 4)
    row_height = height * scale + caption_height + 2 * MARGIN
    sheet = Image.new("RGB", (columns * (cell + MARGIN) + MARGIN, rows * row_height + MARGIN), "white")
    draw = ImageDraw.Draw(sheet)
    for i, (image, lines) in enumerate(zip(images, wrapped, strict=True)):
        x, y = MARGIN + (i % columns) * (cell + MARGIN), MARGIN + (i // columns) * row_height
        shown = Image.fromarray(to_uint8(image)).resize((cell, height * scale), Image.Resampling.NEAREST)
        sheet.paste(shown, (x, y))
        draw.multiline_text((x, y + height * scale + 4), "\n".join(lines), fill="black", font=font)
    return sheet


def _plain(value: Any) -> Any:
    """numpy numbers and arrays as JSON."""
    return value.tolist() if hasattr(value, "tolist") else str(value)
