"""Stages `vae` and `decoder`: the autoencoder, the latents of the pool, and a decoder polished on them."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from sflow_jax.families.flux1 import FLUX1
from sflow_jax.measures.metrics import psnr
from sflow_jax.models.autoencoder import Autoencoder, AutoencoderConfig, Decoder
from sflow_jax.painter import decode_latents, encode_pictures
from sflow_jax.pictures.canvas import Canvas
from sflow_jax.pictures.files import to_network, to_unit
from sflow_jax.toyworld.train.loop import Recipe, Stage
from sflow_jax.toyworld.train.pictures import save_pairs
from sflow_jax.toyworld.train.pool import Pool, indices

# Just enough to keep the latents' spread near 1 and their values continuous.
KL_WEIGHT = 1e-5
L1_WEIGHT = 0.1
# Added to every variance before it is divided out, in parts of their mean: what says little is not blown up.
WHITENING_FLOOR = 0.1
# Of the exported posterior, in the transformer's units.
POSTERIOR_SPREAD = 0.01
# Of previews.
GRID_PAIRS = 16


def vae_loss(model: Autoencoder, frozen: None, batch, key) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Squared and absolute error of the reconstruction, plus a trace of KL divergence."""
    mean, log_variance = model.encode(batch["pictures"])
    latents = mean + jnp.exp(0.5 * log_variance) * jax.random.normal(key, mean.shape)
    error = model.decode(latents) - batch["pictures"]
    loss, decibel = reconstruction_loss(error)
    divergence = 0.5 * jnp.mean(mean**2 + jnp.exp(log_variance) - 1 - log_variance)
    return loss + KL_WEIGHT * divergence, {"db": decibel, "kl": divergence}


