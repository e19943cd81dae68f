"""What a feature network does to pictures first: resize, crop and normalise, on the device.

Follows the PIL-based processors of transformers (`BitImageProcessorPil`, `CLIPImageProcessorPil`) level for level,
and so Pillow's 8-bit resize: weights in fixed point with 22 fractional bits, whole levels after each of the two
passes, along rows first. (Pillow 13 begins with the columns of pictures more than about twice as high as wide.) The
torchvision-based processors round their weights coarser: up to 2 levels away on some percent of the numbers.

Axes: b batch, y rows, x columns, a the axis that is resized.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Real

from sflow_jax.arrays import AnyArray
from sflow_jax.typed import Number, Positive, Side, typed

PROCESSORS = ("BitImageProcessor", "CLIPImageProcessor", "CLIPFeatureExtractor")
STEPS = ("do_resize", "do_center_crop", "do_rescale", "do_normalize")
# Changes nothing here: pictures are RGB already.
HARMLESS = ("do_convert_rgb",)
BILINEAR, BICUBIC = 2, 3
# Levels of an 8-bit picture.
LEVELS = 255
# Pillow's fixed point: a weight of 1 is 2 ** 22. Halved, both parts times 255 stay exact in float32.
FRACTION_BITS = 22
LOW_BITS = FRACTION_BITS // 2


def _bilinear(distance: np.ndarray) -> np.ndarray:
    return np.maximum(1 - distance, 0)


def _bicubic(distance: np.ndarray) -> np.ndarray:
    """Keys' kernel with a = −0.5, the one of Pillow and of every antialiased resize."""
    near = (1.5 * distance - 2.5) * distance**2 + 1
    far = -0.5 * (((distance - 5) * distance + 8) * distance - 4)
    return np.where(distance < 1, near, np.where(distance < 2, far, 0.0))


# Pillow's number of a kernel → the kernel, and how far it reaches.
RESAMPLERS = {BILINEAR: (_bilinear, 1), BICUBIC: (_bicubic, 2)}


def resize_weights(before: int, after: int, resample: int) -> Int[np.ndarray, "after before"]:
    """Pillow's fixed-point weights of a resize along one axis; each row sums to about 2 ** 22.

    resample: 2 bilinear, 3 bicubic. Reducing widens the kernel (antialiasing), enlarging does not.
    """
    kernel, reach = RESAMPLERS[resample]
    step = before / after
    width = max(step, 1.0)
    middle = (np.arange(after)[:, None] + 0.5) * step
    first = np.maximum(np.trunc(middle - reach * width + 0.5), 0)
    last = np.minimum(np.trunc(middle + reach * width + 0.5), before)
    place = np.arange(before)[None]
    weights = kernel(np.abs((place - middle + 0.5) / width)) * ((first <= place) & (place < last))
    weights /= weights.sum(axis=1, keepdims=True)
    return np.trunc(weights * 2**FRACTION_BITS + np.copysign(0.5, weights)).astype(np.int32)


def _apply(pictures: Float[Array, "b y x 3"], weights: np.ndarray, axis: str) -> Float[Array, "b v u 3"]:
    """One pass over `axis` ("y" or "x"), rounded to whole levels; exact, whatever order a device adds in."""
    high = (weights + (1 << LOW_BITS - 1)) >> LOW_BITS
    equation = "byxc,ay->baxc" if axis == "y" else "byxc,ax->byac"

    def product(part: np.ndarray) -> jax.Array:
        factors = jnp.asarray(part, jnp.float32)
        return jnp.einsum(equation, pictures, factors, precision=jax.lax.Precision.HIGHEST).astype(jnp.int32)

    total = (product(high) << LOW_BITS) + product(weights - (high << LOW_BITS))
    rounded = (total + (1 << FRACTION_BITS - 1)) >> FRACTION_BITS
    return jnp.clip(rounded, 0, LEVELS).astype(jnp.float32)


def _lengths(size: Any, *keys: str) -> tuple[int, ...] | None:
    """The whole numbers under exactly these keys; None for anything else."""
    if not isinstance(size, dict) or set(size) != set(keys):
        return None
    lengths = tuple(size[key] for key in keys)
    return lengths if all(isinstance(length, int) and length > 0 for length in lengths) else None


def _resize_target(size: Any) -> dict[str, Any]:
    """The size of a preprocessor config; a bare number is the shorter side's, as these processors read it."""
    size = {"shortest_edge": size} if isinstance(size, int) else size
    if edge := _lengths(size, "shortest_edge"):
        return {"shortest_edge": edge[0]}
    if sides := _lengths(size, "height", "width"):
        return {"size": sides}
    raise ValueError(f"size {size!r} is not supported: it needs shortest_edge, or height and width")


def _crop(size: Any) -> tuple[int, int]:
    """(height, width) of a preprocessor config's crop; a bare number is both."""
    sides = _lengths({"height": size, "width": size} if isinstance(size, int) else size, "height", "width")
    if sides is None:
        raise ValueError(f"crop_size {size!r} is not supported: it needs height and width")
    return sides


