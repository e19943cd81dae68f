"""The networks that judge pictures: DINOv2, CLIP with its tokenizer, LPIPS."""

import dataclasses
import hashlib
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from etils import epath
from jaxtyping import Float, UInt8

from sflow_jax.arrays import AnyArray
from sflow_jax.catalogue import find_checkpoint, load_features
from sflow_jax.errors import SettingError
from sflow_jax.families.text import tokenize
from sflow_jax.measures.features import Features
from sflow_jax.measures.lpips import Lpips, load_lpips
from sflow_jax.models.clip import LEGACY_END_OF_TEXT
from sflow_jax.settings import EMBEDDED_MODELS, EvaluationSettings
from sflow_jax.storage.checkpoint import ModelInfo
from sflow_jax.storage.tokenizers import load_tokenizer


@jax.jit
def _picture_features(features: Features, pictures: UInt8[AnyArray, "b y x 3"]) -> jax.Array:
    return features(pictures)


@jax.jit
def _text_features(features: Features, token_ids: AnyArray) -> jax.Array:
    return features.network.text_features(token_ids)


@dataclasses.dataclass(frozen=True)
class CaptionedClip:
    """CLIP with the tokenizer that makes captions readable to it."""

    features: Features
    tokenizer: Any

    def pictures(self, pictures: UInt8[np.ndarray, "b y x 3"]) -> Float[np.ndarray, "b p"]:
        """Unit vectors of pictures, float32."""
        return np.asarray(_picture_features(self.features, pictures))

    def captions(self, captions: Sequence[str]) -> Float[np.ndarray, "b p"]:
        """Unit vectors of captions, float32; what is too long is cut, with a warning."""
        positions = self.features.network.config.text.positions
        ids = [tokenize(self.tokenizer, caption, positions, "CLIP") for caption in captions]
        return np.asarray(_text_features(self.features, np.concatenate(ids)))


@dataclasses.dataclass(frozen=True)
class Networks:
    """Those that were named; None for the others."""

    dino: Features | None = None
    clip: CaptionedClip | None = None
    lpips: Lpips | None = None
    lpips_digest: str | None = None

    def record(self) -> dict[str, str]:
        """Name and digest of each."""
        stored = {"dino": self.dino, "clip": self.clip and self.clip.features}
        record = {name: f"{x.name} ({x.digest})" for name, x in stored.items() if x is not None}
        return record | ({"lpips": f"SqueezeNet 1.1 ({self.lpips_digest})"} if self.lpips_digest else {})


def load_networks(settings: EvaluationSettings, checkpoint: str, info: ModelInfo) -> Networks:
    """The networks that settings name, or that ship for the embedded models. checkpoint, info: of the model.

    SettingError for networks of another kind, for files that do not fit, and for a tokenizer that is not CLIP's.
    """
    embedded = checkpoint in EMBEDDED_MODELS
    dino = _load(settings.features or ("toyworld" if embedded else None), "dinov2")
    clip = _load(settings.clip or ("toyworld-clip" if embedded else None), "clip")
    captioned = None if clip is None else CaptionedClip(clip, _tokenizer(settings, checkpoint, info, clip))
    if settings.lpips is None:
        return Networks(dino, captioned)
    network = load_lpips(settings.lpips)
    digest = hashlib.sha256(epath.Path(settings.lpips).read_bytes()).hexdigest()[:16]
    return Networks(dino, captioned, network, digest)


def _load(name: str | None, kind: str) -> Features | None:
    if name is None:
        return None
    features = load_features(name)
    if features.kind != kind:
        raise SettingError(f"{name} is a {features.kind}, where a {kind} is needed")
    return features


def _tokenizer(settings: EvaluationSettings, checkpoint: str, info: ModelInfo, clip: Features) -> Any:
    """The one that was named, or the model's own for its CLIP."""
    place, own = settings.clip_tokenizer, info.family.tokenizers
    name = next((name for name in own if name.startswith("clip")), None)
    if place is None and name is not None:
        place = find_checkpoint(checkpoint) / own[name]
    if place is None:
        raise SettingError(f"{info.title} has no tokenizer for CLIP; name a folder with `clip_tokenizer`")
    tokenizer, text = load_tokenizer(place), clip.network.config.text
    last = text.vocabulary - 1 if text.end_of_text == LEGACY_END_OF_TEXT else text.end_of_text
    if (len(tokenizer), tokenizer.eos_token_id) != (text.vocabulary, last):
        raise SettingError(
            f"the tokenizer at {place} has {len(tokenizer)} words and ends texts with {tokenizer.eos_token_id}, "
            f"where {clip.name} has {text.vocabulary} and {last}; name its own folder with `clip_tokenizer`"
        )
    return tokenizer
