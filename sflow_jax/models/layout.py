"""What every layer needs to know about a call, beside its arrays."""

import dataclasses
from typing import NamedTuple

import jax
from jax.sharding import Sharding
from jaxtyping import Array, Float

from sflow_jax.models.attention import joint_attention
from sflow_jax.settings import AUTOMATIC

# What a layer can hand out, over image tokens but for `text`: keys and values as the layer computes them (before
# injection), the image and text streams behind the layer.
CAPTURES = ("keys", "values", "image", "text")


@dataclasses.dataclass(frozen=True)
class Layout:
    """How the batch is made, where it is, and what is asked of it (static).

    members: batch = groups × members, and member 0 of each group is the source whose keys and values the others may
    take. kernel, sharding: of attention. capture: names of `CAPTURES` that every layer hands out.
    """

    members: int = 1
    kernel: str = AUTOMATIC
    sharding: Sharding | None = None
    capture: tuple[str, ...] = ()

    def keep_whole(self, x: jax.Array) -> jax.Array:
        """An array split over a mesh by groups alone, so that the residual stream is whole on every device.

        Without this the compiler splits it by columns like the modulation, and gathers it again at every product.
        """
        return jax.lax.with_sharding_constraint(x, self.sharding) if self.sharding is not None else x

    def attend(
        self, query: Float[Array, "b l h k"], key: Float[Array, "b l h k"], value: Float[Array, "b l h k"]
    ) -> Float[Array, "b l h k"]:
        """Joint attention of text and image tokens."""
        return joint_attention(query, key, value, kernel=self.kernel, sharding=self.sharding)

    def captured(self, **values: jax.Array) -> dict[str, jax.Array]:
        """Of what a layer has, what was asked for."""
        return {name: values[name] for name in self.capture}


class Output(NamedTuple):
    """What a transformer returns.

    velocity: [b, s, c] float32. captured: name of `Layout.capture` → [n, b, …], every layer's.
    """

    velocity: jax.Array
    captured: dict[str, jax.Array]
