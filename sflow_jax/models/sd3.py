"""The diffusion transformers of Stable Diffusion 3 and 3.5 with layer control, blocks stacked under `jax.lax.scan`.

All layers have a text and an image stream and one joint attention; the first ones of 3.5-medium ("dual") also have
an attention of the image alone, and the last layer's text gives queries, keys and values but no output.

Axes: b batch, s image tokens, w text tokens (words), l tokens of a stream, c latent channels, d hidden size,
h heads, k head dimension, f MLP width, n layers (numbered globally).
"""

import dataclasses
import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp
import msgspec
from flax import nnx
from jaxtyping import Array, Float, Int

from sflow_jax.arrays import AnyArray, Leaf
from sflow_jax.models.conditioning import Conditioning
from sflow_jax.models.interventions import (
    NOTHING,
    Interventions,
    LayerInterventions,
    inject_keys_values,
    scale_gate,
    scale_heads,
    scale_tokens,
)
from sflow_jax.models.layers import (
    Buffer,
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
from sflow_jax.typed import Count, Epsilon, Layers, Side, Size, typed

# Latents along each side of a token.
PATCH = 2


class DiffusersConfig(msgspec.Struct, frozen=True):
    """What the `config.json` of diffusers' SD3Transformer2DModel may say, with its defaults."""

    class_name: Literal["SD3Transformer2DModel"] = msgspec.field(
        name="_class_name", default="SD3Transformer2DModel"
    )
    in_channels: Size = 16
    out_channels: Size | None = 16
    patch_size: Size = 2
    num_layers: Layers = 18
    num_attention_heads: Size = 18
    attention_head_dim: Size = 64
    joint_attention_dim: Size = 4096
    caption_projection_dim: Size = 1152
    pooled_projection_dim: Size = 2048
    pos_embed_max_size: Side = 96
    dual_attention_layers: tuple[Count, ...] = ()
    qk_norm: str | None = None
    sample_size: Size = 128


@dataclasses.dataclass(frozen=True)
class Sd3Config:
    """Sizes of a transformer; the defaults are SD3-medium's.

    in_channels: of a packed token. dual_layers: how many layers, from the first on, also have an attention of the
    image alone. position_side: tokens along each side of the position table, the largest picture.
    """

    in_channels: Size = 64
    layers: Layers = 24
    dual_layers: Count = 0
    heads: Size = 24
    head_dim: Size = 64
    text_width: Size = 4096
    pooled_width: Size = 2048
    qk_norm: bool = False
    position_side: Side = 192
    mlp_ratio: Layers = 4
    epsilon: Epsilon = 1e-6

    def __post_init__(self) -> None:
        if not 0 <= self.dual_layers < self.layers - 1:
            raise ValueError(
                f"this SD3 variant is not supported: at most {self.layers - 2} of {self.layers} layers may "
                f"have two attentions, found {self.dual_layers}"
            )

    @property
    def width(self) -> int:
        """Hidden size d."""
        return self.heads * self.head_dim

    @property
    def joint_layers(self) -> int:
        """Layers between the dual ones and the last."""
        return self.layers - self.dual_layers - 1

    @classmethod
    def medium(cls) -> "Sd3Config":
        """SD3-medium, 2,028,328,000 parameters."""
        return cls()

    @classmethod
    def medium_35(cls) -> "Sd3Config":
        """SD3.5-medium, 2,243,171,520 parameters."""
        return cls(dual_layers=13, qk_norm=True, position_side=384)

    @classmethod
    def large_35(cls) -> "Sd3Config":
        """SD3.5-large, 8,056,627,520 parameters."""
        return cls(layers=38, heads=38, qk_norm=True)

    @classmethod
    def from_hf(cls, config: dict[str, Any]) -> "Sd3Config":
        """From the `config.json` of a diffusers transformer folder.

        Raises ValueError for a variant that this module does not implement.
        """
        theirs = typed(config, DiffusersConfig)
        dual = theirs.dual_attention_layers
        expected = {
            "patch_size": PATCH,
            "out_channels": theirs.in_channels,
            "caption_projection_dim": theirs.num_attention_heads * theirs.attention_head_dim,
            "dual_attention_layers": tuple(range(len(dual))),
            "qk_norm": "rms_norm",
        }
        for name, value in expected.items():
            # Where diffusers' config says nothing, this module's value is meant.
            if getattr(theirs, name) not in (value, None):
                raise ValueError(
                    f"this SD3 variant is not supported: {name} is {getattr(theirs, name)!r}, expected {value!r}"
                )
        return cls(
            in_channels=theirs.in_channels * PATCH**2,
            layers=theirs.num_layers,
            dual_layers=len(dual),
            heads=theirs.num_attention_heads,
            head_dim=theirs.attention_head_dim,
            text_width=theirs.joint_attention_dim,
            pooled_width=theirs.pooled_projection_dim,
            qk_norm=theirs.qk_norm is not None,
            position_side=theirs.pos_embed_max_size,
        )


def sample_size(config: dict[str, Any]) -> int:
    """Latents along each side of a picture of the usual size, of a diffusers transformer's `config.json`."""
    return typed(config, DiffusersConfig).sample_size


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Sd3Conditioning(Conditioning):
    """What the prompts became.

    text: [b, w, e], features of every token, both CLIPs' joined by channels and then T5's; fewer channels than the
    transformer's text width are filled up with zeros. pooled: [b, p], both CLIPs' vectors at the end of the text.
    """

    text: Leaf
    pooled: Leaf


def sinusoid_table(side: int, width: int) -> Float[Array, "side side width"]:
    """What a new position table holds: sines and cosines of the column, then of the row.

    Published tables come with the weights.
    """
    quarter = width // 4
    frequencies = 10_000.0 ** (-jnp.arange(quarter) / quarter)
    angles = jnp.arange(side)[:, None] * frequencies[None]
    along = jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=1)
    shape = (side, side, 2 * quarter)
    return jnp.concatenate([jnp.broadcast_to(along[None], shape), jnp.broadcast_to(along[:, None], shape)], axis=-1)


