"""The FLUX.1 diffusion transformer with layer control, stacked blocks under `jax.lax.scan`.

Axes: b batch, s image tokens, w text tokens (words), l joint tokens (text first), c latent channels,
d hidden size, h heads, k head dimension, f MLP width, n layers (numbered globally: double blocks first).
"""

import dataclasses
import functools
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import msgspec
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from sflow_jax.arrays import AnyArray, Leaf
from sflow_jax.models.attention import rotary_angles, rotate
from sflow_jax.models.conditioning import Conditioning
from sflow_jax.models.interventions import (
    NOTHING,
    Interventions,
    LayerInterventions,
    inject_keys_values,
    joint_share,
    of_source,
    scale_gate,
    scale_heads,
    scale_tokens,
)
from sflow_jax.models.layers import (
    Linear,
    RMSNorm,
    of_every_block,
    parameter_dtype,
    scan_layers,
    sinusoids,
    stacked,
    without,
)
from sflow_jax.models.layout import Layout, Output
from sflow_jax.models.lending import LentByLayer, blank_record, lending, slots_of, with_record
from sflow_jax.models.modulation import (
    SINUSOID_SCALE,
    SINUSOID_WIDTH,
    Embedder,
    Modulation,
    Numbers,
    QueryKeyValue,
    modulate,
    split_modulation,
)
from sflow_jax.models.reuse import begin, ended, skippable
from sflow_jax.pictures.canvas import Canvas
from sflow_jax.typed import Epsilon, Layers, Positive, Size, typed


class DiffusersConfig(msgspec.Struct, frozen=True):
    """What the `config.json` of diffusers' FluxTransformer2DModel may say, with its defaults."""

    class_name: Literal["FluxTransformer2DModel"] = msgspec.field(
        name="_class_name", default="FluxTransformer2DModel"
    )
    in_channels: Size = 64
    out_channels: Size | None = None
    patch_size: Size = 1
    num_layers: Layers = 19
    num_single_layers: Layers = 38
    num_attention_heads: Size = 24
    attention_head_dim: Size = 128
    joint_attention_dim: Size = 4096
    pooled_projection_dim: Size = 768
    guidance_embeds: bool = False
    axes_dims_rope: tuple[Size, ...] = (16, 56, 56)


@dataclasses.dataclass(frozen=True)
class FluxConfig:
    """Sizes of a FLUX.1 transformer; `dev` and `schnell` are the published ones (Krea equals dev)."""

    in_channels: Size = 64
    double_blocks: Layers = 19
    single_blocks: Layers = 38
    heads: Size = 24
    head_dim: Size = 128
    text_width: Size = 4096
    pooled_width: Size = 768
    guidance: bool = True
    rotary_axes: tuple[Size, ...] = (16, 56, 56)
    rotary_theta: Positive = 10_000.0
    mlp_ratio: Layers = 4
    epsilon: Epsilon = 1e-6

    def __post_init__(self) -> None:
        if sum(self.rotary_axes) != self.head_dim or any(axis % 2 for axis in self.rotary_axes):
            raise ValueError(
                f"axes_dims_rope {self.rotary_axes} must be even and add up to attention_head_dim {self.head_dim}"
            )

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
        theirs = typed(config, DiffusersConfig)
        if theirs.patch_size != 1 or (theirs.out_channels or theirs.in_channels) != theirs.in_channels:
            raise ValueError(
                "this FLUX variant (Fill, Canny, Depth or another) is not supported: it needs patch_size 1 and as "
                f"many output as input channels, found patch_size {theirs.patch_size}, {theirs.in_channels} in and "
                f"{theirs.out_channels} out"
            )
        return cls(
            in_channels=theirs.in_channels,
            double_blocks=theirs.num_layers,
            single_blocks=theirs.num_single_layers,
            heads=theirs.num_attention_heads,
            head_dim=theirs.attention_head_dim,
            text_width=theirs.joint_attention_dim,
            pooled_width=theirs.pooled_projection_dim,
            guidance=theirs.guidance_embeds,
            rotary_axes=theirs.axes_dims_rope,
        )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class FluxConditioning(Conditioning):
    """What the prompts became.

    text: [b, w, e], T5's features of every token. pooled: [b, p], CLIP's vector at the end of the text.
    """

    text: Leaf
    pooled: Leaf


