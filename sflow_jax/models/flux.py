"""The FLUX.1 diffusion transformer with layer control, stacked blocks under `jax.lax.scan`.

Axes: b batch, s image tokens, w text tokens (words), l joint tokens (text first), c latent channels,
d hidden size, h heads, k head dimension, f MLP width, n layers (numbered globally: double blocks first).
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Sharding
from jaxtyping import Array, Bool, Float

from sflow_jax.attention import AUTOMATIC, joint_attention, rotary_angles, rotate
from sflow_jax.models.layers import (
    Linear,
    RMSNorm,
    layer_norm,
    parameter_dtype,
    scan_layers,
    sinusoids,
    stacked,
)

SINUSOID_WIDTH = 256
# Sigma and guidance enter the sinusoids multiplied by this.
SINUSOID_SCALE = 1000.0


@dataclasses.dataclass(frozen=True)
class FluxConfig:
    """Sizes of a FLUX.1 transformer; `dev` and `schnell` are the published ones (Krea equals dev)."""

    in_channels: int = 64
    double_blocks: int = 19
    single_blocks: int = 38
    heads: int = 24
    head_dim: int = 128
    text_width: int = 4096
    pooled_width: int = 768
    guidance: bool = True
    rotary_axes: tuple[int, ...] = (16, 56, 56)
    rotary_theta: float = 10_000.0
    mlp_ratio: int = 4
    epsilon: float = 1e-6

    @property
    def width(self) -> int:
        """Hidden size d."""
        return self.heads * self.head_dim

    @property
    def layers(self) -> int:
        """Number of layers n, double and single together."""
        return self.double_blocks + self.single_blocks

    @classmethod
    def dev(cls) -> "FluxConfig":
        """FLUX.1-dev (and Krea-dev): guidance-distilled, 11,901,408,320 parameters."""
        return cls()

    @classmethod
    def schnell(cls) -> "FluxConfig":
        """FLUX.1-schnell: timestep-distilled, no guidance input, 11,891,178,560 parameters."""
        return cls(guidance=False)

    @classmethod
    def from_hf(cls, config: dict[str, Any]) -> "FluxConfig":
        """From the `config.json` of a diffusers transformer folder.

        Raises ValueError for a variant that this module does not implement (patch size, extra input channels).
        """
        in_channels = config.get("in_channels", 64)
        out_channels = config.get("out_channels") or in_channels
        if config.get("patch_size", 1) != 1 or out_channels != in_channels:
            raise ValueError(
                "this FLUX variant is not supported: it needs patch_size 1 and as many output as input channels, "
                f"found patch_size {config.get('patch_size')}, {in_channels} in and {out_channels} out"
            )
        made = cls(
            in_channels=in_channels,
            double_blocks=config.get("num_layers", 19),
            single_blocks=config.get("num_single_layers", 38),
            heads=config.get("num_attention_heads", 24),
            head_dim=config.get("attention_head_dim", 128),
            text_width=config.get("joint_attention_dim", 4096),
            pooled_width=config.get("pooled_projection_dim", 768),
            guidance=config.get("guidance_embeds", False),
            rotary_axes=tuple(config.get("axes_dims_rope", (16, 56, 56))),
        )
        if sum(made.rotary_axes) != made.head_dim:
            raise ValueError(f"axes_dims_rope {made.rotary_axes} must add up to attention_head_dim {made.head_dim}")
        return made


@dataclasses.dataclass(frozen=True)
class Layout:
    """What every layer needs to know about the tokens of this call (static).

    text_tokens: how many of the joint tokens are text. members: batch = groups × members, and member 0 of
    each group is the source whose keys and values the others may take. kernel, sharding: of attention.
    """

    text_tokens: int
    members: int
    kernel: str
    sharding: Sharding | None

    def whole(self, x: jax.Array) -> jax.Array:
        """An array split over a mesh by groups alone, so that the residual stream is whole on every device.

        Without this the compiler splits it by columns like the modulation, and gathers it again at every product.
        """
        return jax.lax.with_sharding_constraint(x, self.sharding) if self.sharding is not None else x

    def attend(self, query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
        """Joint attention of text and image tokens."""
        return joint_attention(query, key, value, kernel=self.kernel, sharding=self.sharding)


def inject_source(
    x: Float[Array, "b l h k"], inject: Bool[Array, " b"] | None, members: int
) -> Float[Array, "b l h k"]:
    """Give each element marked in `inject` the keys (or values) of its group's member 0."""
    if inject is None or members == 1:
        return x
    grouped = x.reshape(-1, members, *x.shape[1:])
    chosen = jnp.where(inject.reshape(-1, members, 1, 1, 1), grouped[:, :1], grouped)
    return chosen.reshape(x.shape)


def keep_bypassed(bypass: Bool[Array, " b"] | None, before: jax.Array, after: jax.Array) -> jax.Array:
    """The residual stream after a layer, or as it was before where the layer is bypassed."""
    return after if bypass is None else jnp.where(bypass[:, None, None], before, after)


