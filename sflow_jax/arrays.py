"""The aliases that signatures share."""

from typing import Any

import jax
import numpy as np

# What a function takes when the host's and the device's arrays serve alike.
AnyArray = jax.Array | np.ndarray
# A leaf of a pytree that may hold shapes, placements or axes instead of arrays.
Leaf = Any