@dataclasses.dataclass(frozen=True)
class Call:
    """What all layers of one call share, beside what is scanned.

    region: share of the injection that each image token takes. watched: tokens whose joint attention is handed out.
    lent, lent_alone: to one layer's joint attention and the image's own, by sources that are not in the batch.
    """

    layout: Layout
    region: Float[AnyArray, "b s"] | None
    watched: Int[AnyArray, "b q"] | None
    lent: LentByLayer | None = None
    lent_alone: LentByLayer | None = None

    def inject(self, image: QueryKeyValue, layer: LayerInterventions, lent: LentByLayer | None) -> QueryKeyValue:
        """Image keys and values moved to the source's."""
        key, value = inject_keys_values(image.key, image.value, layer, self.region, self.layout.members, lent)
        return QueryKeyValue(image.query, key, value)

    def attend(
        self, text: QueryKeyValue, image: QueryKeyValue, layer: LayerInterventions
    ) -> tuple[Float[Array, "b l h k"], Float[Array, "b q keys"] | None]:
        """Attention over text and image, whose keys and values may be injected; and where watched tokens attend."""
        words = text.query.shape[1]
        moved = self.inject(image, layer, self.lent)
        query, key, value = (jnp.concatenate(parts, axis=1) for parts in zip(text, moved))
        seen = self.layout.watch(query, key, words, layer, self.region, self.watched, self.lent)
        mixed = self.layout.attend_beside(query, key, value, words, layer.extend, self.region, self.lent)
        return scale_heads(mixed, layer.heads), seen

    def attend_alone(self, image: QueryKeyValue, layer: LayerInterventions) -> Float[Array, "b s h k"]:
        """Attention over the image's tokens alone, which nobody watches."""
        moved = self.inject(image, layer.of_own_attention(), self.lent_alone)
        mixed = self.layout.attend_beside(*moved, 0, layer.extend, self.region, self.lent_alone)
        return scale_heads(mixed, layer.heads)


class Attention(nnx.Module):
    """The projections of one token stream: q and k, normalised where the model has that, v, and the way back."""

    def __init__(self, config: Sd3Config, *, has_out: bool = True, rngs: nnx.Rngs):
        heads = (config.heads, config.head_dim)
        self.qkv = Linear(config.width, (3, *heads), rngs=rngs)
        if config.qk_norm:
            self.query_norm = RMSNorm(config.head_dim, config.epsilon)
            self.key_norm = RMSNorm(config.head_dim, config.epsilon)
        if has_out:
            self.out = Linear(heads, config.width, rngs=rngs)
        self.qk_norm = config.qk_norm

    def project(self, x: Float[Array, "b l d"]) -> QueryKeyValue:
        """Of a normalised stream."""
        query, key, value = self.qkv.split(x)
        if self.qk_norm:
            query, key = self.query_norm(query), self.key_norm(key)
        return QueryKeyValue(query, key, value)