def modulate(x: jax.Array, shift: jax.Array, scale: jax.Array, epsilon: float) -> jax.Array:
    """Adaptive layer normalisation: normalise in float32, then scale and shift per batch element."""
    return (layer_norm(x, epsilon) * (1 + scale[:, None]) + shift[:, None]).astype(x.dtype)


class Embedder(nnx.Module):
    """Two linear layers with SiLU between: scalars and pooled text → the modulation vector."""

    def __init__(self, width_in: int, width: int, *, rngs: nnx.Rngs):
        self.in_layer = Linear(width_in, width, rngs=rngs)
        self.out_layer = Linear(width, width, rngs=rngs)

    def __call__(self, x: Float[Array, "b i"]) -> Float[Array, "b d"]:
        return self.out_layer(jax.nn.silu(self.in_layer(x)))


class Attention(nnx.Module):
    """The projections of one token stream: normalised, rotated q and k, v, and the way back."""

    def __init__(self, config: FluxConfig, *, rngs: nnx.Rngs):
        heads = (config.heads, config.head_dim)
        self.qkv = Linear(config.width, (3, *heads), rngs=rngs)
        self.query_norm = RMSNorm(config.head_dim, config.epsilon)
        self.key_norm = RMSNorm(config.head_dim, config.epsilon)
        self.out = Linear(heads, config.width, rngs=rngs)

    def project(self, x: Float[Array, "b l d"], angles: Float[Array, "l half_k"]) -> tuple[jax.Array, ...]:
        """q, k, v, each [b, l, h, k]."""
        query, key, value = (y.squeeze(2) for y in jnp.split(self.qkv(x), 3, axis=2))
        return rotate(self.query_norm(query), angles), rotate(self.key_norm(key), angles), value


class Stream(nnx.Module):
    """One of the two token streams (image or text) of a double block."""

    def __init__(self, config: FluxConfig, *, rngs: nnx.Rngs):
        hidden = config.width * config.mlp_ratio
        self.modulation = Linear(config.width, 6 * config.width, rngs=rngs)
        self.attention = Attention(config, rngs=rngs)
        self.mlp_in = Linear(config.width, hidden, rngs=rngs)
        self.mlp_out = Linear(hidden, config.width, rngs=rngs)
        self.epsilon = config.epsilon

    def finish(self, x: jax.Array, mixed: jax.Array, parts: list[jax.Array]) -> jax.Array:
        """Add the gated attention output and the gated MLP to the stream."""
        gate_attention, shift, scale, gate_mlp = parts
        x = x + gate_attention[:, None] * self.attention.out(mixed)
        hidden = self.mlp_in(modulate(x, shift, scale, self.epsilon))
        return x + gate_mlp[:, None] * self.mlp_out(jax.nn.gelu(hidden, approximate=True))


class DoubleBlock(nnx.Module):
    """Text and image streams with their own weights, one joint attention."""

    def __init__(self, config: FluxConfig, *, rngs: nnx.Rngs):
        self.image = Stream(config, rngs=rngs)
        self.text = Stream(config, rngs=rngs)

    def __call__(self, text, image, vector, angles, inject, bypass, layout: Layout):
        words = layout.text_tokens
        parts, projected = {}, {}
        for name, stream, x, turn in (
            ("text", self.text, text, angles[:words]),
            ("image", self.image, image, angles[words:]),
        ):
            shift, scale, *parts[name] = jnp.split(layout.whole(stream.modulation(vector)), 6, axis=-1)
            projected[name] = stream.attention.project(modulate(x, shift, scale, stream.epsilon), turn)
        query, key, value = projected["image"]
        key, value = (inject_source(y, inject, layout.members) for y in (key, value))
        joint = (jnp.concatenate(pair, axis=1) for pair in zip(projected["text"], (query, key, value)))
        mixed = layout.attend(*joint)
        text_out = self.text.finish(text, mixed[:, :words], parts["text"])
        image_out = self.image.finish(image, mixed[:, words:], parts["image"])
        return layout.whole(keep_bypassed(bypass, text, text_out)), layout.whole(
            keep_bypassed(bypass, image, image_out)
        )


class SingleBlock(nnx.Module):
    """Text and image tokens in one stream; attention and MLP side by side."""

    def __init__(self, config: FluxConfig, *, rngs: nnx.Rngs):
        hidden = config.width * config.mlp_ratio
        self.modulation = Linear(config.width, 3 * config.width, rngs=rngs)
        self.attention = Attention(config, rngs=rngs)
        self.mlp_in = Linear(config.width, hidden, rngs=rngs)
        # The published layer is one product over [attention, MLP]; its bias lives in `attention.out`.
        self.mlp_out = Linear(hidden, config.width, use_bias=False, rngs=rngs)
        self.epsilon = config.epsilon

    def __call__(self, x, vector, angles, inject, bypass, layout: Layout):
        words = layout.text_tokens
        shift, scale, gate = jnp.split(layout.whole(self.modulation(vector)), 3, axis=-1)
        normed = modulate(x, shift, scale, self.epsilon)
        query, key, value = self.attention.project(normed, angles)
        key, value = (
            jnp.concatenate([y[:, :words], inject_source(y[:, words:], inject, layout.members)], axis=1)
            if layout.members > 1
            else y
            for y in (key, value)
        )
        mixed = layout.attend(query, key, value)
        hidden = jax.nn.gelu(self.mlp_in(normed), approximate=True)
        # Added before the bias, so that devices that share the products add up once.
        update = self.attention.out.add_bias(self.attention.out.product(mixed) + self.mlp_out(hidden))
        return layout.whole(keep_bypassed(bypass, x, x + gate[:, None] * update))


