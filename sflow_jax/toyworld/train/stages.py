"""The stages in order, each built from what the ones before have left in the run's folder."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from sflow_jax.models.autoencoder import Autoencoder
from sflow_jax.toyworld.train.flow import World, distill_stage, flow_stage
from sflow_jax.toyworld.train.loop import Checkpoints, Run, Stage, finished
from sflow_jax.toyworld.train.plan import Plan
from sflow_jax.toyworld.train.pool import Pool, load_pool
from sflow_jax.toyworld.train.sd3 import Sd3World, embedded_flux, sd3_stage
from sflow_jax.toyworld.train.text import t5_stage
from sflow_jax.toyworld.train.vae import Whitening, decoder_stage, encode_pool, vae_stage, with_decoder
from sflow_jax.toyworld.train.vision import clip_stage, dino_stage

STAGES = ("vae", "decoder", "clip", "t5", "dino", "flow", "distill")
# From what ships, without the stages before.
FROM_EMBEDDED = ("sd3",)
# Enough latents to know their statistics.
MEASURED = 10_000


@dataclasses.dataclass(frozen=True)
class Training:
    """A plan being carried out in a run's folder."""

    plan: Plan
    run: Run

    @property
    def folder(self) -> Path:
        return self.run.folder

    def pool(self) -> Pool:
        """The training scenes."""
        return load_pool(self.folder / "pool", self.plan.scenes, seed=self.run.seed, size=self.plan.size)

    def held_out(self) -> Pool:
        """Scenes of combinations that training never sees."""
        return load_pool(
            self.folder / "held_out", self.plan.held_out, seed=self.run.seed, split="held-out", size=self.plan.size
        )

    def stage(self, name: str) -> Stage:
        """A stage by name; ValueError if one that it builds on has not run."""
        recipe = self.plan.recipes[name]
        build: dict[str, Callable[[], Stage]] = {
            "vae": lambda: vae_stage(self.plan.vae, recipe, self.pool(), self.held_out(), self.folder),
            "decoder": lambda: decoder_stage(
                self.trained("vae"), self.latents(), recipe, self.pool(), self.held_out(), self.folder
            ),
            "clip": lambda: clip_stage(self.plan.clip, recipe, self.pool()),
            "t5": lambda: t5_stage(self.plan.t5, recipe, self.pool()),
            "dino": lambda: dino_stage(self.plan.dino, recipe, self.pool(), self.held_out(), self.folder),
            "flow": lambda: flow_stage(self.plan.flux, recipe, self.world(), self.folder),
            "distill": lambda: distill_stage(self.trained("flow"), recipe, self.world(), self.folder),
            "sd3": lambda: sd3_stage(self.plan.sd3, recipe, self.sd3_world(), embedded_flux(), self.folder),
        }
        return build[name]()

    def trained(self, name: str) -> Any:
        """The averaged weights of a stage that has run."""
        return finished(self.stage(name), self.run)

    def world(self) -> World:
        """Latents and frozen networks of the last two stages."""
        whitening = self.whitening()
        return World(
            self.pool(),
            self.latents(),
            whitening,
            self.held_out(),
            autoencoder=whitening.autoencoder(self.autoencoder()),
            clip=self.trained("clip").text,
            t5=self.trained("t5").network,
        )

    def sd3_world(self) -> Sd3World:
        """Scenes in the latents of the embedded autoencoder, and the embedded encoders."""
        folder = self.folder / "sd3"
        pool = load_pool(folder / "pool", self.plan.sd3_scenes, seed=self.run.seed, size=self.plan.size)
        return Sd3World.embedded(pool, self.held_out(), folder / "latents.npy")

    def autoencoder(self) -> Autoencoder:
        """Of stage `vae`, with the polished decoder as soon as there is one."""
        model = self.trained("vae")
        polished = Checkpoints(self.folder / "decoder").newest() is not None
        return with_decoder(model, self.trained("decoder")) if polished else model

    def latents(self) -> np.ndarray:
        """Of the training scenes, float16 [n, yl, xl, c], made once."""
        return encode_pool(self.trained("vae"), self.pool(), self.folder / "latents.npy")

    def whitening(self) -> Whitening:
        """Measured once and kept, so that all stages agree."""
        path = self.folder / "whitening.json"
        if not path.exists():
            measured = Whitening.measured(self.latents()[:MEASURED])
            path.write_text(json.dumps(dataclasses.asdict(measured) | {"mixing": measured.mixing.tolist()}))
        stored = json.loads(path.read_text())
        return Whitening(np.asarray(stored["mixing"], np.float32), stored["shift"], stored["scale"])
