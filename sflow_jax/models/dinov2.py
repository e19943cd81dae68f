"""DINOv2: a vision transformer whose class token describes a picture, blocks stacked and scanned.

Axes: b batch, y rows, x columns, c channels, l tokens (class, registers, patches), d width, f MLP width.
"""

import dataclasses
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import msgspec
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from sflow_jax.models.layers import LayerNorm, check_heads, check_patches, parameter_dtype, stacked
from sflow_jax.typed import Epsilon, Layers, Side, Size, typed

# The coefficient of torch's bicubic kernel, with which the published models were trained and are run.
BICUBIC = -0.75
INITIAL_STD = 0.02


class TransformersConfig(msgspec.Struct, frozen=True):
    """What the `config.json` of transformers' Dinov2Model must say, and its defaults for the rest."""

    hidden_size: Size
    num_attention_heads: Size
    num_hidden_layers: Layers
    mlp_ratio: Layers = 4
    image_size: Side = 224
    patch_size: Side = 16
    num_register_tokens: Annotated[int, msgspec.Meta(ge=0, le=1000)] = 0
    use_swiglu_ffn: bool = False
    hidden_act: str = "gelu"
    qkv_bias: bool = True
    layer_norm_eps: Epsilon = 1e-6


@dataclasses.dataclass(frozen=True)
class Dinov2Config:
    """Sizes of a DINOv2 network; the defaults are ViT-g/14's (1,136,480,768 parameters)."""

    width: Size = 1536
    heads: Size = 24
    mlp_ratio: Layers = 4
    layers: Layers = 40
    picture_size: Side = 518
    patch_size: Side = 14
    registers: Annotated[int, msgspec.Meta(ge=0, le=1000)] = 0
    swiglu: bool = True
    epsilon: Epsilon = 1e-6

    def __post_init__(self) -> None:
        check_heads(self.width, self.heads)
        check_patches(self.picture_size, self.patch_size)

    @property
    def grid(self) -> int:
        """Patches along a side of the pictures that the position embedding was made for."""
        return self.picture_size // self.patch_size

    @property
    def mlp_width(self) -> int:
        """Hidden width f; with SwiGLU two thirds of it, rounded up to a multiple of 8."""
        full = self.width * self.mlp_ratio
        return (full * 2 // 3 + 7) // 8 * 8 if self.swiglu else full

    @classmethod
    def giant(cls) -> "Dinov2Config":
        """ViT-g/14, with which the paper measures vitality."""
        return cls()

    @classmethod
    def small(cls) -> "Dinov2Config":
        """ViT-S/14 (22,056,576 parameters)."""
        return cls(width=384, heads=6, layers=12, swiglu=False)

    @classmethod
    def from_hf(cls, config: dict[str, Any]) -> "Dinov2Config":
        """From a transformers `config.json`; ValueError for an activation other than GELU or no q, k, v bias."""
        theirs = typed(config, TransformersConfig)
        if theirs.hidden_act != "gelu" or not theirs.qkv_bias:
            raise ValueError(
                "this DINOv2 variant is not supported: it needs hidden_act 'gelu' and qkv_bias true, "
                f"found {theirs.hidden_act!r} and {theirs.qkv_bias}"
            )
        return cls(
            width=theirs.hidden_size,
            heads=theirs.num_attention_heads,
            mlp_ratio=theirs.mlp_ratio,
            layers=theirs.num_hidden_layers,
            picture_size=theirs.image_size,
            patch_size=theirs.patch_size,
            registers=theirs.num_register_tokens,
            swiglu=theirs.use_swiglu_ffn,
            epsilon=theirs.layer_norm_eps,
        )


def bicubic_matrix(before: int, after: int) -> np.ndarray:
    """Weights [after, before] of torch's bicubic resize along one axis (edges repeated, no antialiasing)."""
    middle = (np.arange(after) + 0.5) * before / after - 0.5
    base = np.floor(middle).astype(int)
    matrix = np.zeros((after, before))
    for offset in range(-1, 3):
        distance = np.abs(middle - (base + offset))
        near = (BICUBIC + 2) * distance**3 - (BICUBIC + 3) * distance**2 + 1
        far = BICUBIC * (distance**3 - 5 * distance**2 + 8 * distance - 4)
        weight = np.where(distance <= 1, near, np.where(distance < 2, far, 0.0))
        np.add.at(matrix, (np.arange(after), np.clip(base + offset, 0, before - 1)), weight)
    return matrix.astype(np.float32)


class Dinov2Block(nnx.Module):
    """Pre-norm transformer block whose two branches are scaled by learned vectors."""

    def __init__(self, config: Dinov2Config, *, rngs: nnx.Rngs):
        heads = (config.heads, config.width // config.heads)
        hidden = config.mlp_width
        self.attention_norm = LayerNorm(config.width, config.epsilon)
        self.qkv = nnx.LinearGeneral(config.width, (3, *heads), rngs=rngs)
        self.out = nnx.LinearGeneral(heads, config.width, axis=(-2, -1), rngs=rngs)
        self.attention_scale = nnx.Param(jnp.ones((config.width,)))
        self.mlp_norm = LayerNorm(config.width, config.epsilon)
        self.mlp_in = nnx.Linear(config.width, 2 * hidden if config.swiglu else hidden, rngs=rngs)
        self.mlp_out = nnx.Linear(hidden, config.width, rngs=rngs)
        self.mlp_scale = nnx.Param(jnp.ones((config.width,)))
        self.swiglu = config.swiglu

    def activate(self, hidden: Float[Array, "b l i"]) -> Float[Array, "b l f"]:
        """GELU, or SwiGLU: the first half gates the second."""
        if not self.swiglu:
            return jax.nn.gelu(hidden, approximate=False)
        gate, value = jnp.split(hidden, 2, axis=-1)
        return jax.nn.silu(gate) * value

    def keys(self, x: Float[Array, "b l d"]) -> Float[Array, "b l d"]:
        """The keys of all heads, side by side, of what enters the block."""
        key = self.qkv(self.attention_norm(x))[:, :, 1]
        return key.reshape(*key.shape[:2], -1)

    def __call__(self, x: Float[Array, "b l d"]) -> Float[Array, "b l d"]:
        query, key, value = (y.squeeze(2) for y in jnp.split(self.qkv(self.attention_norm(x)), 3, axis=2))
        mixed = jax.nn.dot_product_attention(query, key, value)
        x = x + self.attention_scale[...][None, None] * self.out(mixed)
        hidden = self.activate(self.mlp_in(self.mlp_norm(x)))
        return x + self.mlp_scale[...][None, None] * self.mlp_out(hidden)


class Dinov2(nnx.Module):
    """Pictures → normalised tokens; the first is the picture's global feature."""

    def __init__(self, config: Dinov2Config, *, rngs: nnx.Rngs):
        self.config = config
        patch, width = (config.patch_size, config.patch_size), config.width
        tokens = {"class_token": 1, "mask_token": 1, "position_embedding": 1 + config.grid**2}
        if config.registers:
            tokens["registers"] = config.registers
        self.patch_embedding = nnx.Conv(3, width, patch, strides=patch, padding="VALID", rngs=rngs)
        for name, count in tokens.items():
            setattr(self, name, nnx.Param(INITIAL_STD * jax.random.normal(rngs.params(), (count, width))))
        self.blocks = stacked(config.layers, lambda r: Dinov2Block(config, rngs=r), rngs)
        self.final_norm = LayerNorm(width, config.epsilon)

    def positions(self, rows: int, columns: int) -> Float[Array, "l d"]:
        """Position embedding of the class token and of rows × columns patches, resized where they differ."""
        table, grid = self.position_embedding[...], self.config.grid
        if (rows, columns) == (grid, grid):
            return table
        wide = table[1:].reshape(grid, grid, -1).astype(jnp.float32)
        if self.config.registers:
            # The models with registers are resized with antialiasing, and with it torch's other kernel.
            patches = jax.image.resize(wide, (rows, columns, wide.shape[-1]), "cubic", antialias=True)
        else:
            down, across = (jnp.asarray(bicubic_matrix(grid, size)) for size in (rows, columns))
            patches = jnp.einsum("ya,xb,abd->yxd", down, across, wide)
        return jnp.concatenate([table[:1], patches.astype(table.dtype).reshape(rows * columns, -1)])

    def embed(self, pictures: Float[Array, "b y x c"]) -> Float[Array, "b l d"]:
        """What enters the first block: class token, registers and patches with their positions."""
        patches = self.patch_embedding(pictures.astype(parameter_dtype(self)))
        batch, rows, columns, width = patches.shape

        def repeated(token: jax.Array) -> jax.Array:
            return jnp.broadcast_to(token, (batch, *token.shape))

        x = jnp.concatenate([repeated(self.class_token[...]), patches.reshape(batch, -1, width)], axis=1)
        x = x + self.positions(rows, columns)[None]
        if self.config.registers:
            x = jnp.concatenate([x[:, :1], repeated(self.registers[...]), x[:, 1:]], axis=1)
        return x

    def __call__(self, pictures: Float[Array, "b y x c"], *, unroll: bool = False) -> Float[Array, "b l d"]:
        """All tokens after the last norm, of pictures normalised as the model expects.

        unroll: compile every layer by itself; training on a CPU is faster so.
        """
        x = self.embed(pictures)
        with jax.named_scope("dinov2_blocks"):
            x, _ = jax.lax.scan(lambda x, block: (block(x), None), x, self.blocks, unroll=unroll)
        return self.final_norm(x)

    def last_keys(self, pictures: Float[Array, "b y x c"]) -> Float[Array, "b l d"]:
        """Keys of the last block's attention, all heads side by side: of the class token and the patches."""
        earlier = jax.tree.map(lambda leaf: leaf[:-1], self.blocks)
        last = jax.tree.map(lambda leaf: leaf[-1], self.blocks)
        x, _ = jax.lax.scan(lambda x, block: (block(x), None), self.embed(pictures), earlier)
        keys = last.keys(x)
        return jnp.concatenate([keys[:, :1], keys[:, 1 + self.config.registers :]], axis=1)
