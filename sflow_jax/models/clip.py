"""The CLIP text encoder: token ids → one pooled vector (and the sequence).

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
from sflow_jax.models.layers import LayerNorm, check_heads, stacked
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


def check_activation(name: str) -> str:
    """The name itself; ValueError unless it is known."""
    if name not in ACTIVATIONS:
        raise ValueError(f"CLIP activation {name!r} is not supported; known: {', '.join(ACTIVATIONS)}")
    return name


@dataclasses.dataclass(frozen=True)
class ClipTextConfig:
    """Sizes of a CLIP text encoder; the defaults are CLIP-L's (123,060,480 parameters)."""

    vocabulary: Size = 49_408
    width: Size = 768
    heads: Size = 12
    mlp_width: Size = 3072
    layers: Layers = 12
    positions: Size = 77
    activation: Literal["quick_gelu", "gelu"] = "quick_gelu"
    end_of_text: Count = LEGACY_END_OF_TEXT
    epsilon: Epsilon = 1e-5

    def __post_init__(self) -> None:
        check_heads(self.width, self.heads)

    @classmethod
    def large(cls) -> "ClipTextConfig":
        """The text half of CLIP ViT-L/14, as in every FLUX.1 model."""
        return cls()

    @classmethod
    def from_hf(cls, config: dict[str, Any]) -> "ClipTextConfig":
        """From a transformers `config.json` of a CLIP text model; ValueError for an unknown activation."""
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

    def __call__(self, token_ids: Int[Array, "b w"]) -> tuple[Float[Array, "b w d"], Float[Array, "b d"]]:
        """The normalised sequence, and its element at the end-of-text token (the pooled vector)."""
        x = self.token_embedding(token_ids) + self.position_embedding.embedding[: token_ids.shape[1]][None]
        with jax.named_scope("clip_blocks"):
            x, _ = jax.lax.scan(lambda x, block: (block(x), None), x, self.blocks)
        x = self.final_norm(x)
        if self.config.end_of_text == LEGACY_END_OF_TEXT:
            end = token_ids.argmax(axis=-1)
        else:
            end = (token_ids == self.config.end_of_text).argmax(axis=-1)
        return x, x[jnp.arange(x.shape[0]), end]
