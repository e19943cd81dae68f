"""What every layout is read into: networks with their tables and tensors, and the parts that families share."""

import dataclasses
from collections.abc import Container
from pathlib import Path
from typing import Any

import numpy as np
from sflow_convert import autoencoder
from sflow_convert.engine import ConversionError, Table
from sflow_convert.sources import Tensors, check_kind, find_files, open_files, read_config

from sflow_jax.families.family import Family
from sflow_jax.models.autoencoder import Autoencoder, AutoencoderConfig

PUBLISHED_PICTURE_SIZE = 1024
SHARED, TIED = "shared.weight", "encoder.embed_tokens.weight"


@dataclasses.dataclass(frozen=True)
class Network:
    """One network of the source: what builds it, its config in our terms, its table, its tensors."""

    build: type
    config: Any
    table: Table
    tensors: Tensors

    def __post_init__(self) -> None:
        check_kind(self.tensors)


@dataclasses.dataclass(frozen=True)
class Source:
    """Everything that a conversion needs."""

    family: Family
    variant: str
    networks: dict[str, Network]
    scheduler: dict[str, Any]
    picture_size: int
    tokenizers: dict[str, Path]

    def __post_init__(self) -> None:
        try:
            self.family.schedule(self.scheduler)
        except ValueError as error:
            raise ConversionError(f"scheduler_config.json: {error}") from error

    @property
    def configs(self) -> dict[str, Any]:
        """Network name → its config."""
        return {name: network.config for name, network in self.networks.items()}


@dataclasses.dataclass(frozen=True)
class Places:
    """Where parts of a source lie that are not in it. model: which one it is, where that cannot be seen."""

    text_encoders: Path | None = None
    autoencoder: Path | None = None
    model: str | None = None


HERE = Places()


def open_autoencoder(place: Path) -> Network:
    """A folder of diffusers, or a single file with its names or Black Forest Labs'."""
    if place.is_file() or place.suffix == ".safetensors":
        return autoencoder_of(open_files([place]))
    config = read_config(place / "config.json", AutoencoderConfig.from_hf)
    return Network(Autoencoder, config, autoencoder.diffusers_table(config), open_files(find_files(place)))


def autoencoder_of(tensors: Tensors) -> Network:
    """One whose sizes are those of its tensors."""
    diffusers = any(name.startswith("encoder.down_blocks.") for name in tensors.files)
    try:
        config = autoencoder.config_from_single_file(tensors.shapes, diffusers=diffusers)
    except (KeyError, ValueError, IndexError) as error:
        where = tensors.paths[0] if tensors.paths else "the file"
        raise ConversionError(f"{where} does not hold FLUX's autoencoder: no tensor {error}") from error
    table = autoencoder.diffusers_table if diffusers else autoencoder.single_file_table
    return Network(Autoencoder, config, table(config), tensors)


def rename_clip(name: str) -> str | None:
    """transformers writes CLIP text weights with and without a prefix; position ids are not weights."""
    name = name if name.startswith(("text_model.", "text_projection.")) else f"text_model.{name}"
    return None if name == "text_model.embeddings.position_ids" else name


def rename_t5(name: str) -> str | None:
    """T5 files may store the tied embedding a second time, under the encoder's name."""
    return None if name == TIED else name


def tied(tensors: Tensors) -> Tensors:
    """T5's tensors with the embedding once; ConversionError where two copies of it differ."""
    if SHARED not in tensors.files:
        return tensors.only(lambda name: SHARED if name == TIED else name)
    if TIED in tensors.files:
        first, second = (tensors.read(name, None) for name in (SHARED, TIED))
        if not np.array_equal(first, second):
            raise ConversionError(
                f"{TIED} differs from {SHARED} in {tensors.files[SHARED].parent}: this is no T5 of FLUX"
            )
    return tensors.only(rename_t5)


def tokenizers(family: Family, folder: Path, networks: Container[str] | None = None) -> dict[str, Path]:
    """The tokenizer folders of a family, or of some networks, by name; ConversionError if one is missing."""
    wanted = (place for name, place in family.tokenizers.items() if networks is None or name in networks)
    folders = {name: folder / name for name in wanted}
    for path in folders.values():
        if not path.is_dir():
            raise ConversionError(f"{path} is missing; the source is not a complete checkpoint")
    return folders
