"""Measures of pictures: `psnr` and `cosine_similarity` on the host, the others per picture inside jitted functions.

Axes: b batch, y rows, x columns, d features.
"""

import dm_pix
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Real

from sflow_jax.arrays import AnyArray

# What `picture_psnr` says of equal pictures, dB.
MOST_PSNR = 100.0
SSIM_WINDOW = 11


def psnr(image: Float[np.ndarray, "*any 3"], reference: Float[np.ndarray, "*any 3"]) -> float:
    """Peak signal-to-noise ratio of pictures (or of some of their pixels) in 0..1, dB; infinite for equal ones."""
    error = float(np.mean(np.square(image.astype(np.float64) - reference.astype(np.float64))))
    return float("inf") if error == 0 else -10 * float(np.log10(error))


def bounded_psnr(image: Float[np.ndarray, "*any 3"], reference: Float[np.ndarray, "*any 3"]) -> float:
    """`psnr`, at most `MOST_PSNR`, so that equal pictures do not make means infinite; NaN of no pixels."""
    return min(psnr(image, reference), MOST_PSNR) if image.size else float("nan")


def cosine_similarity(
    features: Float[np.ndarray, "n d"], others: Float[np.ndarray, "n d"]
) -> Float[np.ndarray, " n"]:
    """Row by row, −1..1; the paper's measure of pictures with DINOv2's global features."""
    first, second = (x / np.linalg.norm(x, axis=-1, keepdims=True) for x in (features, others))
    return np.sum(first * second, axis=-1)


def feature_cosine(features: Float[AnyArray, "b d"], others: Float[AnyArray, "b d"]) -> Float[Array, " b"]:
    """`cosine_similarity` inside jitted functions: row by row, −1..1, float32."""
    first, second = (jnp.asarray(x, jnp.float32) for x in (features, others))
    lengths = jnp.linalg.norm(first, axis=-1) * jnp.linalg.norm(second, axis=-1)
    return jnp.sum(first * second, axis=-1) / lengths


def picture_psnr(pictures: Real[AnyArray, "b y x 3"], references: Real[AnyArray, "b y x 3"]) -> Float[Array, " b"]:
    """Peak signal-to-noise ratio of every picture, levels 0..255, float32 dB; jit-compatible.

    At most 100 dB (`MOST_PSNR`), so that equal pictures do not make means infinite or differences NaN.
    """
    error = jnp.mean(jnp.square(_unit_range(pictures) - _unit_range(references)), axis=(1, 2, 3))
    return -10 * jnp.log10(jnp.maximum(error, 10 ** (-MOST_PSNR / 10)))


def picture_ssim(pictures: Real[AnyArray, "b y x 3"], references: Real[AnyArray, "b y x 3"]) -> Float[Array, " b"]:
    """Structural similarity of every picture, levels 0..255, at most 1, float32; jit-compatible.

    Wang et al. 2004: Gaussian window of 11×11 with σ = 1.5, K₁ = 0.01, K₂ = 0.03, only whole windows, the mean over
    places and channels. Raises ValueError for pictures smaller than the window.
    """
    height, width = pictures.shape[1:3]
    if min(height, width) < SSIM_WINDOW:
        raise ValueError(f"SSIM needs pictures of at least {SSIM_WINDOW}×{SSIM_WINDOW}, found {height}×{width}")
    return dm_pix.ssim(_unit_range(pictures), _unit_range(references), filter_size=SSIM_WINDOW)


def picture_mse(pictures: Real[AnyArray, "b y x 3"], references: Real[AnyArray, "b y x 3"]) -> Float[Array, " b"]:
    """Mean squared error of every picture, levels 0..255 taken as 0..1, float32; jit-compatible."""
    return jnp.mean(jnp.square(_unit_range(pictures) - _unit_range(references)), axis=(1, 2, 3))


def blacken(pictures: Real[AnyArray, "b y x 3"], kept: Bool[AnyArray, "b y x"]) -> Float[Array, "b y x 3"]:
    """Pictures whose other pixels are black, levels 0..255, float32: how PIE-Bench's evaluator masks.

    Measures of two such pictures count the black pixels as equal ones, so that they depend on the mask's size.
    """
    return jnp.where(kept[..., None], jnp.asarray(pictures, jnp.float32), 0.0)


def _unit_range(pictures: Real[AnyArray, "b y x 3"]) -> Float[Array, "b y x 3"]:
    """Levels 0..255 → 0..1."""
    return jnp.asarray(pictures, jnp.float32) / 255
