"""Measures of pictures, float32."""

import numpy as np
from jaxtyping import Float


def psnr(image: Float[np.ndarray, "*any 3"], reference: Float[np.ndarray, "*any 3"]) -> float:
    """Peak signal-to-noise ratio of pictures (or of some of their pixels) in 0..1, dB; infinite for equal ones."""
    error = float(np.mean(np.square(image.astype(np.float64) - reference.astype(np.float64))))
    return float("inf") if error == 0 else -10 * float(np.log10(error))


def cosine_similarity(
    features: Float[np.ndarray, "n d"], others: Float[np.ndarray, "n d"]
) -> Float[np.ndarray, " n"]:
    """Row by row, −1..1; the paper's measure of pictures with DINOv2's global features."""
    first, second = (x / np.linalg.norm(x, axis=-1, keepdims=True) for x in (features, others))
    return np.sum(first * second, axis=-1)
