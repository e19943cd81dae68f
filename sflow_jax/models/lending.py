"""A source that is not in the batch: what its layers lend comes from a store, which an earlier pass filled.

Axes: p places of the store, n layers, g groups (× branches), s image tokens, h heads, k head dimension.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from sflow_jax.arrays import Leaf

# What a layer can lend of its image tokens, in the order of `Lent.places`; own: of the image's own attention.
KINDS = ("keys", "values", "own_keys", "own_values")
# Keys and values of one attention of one layer.
LentByLayer = tuple[Float[Array, "g s h k"], Float[Array, "g s h k"]]
# The name under which it is handed out.
LENT = "lent"


@functools.partial(jax.tree_util.register_dataclass, data_fields=["places", "tensors"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class Lent:
    """What sources lend. How many places there are is a shape; which layers' they are is data.

    places: [p, 2] int32, of which layer, and which of `KINDS`, each tensor is. tensors: [p, g, s, h, k]; None where
    the source is in the batch, and what it lends is to be recorded.
    """

    places: Leaf
    tensors: Leaf | None = None

    @property
    def recording(self) -> bool:
        """Whether it is still to be recorded."""
        return self.tensors is None

    def slots(self, layers: int) -> Int[Array, "n kinds"]:
        """The place of every layer's tensors; those that lend nothing are beyond the last."""
        count = len(self.places)
        empty = jnp.full((layers, len(KINDS)), count, jnp.int32)
        return empty.at[self.places[:, 0], self.places[:, 1]].set(jnp.arange(count, dtype=jnp.int32))

    def of(self, slots: Int[Array, " kinds"]) -> tuple[LentByLayer, LentByLayer]:
        """What a layer's attention takes, and the image's own; anything finite where nobody does."""
        key, value, own_key, own_value = (
            jax.lax.dynamic_index_in_dim(self.tensors, slot, keepdims=False) for slot in slots
        )
        return (key, value), (own_key, own_value)


def slots_of(
    lent: Lent | None, layers: int, first: int = 0, last: int | None = None
) -> Int[Array, "some kinds"] | None:
    """Places of some of so many layers, up to but not including `last`, as a scan over them takes them."""
    return None if lent is None else lent.slots(layers)[first:last]


def lent_to(
    lent: Lent | None, slots: Int[Array, " kinds"] | None
) -> tuple[LentByLayer, LentByLayer] | tuple[None, None]:
    """What one layer's two attentions take from sources that are not in the batch."""
    return (None, None) if lent is None or lent.recording else lent.of(slots)


def blank_record(lent: Lent | None, shape: tuple[int, ...], dtype: Any) -> Float[Array, "p g s h k"] | None:
    """Where layers record; None where nobody does. shape: of one tensor [g, s, h, k]."""
    return None if lent is None or not lent.recording else jnp.zeros((len(lent.places), *shape), dtype)


def record(
    recorded: Float[Array, "p g s h k"] | None, slots: Int[Array, " kinds"] | None, captured: dict[str, Any]
) -> tuple[Float[Array, "p g s h k"] | None, dict[str, Any]]:
    """The record with what one layer handed out, and the rest of that."""
    if recorded is None:
        return None, captured
    rest = dict(captured)
    for slot, tensor in zip(slots, rest.pop(LENT)):
        recorded = recorded.at[slot].set(tensor, mode="drop")
    return recorded, rest


def lending(lent: Lent | None, run: Callable[..., tuple[Any, dict[str, Any]]]) -> Callable[..., Any]:
    """What a scan over layers calls with its carry, a block and the layer's rows, of which the last are `slots_of`.

    The carry is the streams and the record. run: (streams, block, the other rows, what the layer's two attentions
    take) → the streams behind the block, and what it handed out.
    """

    def through(carry: Any, block: Any, rows: Any) -> Any:
        (streams, recorded), (*others, slots) = carry, rows
        streams, captured = run(streams, block, others, lent_to(lent, slots))
        recorded, captured = record(recorded, slots, captured)
        return (streams, recorded), captured

    return through


def with_record(captured: dict[str, Any], recorded: Float[Array, "p g s h k"] | None) -> dict[str, Any]:
    """What all layers handed out."""
    return captured if recorded is None else captured | {LENT: recorded}
