"""The variational autoencoder of FLUX.1 and SD3: pictures ↔ latents, 8× smaller, 16 channels.

Axes: b batch, y rows, x columns, c channels. Pictures are NHWC in −1..1.
"""

import dataclasses
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import msgspec
from flax import nnx
from jaxtyping import Array, Float

from sflow_jax.models.attention import self_attention
from sflow_jax.models.layers import parameter_dtype
from sflow_jax.typed import Layers, Number, Positive, Side, Size, typed

GROUP_NORM_EPSILON = 1e-6


# Of diffusers' config: what FLUX's autoencoder has and has not.
FLUX_LAYERS = {
    "act_fn": "silu",
    "use_quant_conv": False,
    "use_post_quant_conv": False,
    "mid_block_add_attention": True,
}


class DiffusersConfig(msgspec.Struct, frozen=True):
    """What the `config.json` of diffusers' AutoencoderKL must say, and its defaults for the rest."""

    block_out_channels: Annotated[tuple[Size, ...], msgspec.Meta(min_length=1, max_length=8)]
    scaling_factor: Positive
    in_channels: Literal[3] = 3
    latent_channels: Size = 16
    layers_per_block: Layers = 2
    norm_num_groups: Size = 32
    shift_factor: Number | None = None
    act_fn: str = "silu"
    use_quant_conv: bool = True
    use_post_quant_conv: bool = True
    mid_block_add_attention: bool = True
    sample_size: Side = 1024


@dataclasses.dataclass(frozen=True)
class AutoencoderConfig:
    """Sizes of an autoencoder; the defaults are FLUX.1's (83,819,683 parameters, as SD3's)."""

    picture_channels: Literal[3] = 3
    latent_channels: Size = 16
    widths: Annotated[tuple[Size, ...], msgspec.Meta(min_length=1, max_length=8)] = (128, 256, 512, 512)
    blocks_per_level: Layers = 2
    norm_groups: Size = 32
    scaling_factor: Positive = 0.3611
    shift_factor: Number = 0.1159

    def __post_init__(self) -> None:
        if any(width % self.norm_groups for width in self.widths):
            raise ValueError(f"{self.norm_groups} norm groups do not split widths of {self.widths}")

    @property
    def downsampling(self) -> int:
        """How many picture pixels one latent covers along each side."""
        return 2 ** (len(self.widths) - 1)

    @classmethod
    def flux(cls) -> "AutoencoderConfig":
        """The autoencoder of every FLUX.1 model."""
        return cls()

    @classmethod
    def sd3(cls) -> "AutoencoderConfig":
        """The autoencoder of every SD3 and SD3.5 model: other weights, other scaling."""
        return cls(scaling_factor=1.5305, shift_factor=0.0609)

    @classmethod
    def from_hf(cls, config: dict[str, Any]) -> "AutoencoderConfig":
        """From the `config.json` of a diffusers VAE folder; ValueError for layers that FLUX's does not have."""
        theirs = typed(config, DiffusersConfig)
        for name, value in FLUX_LAYERS.items():
            if getattr(theirs, name) != value:
                raise ValueError(
                    f"this autoencoder is not FLUX's: {name} is {getattr(theirs, name)!r}, expected {value!r}"
                )
        return cls(
            picture_channels=theirs.in_channels,
            latent_channels=theirs.latent_channels,
            widths=theirs.block_out_channels,
            blocks_per_level=theirs.layers_per_block,
            norm_groups=theirs.norm_num_groups,
            scaling_factor=theirs.scaling_factor,
            shift_factor=theirs.shift_factor or 0.0,
        )


def picture_size(config: dict[str, Any]) -> int:
    """Height and width that the `config.json` of a diffusers VAE folder names, in pixels."""
    return typed(config, DiffusersConfig).sample_size


def group_norm(config: AutoencoderConfig, width: int, rngs: nnx.Rngs) -> nnx.GroupNorm:
    """Group normalisation with float32 statistics (nnx's default) and the published epsilon."""
    return nnx.GroupNorm(width, config.norm_groups, epsilon=GROUP_NORM_EPSILON, rngs=rngs)


def convolution(width_in: int, width_out: int, rngs: nnx.Rngs, size: int = 3, **options) -> nnx.Conv:
    """A square convolution that keeps the size unless `options` say otherwise."""
    return nnx.Conv(width_in, width_out, (size, size), padding=options.pop("padding", "SAME"), rngs=rngs, **options)


class ResidualBlock(nnx.Module):
    """Norm, SiLU, convolution, twice, around a skip that changes the width where it must."""

    def __init__(self, config: AutoencoderConfig, width_in: int, width_out: int, *, rngs: nnx.Rngs):
        self.norm_1 = group_norm(config, width_in, rngs)
        self.conv_1 = convolution(width_in, width_out, rngs)
        self.norm_2 = group_norm(config, width_out, rngs)
        self.conv_2 = convolution(width_out, width_out, rngs)
        if width_in != width_out:
            self.shortcut = convolution(width_in, width_out, rngs, size=1)

    def __call__(self, x: Float[Array, "b y x i"]) -> Float[Array, "b y x o"]:
        hidden = self.conv_1(jax.nn.silu(self.norm_1(x)))
        hidden = self.conv_2(jax.nn.silu(self.norm_2(hidden)))
        return hidden + (self.shortcut(x) if hasattr(self, "shortcut") else x)


