"""What transformers of several families share: adaptive normalisation, and what drives it.

Axes: b batch, l tokens of a stream, d hidden size, h heads, k head dimension, n layers.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from sflow_jax.models.layers import Linear, layer_norm

SINUSOID_WIDTH = 256
# Sigma and guidance enter the sinusoids multiplied by this.
SINUSOID_SCALE = 1000.0


class Modulation(NamedTuple):
    """What adaptive normalisation does to one part of a layer, a vector a batch element."""

    shift: Float[Array, "b d"]
    scale: Float[Array, "b d"]
    gate: Float[Array, "b d"]


def split_modulation(numbers: Float[Array, "b parts_d"], parts: int) -> tuple[Modulation, ...]:
    """One for each of the layer's parts, from what its modulation layer made of the vector."""
    vectors = jnp.split(numbers, 3 * parts, axis=-1)
    return tuple(Modulation(*vectors[first : first + 3]) for first in range(0, 3 * parts, 3))


class Numbers(NamedTuple):
    """What the modulation layers of a block of two streams made of the vector; or of all blocks [n, b, …]."""

    text: jax.Array
    image: jax.Array


def modulate(
    x: Float[Array, "b l d"], shift: Float[Array, "b d"], scale: Float[Array, "b d"], epsilon: float
) -> Float[Array, "b l d"]:
    """Adaptive layer normalisation: normalise in float32, then scale and shift per batch element."""
    return (layer_norm(x, epsilon) * (1 + scale[:, None]) + shift[:, None]).astype(x.dtype)


class Embedder(nnx.Module):
    """Two linear layers with SiLU between: scalars and pooled text → the modulation vector."""

    def __init__(self, width_in: int, width: int, *, rngs: nnx.Rngs):
        self.in_layer = Linear(width_in, width, rngs=rngs)
        self.out_layer = Linear(width, width, rngs=rngs)

    def __call__(self, x: Float[Array, "b i"]) -> Float[Array, "b d"]:
        return self.out_layer(jax.nn.silu(self.in_layer(x)))


class QueryKeyValue(NamedTuple):
    """Of one token stream."""

    query: Float[Array, "b l h k"]
    key: Float[Array, "b l h k"]
    value: Float[Array, "b l h k"]
