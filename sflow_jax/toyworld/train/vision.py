"""Stages `clip` (contrastive, pictures and captions) and `dino` (reads a picture's attributes)."""

import itertools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from sflow_jax.models.clip_vision import Clip, ClipConfig
from sflow_jax.models.dinov2 import Dinov2, Dinov2Config
from sflow_jax.pictures.files import to_unit
from sflow_jax.toyworld.attributes import ATTRIBUTES
from sflow_jax.toyworld.train.loop import Recipe, Stage
from sflow_jax.toyworld.train.pool import NAMED, UNNAMED, Pool, indices

# Mean and spread that the published models expect of pictures in 0..1, red, green, blue.
CLIP_STATISTICS = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
DINO_STATISTICS = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
UNNAMED_WEIGHT = 0.5
# The published models hold the inverse temperature at 100 or below.
LARGEST_LOGIT_SCALE = float(np.log(100.0))
# So that reading does not hang on single pixels: spread of the noise added to training pictures in 0..1.
NOISE = 0.03
# Named attributes that a picture without its colours still shows.
SHAPES = ("species", "pose", "object", "side")


def normalise(pictures: jax.Array, statistics: tuple[tuple[float, ...], tuple[float, ...]]) -> jax.Array:
    """Pictures in 0..1 [b, y, x, 3], as a published vision network expects them."""
    mean, spread = (jnp.array(values) for values in statistics)
    return (pictures - mean.reshape(1, 1, 1, -1)) / spread.reshape(1, 1, 1, -1)


def noisy(pictures: jax.Array, key: jax.Array) -> jax.Array:
    """Pictures in 0..1 with noise whose strength differs per picture."""
    amount, noise = jax.random.split(key)
    strength = NOISE * jax.random.uniform(amount, (len(pictures), 1, 1, 1))
    return pictures + strength * jax.random.normal(noise, pictures.shape)


def clip_loss(model: Clip, frozen: None, batch, key) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Symmetric cross-entropy: which caption of the batch is whose picture's."""
    pictures = model.picture_features(normalise(noisy(batch["pictures"], key), CLIP_STATISTICS))
    captions = model.text_features(batch["clip_ids"])
    scale = jnp.exp(jnp.minimum(model.logit_scale[...], LARGEST_LOGIT_SCALE))
    logits, own = scale * pictures @ captions.T, jnp.arange(len(pictures))
    losses = [optax.softmax_cross_entropy_with_integer_labels(x, own).mean() for x in (logits, logits.T)]
    return sum(losses) / 2, {"right": jnp.mean(logits.argmax(axis=1) == own)}


def clip_stage(config: ClipConfig, recipe: Recipe, pool: Pool) -> Stage:
    """Both towers together; their text half then conditions the transformer."""

    def batch(rng: np.random.Generator):
        chosen, wording = indices(pool, recipe.batch, rng)
        return {
            "pictures": to_unit(pool.pictures[chosen]),
            "clip_ids": pool.clip_ids[chosen, wording].astype(np.int32),
        }

    return Stage(
        name="clip",
        recipe=recipe,
        build=lambda seed: Clip(config, rngs=nnx.Rngs(seed)),
        loss=clip_loss,
        batch=batch,
    )


class Reader(nnx.Module):
    """DINOv2 and linear layers that read every attribute from its class token."""

    def __init__(self, config: Dinov2Config, *, rngs: nnx.Rngs):
        self.network = Dinov2(config, rngs=rngs)
        self.named = nnx.Dict({name: nnx.Linear(config.width, len(ATTRIBUTES[name]), rngs=rngs) for name in NAMED})
        self.unnamed = nnx.Linear(config.width, len(UNNAMED), rngs=rngs)

    def __call__(self, pictures: jax.Array, unroll: bool = False) -> tuple[dict[str, jax.Array], jax.Array]:
        """Logits of each named attribute, and the unnamed ones scaled to -1..1, of pictures in 0..1."""
        feature = self.network(normalise(pictures, DINO_STATISTICS), unroll=unroll)[:, 0]
        return {name: self.named[name](feature) for name in NAMED}, self.unnamed(feature)