class Stream(nnx.Module):
    """One of the two token streams of a layer. dual: it also has an attention of its own tokens alone."""

    def __init__(self, config: Sd3Config, *, dual: bool = False, rngs: nnx.Rngs):
        hidden = config.width * config.mlp_ratio
        parts = 3 if dual else 2
        self.modulation = Linear(config.width, 3 * parts * config.width, rngs=rngs)
        self.attention = Attention(config, rngs=rngs)
        if dual:
            self.own_attention = Attention(config, rngs=rngs)
        self.mlp_in = Linear(config.width, hidden, rngs=rngs)
        self.mlp_out = Linear(hidden, config.width, rngs=rngs)
        self.epsilon = config.epsilon

    def normed(self, x: Float[Array, "b l d"], modulation: Modulation) -> Float[Array, "b l d"]:
        """The stream as one part of the layer sees it."""
        return modulate(x, modulation.shift, modulation.scale, self.epsilon)

    def add_attention(
        self, x: Float[Array, "b l d"], mixed: Float[Array, "b l h k"], gate: Float[Array, "b d"]
    ) -> Float[Array, "b l d"]:
        """The stream with the gated attention output."""
        return x + gate[:, None] * self.attention.out(mixed)

    def add_mlp(
        self, x: Float[Array, "b l d"], modulation: Modulation, gate: Float[Array, "b d"]
    ) -> Float[Array, "b l d"]:
        """The stream with the gated MLP."""
        hidden = jax.nn.gelu(self.mlp_in(self.normed(x, modulation)), approximate=True)
        return x + gate[:, None] * self.mlp_out(hidden)


class LastText(nnx.Module):
    """The last layer's text stream, which only the image attends to: nothing comes after it."""

    def __init__(self, config: Sd3Config, *, rngs: nnx.Rngs):
        self.modulation = Linear(config.width, 2 * config.width, rngs=rngs)
        self.attention = Attention(config, has_out=False, rngs=rngs)
        self.epsilon = config.epsilon

    def project(self, x: Float[Array, "b w d"], numbers: Float[Array, "b two_d"]) -> QueryKeyValue:
        """q, k and v of the normalised stream."""
        shift, scale = jnp.split(numbers, 2, axis=-1)
        return self.attention.project(modulate(x, shift, scale, self.epsilon))


Streams = tuple[Float[Array, "b w d"], Float[Array, "b s d"]]


class JointBlock(nnx.Module):
    """Text and image streams with their own weights, one joint attention; dual: and one of the image alone."""

    def __init__(self, config: Sd3Config, *, dual: bool = False, rngs: nnx.Rngs):
        self.image = Stream(config, dual=dual, rngs=rngs)
        self.text = Stream(config, rngs=rngs)
        self.parts = 3 if dual else 2

    def __call__(
        self, streams: Streams, numbers: Numbers, layer: LayerInterventions, call: Call
    ) -> tuple[Streams, dict[str, Any]]:
        """(text, image) → the same behind the layer, and what was asked to be captured."""
        text, image = scale_tokens(streams[0], layer.text), streams[1]
        words, keep_whole = text.shape[1], call.layout.keep_whole
        text_attention, text_mlp = split_modulation(numbers.text, 2)
        # Of the joint attention, of the MLP, and of the image's own attention where there is one.
        modulation, image_mlp, *own = split_modulation(numbers.image, self.parts)
        projected = self.image.attention.project(self.image.normed(image, modulation))
        from_text = self.text.attention.project(self.text.normed(text, text_attention))
        mixed, seen = call.attend(from_text, projected, layer)
        attention, mlp = (layer.gate, layer.attention), (layer.gate, layer.mlp)
        text = self.text.add_attention(text, mixed[:, :words], scale_gate(text_attention.gate, *attention))
        # Both attentions see the image as it entered.
        alone = [self.image.own_attention.project(self.image.normed(image, modulation)) for modulation in own]
        updates = [
            self._own(projected, modulation, layer, call, attention) for projected, modulation in zip(alone, own)
        ]
        image = self.image.add_attention(image, mixed[:, words:], scale_gate(modulation.gate, *attention))
        for update in updates:
            image = image + update
        text = keep_whole(self.text.add_mlp(text, text_mlp, scale_gate(text_mlp.gate, *mlp)))
        image = keep_whole(self.image.add_mlp(image, image_mlp, scale_gate(image_mlp.gate, *mlp)))
        return (text, image), call.layout.captured(
            keys=projected.key, values=projected.value, text=text, image=image, attention=seen,
            lent=call.layout.lent(*(x for part in (projected, *alone) for x in (part.key, part.value))),
        )  # fmt: skip

    def _own(
        self,
        projected: QueryKeyValue,
        modulation: Modulation,
        layer: LayerInterventions,
        call: Call,
        scales: tuple[Any, ...],
    ) -> Float[Array, "b s d"]:
        """The gated update of the image's own attention."""
        mixed = call.attend_alone(projected, layer)
        return scale_gate(modulation.gate, *scales)[:, None] * self.image.own_attention.out(mixed)


