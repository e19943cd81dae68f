"""What may be done to a layer: the one seam, for all families. What is absent (None) costs nothing.

Axes: b batch, s image tokens, w text tokens, l joint tokens, h heads, k head dimension, n layers.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from sflow_jax.arrays import AnyArray, Leaf
from sflow_jax.models.lending import Lent, LentByLayer
from sflow_jax.models.reuse import Asked


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["gate", "inject", "own_inject", "attention", "mlp", "text", "heads", "key_shift", "extend"],
    meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class LayerInterventions:
    """Arrays for one layer [b, …], or for all [b, n, …] or [n, b, …]; float32.

    gate: scale of the layer's whole update; 0 bypasses it. inject: [2], how far keys and values move to those of
    the group's source, 0…1. own_inject: [2], the same in the image's own attention, where a layer has one; None is
    as `inject`. attention, mlp: scale of that part of the update alone. text: scale of the text stream
    that enters the layer. heads: [h], scale of each head's output. key_shift: [2], rows and columns of tokens by
    which the rotary positions of the image's keys are moved. extend: how much the image tokens of the group's
    source count beside the own ones in attention, 0 and up; where it is given, attention is XLA's.
    """

    gate: Leaf | None = None
    inject: Leaf | None = None
    own_inject: Leaf | None = None
    attention: Leaf | None = None
    mlp: Leaf | None = None
    text: Leaf | None = None
    heads: Leaf | None = None
    key_shift: Leaf | None = None
    extend: Leaf | None = None

    def of_own_attention(self) -> "LayerInterventions":
        """As the image's own attention takes them."""
        return self if self.own_inject is None else dataclasses.replace(self, inject=self.own_inject)

    def per_layer(self) -> "LayerInterventions":
        """[b, n, …] → [n, b, …], as a scan over layers takes it."""
        return jax.tree.map(lambda leaf: jnp.moveaxis(leaf, 1, 0), self)

    def layers(self, first: int, last: int | None) -> "LayerInterventions":
        """Some of the layers of [n, b, …], up to but not including `last`."""
        return jax.tree.map(lambda leaf: leaf[first:last], self)


class Skip(NamedTuple):
    """Skip-layer guidance. gate: [n], 0 in the layers left out. scale: 0 is none."""

    gate: Leaf
    scale: Leaf


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["layers", "region", "skip", "watched", "lent", "cache"],
    meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class Interventions:
    """What is done in one step. layers: [b, n, …]. region: [b, s], share of the injection that a token takes.

    skip: what the step does beside, which no network sees. watched: [b, q] int32, joint tokens (text first) whose
    attention layers hand out; nothing is done to them. lent: by sources that are not in the batch, or to be
    recorded. cache: of what layers added before, see `models.reuse`.
    """

    layers: LayerInterventions = LayerInterventions()
    region: Leaf | None = None
    skip: Skip | None = None
    watched: Leaf | None = None
    lent: Lent | None = None
    cache: Asked | None = None


NOTHING = Interventions()


def injected_share(
    strength: Float[AnyArray, " b"], region: Float[AnyArray, "b s"] | None
) -> Float[Array, "b s"] | Float[Array, "b 1"]:
    """How far each image token's keys, or values, move to the source's."""
    share = strength[:, None] if region is None else strength[:, None] * region
    # In float32: rounded shares would not add up to one, and the source would move.
    return share.astype(jnp.float32)


def joint_share(
    strength: Float[AnyArray, " b"], region: Float[AnyArray, "b s"] | None, words: int, tokens: int
) -> Float[Array, "b words_plus_tokens"]:
    """The same of text and image tokens: text in front, `words` of them, moves nowhere."""
    share = injected_share(strength, region)
    return jnp.pad(jnp.broadcast_to(share, (len(share), tokens)), ((0, 0), (words, 0)))


def of_source(
    x: Float[Array, "b s h any"], members: int, lent: Float[Array, "g s h any"] | None = None
) -> Float[Array, "b s h any"]:
    """Every element's source's: its group's member 0's, or what a source outside the batch lends."""
    grouped = x.reshape(-1, members, *x.shape[1:])
    first = grouped[:, :1] if lent is None else lent[:, None]
    return jnp.broadcast_to(first, grouped.shape).reshape(x.shape)


def inject_source(
    x: Float[Array, "b words_plus_s h k"],
    strength: Float[AnyArray, " b"] | None,
    region: Float[AnyArray, "b s"] | None,
    members: int,
    lent: Float[Array, "g s h k"] | None = None,
    words: int = 0,
) -> Float[Array, "b words_plus_s h k"]:
    """Move each element's image keys (or values) towards those of its group's source: exactly there at 1.

    words: text tokens that come first and stay as they are.
    """
    if strength is None or (members == 1 and lent is None):
        return x
    # One pass over all tokens: joining text with moved image tokens would copy both.
    share = joint_share(strength, region, words, x.shape[1] - words)[:, :, None, None]
    lent = None if lent is None else jnp.pad(lent, ((0, 0), (words, 0), (0, 0), (0, 0)))
    return ((1 - share) * x + share * of_source(x, members, lent)).astype(x.dtype)


def inject_keys_values(
    key: Float[Array, "b words_plus_s h k"],
    value: Float[Array, "b words_plus_s h k"],
    layer: LayerInterventions,
    region: Float[AnyArray, "b s"] | None,
    members: int,
    lent: LentByLayer | None = None,
    words: int = 0,
) -> tuple[Float[Array, "b words_plus_s h k"], Float[Array, "b words_plus_s h k"]]:
    """K/V injection (Stable Flow), of image tokens. lent: by sources that are not in the batch. words: text tokens
    that come first and stay as they are."""
    if layer.inject is None:
        return key, value
    lent_key, lent_value = lent or (None, None)
    return (
        inject_source(key, layer.inject[:, 0], region, members, lent_key, words),
        inject_source(value, layer.inject[:, 1], region, members, lent_value, words),
    )


def scale_gate(gate: Float[Array, "b d"], *scales: Float[AnyArray, " b"] | None) -> Float[Array, "b d"]:
    """A gate times what is given: a vector a picture, so that nothing of the stream's size is touched."""
    for scale in scales:
        gate = gate if scale is None else gate * scale.astype(gate.dtype)[:, None]
    return gate


def scale_tokens(x: Float[Array, "b l d"], scale: Float[AnyArray, " b"] | None) -> Float[Array, "b l d"]:
    """A stream times a number a picture."""
    return x if scale is None else x * scale.astype(x.dtype)[:, None, None]


def scale_heads(
    mixed: Float[Array, "b l h k"], heads: Float[AnyArray, "b h"] | None, every: Float[AnyArray, " b"] | None = None
) -> Float[Array, "b l h k"]:
    """Attention's output times a number a head, and one a picture."""
    if heads is not None:
        mixed = mixed * heads.astype(mixed.dtype)[:, None, :, None]
    return mixed if every is None else mixed * every.astype(mixed.dtype)[:, None, None, None]