def recoloured(pictures: jax.Array, key: jax.Array) -> jax.Array:
    """Pictures in 0..1 with their channels in any order, half of them negatives: shapes without their colours."""
    order, sign = jax.random.split(key)
    orders = jnp.array(list(itertools.permutations(range(3))))
    chosen = orders[jax.random.randint(order, (len(pictures),), 0, len(orders))]
    mixed = jnp.take_along_axis(pictures, chosen[:, None, None, :], axis=-1)
    negative = jax.random.bernoulli(sign, 0.5, (len(pictures), 1, 1, 1))
    return jnp.where(negative, 1 - mixed, mixed)


def dino_loss(model: Reader, frozen: None, batch, key) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Cross-entropy of every named attribute, squared error of every unnamed one.

    Half of the pictures are recoloured and teach only what is not a colour: without them the species hangs on
    combinations with colours, and held-out combinations are read wrong.
    """
    noise_key, colour_key = jax.random.split(key)
    pictures = noisy(batch["pictures"], noise_key)
    plain = len(pictures) // 2
    pictures = jnp.concatenate([pictures[:plain], recoloured(pictures[plain:], colour_key)])
    logits, unnamed = model(pictures, unroll=True)
    losses, right = [], []
    for column, name in enumerate(NAMED):
        taught = slice(None) if name in SHAPES else slice(0, plain)
        guess, truth = logits[name][taught], batch["named"][taught, column].astype(int)
        losses.append(optax.softmax_cross_entropy_with_integer_labels(guess, truth).mean())
        right.append(jnp.mean(guess.argmax(axis=-1) == truth))
    squared = jnp.mean((unnamed - batch["unnamed"]) ** 2)
    loss = sum(losses) / len(losses) + UNNAMED_WEIGHT * squared
    return loss, {"right": jnp.mean(jnp.stack(right)), "species": right[0], "unnamed": squared}


@jax.jit
def read_batch(model: Reader, pictures: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The same of pictures in 0..1."""
    logits, unnamed = model(pictures)
    return jnp.stack([logits[name].argmax(axis=-1) for name in NAMED], axis=1), unnamed


def read(model: Reader, pictures: np.ndarray, batch: int = 64) -> tuple[np.ndarray, np.ndarray]:
    """Named attributes (index, [n, 8]) and unnamed ones ([n, 15]) of uint8 pictures."""
    parts = [read_batch(model, to_unit(pictures[i : i + batch])) for i in range(0, len(pictures), batch)]
    return tuple(np.concatenate([np.asarray(part[i]) for part in parts]) for i in range(2))


def accuracy(named: np.ndarray, truth: np.ndarray) -> dict[str, float]:
    """Share of pictures whose attribute was read right, for each attribute and for all together."""
    right = named == truth
    return {name: float(right[:, i].mean()) for i, name in enumerate(NAMED)} | {
        "all": float(right.all(axis=1).mean())
    }


def dino_stage(config: Dinov2Config, recipe: Recipe, pool: Pool, held_out: Pool, folder: Path) -> Stage:
    """Supervised by the attributes that the scenes were drawn from."""

    def batch(rng: np.random.Generator):
        chosen, _ = indices(pool, recipe.batch, rng)
        return {
            "pictures": to_unit(pool.pictures[chosen]),
            "named": pool.named[chosen],
            "unnamed": pool.unnamed[chosen],
        }

    def preview(model: Any, step: int) -> None:
        named, unnamed = read(model, held_out.pictures)
        error = np.sqrt(np.mean((unnamed - held_out.unnamed) ** 2, axis=0))
        with (folder / "dino" / "accuracy.txt").open("a") as file:
            shares = accuracy(named, np.asarray(held_out.named))
            file.write(f"{step} " + " ".join(f"{name} {value:.4f}" for name, value in shares.items()) + "\n")
            file.write(" ".join(f"{name} {value:.3f}" for name, value in zip(UNNAMED, error)) + "\n")

    return Stage(
        name="dino",
        recipe=recipe,
        build=lambda seed: Reader(config, rngs=nnx.Rngs(seed)),
        loss=dino_loss,
        batch=batch,
        preview=preview,
    )
