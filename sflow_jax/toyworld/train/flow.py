"""Stages `flow` (flow matching) and `distill` (guidance becomes an input, as in FLUX.1-dev)."""

import dataclasses
import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.scipy.special import ndtri

from sflow_jax.models.autoencoder import Autoencoder
from sflow_jax.models.clip import ClipText
from sflow_jax.models.flux1 import Flux, FluxConfig, position_ids
from sflow_jax.models.t5 import T5Encoder
from sflow_jax.pictures.latents import pack, unpack
from sflow_jax.toyworld.train.hf import SHIFT
from sflow_jax.toyworld.train.loop import Recipe, Stage
from sflow_jax.toyworld.train.pictures import save_grid, to_uint8
from sflow_jax.toyworld.train.pool import Pool, indices
from sflow_jax.toyworld.train.tokenizers import clip_tokenizer, t5_tokenizer, token_ids
from sflow_jax.toyworld.train.vae import Whitening

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
        pool: captions; its pictures are not looked at.
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
    def ids(self) -> np.ndarray:
        """Position ids of the packed latents."""
        return position_ids(*self.latents.shape[1:3])

    def batch(self, size: int, dropout: float, rng: np.random.Generator) -> dict[str, np.ndarray]:
        """Packed latents and caption tokens, some captions empty."""
        chosen, wording = indices(self.pool, size, rng)
        empty = rng.random(size)[:, None] < dropout
        tokens = {
            name: np.where(empty, getattr(empty_captions(), name), getattr(self.pool, name)[chosen, wording])
            for name in ("t5_ids", "clip_ids")
        }
        return {
            "latents": pack(self.whitening(self.latents[chosen])),
            **{name: ids.astype(np.int32) for name, ids in tokens.items()},
        }


@dataclasses.dataclass(frozen=True)
class Captions:
    """Tokens of captions, int32 [n, w]."""

    t5_ids: np.ndarray
    clip_ids: np.ndarray

    @classmethod
    def of(cls, captions: list[str]) -> "Captions":
        return cls(token_ids(t5_tokenizer(), captions), token_ids(clip_tokenizer(), captions))


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
    ids = world.ids

    def loss(model: Flux, frozen, batch, key) -> tuple[jax.Array, dict[str, jax.Array]]:
        sigma_key, noise_key = jax.random.split(key)
        latents = batch["latents"]
        sigma = sample_sigmas(sigma_key, len(latents))
        noise = jax.random.normal(noise_key, latents.shape)
        velocity = model(
            noised(latents, sigma, noise),
            *encode(frozen, batch["t5_ids"], batch["clip_ids"]),
            timestep=sigma,
            guidance=jnp.ones_like(sigma),
            image_ids=ids,
            unroll=True,
        )
        return jnp.mean((velocity - (noise - latents)) ** 2), {}

    def preview(model: Flux, step: int) -> None:
        captions, truth = preview_captions(world.held_out)
        made = sample(model, world, captions, PREVIEW_GUIDANCE, distilled=False)
        save_grid(np.concatenate([made, truth]), folder / "flow" / f"grid_{step}.png")

    return Stage(
        name="flow",
        recipe=recipe,
        build=lambda seed: initial_flux(flux, seed),
        loss=loss,
        batch=lambda rng: world.batch(recipe.batch, CAPTION_DROPOUT, rng),
        frozen=world.encoders,
        preview=preview,
        preview_every=800,
    )