def reconstruction_loss(error: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Squared and absolute error, and the PSNR in dB (pictures span -1..1, so the peak is 2)."""
    squared = jnp.mean(error**2)
    return squared + L1_WEIGHT * jnp.mean(jnp.abs(error)), 10 * jnp.log10(4 / squared)


def picture_canvas(pictures: np.ndarray, config: AutoencoderConfig) -> Canvas:
    """The size of pictures [n, y, x, 3], in pixels and in tokens of the transformer."""
    return Canvas.of(*pictures.shape[1:3], FLUX1.token_side({"autoencoder": config}))


def reconstruct(model: Autoencoder, pictures: np.ndarray) -> np.ndarray:
    """Decode the mean of the latents of uint8 pictures: [n, y, x, 3] in 0..1."""
    latents = encode_pictures(model, to_network(pictures), family=FLUX1)
    return np.asarray(decode_latents(model, latents, family=FLUX1, canvas=picture_canvas(pictures, model.config)))


def save_reconstructions(model: Autoencoder, pictures: np.ndarray, folder: Path, step: int) -> None:
    """A grid of reconstructions and pictures (uint8 [n, y, x, 3]), and a line with the mean PSNR of all of them."""
    decoded, drawings = reconstruct(model, pictures), to_unit(pictures)
    shown = min(GRID_PAIRS, len(decoded))
    save_pairs(decoded[:shown], drawings[:shown], ["decoded"] * shown, folder / f"grid_{step}.png")
    decibel = np.mean([psnr(*pair) for pair in zip(decoded, drawings)])
    with (folder / "psnr.txt").open("a") as file:
        file.write(f"{step} {decibel:.2f}\n")


def vae_stage(config: AutoencoderConfig, recipe: Recipe, pool: Pool, held_out: Pool, folder: Path) -> Stage:
    """Encoder and decoder together, on the pool's pictures."""

    def batch(rng: np.random.Generator):
        pictures = to_network(pool.pictures[indices(pool, recipe.batch, rng)[0]])
        return {"pictures": pictures}

    def preview(model: Autoencoder, step: int) -> None:
        save_reconstructions(model, held_out.pictures[:32], folder / "vae", step)

    return Stage(
        name="vae",
        recipe=recipe,
        build=lambda seed: Autoencoder(config, rngs=nnx.Rngs(seed)),
        loss=vae_loss,
        batch=batch,
        preview=preview,
        preview_every=400,
    )


def with_decoder(model: Autoencoder, decoder: Decoder) -> Autoencoder:
    """The same encoder with another decoder."""
    joined = jax.tree.map(lambda leaf: leaf, model)
    joined.decoder = decoder
    return joined


def decoder_stage(
    model: Autoencoder, latents: np.ndarray, recipe: Recipe, pool: Pool, held_out: Pool, folder: Path
) -> Stage:
    """The decoder alone, from the latents' means.

    The latents stay, so this may run while, or after, the transformer learns them.
    """

    def loss(decoder: Decoder, frozen: None, batch, key) -> tuple[jax.Array, dict[str, jax.Array]]:
        loss, decibel = reconstruction_loss(decoder(batch["latents"]) - batch["pictures"])
        return loss, {"db": decibel}

    def batch(rng: np.random.Generator):
        chosen, _ = indices(pool, recipe.batch, rng)
        return {"pictures": to_network(pool.pictures[chosen]), "latents": latents[chosen].astype(np.float32)}

    def preview(decoder: Decoder, step: int) -> None:
        save_reconstructions(with_decoder(model, decoder), held_out.pictures[:96], folder / "decoder", step)

    return Stage(
        name="decoder",
        recipe=recipe,
        build=lambda seed: jax.tree.map(jnp.copy, model.decoder),
        loss=loss,
        batch=batch,
        preview=preview,
        preview_every=400,
    )


@dataclasses.dataclass(frozen=True)
class Whitening:
    """Latents as the transformer sees them: `(means @ mixing - shift) * scale`.

    An autoencoder this small stays close to its pictures: half of its latents' variance is one mixture of channels,
    brightness, and what tells a cat from a dog is lost in the first trace of noise. Mixed, the channels are nearly
    uncorrelated and of equal variance.

    Attributes:
        mixing: of channels, [c, c].
        shift, scale: of all channels alike, as the published config has them.
    """

    mixing: np.ndarray
    shift: float
    scale: float

    @classmethod
    def measured(cls, means: np.ndarray) -> "Whitening":
        """From latent means [n, yl, xl, c]."""
        numbers = np.asarray(means, np.float32).reshape(-1, means.shape[-1])
        variances, directions = np.linalg.eigh(np.cov(numbers.T))
        floored = variances + WHITENING_FLOOR * variances.mean()
        mixing = (directions / np.sqrt(floored)) @ directions.T
        mixed = numbers @ mixing
        return cls(mixing.astype(np.float32), float(mixed.mean()), 1 / float(mixed.std()))

    def __call__(self, means: np.ndarray) -> np.ndarray:
        """Latents for the transformer."""
        return (means.astype(np.float32) @ self.mixing - self.shift) * self.scale

    def autoencoder(self, model: Autoencoder) -> Autoencoder:
        """The same autoencoder with the whitening in it: two convolutions take the mixing in exactly.

        The posterior, which training does not use, gets one narrow width for all latents.
        """
        whitened, channels = jax.tree.map(lambda leaf: leaf, model), len(self.mixing)
        whitened.config = dataclasses.replace(model.config, shift_factor=self.shift, scaling_factor=self.scale)
        out, into = whitened.encoder.conv_out, whitened.decoder.conv_in
        for parameter, log_variance in ((out.kernel, 0.0), (out.bias, 2 * np.log(POSTERIOR_SPREAD / self.scale))):
            means = parameter[..., :channels] @ self.mixing
            parameter[...] = jnp.concatenate([means, jnp.full_like(means, log_variance)], axis=-1)
        into.kernel[...] = jnp.einsum("ci,yxio->yxco", np.linalg.inv(self.mixing), into.kernel[...])
        return whitened


def encode_pool(model: Autoencoder, pool: Pool, path: Path, batch: int = 64) -> np.ndarray:
    """Latent means of all pictures, float16 [n, yl, xl, c], kept in `path`."""
    encode = jax.jit(lambda model, pictures: model.encode(pictures)[0].astype(jnp.float16))
    if not path.exists():
        parts = []
        for start in range(0, len(pool), batch):
            pictures = to_network(pool.pictures[start : start + batch])
            padded = np.concatenate([pictures, np.zeros((batch - len(pictures), *pictures.shape[1:]), np.float32)])
            parts.append(np.asarray(encode(model, padded))[: len(pictures)])
        np.save(path, np.concatenate(parts))
    return np.load(path, mmap_mode="r")