class LastBlock(nnx.Module):
    """The layer whose text stream ends in it."""

    def __init__(self, config: Sd3Config, *, rngs: nnx.Rngs):
        self.image = Stream(config, rngs=rngs)
        self.text = LastText(config, rngs=rngs)

    def __call__(
        self, streams: Streams, numbers: Numbers, layer: LayerInterventions, call: Call
    ) -> tuple[Streams, dict[str, Any]]:
        """(text, image) → the text as it entered, the image behind the layer, and what was asked for."""
        text, image = scale_tokens(streams[0], layer.text), streams[1]
        modulation, image_mlp = split_modulation(numbers.image, 2)
        projected = self.image.attention.project(self.image.normed(image, modulation))
        mixed, seen = call.attend(self.text.project(text, numbers.text), projected, layer)
        gate = scale_gate(modulation.gate, layer.gate, layer.attention)
        image = self.image.add_attention(image, mixed[:, text.shape[1] :], gate)
        image = self.image.add_mlp(image, image_mlp, scale_gate(image_mlp.gate, layer.gate, layer.mlp))
        image = call.layout.keep_whole(image)
        return (text, image), call.layout.captured(
            keys=projected.key, values=projected.value, text=text, image=image, attention=seen,
            lent=call.layout.lent(projected.key, projected.value),
        )  # fmt: skip


def modulations(blocks: nnx.Module, vector: Float[Array, "b d"], layout: Layout) -> Numbers:
    """What modulates all blocks of a stack, in one product before the scan."""
    products = (functools.partial(of_every_block, stream.modulation) for stream in (blocks.text, blocks.image))
    return Numbers(*(layout.products_of_vectors(multiply, vector) for multiply in products))


