"""The T5 v1.1 encoder: token ids → a sequence of text features.

Axes: b batch, w tokens, d width, h heads, k head dimension.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import msgspec
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from sflow_jax.models.attention import self_attention
from sflow_jax.models.layers import Linear, RMSNorm, scan_layers, stacked
from sflow_jax.typed import Epsilon, Layers, Size, typed


class TransformersConfig(msgspec.Struct, frozen=True):
    """What the `config.json` of transformers' T5EncoderModel must say, and its defaults for the rest."""

    vocab_size: Size
    d_model: Size
    num_heads: Size
    d_kv: Size
    d_ff: Size
    num_layers: Layers
    feed_forward_proj: str = "relu"
    relative_attention_num_buckets: Size = 32
    relative_attention_max_distance: Size = 128
    layer_norm_epsilon: Epsilon = 1e-6


@dataclasses.dataclass(frozen=True)
class T5Config:
    """Sizes of a T5 v1.1 encoder; the defaults are T5-XXL's (4,762,310,656 parameters)."""

    vocabulary: Size = 32_128
    width: Size = 4096
    heads: Size = 64
    head_dim: Size = 64
    mlp_width: Size = 10_240
    layers: Layers = 24
    position_buckets: Size = 32
    position_reach: Size = 128
    epsilon: Epsilon = 1e-6

    def __post_init__(self) -> None:
        if self.position_buckets % 4 or self.position_reach <= self.position_buckets // 4:
            raise ValueError(
                f"relative attention cannot have {self.position_buckets} buckets for distances up to "
                f"{self.position_reach}"
            )

    @classmethod
    def xxl(cls) -> "T5Config":
        """The text encoder of every FLUX.1 model."""
        return cls()

    @classmethod
    def from_hf(cls, config: dict[str, Any]) -> "T5Config":
        """From a transformers `config.json`; ValueError unless the feed-forward part is v1.1's gated GELU."""
        theirs = typed(config, TransformersConfig)
        if theirs.feed_forward_proj != "gated-gelu":
            raise ValueError(
                f"this T5 is not version 1.1: feed_forward_proj is {theirs.feed_forward_proj!r}, "
                "expected 'gated-gelu'"
            )
        return cls(
            vocabulary=theirs.vocab_size,
            width=theirs.d_model,
            heads=theirs.num_heads,
            head_dim=theirs.d_kv,
            mlp_width=theirs.d_ff,
            layers=theirs.num_layers,
            position_buckets=theirs.relative_attention_num_buckets,
            position_reach=theirs.relative_attention_max_distance,
            epsilon=theirs.layer_norm_epsilon,
        )


def position_buckets(tokens: int, buckets: int, reach: int) -> np.ndarray:
    """Bucket number of every (query, key) pair, int32 [tokens, tokens] (T5 paper, section 2.1).

    Half of the buckets are for keys after the query; of each half, small distances have a bucket each and
    larger ones share logarithmically wider buckets up to `reach`.
    """
    offset = np.arange(tokens)[None, :] - np.arange(tokens)[:, None]
    half = buckets // 2
    exact = half // 2
    distance = np.abs(offset)
    # Float32 as in the published code: float64 would move pairs that sit on a bucket's edge.
    ratio = np.log(np.maximum(distance, 1).astype(np.float32) / np.float32(exact)) / np.float32(
        math.log(reach / exact)
    )
    far = np.minimum(exact + (ratio * np.float32(half - exact)).astype(np.int32), half - 1)
    return np.where(offset > 0, half, 0) + np.where(distance < exact, distance, far)


class T5Block(nnx.Module):
    """Self-attention with position bias and no scaling, then gated GELU, each behind an RMS norm."""

    def __init__(self, config: T5Config, *, rngs: nnx.Rngs):
        heads = (config.heads, config.head_dim)
        self.attention_norm = RMSNorm(config.width, config.epsilon)
        self.qkv = Linear(config.width, (3, *heads), use_bias=False, rngs=rngs)
        self.out = Linear(heads, config.width, use_bias=False, rngs=rngs)
        self.mlp_norm = RMSNorm(config.width, config.epsilon)
        self.gate = Linear(config.width, config.mlp_width, use_bias=False, rngs=rngs)
        self.mlp_in = Linear(config.width, config.mlp_width, use_bias=False, rngs=rngs)
        self.mlp_out = Linear(config.mlp_width, config.width, use_bias=False, rngs=rngs)

    def __call__(self, x: Float[Array, "b w d"], bias: Float[Array, "h w w"]) -> Float[Array, "b w d"]:
        query, key, value = self.qkv.split(self.attention_norm(x))
        mixed = self_attention(query, key, value, bias=bias, scale=1.0)
        x = x + self.out(mixed)
        normed = self.mlp_norm(x)
        return x + self.mlp_out(jax.nn.gelu(self.gate(normed), approximate=True) * self.mlp_in(normed))


class T5Encoder(nnx.Module):
    """T5 v1.1 encoder, blocks stacked and scanned; padding is attended to, as FLUX does."""

    def __init__(self, config: T5Config, *, rngs: nnx.Rngs):
        self.config = config
        self.embedding = nnx.Embed(config.vocabulary, config.width, rngs=rngs)
        self.position_bias = nnx.Embed(config.position_buckets, config.heads, rngs=rngs)
        self.blocks = stacked(config.layers, lambda r: T5Block(config, rngs=r), rngs)
        self.final_norm = RMSNorm(config.width, config.epsilon)

    def __call__(self, token_ids: Int[Array, "b w"]) -> Float[Array, "b w d"]:
        """Text features in the weights' dtype."""
        config = self.config
        buckets = position_buckets(token_ids.shape[1], config.position_buckets, config.position_reach)
        bias = jnp.transpose(self.position_bias(jnp.asarray(buckets)), (2, 0, 1))
        x = self.embedding(token_ids)
        with jax.named_scope("t5_blocks"):
            x, _ = scan_layers(lambda x, block, _: (block(x, bias), None), x, self.blocks, None)
        return self.final_norm(x)
