"""What every layer needs to know about a call, beside its arrays."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec, Sharding
from jaxtyping import Array, Float, Int

from sflow_jax.arrays import AnyArray
from sflow_jax.machine.meshes import FSDP, TENSOR
from sflow_jax.models.attention import attention_weights, extended_attention, joint_attention
from sflow_jax.models.interventions import LayerInterventions, injected_share, of_source
from sflow_jax.models.lending import LentByLayer
from sflow_jax.settings import AUTOMATIC

# What a layer can hand out, over image tokens but for `text`: keys and values as the layer computes them (before
# injection), the image and text streams behind the layer.
CAPTURES = ("keys", "values", "image", "text")
# Beside them: where the tokens of `Interventions.watched` attend, see `Layout.watch`.
ATTENTION = "attention"


@dataclasses.dataclass(frozen=True)
class Layout:
    """How the batch is made, where it is, and what is asked of it (static).

    members: batch = groups × members, and member 0 of each group is the source whose keys and values the others may
    take. kernel, sharding: of attention. capture: names of `CAPTURES`, `ATTENTION` or `lending.LENT`, that every
    layer hands out.
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

    def products_of_vectors(
        self, multiply: Callable[[jax.Array], jax.Array], x: Float[Array, "b d"]
    ) -> Float[Array, "n b o"]:
        """What kernels of many blocks make of one vector a picture, whole on every device.

        Devices that split the kernels' rows (`fsdp`) add up these small results. Split by pictures from the start,
        they would gather the kernels of all blocks at once.
        """
        if not isinstance(self.sharding, NamedSharding):
            return multiply(x)
        mesh, groups = self.sharding.mesh, (*self.sharding.spec, None)[0]
        groups = groups if isinstance(groups, tuple) else (groups,)
        others = tuple(axis for axis in groups if axis not in (None, FSDP))

        def placed(y: jax.Array, *axes: Any) -> jax.Array:
            return jax.lax.with_sharding_constraint(y, NamedSharding(mesh, PartitionSpec(*axes)))

        sums = placed(multiply(placed(x, others, FSDP)), None, others, TENSOR)
        return jax.vmap(self.keep_whole)(sums)

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
        lent: LentByLayer | None = None,
    ) -> Float[Array, "b l h k"]:
        """Joint attention that also sees the image tokens of the group's source, `weight` times as much; None: not.

        words: text tokens, which come first. region: share of the weight that each image token's query takes. lent:
        keys and values of a source that is not in the batch.
        """
        if weight is None or (self.members == 1 and lent is None):
            return self.attend(query, key, value)
        shares = self._shares_beside(weight, region, words, key.shape[1] - words, lent is None)
        beside = (of_source(x[:, words:], self.members, of) for x, of in zip((key, value), lent or (None, None)))
        return extended_attention(query, key, value, *beside, shares)

    def watch(
        self,
        query: Float[Array, "b l h k"],
        key: Float[Array, "b l h k"],
        words: int,
        layer: LayerInterventions,
        region: Float[AnyArray, "b s"] | None,
        watched: Int[AnyArray, "b q"] | None,
        lent: LentByLayer | None = None,
    ) -> Float[Array, "b q words_plus_two_s"] | None:
        """Where tokens attend, mean over heads, float32: shares of text, of own image tokens, of the source's.

        query, key: of text and image, as the layer's attention has them. watched: numbers of joint tokens. Where an
        image key is injected by a share m, a share m of its weight is the source's. None where nobody asked.
        """
        if ATTENTION not in self.capture:
            return None
        chosen = jnp.take_along_axis(query, watched[:, :, None, None], axis=1)
        tokens, beside = key.shape[1] - words, ()
        present = lent is None
        if layer.extend is not None and (self.members > 1 or not present):
            shares = self._shares_beside(layer.extend, region, words, tokens, present)
            source_key = of_source(key[:, words:], self.members, None if present else lent[0])
            beside = source_key, jnp.take_along_axis(shares, watched, axis=1)
        weights = attention_weights(chosen, key, *beside)
        text, image, source = jnp.split(weights, [words, words + tokens], axis=-1)
        injected = jnp.zeros((len(query), 1, 1))
        if layer.inject is not None:
            injected = injected + injected_share(self._of_others(layer.inject[:, 0], present), region)[:, None]
        seen = injected * image if source.shape[-1] == 0 else injected * image + source
        return jnp.concatenate([text, (1 - injected) * image, seen], axis=-1)

    def _of_others(self, x: Float[AnyArray, " b"], present: bool) -> Float[Array, " b"]:
        """The same numbers, but 0 for sources that are present: what they take from themselves is their own."""
        return jnp.where(present & (jnp.arange(len(x)) % self.members == 0), 0.0, x)

    def _shares_beside(
        self, weight: Float[AnyArray, " b"], region: Float[AnyArray, "b s"] | None, words: int, tokens: int,
        present: bool,
    ) -> Float[Array, "b l"]:  # fmt: skip
        """How much each token's query counts the source's keys; the source itself sees its own tokens once."""
        share = self._of_others(weight, present)[:, None]
        image = share * (jnp.ones((len(weight), tokens)) if region is None else region)
        return jnp.concatenate([jnp.broadcast_to(share, (len(weight), words)), image], axis=1)

    def lent(self, *tensors: Float[Array, "b s h k"]) -> tuple[Float[Array, "g s h k"], ...]:
        """Of what layers lend, that of every group's member 0."""
        return tuple(x.reshape(-1, self.members, *x.shape[1:])[:, 0] for x in tensors)

    def captured(self, **values: Any) -> dict[str, Any]:
        """Of what a layer has, what was asked for."""
        return {name: values[name] for name in self.capture}


class Output(NamedTuple):
    """What a transformer returns.

    velocity: [b, s, c] float32. captured: name of `Layout.capture` → [n, b, …], every layer's; what sources lend
    is [p, g, s, h, k].
    """

    velocity: jax.Array
    captured: dict[str, jax.Array]
