"""Measures of pictures, float32."""

import numpy as np
from jaxtyping import Float


def psnr(image: Float[np.ndarray, "*b y x 3"], reference: Float[np.ndarray, "*b y x 3"]) -> float:
    """Peak signal-to-noise ratio of pictures in 0..1, dB; infinite for equal ones."""
    error = float(np.mean(np.square(image.astype(np.float64) - reference.astype(np.float64))))
    return float("inf") if error == 0 else -10 * float(np.log10(error))
