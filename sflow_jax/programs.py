"""The compiled programs: one step of the transformer, and the autoencoder both ways.

Everything that may change between calls of one shape is an argument, so each compiles once.
"""

import functools
from collections.abc import Iterable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, Sharding
from jaxtyping import Array, Float
from tqdm.auto import tqdm

from sflow_jax.arrays import AnyArray
from sflow_jax.latents import Canvas, pack, position_ids, unpack
from sflow_jax.models.autoencoder import Autoencoder
from sflow_jax.models.flux import Flux
from sflow_jax.prompts import Conditioning
from sflow_jax.sampling import Step, advance
from sflow_jax.sharding import batch_sharding


@functools.partial(jax.jit, static_argnames=("sharding", "kernel"), donate_argnames="latents")
def step_latents(
    transformer: Flux,
    conditioning: tuple[Array, Array],
    guidance: Float[AnyArray, " b"],
    image_ids: Float[AnyArray, "s 3"],
    latents: Float[AnyArray, "b s c"],
    step: Step,
    *,
    sharding: Sharding,
    kernel: str,
) -> tuple[Float[Array, "b s c"], Float[Array, ""]]:
    """One step of generation, inversion or editing; the number of groups is `step.offset`'s.

    The latents given are used up. Beside the new ones it returns one of their numbers, to wait for when they are
    used up in turn.
    """
    batch, groups = latents.shape[0], step.offset.shape[0]

    def velocity(latents: Array, sigma: Array) -> Array:
        return transformer(
            latents,
            *conditioning,
            timestep=jnp.broadcast_to(sigma, (batch,)),
            guidance=guidance,
            image_ids=image_ids,
            inject=step.inject,
            bypass=step.bypass,
            members=batch // groups,
            kernel=kernel,
            sharding=sharding,
        )

    moved = jax.lax.with_sharding_constraint(advance(velocity, latents, step), sharding)
    return moved, moved[0, 0, 0]


@functools.partial(jax.jit, static_argnames=("rows", "columns"))
def decode(
    autoencoder: Autoencoder, latents: Float[AnyArray, "b s c"], *, rows: int, columns: int
) -> Float[Array, "b y x 3"]:
    """Packed, scaled latents → pictures in 0..1."""
    config = autoencoder.config
    unscaled = unpack(latents, rows, columns) / config.scaling_factor + config.shift_factor
    return jnp.clip(autoencoder.decode(unscaled) / 2 + 0.5, 0.0, 1.0)


@jax.jit
def encode(autoencoder: Autoencoder, pictures: Float[Array, "b y x 3"]) -> Float[Array, "b s c"]:
    """Pictures in −1..1 → packed, scaled latent means."""
    mean, _ = autoencoder.encode(pictures)
    return pack((mean - autoencoder.config.shift_factor) * autoencoder.config.scaling_factor)


class Run:
    """A transformer with all that stays the same during one solve; call it with latents and steps.

    nothing: zeros [groups, s, c] for steps without offset or replay.
    """

    def __init__(
        self,
        transformer: Flux,
        canvas: Canvas,
        conditioning: Conditioning,
        guidance: Float[np.ndarray, " b"],
        *,
        groups: int,
        mesh: Mesh | None,
        kernel: str,
    ):
        self.sharding = batch_sharding(mesh, groups)
        self.nothing = np.zeros((groups, canvas.tokens, transformer.config.in_channels), np.float32)
        features = jax.device_put((conditioning.text, conditioning.pooled), self.sharding)
        image_ids = position_ids(canvas.rows, canvas.columns)
        self.step = functools.partial(
            step_latents, transformer, features, guidance, image_ids, sharding=self.sharding, kernel=kernel
        )

    def __call__(
        self, latents: Float[AnyArray, "b s c"], steps: Iterable[Step], bar: tqdm
    ) -> Iterator[Float[Array, "b s c"]]:
        """Yield the latents after every step; the host prepares one step while the device computes another.

        The next step uses up what was yielded: copy what is to be kept.
        """
        current, done = jax.device_put(latents, self.sharding, may_alias=False), None
        for step in steps:
            current, following = self.step(current, step)
            # Waiting for the step before keeps the bar honest without ever idling the device.
            jax.block_until_ready(done)
            done = following
            bar.update()
            yield current
        jax.block_until_ready(done)
