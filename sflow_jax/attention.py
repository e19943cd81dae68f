"""Joint attention, rotary position embedding, and the choice of attention kernel.

Axes: b batch, l joint tokens (text first, then image), h heads, k head dimension.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

Kernel = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]


def xla_attention(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
    """Attention written out for XLA: scores and softmax in float32, memory quadratic in the tokens."""
    scale = query.shape[-1] ** -0.5
    # Scaling the query costs l·k products, scaling the scores would cost l·l.
    scores = jnp.einsum("blhk,bmhk->bhlm", query * scale, key, preferred_element_type=jnp.float32)
    # Softmax by hand: dividing after the second product touches l·k numbers instead of l·l.
    weights = jnp.exp(scores - scores.max(axis=-1, keepdims=True))
    totals = weights.sum(axis=-1)
    mixed = jnp.einsum("bhlm,bmhk->blhk", weights.astype(value.dtype), value, preferred_element_type=jnp.float32)
    return (mixed / totals.swapaxes(1, 2)[..., None]).astype(value.dtype)


KERNELS: dict[str, Kernel] = {"xla": xla_attention}


def joint_attention(
    query: Float[Array, "b l h k"],
    key: Float[Array, "b l h k"],
    value: Float[Array, "b l h k"],
    *,
    kernel: str = "xla",
) -> Float[Array, "b l h k"]:
    """Full attention over text and image tokens, no mask, scores divided by sqrt(k).

    `kernel` names an entry of `KERNELS`; raises ValueError for another name.
    """
    if kernel not in KERNELS:
        raise ValueError(f"unknown attention kernel {kernel!r}; choose one of {', '.join(KERNELS)}")
    return KERNELS[kernel](query, key, value)


def rotary_angles(
    position_ids: Float[Array, "l axes"], axes: tuple[int, ...], theta: float
) -> Float[Array, "l half_k"]:
    """Rotation angle of every token and rotary pair, in radians, float32.

    Axis i of the position ids drives `axes[i] / 2` pairs with frequencies theta^(-2j / axes[i]).
    """
    angles = []
    for axis, width in enumerate(axes):
        frequencies = theta ** (-np.arange(0, width, 2, dtype=np.float64) / width)
        angles.append(position_ids[:, axis, None] * jnp.asarray(frequencies, jnp.float32)[None])
    return jnp.concatenate(angles, axis=-1)


def rotate(x: Float[Array, "b l h k"], angles: Float[Array, "l half_k"]) -> Float[Array, "b l h k"]:
    """Apply rotary position embedding, in float32, to queries or keys.

    Pairs are (i, i + k/2): the converter reorders each head's channels from the published
    (2i, 2i + 1), which leaves every query-key product as it was and avoids strided access.
    """
    cos, sin = jnp.cos(angles)[None, :, None], jnp.sin(angles)[None, :, None]
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)
