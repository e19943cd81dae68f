"""The one alias that signatures share."""

import jax
import numpy as np

# What a function takes when the host's and the device's arrays serve alike.
AnyArray = jax.Array | np.ndarray
