"""The T5 v1.1 encoder: token ids → a sequence of text features.

Axes: b batch, w tokens, d width, h heads, k head dimension.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from sflow_jax.models.attention import self_attention
from sflow_jax.models.layers import Linear, RMSNorm, scan_layers, stacked


@dataclasses.dataclass(frozen=True)
class T5Config:
    """Sizes of a T5 v1.1 encoder; the defaults are T5-XXL's (4,762,310,656 parameters)."""

    vocabulary: int = 32_128
    width: int = 4096
    heads: int = 64
    head_dim: int = 64
    mlp_width: int = 10_240
    layers: int = 24
    position_buckets: int = 32
    position_reach: int = 128
    epsilon: float = 1e-6

    @classmethod
    def xxl(cls) -> "T5Config":
        """The text encoder of every FLUX.1 model."""
        return cls()

    @classmethod
    def from_hf(cls, config: dict[str, Any]) -> "T5Config":
        """From a transformers `config.json`; ValueError unless the feed-forward part is v1.1's gated GELU."""
        activation = config.get("feed_forward_proj", "relu")
        if activation != "gated-gelu":
            raise ValueError(
                f"this T5 is not version 1.1: feed_forward_proj is {activation!r}, expected 'gated-gelu'"
            )
        return cls(
            vocabulary=config["vocab_size"],
            width=config["d_model"],
            heads=config["num_heads"],
            head_dim=config["d_kv"],
            mlp_width=config["d_ff"],
            layers=config["num_layers"],
            position_buckets=config.get("relative_attention_num_buckets", 32),
            position_reach=config.get("relative_attention_max_distance", 128),
            epsilon=config.get("layer_norm_epsilon", 1e-6),
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
