"""Stage `sd3`: the embedded SD3 by flow matching, captions dropped now and then; true guidance, nothing distilled.

It learns from what ships: the encoders and the autoencoder of the embedded FLUX, and its layers as a start.
"""

import dataclasses
import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from sflow_convert.job import in_memory
from sflow_convert.layouts import open_source
from sflow_convert.parts import open_autoencoder
from sflow_convert.sd3_layouts import open_text_encoders

from sflow_jax.arrays import AnyArray
from sflow_jax.embedded import ASSETS, write_shared
from sflow_jax.families.sd3 import SD3
from sflow_jax.models.autoencoder import Autoencoder
from sflow_jax.models.flux1 import Flux
from sflow_jax.models.layers import parameters, sinusoids, with_parameters
from sflow_jax.models.modulation import SINUSOID_SCALE, SINUSOID_WIDTH
from sflow_jax.models.sd3 import Sd3, Sd3Conditioning, Sd3Config
from sflow_jax.painter import decode_latents, encode_pictures
from sflow_jax.pictures.canvas import Canvas
from sflow_jax.pictures.files import to_network, to_unit
from sflow_jax.sampling.control import LayerControl
from sflow_jax.sampling.guidance import interleave
from sflow_jax.sampling.solve import Solve
from sflow_jax.sampling.steps import denoising_steps
from sflow_jax.settings import AUTOMATIC
from sflow_jax.toyworld.attributes import ATTRIBUTES
from sflow_jax.toyworld.reader import AttributeReader
from sflow_jax.toyworld.train.flow import (
    CAPTION_DROPOUT,
    Captions,
    caption_tokens,
    empty_captions,
    noised,
    preview_captions,
    sample_sigmas,
)
from sflow_jax.toyworld.train.hf import SD3_SCHEDULER
from sflow_jax.toyworld.train.loop import Recipe, Stage
from sflow_jax.toyworld.train.pictures import save_pairs
from sflow_jax.toyworld.train.pool import NAMED, Pool, indices
from sflow_jax.toyworld.train.vae import picture_canvas

ENCODED = 64
PREVIEW_GUIDANCE, PREVIEW_STEPS, PREVIEWED = 5.0, 20, 96


@dataclasses.dataclass(frozen=True)
class Sd3World:
    """What the stage trains on.

    latents: float16 [n, s, c], as the transformer has them. encoders: `clip` with its projection, and `t5`.
    """

    pool: Pool
    latents: np.ndarray
    held_out: Pool
    autoencoder: Autoencoder
    encoders: dict[str, Any]

    @property
    def canvas(self) -> Canvas:
        """The pictures' size."""
        return picture_canvas(self.pool.pictures, self.autoencoder.config)

    def batch(self, size: int, dropout: float, rng: np.random.Generator) -> dict[str, np.ndarray]:
        """Packed latents and caption tokens, some captions empty."""
        chosen, wording = indices(self.pool, size, rng)
        latents = self.latents[chosen].astype(np.float32)
        return {"latents": latents, **caption_tokens(self.pool, chosen, wording, dropout, rng)}

    @classmethod
    def embedded(cls, pool: Pool, held_out: Pool, latents: Path) -> "Sd3World":
        """With the networks that ship; latents: the file to keep them in."""
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary) / "sd3"
            write_shared(folder)
            autoencoder = in_memory(open_autoencoder(folder / "vae"))
            encoders = {name: in_memory(network) for name, network in open_text_encoders(folder).items()}
        encoded = encode_pool(autoencoder, pool, latents)
        return cls(pool, encoded, held_out, autoencoder, {"clip": encoders["clip_l"], "t5": encoders["t5"]})


def encode_pool(autoencoder: Autoencoder, pool: Pool, path: Path) -> np.ndarray:
    """Latents of all pictures, float16 [n, s, c], made once."""
    if not path.exists():
        parts = []
        for start in range(0, len(pool), ENCODED):
            rows = np.minimum(np.arange(start, start + ENCODED), len(pool) - 1)
            latents = encode_pictures(autoencoder, to_network(pool.pictures[rows]), family=SD3)
            parts.append(np.asarray(latents, np.float16))
        np.save(path, np.concatenate(parts)[: len(pool)])
    return np.load(path, mmap_mode="r")


@jax.jit
def encode(encoders: Mapping[str, Any], captions: Captions) -> Sd3Conditioning:
    """As the family's text encoders do it, both CLIPs being one whose sequence is as wide as T5's."""
    sequence, vector = encoders["clip"].before_last(captions.clip_ids)
    text = jnp.concatenate([sequence, encoders["t5"](captions.t5_ids)], axis=1)
    return Sd3Conditioning(text, jnp.concatenate([vector, vector], axis=-1))


def embedded_flux() -> Flux:
    """The transformer that ships."""
    return in_memory(open_source(ASSETS).networks["transformer"])


def initial_sd3(config: Sd3Config, seed: int) -> Sd3:
    """Every block starts as the identity and the output as zero (adaLN-zero), which learns faster."""
    model = Sd3(config, rngs=nnx.Rngs(seed))
    zero = {path: jnp.zeros_like(x) for path, x in parameters(model).items() if _starts_at_zero(path)}
    return with_parameters(model, parameters(model) | zero)


def _starts_at_zero(path: str) -> bool:
    return path.endswith("kernel") and ("modulation" in path or path.startswith("image_out"))


