"""The size of a picture, made once and then passed."""

import dataclasses
import itertools
import math
import numbers

from sflow_jax.errors import SettingError

# Pixels; beyond them no machine holds the attention of one layer.
LONGEST_SIDE, MOST_PIXELS = 16_384, 2**26


@dataclasses.dataclass(frozen=True)
class Canvas:
    """A picture's height and width in pixels, and its rows and columns of tokens."""

    height: int
    width: int
    rows: int
    columns: int

    @classmethod
    def of(cls, height: int, width: int, token_side: int) -> "Canvas":
        """SettingError unless both sides are positive multiples of a token's side in pixels (16 for FLUX.1)."""
        if not all(isinstance(side, numbers.Integral) for side in (height, width)):
            raise SettingError(
                f"`height` and `width` must be whole numbers, found {height!r:.30} and {width!r:.30}"
            )
        if max(height, width) > LONGEST_SIDE:
            raise SettingError(f"`height` and `width` must be at most {LONGEST_SIDE}, found {height}x{width}")
        if height * width > MOST_PIXELS:
            raise SettingError(
                f"`height` × `width` must be at most {MOST_PIXELS // 10**6} million pixels, found {height}x{width}"
            )
        if min(height, width) < token_side or height % token_side or width % token_side:
            near = [max(token_side, round(length / token_side) * token_side) for length in (height, width)]
            raise SettingError(
                f"size {height}x{width} does not fit: `height` and `width` must be multiples of {token_side}, "
                f"for example {near[0]}x{near[1]}"
            )
        return cls(height, width, height // token_side, width // token_side)

    @property
    def tokens(self) -> int:
        """Number of image tokens s."""
        return self.rows * self.columns


def sides_like(height: int, width: int, pixels: int, token_side: int, most: int | None = None) -> tuple[int, int]:
    """Height and width, multiples of a token, of nearly the shape of another picture and so many pixels.

    A square stays one. most: tokens along the longest side.
    """
    ideal = [math.sqrt(pixels * part / whole) / token_side for part, whole in ((height, width), (width, height))]

    def strain(tokens: tuple[int, int]) -> float:
        shape = math.log(tokens[0] / tokens[1]) - math.log(ideal[0] / ideal[1])
        # A shape that is kept means little cut off, which counts more than the number of pixels.
        return abs(shape) + abs(math.log(tokens[0] * tokens[1] / (ideal[0] * ideal[1]))) / 4

    longest = most or LONGEST_SIDE // token_side
    near = [{min(longest, max(1, math.floor(x) + more)) for more in (-1, 0, 1, 2)} for x in ideal]
    rows, columns = min(itertools.product(*map(sorted, near)), key=strain)
    return rows * token_side, columns * token_side