@dataclasses.dataclass(frozen=True)
class Call:
    """What all layers of one call share, beside what is scanned.

    words: text tokens w. region: share of the injection that each image token takes. watched: tokens whose
    attention is handed out. axes, theta: of the rotary position embedding. lent: to one layer, by sources that are
    not in the batch.
    """

    layout: Layout
    words: int
    region: Float[AnyArray, "b s"] | None
    watched: Int[AnyArray, "b q"] | None
    axes: tuple[int, ...]
    theta: float
    lent: LentByLayer | None = None

    def inject(
        self,
        key: Float[Array, "b words_plus_s h k"],
        value: Float[Array, "b words_plus_s h k"],
        layer: LayerInterventions,
        unturned: "Unturned",
        words: int = 0,
    ) -> tuple[Float[Array, "b words_plus_s h k"], Float[Array, "b words_plus_s h k"]]:
        """Image keys and values moved to the source's, behind so many text tokens. unturned: of the keys."""
        members, region = self.layout.members, self.region
        moved, value = inject_keys_values(key, value, layer, region, members, self.lent, words)
        if layer.inject is None or members == 1 or self.lent is not None or layer.key_shift is not None:
            return moved, value
        share = joint_share(layer.inject[:, 0], region, words, key.shape[1] - words)
        at_once = functools.partial(injected_and_rotated, unturned, share, members)
        return jax.lax.platform_dependent(cuda=at_once, default=lambda: moved), value

    def attend(
        self,
        query: Float[Array, "b l h k"],
        key: Float[Array, "b l h k"],
        value: Float[Array, "b l h k"],
        layer: LayerInterventions,
    ) -> tuple[Float[Array, "b l h k"], Float[Array, "b q keys"] | None]:
        """Joint attention, and where the watched tokens attend."""
        mixed = self.layout.attend_beside(query, key, value, self.words, layer.extend, self.region, self.lent)
        return mixed, self.layout.watch(query, key, self.words, layer, self.region, self.watched, self.lent)

    def shift_keys(
        self, key: Float[Array, "b s h k"], shift: Float[AnyArray, "b 2"] | None
    ) -> Float[Array, "b s h k"]:
        """Image keys as if they stood so many rows and columns away."""
        if shift is None:
            return key
        moved = jnp.concatenate([jnp.zeros((len(shift), 1)), shift], axis=1)
        return rotate(key, rotary_angles(moved, self.axes, self.theta)[:, None])


class Unturned(NamedTuple):
    """Queries or keys as their product has them, with what normalises and rotates them."""

    x: Float[Array, "b l h k"]
    norm: RMSNorm
    angles: Float[Array, "l half_k"]


def normed_and_rotated(heads: Unturned) -> Float[Array, "b l h k"]:
    """Queries or keys, normalised and then rotated; on NVIDIA GPUs in two passes over memory instead of three."""
    # Chosen when the program is lowered, since it may be for another platform than this process's.
    return jax.lax.platform_dependent(heads, cuda=rotated_and_normed, default=_in_turn)


def _in_turn(heads: Unturned) -> jax.Array:
    return rotate(heads.norm(heads.x), heads.angles)


def rotated_and_normed(heads: Unturned) -> Float[Array, "b l h k"]:
    """The same, rounded once: all of it but a head's length is linear, so that is divided by at the end.

    Lengths are one pass over x, the rest another; in turn, XLA would write out the normalised heads in between.
    """
    x, norm, angles = heads
    return (rotate(norm.scaled(x), angles) * norm.inverse(x)).astype(x.dtype)


def injected_and_rotated(heads: Unturned, share: Float[Array, "b l"], members: int) -> Float[Array, "b l h k"]:
    """Keys normalised and rotated, and moved by a share to those of the group's source; rounded once.

    They are mixed before they are rotated, or XLA would write out the source's rotated keys. A head's length and
    share are one number, or XLA would write out the normalised keys.
    """
    x, norm, angles = heads
    share, inverse, scaled = share[:, :, None, None], norm.inverse(x), norm.scaled(x)
    mixed = (1 - share) * inverse * scaled + share * of_source(inverse, members) * of_source(scaled, members)
    return rotate(mixed, angles).astype(x.dtype)