def started_from_flux(model: Sd3, flux: Flux, projection: AnyArray) -> Sd3:
    """The SD3 with a FLUX's layers, which sees the same text and latents: a start far better than noise.

    Double blocks go into the dual layers, whose own attention starts closed; of the single blocks, evenly chosen
    ones into both streams of the other layers. The FLUX's guidance stays at 1. projection: of CLIP's pooled
    vector, [d, p], which the FLUX does without.
    """
    ours, theirs = parameters(model), parameters(flux)
    ends = {path: theirs[path] for path in ours if path in theirs}
    inverse = jnp.linalg.pinv(projection) @ theirs["pooled_in.in_layer.kernel"] / 2
    ends["pooled_in.in_layer.kernel"] = jnp.concatenate([inverse, inverse])
    one = sinusoids(jnp.full((1,), SINUSOID_SCALE), SINUSOID_WIDTH)
    ends["timestep_in.out_layer.bias"] += flux.guidance_in(one)[0]
    behind = model.config.layers - model.config.dual_layers
    chosen = np.linspace(0, flux.config.single_blocks - 1, behind).round().astype(int)
    stacks = {"joint_blocks": chosen[:-1], "last_blocks": chosen[-1:]}
    layers = {}
    for path, x in ours.items():
        stack, _, rest = path.partition(".")
        if stack == "dual_blocks" and (taken := theirs.get(f"double_blocks.{rest}")) is not None:
            layers[path] = jnp.pad(taken, [(0, large - small) for large, small in zip(x.shape, taken.shape)])
        elif stack in stacks:
            layers[path] = _of_single_blocks(theirs, rest.partition(".")[2], x, stacks[stack])
    return with_parameters(model, ours | ends | layers)


def _of_single_blocks(theirs: Mapping[str, jax.Array], rest: str, x: jax.Array, chosen: np.ndarray) -> jax.Array:
    """One parameter of a stream; attention and MLP, side by side there and in turn here, are modulated alike."""
    taken = theirs.get(f"single_blocks.{rest}")
    if taken is None:  # the MLP's bias, which is the attention's there
        return jnp.zeros_like(x)
    if rest.startswith("modulation"):
        taken = jnp.concatenate([taken, taken], axis=-1)[..., : x.shape[-1]]
    return taken[chosen]


def sd3_stage(config: Sd3Config, recipe: Recipe, world: Sd3World, flux: Flux, folder: Path) -> Stage:
    """The transformer, from the layers of a FLUX with the same encoders."""
    canvas, projection = world.canvas, world.encoders["clip"].text_projection.kernel[...]

    def loss(model: Sd3, frozen, batch, key) -> tuple[jax.Array, dict[str, jax.Array]]:
        sigma_key, noise_key = jax.random.split(key)
        latents = batch["latents"]
        sigma = sample_sigmas(sigma_key, len(latents))
        noise = jax.random.normal(noise_key, latents.shape)
        captions = encode(frozen, Captions.of_batch(batch))
        output = model(noised(latents, sigma, noise), captions, sigma=sigma, canvas=canvas, unroll=True)
        return jnp.mean((output.velocity - (noise - latents)) ** 2), {}

    return Stage(
        name="sd3",
        recipe=recipe,
        build=lambda seed: started_from_flux(initial_sd3(config, seed), flux, projection),
        loss=loss,
        batch=lambda rng: world.batch(recipe.batch, CAPTION_DROPOUT, rng),
        frozen=world.encoders,
        preview=lambda model, step: preview(model, world, folder / "sd3", step),
        preview_every=400,
    )


def sample(model: Sd3, world: Sd3World, captions: Captions, seed: int = 0) -> np.ndarray:
    """Pictures of captions by Euler steps along the family's sigmas, guided by the empty caption, [n, y, x, 3]."""
    canvas, count, channels = world.canvas, len(captions), model.config.in_channels
    conditioning = encode(world.encoders, captions)
    nothing = encode(world.encoders, empty_captions()).rows([0] * count)
    solve = Solve(
        model,
        canvas,
        interleave(conditioning, nothing, count),
        np.full(count, PREVIEW_GUIDANCE, np.float32),
        channels=channels,
        groups=count,
        mesh=None,
        kernel=AUTOMATIC,
    )
    sigmas = SD3.schedule(SD3_SCHEDULER).sigmas(PREVIEW_STEPS, canvas.tokens)
    intervals = denoising_steps(sigmas, LayerControl.none(PREVIEW_STEPS, count, model.config.layers), solve.blank)
    latents = jax.random.normal(jax.random.key(seed), (count, canvas.tokens, channels))
    for reached in solve(latents, intervals):
        latents = reached.latents
    return np.asarray(decode_latents(world.autoencoder, latents, family=SD3, canvas=canvas))


def preview(model: Sd3, world: Sd3World, folder: Path, step: int) -> None:
    """Pictures of captions that training never saw, beside the drawings; the share that is right, in a log."""
    captions, drawings = preview_captions(world.held_out, PREVIEWED)
    pictures = sample(model, world, captions)
    shown = Captions(captions.t5_ids[:32], captions.clip_ids[:32])
    save_pairs(pictures[:32], to_unit(drawings[:32]), shown.words, folder / f"grid_{step}.png")
    truth = [{name: ATTRIBUTES[name][i] for name, i in zip(NAMED, row)} for row in world.held_out.named[:PREVIEWED]]
    right = np.mean([read == true for read, true in zip(AttributeReader()(pictures).named, truth)])
    with (folder / "right.jsonl").open("a") as lines:
        lines.write(json.dumps({"step": step, "right": float(right)}) + "\n")
