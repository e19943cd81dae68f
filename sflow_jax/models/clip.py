"""The CLIP text encoders: token ids → one pooled vector, and a sequence.

Axes: b batch, w tokens, d width, h heads, k head dimension.
"""

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
import msgspec
from flax import nnx
from jaxtyping import Array, Float, Int

from sflow_jax.models.attention import self_attention
from sflow_jax.models.layers import LayerNorm, Linear, check_heads, stacked
from sflow_jax.typed import Count, Epsilon, Layers, Size, typed

ACTIVATIONS = {
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
}
# Published CLIP configs carry this wrong end-of-text number; then the largest id of the sequence is meant.
LEGACY_END_OF_TEXT = 2


class TransformersConfig(msgspec.Struct, frozen=True):
    """What the `config.json` of transformers' CLIPTextModel must say, and its defaults for the rest."""

    vocab_size: Size
    hidden_size: Size
    num_attention_heads: Size
    intermediate_size: Size
    num_hidden_layers: Layers
    max_position_embeddings: Size = 77
    hidden_act: str = "quick_gelu"
    eos_token_id: Count = 49_407
    layer_norm_eps: Epsilon = 1e-5
    projection_dim: Size = 512


def check_activation(name: str) -> str:
    """The name itself; ValueError unless it is known."""
    if name not in ACTIVATIONS:
        raise ValueError(f"CLIP activation {name!r} is not supported; known: {', '.join(ACTIVATIONS)}")
    return name


@dataclasses.dataclass(frozen=True)
class ClipTextConfig:
    """Sizes of a CLIP text encoder; the defaults are CLIP-L's (123,060,480 parameters).

    projection: width of the projected pooled vector; None is a model without that layer.
    """

    vocabulary: Size = 49_408
    width: Size = 768
    heads: Size = 12
    mlp_width: Size = 3072
    layers: Layers = 12
    positions: Size = 77
    activation: Literal["quick_gelu", "gelu"] = "quick_gelu"
    end_of_text: Count = LEGACY_END_OF_TEXT
    epsilon: Epsilon = 1e-5
    projection: Size | None = None

    def __post_init__(self) -> None:
        check_heads(self.width, self.heads)

    @classmethod
    def large(cls, *, projected: bool = False) -> "ClipTextConfig":
        """The text half of CLIP ViT-L/14, as in FLUX.1; projected: as in SD3, 123,650,304 parameters."""
        return cls(projection=768 if projected else None)

    @classmethod
    def giant(cls) -> "ClipTextConfig":
        """The text half of OpenCLIP ViT-bigG/14 with its projection, 694,659,840 parameters."""
        return cls(
            width=1280, heads=20, mlp_width=5120, layers=32, activation="gelu", end_of_text=49_407, projection=1280
        )

    @classmethod
    def from_hf(cls, config: dict[str, Any], *, projected: bool = False) -> "ClipTextConfig":
        """From a transformers `config.json` of a CLIP text model; ValueError for an unknown activation.

        projected: it has a text projection, which the config does not say.
        """
        theirs = typed(config, TransformersConfig)
        return cls(
            vocabulary=theirs.vocab_size,
            width=theirs.hidden_size,
            heads=theirs.num_attention_heads,
            mlp_width=theirs.intermediate_size,
            layers=theirs.num_hidden_layers,
            positions=theirs.max_position_embeddings,
            activation=check_activation(theirs.hidden_act),
            end_of_text=theirs.eos_token_id,
            epsilon=theirs.layer_norm_eps,
            projection=theirs.projection_dim if projected else None,
        )


class ClipBlock(nnx.Module):
    """Pre-norm transformer block of either half of CLIP: causal for text, every token seeing all for pictures."""

    def __init__(self, config: Any, *, causal: bool, rngs: nnx.Rngs):
        heads = (config.heads, config.width // config.heads)
        self.attention_norm = LayerNorm(config.width, config.epsilon)
        self.qkv = nnx.LinearGeneral(config.width, (3, *heads), rngs=rngs)
        self.out = nnx.LinearGeneral(heads, config.width, axis=(-2, -1), rngs=rngs)
        self.mlp_norm = LayerNorm(config.width, config.epsilon)
        self.mlp_in = nnx.Linear(config.width, config.mlp_width, rngs=rngs)
        self.mlp_out = nnx.Linear(config.mlp_width, config.width, rngs=rngs)
        self.activation, self.causal = config.activation, causal

    def __call__(self, x: Float[Array, "b w d"]) -> Float[Array, "b w d"]:
        query, key, value = (y.squeeze(2) for y in jnp.split(self.qkv(self.attention_norm(x)), 3, axis=2))
        if self.causal:
            mixed = jax.nn.dot_product_attention(query, key, value, is_causal=True)
        else:
            mixed = self_attention(query, key, value)
        x = x + self.out(mixed)
        return x + self.mlp_out(ACTIVATIONS[self.activation](self.mlp_in(self.mlp_norm(x))))


class ClipText(nnx.Module):
    """CLIP's text encoder, blocks stacked and scanned."""

    def __init__(self, config: ClipTextConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.token_embedding = nnx.Embed(config.vocabulary, config.width, rngs=rngs)
        self.position_embedding = nnx.Embed(config.positions, config.width, rngs=rngs)
        self.blocks = stacked(config.layers, lambda r: ClipBlock(config, causal=True, rngs=r), rngs)
        self.final_norm = LayerNorm(config.width, config.epsilon)
        if config.projection is not None:
            self.text_projection = Linear(config.width, config.projection, use_bias=False, rngs=rngs)

    def __call__(self, token_ids: Int[Array, "b w"]) -> tuple[Float[Array, "b w d"], Float[Array, "b d"]]:
        """The normalised sequence, and its element at the end-of-text token (the pooled vector)."""
        x, _ = self._through_blocks(token_ids)
        x = self.final_norm(x)
        return x, self._at_end(x, token_ids)

    def before_last(self, token_ids: Int[Array, "b w"]) -> tuple[Float[Array, "b w d"], Float[Array, "b p"]]:
        """The sequence that enters the last block, and the pooled vector, projected where the model does that."""
        x, before = self._through_blocks(token_ids)
        pooled = self._at_end(self.final_norm(x), token_ids)
        return before, pooled if self.config.projection is None else self.text_projection(pooled)

    def _through_blocks(self, token_ids: Int[Array, "b w"]) -> tuple[Float[Array, "b w d"], Float[Array, "b w d"]]:
        """The sequence behind the last block, and in front of it."""
        x = self.token_embedding(token_ids) + self.position_embedding.embedding[: token_ids.shape[1]][None]
        with jax.named_scope("clip_blocks"):
            streams, _ = jax.lax.scan(lambda xs, block: ((block(xs[0]), xs[0]), None), (x, x), self.blocks)
        return streams

    def _at_end(self, x: Float[Array, "b w d"], token_ids: Int[Array, "b w"]) -> Float[Array, "b d"]:
        """The sequence's element at the end-of-text token."""
        if self.config.end_of_text == LEGACY_END_OF_TEXT:
            end = token_ids.argmax(axis=-1)
        else:
            end = (token_ids == self.config.end_of_text).argmax(axis=-1)
        return x[jnp.arange(x.shape[0]), end]
