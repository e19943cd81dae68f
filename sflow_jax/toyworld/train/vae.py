"""Stages `vae` and `decoder`: the autoencoder, the latents of the pool, and a decoder polished on them."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from sflow_jax.models.autoencoder import Autoencoder, AutoencoderConfig, Decoder
from sflow_jax.pictures.files import to_network
from sflow_jax.toyworld.train.loop import Recipe, Stage
from sflow_jax.toyworld.train.pictures import save_grid, to_uint8
from sflow_jax.toyworld.train.pool import Pool, indices

# Just enough to keep the latents' spread near 1 and their values continuous.
KL_WEIGHT = 1e-5
L1_WEIGHT = 0.1
# Added to every variance before it is divided out, in parts of their mean: what says little is not blown up.
WHITENING_FLOOR = 0.1
# Of the exported posterior, in the transformer's units.
POSTERIOR_SPREAD = 0.01


def psnr(pictures: np.ndarray, truth: np.ndarray) -> float:
    """Mean over pictures of the PSNR in dB; uint8 [n, y, x, 3] each."""
    error = (pictures.astype(np.float64) - truth.astype(np.float64)) ** 2
    return float(np.mean(10 * np.log10(255.0**2 / np.maximum(error.mean(axis=(1, 2, 3)), 1e-9))))


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


@jax.jit
def reconstruct(model: Autoencoder, pictures: jax.Array) -> jax.Array:
    """Decode the mean of the latents."""
    return model.decode(model.encode(pictures)[0])


def save_reconstructions(model: Autoencoder, truth: np.ndarray, folder: Path, step: int) -> None:
    """A grid of pictures (uint8) above their reconstructions, and a line with the PSNR of all of them."""
    truth = np.asarray(truth)
    made = to_uint8(reconstruct(model, to_network(truth)))
    save_grid(np.concatenate([truth[:16], made[:16]]), folder / f"grid_{step}.png")
    with (folder / "psnr.txt").open("a") as file:
        file.write(f"{step} {psnr(made, truth):.2f}\n")


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
    made = jax.tree.map(lambda leaf: leaf, model)
    made.decoder = decoder
    return made


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
        """The same autoencoder with the mixing in it: two convolutions take it in exactly.

        The posterior, which training does not use, gets one narrow width for all latents.
        """
        made, channels = jax.tree.map(lambda leaf: leaf, model), len(self.mixing)
        out, into = made.encoder.conv_out, made.decoder.conv_in
        for parameter, log_variance in ((out.kernel, 0.0), (out.bias, 2 * np.log(POSTERIOR_SPREAD / self.scale))):
            means = parameter[..., :channels] @ self.mixing
            parameter[...] = jnp.concatenate([means, jnp.full_like(means, log_variance)], axis=-1)
        into.kernel[...] = jnp.einsum("ci,yxio->yxco", np.linalg.inv(self.mixing), into.kernel[...])
        return made


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