class Attention(nnx.Module):
    """The projections of one token stream: normalised, rotated q and k, v, and the way back."""

    def __init__(self, config: FluxConfig, *, rngs: nnx.Rngs):
        heads = (config.heads, config.head_dim)
        self.qkv = Linear(config.width, (3, *heads), rngs=rngs)
        self.query_norm = RMSNorm(config.head_dim, config.epsilon)
        self.key_norm = RMSNorm(config.head_dim, config.epsilon)
        self.out = Linear(heads, config.width, rngs=rngs)

    def project(self, x: Float[Array, "b l d"], angles: Float[Array, "l half_k"]) -> tuple[QueryKeyValue, Unturned]:
        """Queries and keys normalised and rotated, values as they are; and what the keys are of."""
        query, key, value = self.qkv.split(x)
        query, key = Unturned(query, self.query_norm, angles), Unturned(key, self.key_norm, angles)
        return QueryKeyValue(normed_and_rotated(query), normed_and_rotated(key), value), key


class Stream(nnx.Module):
    """One of the two token streams (image or text) of a double block."""

    def __init__(self, config: FluxConfig, *, rngs: nnx.Rngs):
        hidden = config.width * config.mlp_ratio
        self.modulation = Linear(config.width, 6 * config.width, rngs=rngs)
        self.attention = Attention(config, rngs=rngs)
        self.mlp_in = Linear(config.width, hidden, rngs=rngs)
        self.mlp_out = Linear(hidden, config.width, rngs=rngs)
        self.epsilon = config.epsilon

    def project(
        self, x: Float[Array, "b l d"], modulation: Modulation, angles: Float[Array, "l half_k"]
    ) -> tuple[QueryKeyValue, Unturned]:
        """q, k and v of the normalised stream; and what the keys are of."""
        return self.attention.project(modulate(x, modulation.shift, modulation.scale, self.epsilon), angles)

    def add_attention(
        self, x: Float[Array, "b l d"], mixed: Float[Array, "b l h k"], gate: Float[Array, "b d"]
    ) -> Float[Array, "b l d"]:
        """The stream with the gated attention output."""
        return x + gate[:, None] * self.attention.out(mixed)

    def add_mlp(
        self, x: Float[Array, "b l d"], modulation: Modulation, gate: Float[Array, "b d"]
    ) -> Float[Array, "b l d"]:
        """The stream with the gated MLP."""
        hidden = self.mlp_in(modulate(x, modulation.shift, modulation.scale, self.epsilon))
        return x + gate[:, None] * self.mlp_out(jax.nn.gelu(hidden, approximate=True))


