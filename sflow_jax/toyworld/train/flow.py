"""Stages `flow` (flow matching) and `distill` (guidance becomes an input, as in FLUX.1-dev)."""

import dataclasses
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.scipy.special import ndtri

from sflow_jax.arrays import AnyArray
from sflow_jax.families.flux1 import FLUX1
from sflow_jax.models.autoencoder import Autoencoder
from sflow_jax.models.clip import ClipText
from sflow_jax.models.flux1 import Flux, FluxConditioning, FluxConfig
from sflow_jax.models.interventions import NOTHING, Interventions
from sflow_jax.models.layout import Output
from sflow_jax.models.t5 import T5Encoder
from sflow_jax.painter import decode_latents
from sflow_jax.pictures.canvas import Canvas
from sflow_jax.pictures.files import to_unit
from sflow_jax.pictures.latents import pack
from sflow_jax.sampling.control import LayerControl
from sflow_jax.sampling.guidance import both_branches, guided_by_branches, interleave
from sflow_jax.sampling.schedule import Schedule
from sflow_jax.sampling.solve import Solve
from sflow_jax.sampling.steps import denoising_steps
from sflow_jax.settings import AUTOMATIC
from sflow_jax.toyworld.train.hf import SCHEDULER
from sflow_jax.toyworld.train.loop import Recipe, Stage
from sflow_jax.toyworld.train.pictures import save_pairs
from sflow_jax.toyworld.train.pool import Pool, indices
from sflow_jax.toyworld.train.tokenizers import clip_tokenizer, t5_tokenizer, token_ids
from sflow_jax.toyworld.train.vae import Whitening, picture_canvas

CAPTION_DROPOUT = 0.1
# Of sigma's logit.
SIGMA_MEAN, SIGMA_SPREAD = 0.2, 1.1
GUIDANCE_RANGE = (1.0, 6.0)
# Share of the student's batch at guidance 1, which inverting real pictures uses.
PLAIN_SHARE = 0.15
PREVIEW_GUIDANCE = 3.0
PREVIEW_STEPS = 16


@dataclasses.dataclass(frozen=True)
class World:
    """What both stages train on.

    Attributes:
        pool: captions; of its pictures only the size is used.
        latents: means, float16 [n, yl, xl, c], as encoded.
        whitening: makes the transformer's latents of them.
        held_out: scenes to preview.
        autoencoder: with the whitening in it, for previews and export.
        clip, t5: frozen text encoders.
    """

    pool: Pool
    latents: np.ndarray
    whitening: Whitening
    held_out: Pool
    autoencoder: Autoencoder
    clip: ClipText
    t5: T5Encoder

    @property
    def encoders(self) -> dict[str, Any]:
        """The text encoders by name."""
        return {"clip": self.clip, "t5": self.t5}

    @property
    def canvas(self) -> Canvas:
        """The pictures' size."""
        return picture_canvas(self.pool.pictures, self.autoencoder.config)

    def batch(self, size: int, dropout: float, rng: np.random.Generator) -> dict[str, np.ndarray]:
        """Packed latents and caption tokens, some captions empty."""
        chosen, wording = indices(self.pool, size, rng)
        latents = pack(self.whitening(self.latents[chosen]))
        return {"latents": latents, **caption_tokens(self.pool, chosen, wording, dropout, rng)}


def caption_tokens(
    pool: Pool, chosen: np.ndarray, wording: np.ndarray, dropout: float, rng: np.random.Generator
) -> dict[str, np.ndarray]:
    """A batch's tokens, int32 [n, w], some captions empty."""
    empty = rng.random(len(chosen))[:, None] < dropout
    nothing = dataclasses.asdict(empty_captions())
    return {
        name: np.where(empty, ids, getattr(pool, name)[chosen, wording]).astype(np.int32)
        for name, ids in nothing.items()
    }


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Captions:
    """Tokens of captions, int32 [n, w]."""

    t5_ids: AnyArray
    clip_ids: AnyArray

    def __len__(self) -> int:
        return len(self.t5_ids)

    @classmethod
    def of(cls, captions: list[str]) -> "Captions":
        """From what they say."""
        return cls(token_ids(t5_tokenizer(), captions), token_ids(clip_tokenizer(), captions))

    @classmethod
    def of_batch(cls, batch: Mapping[str, AnyArray]) -> "Captions":
        """Of a training batch."""
        return cls(batch["t5_ids"], batch["clip_ids"])

    @property
    def words(self) -> list[str]:
        """What they say."""
        return t5_tokenizer().batch_decode(self.t5_ids, skip_special_tokens=True)


