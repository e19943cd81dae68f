"""What every layer needs to know about a call, beside its arrays."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Sharding
from jaxtyping import Array, Float

from sflow_jax.arrays import AnyArray
from sflow_jax.models.attention import extended_attention, joint_attention
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

    def attend_beside(
        self,
        query: Float[Array, "b l h k"],
        key: Float[Array, "b l h k"],
        value: Float[Array, "b l h k"],
        words: int,
        weight: Float[AnyArray, " b"] | None,
        region: Float[AnyArray, "b s"] | None,
    ) -> Float[Array, "b l h k"]:
        """Joint attention that also sees the image tokens of the group's source, `weight` times as much; None: not.

        words: text tokens, which come first. region: share of the weight that each image token's query takes.
        """
        if weight is None or self.members == 1:
            return self.attend(query, key, value)
        sources = (x[:, words:].reshape(-1, self.members, *x[:, words:].shape[1:])[:, :1] for x in (key, value))
        source_key, source_value = (jnp.repeat(x, self.members, axis=1).reshape(-1, *x.shape[2:]) for x in sources)
        # The source itself sees its own tokens once.
        share = jnp.where(jnp.arange(len(query)) % self.members == 0, 0.0, weight)[:, None]
        image = share * (jnp.ones(source_key.shape[:2]) if region is None else region)
        shares = jnp.concatenate([jnp.broadcast_to(share, (len(query), words)), image], axis=1)
        return extended_attention(query, key, value, source_key, source_value, shares)

    def captured(self, **values: jax.Array) -> dict[str, jax.Array]:
        """Of what a layer has, what was asked for."""
        return {name: values[name] for name in self.capture}


class Output(NamedTuple):
    """What a transformer returns.

    velocity: [b, s, c] float32. captured: name of `Layout.capture` → [n, b, …], every layer's.
    """

    velocity: jax.Array
    captured: dict[str, jax.Array]