class SpatialAttention(nnx.Module):
    """Single-head attention over all positions, with a residual connection."""

    def __init__(self, config: AutoencoderConfig, width: int, *, rngs: nnx.Rngs):
        self.norm = group_norm(config, width, rngs)
        self.query, self.key, self.value, self.out = (nnx.Linear(width, width, rngs=rngs) for _ in range(4))

    def __call__(self, x: Float[Array, "b y x c"]) -> Float[Array, "b y x c"]:
        flat = self.norm(x).reshape(x.shape[0], -1, 1, x.shape[-1])
        mixed = self_attention(self.query(flat), self.key(flat), self.value(flat))
        return x + self.out(mixed).reshape(x.shape)


class Middle(nnx.Module):
    """The lowest-resolution part of encoder and decoder."""

    def __init__(self, config: AutoencoderConfig, *, rngs: nnx.Rngs):
        width = config.widths[-1]
        self.block_1 = ResidualBlock(config, width, width, rngs=rngs)
        self.attention = SpatialAttention(config, width, rngs=rngs)
        self.block_2 = ResidualBlock(config, width, width, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.block_2(self.attention(self.block_1(x)))


class Level(nnx.Module):
    """Residual blocks of one resolution, then the step to the next one (`resample`), if any."""

    def __init__(self, config: AutoencoderConfig, width_in: int, width: int, blocks: int, step: str, *, rngs):
        widths = [width_in] + [width] * blocks
        self.blocks = nnx.List(ResidualBlock(config, i, o, rngs=rngs) for i, o in zip(widths, widths[1:]))
        self.step = step
        if step == "down":
            # Padded below and to the right only, as the published encoder does.
            self.resample = convolution(width, width, rngs, strides=2, padding=((0, 1), (0, 1)))
        elif step == "up":
            self.resample = convolution(width, width, rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        for block in self.blocks:
            x = block(x)
        if self.step == "up":
            x = x.repeat(2, axis=1).repeat(2, axis=2)
        return x if self.step == "same" else self.resample(x)


class Encoder(nnx.Module):
    """Picture → mean and log-variance of the latents."""

    def __init__(self, config: AutoencoderConfig, *, rngs: nnx.Rngs):
        widths = config.widths
        steps = ["down"] * (len(widths) - 1) + ["same"]
        self.conv_in = convolution(config.picture_channels, widths[0], rngs)
        self.levels = nnx.List(
            Level(config, i, o, config.blocks_per_level, step, rngs=rngs)
            for i, o, step in zip((widths[0], *widths), widths, steps)
        )
        self.middle = Middle(config, rngs=rngs)
        self.norm_out = group_norm(config, widths[-1], rngs)
        self.conv_out = convolution(widths[-1], 2 * config.latent_channels, rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = self.conv_in(x)
        for level in self.levels:
            x = level(x)
        return self.conv_out(jax.nn.silu(self.norm_out(self.middle(x))))


class Decoder(nnx.Module):
    """Latents → picture."""

    def __init__(self, config: AutoencoderConfig, *, rngs: nnx.Rngs):
        widths = config.widths[::-1]
        steps = ["up"] * (len(widths) - 1) + ["same"]
        self.conv_in = convolution(config.latent_channels, widths[0], rngs)
        self.middle = Middle(config, rngs=rngs)
        self.levels = nnx.List(
            Level(config, i, o, config.blocks_per_level + 1, step, rngs=rngs)
            for i, o, step in zip((widths[0], *widths), widths, steps)
        )
        self.norm_out = group_norm(config, widths[-1], rngs)
        self.conv_out = convolution(widths[-1], config.picture_channels, rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = self.middle(self.conv_in(x))
        for level in self.levels:
            x = level(x)
        return self.conv_out(jax.nn.silu(self.norm_out(x)))


class Autoencoder(nnx.Module):
    """Encoder and decoder; scaling and shifting of latents belong to the family."""

    def __init__(self, config: AutoencoderConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.encoder = Encoder(config, rngs=rngs)
        self.decoder = Decoder(config, rngs=rngs)

    def encode(
        self, pictures: Float[Array, "b y x c"]
    ) -> tuple[Float[Array, "b yl xl cl"], Float[Array, "b yl xl cl"]]:
        """Mean and log-variance, float32, of pictures in −1..1 (log-variance clipped to −30..20)."""
        moments = self.encoder(pictures.astype(parameter_dtype(self))).astype(jnp.float32)
        mean, log_variance = jnp.split(moments, 2, axis=-1)
        return mean, jnp.clip(log_variance, -30.0, 20.0)

    def decode(self, latents: Float[Array, "b yl xl cl"]) -> Float[Array, "b y x c"]:
        """Pictures, float32, nominally in −1..1 (not clipped)."""
        return self.decoder(latents.astype(parameter_dtype(self))).astype(jnp.float32)