@functools.cache
def empty_captions() -> Captions:
    """Tokens of the one empty caption."""
    return Captions.of([""])


def initial_flux(config: FluxConfig, seed: int) -> Flux:
    """Every block starts as the identity and the output as zero (adaLN-zero), which learns faster."""
    model = Flux(config, rngs=nnx.Rngs(seed))
    double, single = model.double_blocks, model.single_blocks
    for layer in (double.image.modulation, double.text.modulation, single.modulation, model.modulation_out):
        layer.kernel[...] = jnp.zeros_like(layer.kernel[...])
    model.image_out.kernel[...] = jnp.zeros_like(model.image_out.kernel[...])
    return model


class Teacher(nnx.Module):
    """A transformer that knows one guidance, 1: a second branch, without captions, guides it."""

    def __init__(self, network: Flux):
        self.network = network

    @property
    def config(self) -> FluxConfig:
        """The network's."""
        return self.network.config

    def __call__(
        self, latents: jax.Array, conditioning: FluxConditioning, *, guidance: AnyArray, **inputs: Any
    ) -> Output:
        """The network's output, whatever scale its caller gives the branches."""
        return self.network(latents, conditioning, guidance=jnp.ones_like(guidance), **inputs)

    def guided(
        self,
        latents: jax.Array,
        branches: FluxConditioning,
        *,
        sigma: jax.Array,
        guidance: jax.Array,
        canvas: Canvas,
    ) -> jax.Array:
        """Velocity of latents [b, s, c] at their sigmas and guidances [b]; branches: interleaved, two rows each."""
        count = len(latents)
        sigmas, scales = both_branches((sigma, guidance), count)
        inputs = {"sigma": sigmas, "guidance": scales, "canvas": canvas, "unroll": True}

        def evaluate(point: jax.Array, interventions: Interventions) -> jax.Array:
            return self(point, branches, interventions=interventions, **inputs).velocity

        return guided_by_branches(evaluate, latents, guidance, NOTHING, count)


def sample_sigmas(key: jax.Array, count: int) -> jax.Array:
    """Logit-normal sigmas, one from each of `count` equally likely intervals (less noisy gradients)."""
    offset, order = jax.random.split(key)
    even = (jnp.arange(count) + jax.random.uniform(offset, (count,))) / count
    logits = SIGMA_MEAN + SIGMA_SPREAD * ndtri(jnp.clip(even, 1e-5, 1 - 1e-5))
    return jax.nn.sigmoid(jax.random.permutation(order, logits))


def noised(latents: jax.Array, sigma: jax.Array, noise: jax.Array) -> jax.Array:
    """z = (1 - sigma)·x + sigma·noise."""
    mixing = sigma[:, None, None]
    return (1 - mixing) * latents + mixing * noise


def flow_stage(flux: FluxConfig, recipe: Recipe, world: World, folder: Path) -> Stage:
    """The transformer; its guidance input stays at 1."""
    canvas = world.canvas

    def loss(model: Flux, frozen, batch, key) -> tuple[jax.Array, dict[str, jax.Array]]:
        sigma_key, noise_key = jax.random.split(key)
        latents = batch["latents"]
        sigma = sample_sigmas(sigma_key, len(latents))
        noise = jax.random.normal(noise_key, latents.shape)
        velocity = model(
            noised(latents, sigma, noise),
            encode(frozen, Captions.of_batch(batch)),
            sigma=sigma,
            guidance=jnp.ones_like(sigma),
            canvas=canvas,
            unroll=True,
        ).velocity
        return jnp.mean((velocity - (noise - latents)) ** 2), {}

    return Stage(
        name="flow",
        recipe=recipe,
        build=lambda seed: initial_flux(flux, seed),
        loss=loss,
        batch=lambda rng: world.batch(recipe.batch, CAPTION_DROPOUT, rng),
        frozen=world.encoders,
        preview=lambda model, step: save_samples(Teacher(model), world, folder / "flow" / f"grid_{step}.png"),
        preview_every=800,
    )