class DoubleBlock(nnx.Module):
    """Text and image streams with their own weights, one joint attention."""

    def __init__(self, config: FluxConfig, *, rngs: nnx.Rngs):
        self.image = Stream(config, rngs=rngs)
        self.text = Stream(config, rngs=rngs)

    def __call__(
        self,
        streams: tuple[Float[Array, "b w d"], Float[Array, "b s d"]],
        numbers: Numbers,
        angles: Float[Array, "w_plus_s half_k"],
        layer: LayerInterventions,
        call: Call,
    ) -> tuple[tuple[Float[Array, "b w d"], Float[Array, "b s d"]], dict[str, Any]]:
        """(text, image) → the same behind the layer, and what was asked to be captured."""
        text, image = streams
        words, layout = text.shape[1], call.layout
        text = scale_tokens(text, layer.text)
        text_attention, text_mlp = split_modulation(numbers.text, 2)
        image_attention, image_mlp = split_modulation(numbers.image, 2)
        (text_query, text_key, text_value), _ = self.text.project(text, text_attention, angles[:words])
        (query, own_key, own_value), unturned = self.image.project(image, image_attention, angles[words:])
        shifted = call.shift_keys(own_key, layer.key_shift)
        key, value = call.inject(shifted, own_value, layer, unturned)
        mixed, seen = call.attend(
            jnp.concatenate([text_query, query], axis=1),
            jnp.concatenate([text_key, key], axis=1),
            jnp.concatenate([text_value, value], axis=1),
            layer,
        )
        mixed = scale_heads(mixed, layer.heads)
        attention, mlp = (layer.gate, layer.attention), (layer.gate, layer.mlp)
        text = self.text.add_attention(text, mixed[:, :words], scale_gate(text_attention.gate, *attention))
        image = self.image.add_attention(image, mixed[:, words:], scale_gate(image_attention.gate, *attention))
        text = layout.keep_whole(self.text.add_mlp(text, text_mlp, scale_gate(text_mlp.gate, *mlp)))
        image = layout.keep_whole(self.image.add_mlp(image, image_mlp, scale_gate(image_mlp.gate, *mlp)))
        return (text, image), layout.captured(
            keys=own_key, values=own_value, text=text, image=image, attention=seen,
            lent=layout.lent(shifted, own_value),
        )  # fmt: skip


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

    def __call__(
        self,
        x: Float[Array, "b l d"],
        numbers: Float[Array, "b parts_d"],
        angles: Float[Array, "l half_k"],
        layer: LayerInterventions,
        call: Call,
    ) -> tuple[Float[Array, "b l d"], dict[str, Any]]:
        """The joint stream (text first) behind the layer, and what was asked to be captured."""
        words, layout = call.words, call.layout
        if layer.text is not None:
            x = jnp.concatenate([scale_tokens(x[:, :words], layer.text), x[:, words:]], axis=1)
        (modulation,) = split_modulation(numbers, 1)
        normed = modulate(x, modulation.shift, modulation.scale, self.epsilon)
        (query, own_key, own_value), unturned = self.attention.project(normed, angles)
        of_image = call.shift_keys(own_key[:, words:], layer.key_shift), own_value[:, words:]
        shifted = own_key
        if layer.key_shift is not None:
            shifted = jnp.concatenate([own_key[:, :words], of_image[0]], axis=1)
        key, value = call.inject(shifted, own_value, layer, unturned, words)
        mixed, seen = call.attend(query, key, value, layer)
        mixed = scale_heads(mixed, layer.heads, layer.attention)
        hidden = scale_tokens(jax.nn.gelu(self.mlp_in(normed), approximate=True), layer.mlp)
        # Added before the bias, so that devices that share the products add up once.
        update = self._biased(self.attention.out.product(mixed) + self.mlp_out(hidden), layer)
        x = layout.keep_whole(x + scale_gate(modulation.gate, layer.gate)[:, None] * update)
        return x, layout.captured(
            keys=own_key[:, words:], values=own_value[:, words:], text=x[:, :words], image=x[:, words:],
            attention=seen, lent=layout.lent(*of_image),
        )  # fmt: skip

    def _biased(self, update: Float[Array, "b l d"], layer: LayerInterventions) -> Float[Array, "b l d"]:
        """With the bias that attention and MLP share: it stays as long as one of them does."""
        if layer.attention is None and layer.mlp is None:
            return self.attention.out.add_bias(update)
        scales = [jnp.ones(()) if scale is None else scale for scale in (layer.attention, layer.mlp)]
        share = jnp.maximum(*jnp.broadcast_arrays(*scales)).astype(update.dtype)
        return update + share[:, None, None] * self.attention.out.bias[...].reshape(1, 1, -1)


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

    def embed(
        self, sigma: Float[AnyArray, " b"], guidance: Float[AnyArray, " b"], pooled: Float[Array, "b p"]
    ) -> Float[Array, "b d"]:
        """The vector [b, d] that modulates every layer, after SiLU."""
        dtype = parameter_dtype(self)
        vector = self.timestep_in(sinusoids(sigma * SINUSOID_SCALE, SINUSOID_WIDTH).astype(dtype))
        if self.config.guidance:
            vector += self.guidance_in(sinusoids(guidance * SINUSOID_SCALE, SINUSOID_WIDTH).astype(dtype))
        return jax.nn.silu(vector + self.pooled_in(pooled.astype(dtype)))

    def modulations(
        self, vector: Float[Array, "b d"], layout: Layout
    ) -> tuple[Numbers, Float[Array, "n b parts_d"]]:
        """What modulates all double blocks, and all single blocks: a few megabytes a picture at most."""

        def all_of(linear: Linear) -> jax.Array:
            return layout.products_of_vectors(functools.partial(of_every_block, linear), vector)

        streams = self.double_blocks
        numbers = Numbers(all_of(streams.text.modulation), all_of(streams.image.modulation))
        return numbers, all_of(self.single_blocks.modulation)

    def __call__(
        self,
        latents: Float[Array, "b s c"],
        conditioning: FluxConditioning,
        *,
        sigma: Float[AnyArray, " b"],
        guidance: Float[AnyArray, " b"],
        canvas: Canvas,
        interventions: Interventions = NOTHING,
        layout: Layout = Layout(),
        remat: bool = False,
        unroll: bool = False,
    ) -> Output:
        """Velocity, float32, same shape as the latents, and what `layout.capture` names of every layer.

        sigma: time in 0..1. guidance: the distilled guidance scale; ignored by models without it. canvas: its rows
        and columns are the tokens' positions. remat: recompute blocks in the backward pass (training). unroll:
        compile every layer by itself; training on a CPU is a fifth faster so.
        """
        config, dtype, text = self.config, parameter_dtype(self), conditioning.text
        call = Call(
            layout, text.shape[1], interventions.region, interventions.watched, config.rotary_axes,
            config.rotary_theta,
        )  # fmt: skip
        with jax.named_scope("embed"):
            vector = self.embed(sigma, guidance, conditioning.pooled)
            # Text tokens sit at (0, 0, 0): they are not rotated.
            ids = np.concatenate([np.zeros((call.words, 3), np.float32), position_ids(canvas)])
            angles = rotary_angles(ids, config.rotary_axes, config.rotary_theta)
            streams = self.text_in(text.astype(dtype)), self.image_in(latents.astype(dtype))
        layers, split, lent = interventions.layers.per_layer(), config.double_blocks, interventions.lent
        tensor = (len(latents) // layout.members, canvas.tokens, config.heads, config.head_dim)
        recorded = blank_record(lent, tensor, dtype)
        with jax.named_scope("modulation"):
            double, single = self.modulations(vector, layout)

        def run(streams, block, rows, taken):
            numbers, layer = rows
            return block(streams, numbers, angles, layer, dataclasses.replace(call, lent=taken[0]))

        # What layers hand out, all of them must compute.
        cache = None if layout.capture else interventions.cache
        through = skippable(cache, lending(lent, run))
        if remat:
            through = jax.checkpoint(through)
        with jax.named_scope("double_blocks"):
            ((streams, recorded), skipping), first = scan_layers(
                through, ((streams, recorded), begin(cache)), without(self.double_blocks, "modulation"),
                (double, layers.layers(0, split), slots_of(lent, config.layers, 0, split)),
                unroll=unroll,
            )  # fmt: skip
        with jax.named_scope("single_blocks"):
            ((joint, recorded), skipping), second = scan_layers(
                through,
                ((jnp.concatenate(streams, axis=1), recorded), skipping),
                without(self.single_blocks, "modulation"),
                (single, layers.layers(split, None), slots_of(lent, config.layers, split)),
                unroll=unroll,
            )  # fmt: skip
        with jax.named_scope("out"):
            shift, scale = jnp.split(self.modulation_out(vector), 2, axis=-1)
            image, reused = ended(cache, skipping, joint[:, call.words :])
            image = modulate(image, shift, scale, config.epsilon)
            velocity = self.image_out(image).astype(jnp.float32)
        captured = jax.tree.map(lambda *parts: jnp.concatenate(parts), first, second)
        return Output(velocity, with_record(captured, recorded) | reused)


def position_ids(canvas: Canvas) -> Float[np.ndarray, "s 3"]:
    """(0, row, column) of every image token."""
    grid = np.indices((canvas.rows, canvas.columns), dtype=np.float32).reshape(2, -1).T
    return np.concatenate([np.zeros((len(grid), 1), np.float32), grid], axis=1)
