"""A made-up family: one kind of layers, 4×4 packing with channels last, a vocabulary instead of text networks,
other leaves of conditioning, and guidance by branches. All that a new family must say, in one file."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from sflow_jax.families.family import Defaults, Family, NetworkSpec
from sflow_jax.models.attention import rotary_angles, rotate
from sflow_jax.models.conditioning import Conditioning
from sflow_jax.models.interventions import NOTHING, inject_keys_values, scale_gate, scale_heads
from sflow_jax.models.layers import Linear, layer_norm, scan_layers, stacked
from sflow_jax.models.layout import Layout, Output
from sflow_jax.sampling.schedule import Schedule

SIDE, WORDS, WIDTH, HEADS = 4, 5, 24, 3


@dataclasses.dataclass(frozen=True)
class TinyConfig:
    """Sizes of the transformer."""

    layers: int = 3
    channels: int = SIDE * SIDE * 3
    heads: int = HEADS


@dataclasses.dataclass(frozen=True)
class PixelsConfig:
    """Of an autoencoder that only scales."""

    scale: float = 0.5


@dataclasses.dataclass(frozen=True)
class WordsConfig:
    """Of the vocabulary."""

    letters: int = 128


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Letters(Conditioning):
    """embedded: [b, w, d]; mask: [b, w]."""

    embedded: Any
    mask: Any


class Block(nnx.Module):
    """Attention over text and picture, no MLP."""

    def __init__(self, *, rngs: nnx.Rngs):
        self.qkv = Linear(WIDTH, (3, HEADS, WIDTH // HEADS), rngs=rngs)
        self.out = Linear((HEADS, WIDTH // HEADS), WIDTH, rngs=rngs)
        self.gate = Linear(WIDTH, WIDTH, rngs=rngs)

    def __call__(self, x, vector, angles, layer, region, layout: Layout):
        query, key, value = self.qkv.split(layer_norm(x, 1e-6))
        query, key = rotate(query, angles), rotate(key, angles)
        moved = inject_keys_values(key[:, WORDS:], value[:, WORDS:], layer, region, layout.members)
        key, value = (jnp.concatenate([y[:, :WORDS], z], axis=1) for y, z in zip((key, value), moved))
        mixed = scale_heads(layout.attend(query, key, value), layer.heads)
        return x + scale_gate(self.gate(vector), layer.gate)[:, None] * self.out(mixed), {}


class Tiny(nnx.Module):
    """A transformer that only this family knows."""

    def __init__(self, config: TinyConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.picture_in = Linear(config.channels, WIDTH, rngs=rngs)
        self.time_in = Linear(1, WIDTH, rngs=rngs)
        self.blocks = stacked(config.layers, lambda r: Block(rngs=r), rngs)
        self.picture_out = Linear(WIDTH, config.channels, rngs=rngs)

    def __call__(
        self, latents, conditioning, *, sigma, guidance, canvas, interventions=NOTHING, layout=Layout()
    ) -> Output:
        text = conditioning.embedded * conditioning.mask[..., None]
        x = jnp.concatenate([text, self.picture_in(latents)], axis=1)
        vector = jnp.tanh(self.time_in(sigma[:, None]) + text.mean(axis=1))
        places = np.indices((canvas.rows, canvas.columns), dtype=np.float32).reshape(2, -1).T
        angles = rotary_angles(np.concatenate([np.zeros((WORDS, 2), np.float32), places]), (4, 4), 100.0)

        def body(x, block, layer):
            return block(x, vector, angles, layer, interventions.region, layout)

        x, captured = scan_layers(body, x, self.blocks, interventions.layers.per_layer())
        return Output(self.picture_out(x[:, WORDS:]), captured)


class Pixels(nnx.Module):
    """Pictures are their own latents, scaled."""

    def __init__(self, config: PixelsConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.scale = nnx.Param(jnp.full((1,), config.scale))


class Vocabulary(nnx.Module):
    """A vector a letter."""

    def __init__(self, config: WordsConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.embedding = nnx.Embed(config.letters, WIDTH, rngs=rngs)


class Reader:
    """The first letters of a prompt."""

    words = WORDS

    def __init__(self, vocabulary: Vocabulary):
        self.vocabulary = vocabulary

    def encode(self, prompts) -> Letters:
        codes = np.array([[ord(c) % 128 for c in prompt[:WORDS].ljust(WORDS, "\0")] for prompt in prompts])
        return Letters(self.vocabulary.embedding(jnp.asarray(codes)), jnp.asarray(codes > 0, jnp.float32))

    def locate(self, prompt, word) -> tuple[int, ...]:
        return tuple(range(prompt.index(word), prompt.index(word) + len(word)))


class MadeUp(Family):
    """Every answer that general parts ask for."""

    name = "made-up"
    networks = {
        "transformer": NetworkSpec(Tiny, TinyConfig, large=True, streamed=True),
        "autoencoder": NetworkSpec(Pixels, PixelsConfig),
        "vocabulary": NetworkSpec(Vocabulary, WordsConfig),
    }
    tokenizers = {}
    guidance = "branches"

    def title(self, variant):
        return f"Made-up {variant}"

    def defaults(self, variant):
        return Defaults(steps=3, guidance=2.0, edit_steps=3, sweep_steps=2, sweep_guidance=2.0, real_steps=3)

    def layer_kinds(self, configs):
        return (("joint", configs["transformer"].layers),)

    def known_vital_layers(self, configs):
        return None

    def schedule(self, scheduler):
        return Schedule(dynamic=False, shift=1.0)

    def text_encoder(self, networks, tokenizers):
        return Reader(networks["vocabulary"]())

    def words(self, tokenizer_lengths):
        return WORDS

    def token_side(self, configs):
        return SIDE

    def channels(self, configs):
        return configs["transformer"].channels

    def encode(self, autoencoder, pictures):
        b, y, x, c = pictures.shape
        tokens = pictures.reshape(b, y // SIDE, SIDE, x // SIDE, SIDE, c).swapaxes(2, 3)
        return tokens.reshape(b, -1, SIDE * SIDE * c) * autoencoder.scale[...].reshape(1, 1, 1)

    def decode(self, autoencoder, latents, canvas):
        tokens = (latents / autoencoder.scale[...].reshape(1, 1, 1)).reshape(
            len(latents), canvas.rows, canvas.columns, SIDE, SIDE, 3
        )
        return tokens.swapaxes(2, 3).reshape(len(latents), canvas.height, canvas.width, 3)

    def abstract_conditioning(self, configs, words, array):
        return Letters(array((words, WIDTH)), array((words,)))

    def step_flops(self, configs, tokens, words, batch):
        return float(batch * 8 * WIDTH**2 * (tokens + words) * configs["transformer"].layers)

    def summed_numbers(self, configs):
        return WIDTH * configs["transformer"].layers
