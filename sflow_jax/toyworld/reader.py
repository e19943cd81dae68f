"""Reads the attributes of a scene off its picture, generated or drawn.

The network (DINOv2's architecture) and its linear heads were trained on drawn scenes only.
"""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from safetensors.numpy import load_file

from sflow_jax.arrays import AnyArray
from sflow_jax.catalogue import ASSETS, open_published_features
from sflow_jax.models.dinov2 import Dinov2

BATCH = 64


@dataclasses.dataclass(frozen=True)
class Reading:
    """What n pictures show.

    named: attribute → value, a dictionary a picture. unnamed: details scaled to −1..1, [n, details].
    features: DINO's global feature, [n, d].
    """

    named: list[dict[str, str]]
    unnamed: Float[np.ndarray, "n details"]
    features: Float[np.ndarray, "n d"]


@jax.jit
def _class_tokens(
    network: Dinov2, images: Float[AnyArray, "b y x 3"], mean: AnyArray, spread: AnyArray
) -> Float[Array, "b d"]:
    return network((images - mean) / spread)[:, 0].astype(jnp.float32)


class AttributeReader:
    """The embedded network and heads; call it with pictures in 0..1."""

    def __init__(self, folder: Path = ASSETS):
        features = open_published_features(folder / "dinov2")
        self.network, statistics = features.network, (features.preprocessing.mean, features.preprocessing.std)
        self.mean, self.spread = (np.asarray(values, np.float32).reshape(1, 1, 1, 3) for values in statistics)
        config = json.loads((folder / "reader" / "config.json").read_text())
        self.values: dict[str, list[str]] = config["named"]
        self.details = list(config["unnamed"])
        heads = load_file(folder / "reader" / "model.safetensors")
        self.heads = {name: value.astype(np.float32) for name, value in heads.items()}

    def __call__(self, images: Float[np.ndarray, "n y x 3"]) -> Reading:
        """Everything the network says of pictures."""
        parts = []
        for start in range(0, len(images), BATCH):
            # Filled up to a full batch, so that any number of pictures compiles once.
            rows = np.minimum(np.arange(start, start + BATCH), len(images) - 1)
            tokens = _class_tokens(self.network, images[rows], self.mean, self.spread)
            parts.append(np.asarray(tokens)[: len(images) - start])
        features = np.concatenate(parts)
        columns = {}
        for name, values in self.values.items():
            columns[name] = [values[i] for i in self._scores(name, features).argmax(axis=-1)]
        named = [dict(zip(columns, row)) for row in zip(*columns.values())]
        return Reading(named, self._scores("unnamed", features), features)

    def _scores(self, head: str, features: Float[np.ndarray, "n d"]) -> Float[np.ndarray, "n outputs"]:
        return features @ self.heads[f"{head}.weight"].T + self.heads[f"{head}.bias"][None]
