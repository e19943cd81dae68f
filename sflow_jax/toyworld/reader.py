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
from sflow_jax.toyworld.attributes import DETAIL_RANGES, Details
from sflow_jax.toyworld.scenes import Scene

BATCH = 64


@dataclasses.dataclass(frozen=True)
class Reading:
    """What n pictures show.

    named: attribute → value, a dictionary a picture. unnamed: details scaled to −1..1 in the order of
    `DETAIL_RANGES`, then facing, [n, details]. features: DINO's global feature, [n, d].
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

    def scenes(self, images: Float[np.ndarray, "n y x 3"]) -> list[Scene]:
        """The scenes that pictures show, details included: drawn again they are like them, if not the same."""
        reading = self(images)
        return [self._scene(named, unnamed) for named, unnamed in zip(reading.named, reading.unnamed, strict=True)]

    def _scene(self, named: dict[str, str], unnamed: Float[np.ndarray, " details"]) -> Scene:
        *scaled, facing = np.clip(unnamed, -1, 1).tolist()
        ranges = zip(DETAIL_RANGES.items(), scaled, strict=True)
        details = {name: low + (high - low) * (value + 1) / 2 for (name, (low, high)), value in ranges}
        shown = {name: value for name, value in named.items() if value != "none" or name in ("hat", "object")}
        if named["object"] == "none" or "side" not in shown:
            shown["side"] = "right" if facing > 0 else "left"
        return Scene(**shown, details=Details(**details | {"stripes": float(details["stripes"] > 0.5)}))

    def _scores(self, head: str, features: Float[np.ndarray, "n d"]) -> Float[np.ndarray, "n outputs"]:
        return features @ self.heads[f"{head}.weight"].T + self.heads[f"{head}.bias"][None]