def _channels(values: Any, name: str) -> tuple[float, ...]:
    """One number a channel."""
    if (
        not isinstance(values, list | tuple)
        or len(values) != 3
        or not all(isinstance(x, int | float) for x in values)
    ):
        raise ValueError(f"{name} {values!r} is not supported: it needs three numbers, of red, green and blue")
    return tuple(map(float, values))


@dataclasses.dataclass(frozen=True)
class Preprocessing:
    """What happens to a picture, in this order; a step that is None is left out.

    shortest_edge: resize until the shorter side is this long. size: or resize to exactly this height and width.
    resample: 2 bilinear, 3 bicubic. crop: height and width of the centre that is kept.
    scale: levels are multiplied by it. mean, std: per channel, after scaling.
    """

    shortest_edge: Side | None = None
    size: tuple[Side, Side] | None = None
    resample: int = BICUBIC
    crop: tuple[Side, Side] | None = None
    scale: Positive = 1 / LEVELS
    mean: tuple[Number, Number, Number] = (0.0, 0.0, 0.0)
    std: tuple[Positive, Positive, Positive] = (1.0, 1.0, 1.0)

    @classmethod
    def from_hf(cls, config: dict[str, Any]) -> "Preprocessing":
        """From a transformers `preprocessor_config.json`; ValueError for what is not supported or left out."""
        kind = str(config.get("image_processor_type") or config.get("feature_extractor_type") or "none")
        if kind.removesuffix("Fast").removesuffix("Pil") not in PROCESSORS:
            raise ValueError(f"image processor {kind} is not supported; known: {', '.join(PROCESSORS)}")
        unclear = [step for step in STEPS if not isinstance(config.get(step, True), bool)]
        if unclear:
            raise ValueError(f"{unclear[0]} must be true or false, found {config[unclear[0]]!r}")
        resize, crop, rescale, normalize = (config.get(step, True) for step in STEPS)
        others = [k for k, v in config.items() if k.startswith("do_") and v and k not in (*STEPS, *HARMLESS)]
        if others:
            raise ValueError(f"preprocessing steps {', '.join(sorted(others))} are not supported")
        wanted = {"size": resize, "crop_size": crop, "image_mean": normalize, "image_std": normalize}
        missing = [key for key, needed in wanted.items() if needed and not config.get(key)]
        if missing:
            raise ValueError(f"the preprocessing config does not say {', '.join(missing)}")
        fields = {"scale": config.get("rescale_factor", 1 / LEVELS) if rescale else 1.0}
        if resize:
            fields |= {"resample": config.get("resample", BICUBIC), **_resize_target(config["size"])}
        if crop:
            fields["crop"] = _crop(config["crop_size"])
        if normalize:
            fields |= {name: _channels(config[f"image_{name}"], f"image_{name}") for name in ("mean", "std")}
        return typed(fields, cls)

    def __post_init__(self):
        if not isinstance(self.resample, int) or self.resample not in RESAMPLERS:
            raise ValueError(f"resample {self.resample} is not supported; known: 2 (bilinear), 3 (bicubic)")

    def resized(self, height: int, width: int) -> tuple[int, int]:
        """Height and width after the resize, as transformers computes them."""
        if self.size is not None:
            return self.size
        if self.shortest_edge is None:
            return height, width
        longer = int(self.shortest_edge * max(height, width) / min(height, width))
        return (longer, self.shortest_edge) if width <= height else (self.shortest_edge, longer)

    def _weights(self, before: int, after: int, cropped: int) -> np.ndarray | None:
        """Of the rows (or columns) that the crop keeps; None where nothing changes."""
        if cropped > after:
            raise ValueError(
                f"a picture resized to {after} pixels along a side is too small for a crop of {cropped}; "
                "give larger pictures"
            )
        if before == after == cropped:
            return None
        start = (after - cropped) // 2
        return resize_weights(before, after, self.resample)[start : start + cropped]

    def __call__(self, pictures: Real[AnyArray, "b y x 3"]) -> Float[Array, "b v u 3"]:
        """Pictures of levels 0..255 (uint8, or float, rounded to whole levels) → the network's input, float32.

        Raises ValueError for pictures that are smaller than the crop once resized.
        """
        x = jnp.clip(jnp.round(jnp.asarray(pictures, jnp.float32)), 0, LEVELS)
        height, width = pictures.shape[1:3]
        resized = self.resized(height, width)
        cropped = self.crop or resized
        across, down = self._weights(width, resized[1], cropped[1]), self._weights(height, resized[0], cropped[0])
        x = x if across is None else _apply(x, across, "x")
        x = x if down is None else _apply(x, down, "y")
        mean, std = (jnp.asarray(numbers, jnp.float32).reshape(1, 1, 1, 3) for numbers in (self.mean, self.std))
        return (x * jnp.float32(self.scale) - mean) / std
