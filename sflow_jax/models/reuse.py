"""Step caching: where the first layer's output hardly changes, what the layers behind it added is used again.

Published as first-block caching (ParaAttention, 2025). Axes: b batch, s image tokens, d width.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from sflow_jax.arrays import Leaf

# The name under which it is handed out.
REUSED = "reused"
# Lengths below it count as this.
TINY = 1e-8


class Reuse(NamedTuple):
    """What evaluations hand on. All arrays have the batch's axis first, and so its sharding.

    first: image tokens behind the first layer, when all layers were evaluated last. added: by the layers behind it.
    known: [b], whether they have been. count: [b] int32, evaluations that used it again, the same in every row.
    """

    first: Float[Array, "b s d"]
    added: Float[Array, "b s d"]
    known: Leaf
    count: Int[Array, " b"]

    @classmethod
    def blank(cls, shape: tuple[int, int, int], dtype: Any) -> "Reuse":
        """Before the first evaluation."""
        rows = shape[0]
        return cls(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype), jnp.zeros(rows), jnp.zeros(rows, jnp.int32))


class Asked(NamedTuple):
    """Reuse in one evaluation. least: relative change of the first layer's output from which all are evaluated."""

    reuse: Reuse
    least: Leaf


class Skipping(NamedTuple):
    """Inside a pass. keep: whether layers are evaluated. number: of the next layer. first: see `Reuse`."""

    keep: Array
    number: Array
    first: Float[Array, "b s d"]


def begin(asked: Asked | None) -> Skipping | None:
    """Before the first layer; None where nothing is reused."""
    if asked is None:
        return None
    return Skipping(jnp.array(True), jnp.array(0, jnp.int32), jnp.zeros_like(asked.reuse.first))


def skippable(asked: Asked | None, through: Callable[..., tuple[Any, dict]]) -> Callable[..., tuple[Any, dict]]:
    """What a scan over layers calls in place of `through`; its carry is that one's and `Skipping`.

    `through`'s carry begins with the streams, which are (text, image) in the first layer.
    """

    def run(carry: Any, block: Any, rows: Any) -> Any:
        inner, skipping = carry
        if skipping is None:
            inner, captured = through(inner, block, rows)
            return (inner, None), captured
        evaluate = functools.partial(through, inner, block, rows)
        inner, captured = jax.lax.cond(skipping.keep, evaluate, lambda: (inner, {}))
        streams = inner[0]
        if isinstance(streams, tuple):
            look = functools.partial(_looked, asked, streams[1])
            skipping = jax.lax.cond(skipping.number == 0, look, lambda: skipping)
        return (inner, skipping), captured

    return run


def _looked(asked: Asked, image: Float[Array, "b s d"]) -> Skipping:
    """Behind the first layer: whether the others are evaluated, which is decided for the whole batch."""
    first, before = (x.astype(jnp.float32) for x in (image, asked.reuse.first))
    lengths = (jnp.sqrt(jnp.sum(x * x, axis=(1, 2))) for x in (first - before, before))
    change, length = lengths
    changes = jnp.where(asked.reuse.known > 0, change / jnp.maximum(length, TINY), jnp.inf)
    return Skipping(jnp.max(changes) >= asked.least, jnp.array(1, jnp.int32), image)


def ended(
    asked: Asked | None, skipping: Skipping | None, image: Float[Array, "b s d"]
) -> tuple[Float[Array, "b s d"], dict[str, Reuse]]:
    """Image tokens behind the last layer, evaluated or not, and what the next evaluation may use, by its name."""
    if asked is None:
        return image, {}
    reuse = asked.reuse

    def evaluated() -> tuple[Array, Reuse]:
        known = jnp.ones_like(reuse.known)
        return image, Reuse(skipping.first, image - skipping.first, known, reuse.count)

    def again() -> tuple[Array, Reuse]:
        return skipping.first + reuse.added, reuse._replace(count=reuse.count + 1)

    image, reuse = jax.lax.cond(skipping.keep, evaluated, again)
    return image, {REUSED: reuse}
