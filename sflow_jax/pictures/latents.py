"""Latents ↔ packed tokens, and the noise that pictures start from.

Axes: b batch, y rows, x columns, c channels; s image tokens; a token packs patch × patch latents.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from sflow_jax.arrays import AnyArray


def pack(latents: Float[AnyArray, "b y x c"], patch: int = 2) -> Float[AnyArray, "b s packed"]:
    """patch × patch latents → one token; channel order (c, row in patch, column in patch), as FLUX and SD3."""
    batch, rows, columns, channels = latents.shape
    x = latents.reshape(batch, rows // patch, patch, columns // patch, patch, channels)  # b y p x q c
    return x.transpose(0, 1, 3, 5, 2, 4).reshape(batch, -1, channels * patch * patch)


def unpack(
    tokens: Float[AnyArray, "b s packed"], rows: int, columns: int, patch: int = 2
) -> Float[AnyArray, "b y x c"]:
    """Inverse of `pack` for a picture of rows × columns tokens."""
    batch, _, packed = tokens.shape
    x = tokens.reshape(batch, rows, columns, packed // patch**2, patch, patch)  # b y x c p q
    return x.transpose(0, 1, 4, 2, 5, 3).reshape(batch, rows * patch, columns * patch, -1)


def draw_noise(seed: int, tokens: int, channels: int) -> Float[np.ndarray, "s c"]:
    """Standard normal packed noise, float32, the same on every platform and mesh. seed: 0 to 2^64 − 1."""
    low, high = seed & 0xFFFF_FFFF, seed >> 32
    # A key takes 32 bits; seeds that fit in them keep the noise that they always had.
    key = jax.random.fold_in(jax.random.key(low), high) if high else jax.random.key(low)
    return np.asarray(jax.random.normal(key, (tokens, channels), jnp.float32))


def draw_numbered_noise(seed: int, number: int, tokens: int, channels: int) -> Float[np.ndarray, "s c"]:
    """As `draw_noise`, one of many noises of a seed, each its own. number: 0 and up."""
    low, high = seed & 0xFFFF_FFFF, seed >> 32
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(low), high), number + 1)
    return np.asarray(jax.random.normal(key, (tokens, channels), jnp.float32))
