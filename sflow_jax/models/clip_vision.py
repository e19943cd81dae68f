"""CLIP's picture encoder, and the whole of CLIP: pictures and captions in one space.

Axes: b batch, y rows, x columns, c channels, w tokens, l patches and the class token, d width, p projection.
"""

import dataclasses
import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
import msgspec
from flax import nnx
from jaxtyping import Array, Float, Int

from sflow_jax.models.clip import ClipBlock, ClipText, ClipTextConfig, check_activation
from sflow_jax.models.layers import LayerNorm, check_heads, check_patches, parameter_dtype, stacked
from sflow_jax.typed import Epsilon, Layers, Side, Size, typed

# The published models start training at this inverse temperature.
INITIAL_LOGIT_SCALE = math.log(1 / 0.07)


class TransformersVisionConfig(msgspec.Struct, frozen=True):
    """What `vision_config` of transformers' CLIPModel may say, with its defaults."""

    hidden_size: Size = 768
    num_attention_heads: Size = 12
    intermediate_size: Size = 3072
    num_hidden_layers: Layers = 12
    image_size: Side = 224
    patch_size: Side = 32
    hidden_act: str = "quick_gelu"
    layer_norm_eps: Epsilon = 1e-5


class TransformersClipConfig(msgspec.Struct, frozen=True):
    """The `config.json` of transformers' CLIPModel."""

    text_config: dict[str, Any] = {}
    vision_config: dict[str, Any] = {}
    projection_dim: Size = 512


@dataclasses.dataclass(frozen=True)
class ClipVisionConfig:
    """Sizes of a CLIP picture encoder; the defaults are ViT-L/14's (303,179,776 parameters)."""

    width: Size = 1024
    heads: Size = 16
    mlp_width: Size = 4096
    layers: Layers = 24
    picture_size: Side = 224
    patch_size: Side = 14
    activation: Literal["quick_gelu", "gelu"] = "quick_gelu"
    epsilon: Epsilon = 1e-5

    def __post_init__(self) -> None:
        check_heads(self.width, self.heads)
        check_patches(self.picture_size, self.patch_size)

    @property
    def patches(self) -> int:
        """Patches of a picture."""
        return (self.picture_size // self.patch_size) ** 2

    @classmethod
    def large(cls) -> "ClipVisionConfig":
        """The picture half of CLIP ViT-L/14."""
        return cls()

    @classmethod
    def from_hf(cls, config: dict[str, Any]) -> "ClipVisionConfig":
        """From a transformers `config.json` (its `vision_config`); ValueError for an unknown activation."""
        theirs = typed(config, TransformersVisionConfig)
        return cls(
            width=theirs.hidden_size,
            heads=theirs.num_attention_heads,
            mlp_width=theirs.intermediate_size,
            layers=theirs.num_hidden_layers,
            picture_size=theirs.image_size,
            patch_size=theirs.patch_size,
            activation=check_activation(theirs.hidden_act),
            epsilon=theirs.layer_norm_eps,
        )


@dataclasses.dataclass(frozen=True)
class ClipConfig:
    """Both encoders and the width of the space they share."""

    text: ClipTextConfig = ClipTextConfig()
    vision: ClipVisionConfig = ClipVisionConfig()
    projection: Size = 768

    @classmethod
    def large(cls) -> "ClipConfig":
        """CLIP ViT-L/14 (427,616,513 parameters)."""
        return cls()

    @classmethod
    def from_hf(cls, config: dict[str, Any]) -> "ClipConfig":
        """From the `config.json` of a transformers CLIPModel folder.

        The published one leaves out what equals transformers' defaults; those are filled in here.
        """
        text = {
            "vocab_size": 49_408,
            "hidden_size": 512,
            "num_attention_heads": 8,
            "intermediate_size": 2048,
            "num_hidden_layers": 12,
        }
        theirs = typed(config, TransformersClipConfig)
        return cls(
            text=ClipTextConfig.from_hf(text | theirs.text_config),
            vision=ClipVisionConfig.from_hf(theirs.vision_config),
            projection=theirs.projection_dim,
        )


class ClipVision(nnx.Module):
    """CLIP's picture encoder, blocks stacked and scanned."""

    def __init__(self, config: ClipVisionConfig, *, rngs: nnx.Rngs):
        self.config = config
        patch = (config.patch_size, config.patch_size)
        self.patch_embedding = nnx.Conv(
            3, config.width, patch, strides=patch, padding="VALID", use_bias=False, rngs=rngs
        )
        scale = config.width**-0.5
        self.class_embedding = nnx.Param(scale * jax.random.normal(rngs.params(), (config.width,)))
        self.position_embedding = nnx.Embed(config.patches + 1, config.width, rngs=rngs)
        self.norm_in = LayerNorm(config.width, config.epsilon)
        self.blocks = stacked(config.layers, lambda r: ClipBlock(config, causal=False, rngs=r), rngs)
        self.norm_out = LayerNorm(config.width, config.epsilon)

    def __call__(self, pictures: Float[Array, "b y x c"]) -> Float[Array, "b d"]:
        """The normalised class token (the pooled vector) of pictures normalised as the model expects."""
        patches = self.patch_embedding(pictures.astype(parameter_dtype(self)))
        x = patches.reshape(patches.shape[0], -1, patches.shape[-1])
        first = jnp.broadcast_to(self.class_embedding[...], (x.shape[0], 1, x.shape[-1]))
        x = self.norm_in(jnp.concatenate([first, x], axis=1) + self.position_embedding.embedding[...][None])
        with jax.named_scope("clip_vision_blocks"):
            x, _ = jax.lax.scan(lambda x, block: (block(x), None), x, self.blocks)
        return self.norm_out(x[:, 0])


def _unit(x: Float[Array, "b p"]) -> Float[Array, "b p"]:
    """Rows of length one, float32."""
    x = x.astype(jnp.float32)
    return x / jnp.linalg.norm(x, axis=-1, keepdims=True)


class Clip(nnx.Module):
    """Both encoders, their projections, and the learned inverse temperature (as its logarithm)."""

    def __init__(self, config: ClipConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.text = ClipText(config.text, rngs=rngs)
        self.vision = ClipVision(config.vision, rngs=rngs)
        self.text_projection = nnx.Linear(config.text.width, config.projection, use_bias=False, rngs=rngs)
        self.vision_projection = nnx.Linear(config.vision.width, config.projection, use_bias=False, rngs=rngs)
        self.logit_scale = nnx.Param(jnp.array(INITIAL_LOGIT_SCALE, jnp.float32))

    def text_features(self, token_ids: Int[Array, "b w"]) -> Float[Array, "b p"]:
        """Unit vectors of captions, float32."""
        return _unit(self.text_projection(self.text(token_ids)[1]))

    def picture_features(self, pictures: Float[Array, "b y x c"]) -> Float[Array, "b p"]:
        """Unit vectors of normalised pictures, float32."""
        return _unit(self.vision_projection(self.vision(pictures)))