def distill_stage(teacher: Flux, recipe: Recipe, world: World, folder: Path) -> Stage:
    """The student learns the teacher's guided velocity, the guidance scale being an input."""
    ids, empty = world.ids, empty_captions()

    def loss(student: Flux, frozen, batch, key) -> tuple[jax.Array, dict[str, jax.Array]]:
        sigma_key, noise_key, guidance_key, plain_key = jax.random.split(key, 4)
        latents = batch["latents"]
        count = len(latents)
        sigma = sample_sigmas(sigma_key, count)
        guidance = jax.random.uniform(guidance_key, (count,), minval=GUIDANCE_RANGE[0], maxval=GUIDANCE_RANGE[1])
        guidance = jnp.where(jax.random.uniform(plain_key, (count,)) < PLAIN_SHARE, 1.0, guidance)
        inputs = {"timestep": sigma, "image_ids": ids, "unroll": True}
        noisy = noised(latents, sigma, jax.random.normal(noise_key, latents.shape))
        text, pooled = encode(frozen, batch["t5_ids"], batch["clip_ids"])
        nothing = [jnp.repeat(x, count, axis=0) for x in encode(frozen, empty.t5_ids, empty.clip_ids)]
        ones = jnp.ones_like(sigma)
        told = frozen["teacher"](noisy, text, pooled, guidance=ones, **inputs)
        untold = frozen["teacher"](noisy, *nothing, guidance=ones, **inputs)
        target = untold + guidance[:, None, None] * (told - untold)
        return jnp.mean((student(noisy, text, pooled, guidance=guidance, **inputs) - target) ** 2), {}

    def preview(student: Flux, step: int) -> None:
        captions, truth = preview_captions(world.held_out)
        made = sample(student, world, captions, PREVIEW_GUIDANCE)
        save_grid(np.concatenate([made, truth]), folder / "distill" / f"grid_{step}.png")

    return Stage(
        name="distill",
        recipe=recipe,
        build=lambda seed: jax.tree.map(jnp.copy, teacher),
        loss=loss,
        batch=lambda rng: world.batch(recipe.batch, 0.0, rng),
        frozen=world.encoders | {"teacher": teacher},
        preview=preview,
    )


def encode(models: dict[str, Any], t5_ids: jax.Array, clip_ids: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Text features and pooled vectors."""
    return models["t5"](t5_ids), models["clip"](clip_ids)[1]


def preview_captions(pool: Pool, count: int = 32) -> tuple[Captions, np.ndarray]:
    """The first captions of a pool and their drawings."""
    captions = Captions(*(getattr(pool, name)[:count, 0].astype(np.int32) for name in ("t5_ids", "clip_ids")))
    return captions, np.asarray(pool.pictures[:count])


def guided_velocity(models, noisy, sigma, guidance: float, conditions, ids, distilled: bool) -> jax.Array:
    """Velocity at one sigma: of a student with guidance as an input, or of a teacher, told and untold."""
    (text, pooled), (no_text, no_pooled) = conditions
    count = len(noisy)
    inputs = {"timestep": jnp.full((count,), sigma), "image_ids": ids}
    scale = jnp.full((count,), guidance if distilled else 1.0)
    told = models["flux"](noisy, text, pooled, guidance=scale, **inputs)
    if distilled:
        return told
    nothing = [jnp.repeat(x, count, axis=0) for x in (no_text, no_pooled)]
    untold = models["flux"](noisy, *nothing, guidance=scale, **inputs)
    return untold + guidance * (told - untold)


def sample(
    model: Flux,
    world: World,
    captions: Captions,
    guidance: float,
    *,
    distilled: bool = True,
    steps: int = PREVIEW_STEPS,
    seed: int = 0,
) -> np.ndarray:
    """Pictures of captions by Euler steps along the scheduler's sigmas, uint8 [n, y, x, 3]."""
    rows, columns, channels = world.latents.shape[1:]
    shape = (len(captions.t5_ids), len(world.ids), 4 * channels)
    even = np.linspace(1, 1 / steps, steps)
    sigmas = np.append(np.exp(SHIFT) / (np.exp(SHIFT) + 1 / even - 1), 0.0)

    @jax.jit
    def run(models, captions: tuple[jax.Array, jax.Array], noise: jax.Array) -> jax.Array:
        conditions = encode(models, *captions), encode(models, empty_captions().t5_ids, empty_captions().clip_ids)

        def step(noisy: jax.Array, pair: jax.Array) -> tuple[jax.Array, None]:
            velocity = guided_velocity(models, noisy, pair[0], guidance, conditions, world.ids, distilled)
            return noisy + (pair[1] - pair[0]) * velocity, None

        pairs = jnp.stack([sigmas[:-1], sigmas[1:]], axis=1).astype(jnp.float32)
        packed, _ = jax.lax.scan(step, noise, pairs)
        latents = unpack(packed / world.whitening.scale + world.whitening.shift, rows, columns)
        return models["autoencoder"].decode(latents)

    noise = jax.random.normal(jax.random.key(seed), shape)
    models = world.encoders | {"flux": model, "autoencoder": world.autoencoder}
    return to_uint8(run(models, (captions.t5_ids, captions.clip_ids), noise))
