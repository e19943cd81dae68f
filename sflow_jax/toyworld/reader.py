"""Reads the attributes of a scene off its picture, generated or drawn.

The network (DINOv2's architecture) and its linear heads were trained on drawn scenes only.
"""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from safetensors.numpy import load_file
from sflow_convert.job import import_network
from sflow_convert.vision import dinov2_table

from sflow_jax.embedded import ASSETS
from sflow_jax.models.dinov2 import Dinov2, Dinov2Config

BATCH = 64


@jax.jit
def _class_tokens(
    network: Dinov2, images: Float[Array, "b y x 3"], mean: Array, spread: Array
) -> Float[Array, "b d"]:
    return network((images - mean) / spread)[:, 0].astype(jnp.float32)


class AttributeReader:
    """What a picture of the toy world shows.

    named: attribute → its values, in the order of the classifier's outputs.
    """

    def __init__(self, folder: Path = ASSETS):
        config = Dinov2Config.from_hf(json.loads((folder / "dinov2" / "config.json").read_text()))
        self.network = import_network(Dinov2, config, dinov2_table(config), folder / "dinov2")
        told = json.loads((folder / "dinov2" / "preprocessor_config.json").read_text())
        self.mean, self.spread = (
            np.asarray(told[name], np.float32).reshape(1, 1, 1, 3) for name in ("image_mean", "image_std")
        )
        self.named: dict[str, list[str]] = json.loads((folder / "reader" / "config.json").read_text())["named"]
        self.heads = {
            name: value.astype(np.float32)
            for name, value in load_file(folder / "reader" / "model.safetensors").items()
        }

    def features(self, images: Float[np.ndarray, "n y x 3"]) -> Float[np.ndarray, "n d"]:
        """DINO's global feature of pictures in 0..1, float32."""
        parts = []
        for start in range(0, len(images), BATCH):
            # Filled up to a full batch, so that any number of pictures compiles once.
            rows = np.minimum(np.arange(start, start + BATCH), len(images) - 1)
            tokens = _class_tokens(self.network, images[rows], self.mean, self.spread)
            parts.append(np.asarray(tokens)[: len(images) - start])
        return np.concatenate(parts)

    def read(self, images: Float[np.ndarray, "n y x 3"]) -> list[dict[str, str]]:
        """Attribute → value of every picture in 0..1."""
        features = self.features(images)
        found = {}
        for name, values in self.named.items():
            logits = features @ self.heads[f"{name}.weight"].T + self.heads[f"{name}.bias"][None]
            found[name] = [values[i] for i in logits.argmax(axis=-1)]
        return [dict(zip(found, row)) for row in zip(*found.values())]