def distill_stage(teacher: Flux, recipe: Recipe, world: World, folder: Path) -> Stage:
    """The student learns the teacher's guided velocity, the guidance scale being an input."""
    canvas = world.canvas

    def loss(student: Flux, frozen, batch, key) -> tuple[jax.Array, dict[str, jax.Array]]:
        sigma_key, noise_key, guidance_key, plain_key = jax.random.split(key, 4)
        latents = batch["latents"]
        count = len(latents)
        sigma = sample_sigmas(sigma_key, count)
        guidance = jax.random.uniform(guidance_key, (count,), minval=GUIDANCE_RANGE[0], maxval=GUIDANCE_RANGE[1])
        guidance = jnp.where(jax.random.uniform(plain_key, (count,)) < PLAIN_SHARE, 1.0, guidance)
        noisy = noised(latents, sigma, jax.random.normal(noise_key, latents.shape))
        captions = encode(frozen, Captions.of_batch(batch))
        branches = interleave(captions, without_captions(frozen, count), count)
        target = frozen["teacher"].guided(noisy, branches, sigma=sigma, guidance=guidance, canvas=canvas)
        output = student(noisy, captions, sigma=sigma, guidance=guidance, canvas=canvas, unroll=True)
        return jnp.mean((output.velocity - target) ** 2), {}

    return Stage(
        name="distill",
        recipe=recipe,
        build=lambda seed: jax.tree.map(jnp.copy, teacher),
        loss=loss,
        batch=lambda rng: world.batch(recipe.batch, 0.0, rng),
        frozen=world.encoders | {"teacher": Teacher(teacher)},
        preview=lambda model, step: save_samples(model, world, folder / "distill" / f"grid_{step}.png"),
    )


@jax.jit
def encode(encoders: Mapping[str, Any], captions: Captions) -> FluxConditioning:
    """Text features and pooled vectors, a row a caption."""
    return FluxConditioning(encoders["t5"](captions.t5_ids), encoders["clip"](captions.clip_ids)[1])


def without_captions(encoders: Mapping[str, Any], count: int) -> FluxConditioning:
    """So many rows of the empty caption."""
    return encode(encoders, empty_captions()).rows([0] * count)


def preview_captions(pool: Pool, count: int = 32) -> tuple[Captions, np.ndarray]:
    """The first captions of a pool, and their drawings, uint8 [n, y, x, 3]."""
    captions = Captions(*(getattr(pool, name)[:count, 0].astype(np.int32) for name in ("t5_ids", "clip_ids")))
    return captions, np.asarray(pool.pictures[:count])


def sample(
    model: Flux | Teacher,
    world: World,
    captions: Captions,
    guidance: float,
    *,
    steps: int = PREVIEW_STEPS,
    seed: int = 0,
) -> np.ndarray:
    """Pictures of captions by Euler steps along the scheduler's sigmas, [n, y, x, 3] in 0..1.

    A teacher is guided by a second branch without captions.
    """
    canvas, count, channels = world.canvas, len(captions), model.config.in_channels
    conditioning = encode(world.encoders, captions)
    if isinstance(model, Teacher):
        conditioning = interleave(conditioning, without_captions(world.encoders, count), count)
    solve = Solve(
        model,
        canvas,
        conditioning,
        np.full(count, guidance, np.float32),
        channels=channels,
        groups=count,
        mesh=None,
        kernel=AUTOMATIC,
    )
    sigmas = Schedule.from_hf(SCHEDULER).sigmas(steps, canvas.tokens)
    intervals = denoising_steps(sigmas, LayerControl.none(steps, count, model.config.layers), solve.blank)
    latents = jax.random.normal(jax.random.key(seed), (count, canvas.tokens, channels))
    for reached in solve(latents, intervals):
        latents = reached.latents
    return np.asarray(decode_latents(world.autoencoder, latents, family=FLUX1, canvas=canvas))


def save_samples(model: Flux | Teacher, world: World, path: Path) -> None:
    """Pictures of captions that training never saw, and what was drawn of them."""
    captions, drawings = preview_captions(world.held_out)
    pictures = sample(model, world, captions, PREVIEW_GUIDANCE)
    save_pairs(pictures, to_unit(drawings), captions.words, path)
