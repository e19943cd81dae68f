"""Published DINOv2 and CLIP folders (Hugging Face layout) → a features folder that `sflow` reads."""

import dataclasses
from pathlib import Path

import jax.numpy as jnp
from etils import epath
from flax import nnx
from jax.typing import DTypeLike
from sflow_convert.engine import ConversionError
from sflow_convert.job import (
    check_free,
    check_room,
    checked_reads,
    in_memory,
    record_checksums,
    source_digests,
    stored_dtype,
    write_networks,
)
from sflow_convert.layouts import Network
from sflow_convert.sources import find_files, open_files, read_config
from sflow_convert.vision import clip_table, dinov2_table

from sflow_jax.measures.features import INFO_FILE, ITEM, NETWORKS, FeaturesInfo
from sflow_jax.measures.preprocessing import Preprocessing
from sflow_jax.models.clip_vision import ClipConfig
from sflow_jax.models.dinov2 import Dinov2Config
from sflow_jax.storage.files import write_whole
from sflow_jax.storage.folders import new_folder

CONFIG_FILE, PREPROCESSOR_FILE = "config.json", "preprocessor_config.json"
# model_type of config.json → kind, how its config is read, its table.
MODEL_TYPES = {
    "dinov2": ("dinov2", Dinov2Config.from_hf, dinov2_table),
    "dinov2_with_registers": (
        "dinov2",
        # transformers leaves out what equals its defaults.
        lambda config: Dinov2Config.from_hf({"num_register_tokens": 4} | config),
        dinov2_table,
    ),
    "clip": ("clip", ClipConfig.from_hf, clip_table),
}


@dataclasses.dataclass(frozen=True)
class FeatureSource:
    """Everything that a conversion needs. kind: dinov2 or clip."""

    kind: str
    network: Network
    preprocessing: Preprocessing

    def info(self, dtype: str | None = None) -> FeaturesInfo:
        """What to record of it, without digests; by default of weights in the dtype that they have here."""
        return FeaturesInfo(self.kind, self.network.config, self.preprocessing, dtype or stored_dtype(self.network))


def is_feature_folder(source: Path) -> bool:
    """Whether a folder is one model of transformers; FLUX checkpoints have no such config at the top."""
    return (source / CONFIG_FILE).is_file() and _model_type(source) is not None


def _model_type(folder: Path) -> str | None:
    """What transformers calls the model of a folder."""
    model_type = read_config(folder / CONFIG_FILE, lambda config: config.get("model_type"))
    return None if model_type is None else str(model_type)


def check_features(folder: Path) -> str:
    """What transformers calls the model; ConversionError where it is no feature network. Reads no weights."""
    model_type = _model_type(folder)
    if model_type not in MODEL_TYPES:
        raise ConversionError(
            f"{folder / CONFIG_FILE}: model_type {model_type!r:.40} is no feature network; those are "
            f"{', '.join(MODEL_TYPES)}"
        )
    return model_type


def rename(name: str) -> str | None:
    """Older CLIP files store position numbers, which are not weights."""
    return None if name.endswith(".embeddings.position_ids") else name


def open_features(folder: Path) -> FeatureSource:
    """Open a published folder; ConversionError for other models, and for what is missing or not supported."""
    model_type = check_features(folder)
    kind, read, table = MODEL_TYPES[model_type]
    config = read_config(folder / CONFIG_FILE, read)
    preprocessing = read_config(folder / PREPROCESSOR_FILE, Preprocessing.from_hf)
    network = Network(NETWORKS[kind], config, table(config), open_files(find_files(folder), rename))
    return FeatureSource(kind, network, preprocessing)


def convert_features(
    source: FeatureSource,
    destination: epath.PathLike,
    *,
    dtype: str | None = None,
    overwrite: bool = False,
    progress: bool = True,
) -> FeaturesInfo:
    """Write `source` as a features folder at `destination`, whole or not at all.

    dtype: one of `sflow_convert.job.DTYPES`, by default the source's own. Raises ConversionError for a source that
    does not fit, and for a destination that exists (unless `overwrite`, and then only features are replaced).
    """
    check_free(destination, INFO_FILE, "a features folder", overwrite)
    networks = {ITEM: source.network}
    reads, info = checked_reads(networks), source.info(dtype)
    check_room(destination, reads, info.dtype)
    with new_folder(destination, replace=overwrite) as folder:
        info = dataclasses.replace(info, source_digests=source_digests(networks, progress))
        write_networks(folder, networks, reads, info.dtype, progress)
        write_whole(folder / INFO_FILE, info.to_json())
        record_checksums(folder, INFO_FILE, progress)
    return info


def import_features(folder: Path, dtype: DTypeLike = "float32") -> tuple[FeaturesInfo, nnx.Module]:
    """A published folder straight into memory: what it is, and the network in `dtype`."""
    source = open_features(folder)
    digests = source_digests({ITEM: source.network}, progress=False)
    info = dataclasses.replace(source.info(), source_digests=digests)
    return info, in_memory(source.network, jnp.dtype(dtype).name)
