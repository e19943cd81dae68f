"""Pictures side by side with captions."""

import math
import textwrap
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float
from PIL import Image, ImageDraw, ImageFont

from sflow_jax.pictures.files import to_uint8

MARGIN = 8
# Small pictures are enlarged (hard pixels) until a grid cell is about this wide, so that captions fit.
CELL_WIDTH = 224
CAPTION_SIZE = 14


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