class Flux(nnx.Module):
    """Predicts the velocity u = noise − picture of packed latents (method: flow matching)."""

    def __init__(self, config: FluxConfig, *, rngs: nnx.Rngs):
        width = config.width
        self.config = config
        self.image_in = Linear(config.in_channels, width, rngs=rngs)
        self.text_in = Linear(config.text_width, width, rngs=rngs)
        self.timestep_in = Embedder(SINUSOID_WIDTH, width, rngs=rngs)
        if config.guidance:
            self.guidance_in = Embedder(SINUSOID_WIDTH, width, rngs=rngs)
        self.pooled_in = Embedder(config.pooled_width, width, rngs=rngs)
        self.double_blocks = stacked(config.double_blocks, lambda r: DoubleBlock(config, rngs=r), rngs)
        self.single_blocks = stacked(config.single_blocks, lambda r: SingleBlock(config, rngs=r), rngs)
        self.modulation_out = Linear(width, 2 * width, rngs=rngs)
        self.image_out = Linear(width, config.in_channels, rngs=rngs)

    def embed(self, timestep: jax.Array, guidance: jax.Array, pooled: jax.Array) -> jax.Array:
        """The vector [b, d] that modulates every layer, after SiLU."""
        dtype = parameter_dtype(self)
        vector = self.timestep_in(sinusoids(timestep * SINUSOID_SCALE, SINUSOID_WIDTH).astype(dtype))
        if self.config.guidance:
            vector += self.guidance_in(sinusoids(guidance * SINUSOID_SCALE, SINUSOID_WIDTH).astype(dtype))
        return jax.nn.silu(vector + self.pooled_in(pooled.astype(dtype)))

    def __call__(
        self,
        latents: Float[Array, "b s c"],
        text: Float[Array, "b w e"],
        pooled: Float[Array, "b p"],
        *,
        timestep: Float[Array, " b"],
        guidance: Float[Array, " b"],
        image_ids: Float[Array, "s 3"],
        inject: Bool[Array, "b n"] | None = None,
        bypass: Bool[Array, "b n"] | None = None,
        members: int = 1,
        kernel: str = AUTOMATIC,
        sharding: Sharding | None = None,
        remat: bool = False,
        unroll: bool = False,
    ) -> Float[Array, "b s c"]:
        """Velocity, float32, same shape as the latents.

        timestep: sigma in 0..1. guidance: the distilled guidance scale; ignored by models without it.
        inject, bypass: per batch element and global layer; None means nowhere. members: batch elements a
        group, member 0 being the source. kernel, sharding: see `joint_attention`. remat: recompute blocks in
        the backward pass (training). unroll: compile every layer by itself; training on a CPU is a fifth
        faster so.
        """
        dtype = parameter_dtype(self)
        layout = Layout(text.shape[1], members, kernel, sharding)
        with jax.named_scope("embed"):
            vector = self.embed(timestep, guidance, pooled)
            # Text tokens sit at (0, 0, 0): they are not rotated.
            ids = jnp.concatenate([jnp.zeros((layout.text_tokens, 3)), image_ids])
            angles = rotary_angles(ids, self.config.rotary_axes, self.config.rotary_theta)
            image, words = self.image_in(latents.astype(dtype)), self.text_in(text.astype(dtype))
        split = self.config.double_blocks
        masks = [None if mask is None else jnp.moveaxis(mask, 1, 0) for mask in (inject, bypass)]
        first = [mask if mask is None else mask[:split] for mask in masks]
        second = [mask if mask is None else mask[split:] for mask in masks]

        def double(carry, block, masks):
            return block(*carry, vector, angles, *masks, layout)

        def single(carry, block, masks):
            return block(carry, vector, angles, *masks, layout)

        if remat:
            double, single = jax.checkpoint(double), jax.checkpoint(single)
        with jax.named_scope("double_blocks"):
            words, image = scan_layers(double, (words, image), self.double_blocks, first, unroll=unroll)
        with jax.named_scope("single_blocks"):
            joint = jnp.concatenate([words, image], axis=1)
            joint = scan_layers(single, joint, self.single_blocks, second, unroll=unroll)
        with jax.named_scope("out"):
            shift, scale = jnp.split(self.modulation_out(vector), 2, axis=-1)
            image = modulate(joint[:, layout.text_tokens :], shift, scale, self.config.epsilon)
            return self.image_out(image).astype(jnp.float32)