class Sd3(nnx.Module):
    """Predicts the velocity u = noise − picture of packed latents (method: flow matching)."""

    def __init__(self, config: Sd3Config, *, rngs: nnx.Rngs):
        width = config.width
        self.config = config
        self.image_in = Linear(config.in_channels, width, rngs=rngs)
        self.position_table = Buffer(sinusoid_table(config.position_side, width))
        self.text_in = Linear(config.text_width, width, rngs=rngs)
        self.timestep_in = Embedder(SINUSOID_WIDTH, width, rngs=rngs)
        self.pooled_in = Embedder(config.pooled_width, width, rngs=rngs)
        if config.dual_layers:
            self.dual_blocks = stacked(config.dual_layers, lambda r: JointBlock(config, dual=True, rngs=r), rngs)
        self.joint_blocks = stacked(config.joint_layers, lambda r: JointBlock(config, rngs=r), rngs)
        # A stack of one, so that placement and conversion treat it as the others.
        self.last_blocks = stacked(1, lambda r: LastBlock(config, rngs=r), rngs)
        self.modulation_out = Linear(width, 2 * width, rngs=rngs)
        self.image_out = Linear(width, config.in_channels, rngs=rngs)

    def stacks(self) -> list[tuple[str, nnx.Module, int]]:
        """Name, blocks and number of layers of every stack, in order."""
        config = self.config
        dual = [("dual_blocks", self.dual_blocks, config.dual_layers)] if config.dual_layers else []
        return [
            *dual,
            ("joint_blocks", self.joint_blocks, config.joint_layers),
            ("last_blocks", self.last_blocks, 1),
        ]

    def embed(self, sigma: Float[AnyArray, " b"], pooled: Float[Array, "b p"]) -> Float[Array, "b d"]:
        """The vector [b, d] that modulates every layer, after SiLU."""
        dtype = parameter_dtype(self)
        vector = self.timestep_in(sinusoids(sigma * SINUSOID_SCALE, SINUSOID_WIDTH).astype(dtype))
        return jax.nn.silu(vector + self.pooled_in(pooled.astype(dtype)))

    def positions(self, canvas: Canvas) -> Float[Array, "1 s d"]:
        """The middle of the position table; ValueError for a picture that is larger."""
        side = self.config.position_side
        if max(canvas.rows, canvas.columns) > side:
            raise ValueError(
                f"{canvas.rows}×{canvas.columns} tokens are more than the position table's {side}×{side}"
            )
        top, left = (side - canvas.rows) // 2, (side - canvas.columns) // 2
        cropped = self.position_table[...][top : top + canvas.rows, left : left + canvas.columns]
        return cropped.reshape(1, canvas.tokens, -1)

    def __call__(
        self,
        latents: Float[Array, "b s c"],
        conditioning: Sd3Conditioning,
        *,
        sigma: Float[AnyArray, " b"],
        guidance: Float[AnyArray, " b"] | None = None,
        canvas: Canvas,
        interventions: Interventions = NOTHING,
        layout: Layout = Layout(),
        remat: bool = False,
        unroll: bool = False,
    ) -> Output:
        """Velocity, float32, same shape as the latents, and what `layout.capture` names of every layer.

        sigma: time in 0..1. guidance: not seen here, its branches are. canvas: its rows and columns are the tokens'
        positions. remat: recompute blocks in the backward pass (training). unroll: compile every layer by itself.
        Positions are no part of keys: ValueError for `key_shift`.
        """
        if interventions.layers.key_shift is not None:
            raise ValueError("keys of this model have no rotary positions that could be shifted")
        dtype, text = parameter_dtype(self), conditioning.text.astype(parameter_dtype(self))
        with jax.named_scope("embed"):
            vector = self.embed(sigma, conditioning.pooled)
            call = Call(layout, interventions.region, interventions.watched)
            text = jnp.pad(text, ((0, 0), (0, 0), (0, self.config.text_width - text.shape[-1])))
            streams = self.text_in(text), self.image_in(latents.astype(dtype)) + self.positions(canvas)
        layers, first, captured, lent = interventions.layers.per_layer(), 0, [], interventions.lent
        tensor = (len(latents) // layout.members, canvas.tokens, self.config.heads, self.config.head_dim)
        # What layers hand out, all of them must compute.
        cache = None if layout.capture else interventions.cache
        carry = (streams, blank_record(lent, tensor, dtype)), begin(cache)

        def run(streams, block, rows, taken):
            joint, alone = taken
            return block(streams, *rows, dataclasses.replace(call, lent=joint, lent_alone=alone))

        through = skippable(cache, lending(lent, run))
        if remat:
            through = jax.checkpoint(through)
        for name, blocks, count in self.stacks():
            with jax.named_scope(name):
                last = first + count
                slots = slots_of(lent, self.config.layers, first, last)
                rows = modulations(blocks, vector, layout), layers.layers(first, last), slots
                carry, seen = scan_layers(through, carry, without(blocks, "modulation"), rows, unroll=unroll)
            first, captured = last, [*captured, seen]
        ((_, image), recorded), skipping = carry
        image, reused = ended(cache, skipping, image)
        with jax.named_scope("out"):
            shift, scale = jnp.split(self.modulation_out(vector), 2, axis=-1)
            image = modulate(image, shift, scale, self.config.epsilon)
            velocity = self.image_out(image).astype(jnp.float32)
        together = jax.tree.map(lambda *parts: jnp.concatenate(parts), *captured)
        return Output(velocity, with_record(together, recorded) | reused)
