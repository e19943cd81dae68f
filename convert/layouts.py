"""The two published layouts of a FLUX checkpoint, read into one description.

- diffusers: `transformer/`, `vae/`, `text_encoder/`, `text_encoder_2/`, `tokenizer/`, `tokenizer_2/`,
  `scheduler/`.
- Black Forest Labs: `flux1-*.safetensors` and `ae.safetensors`, with the folders of text encoders and
  tokenizers beside them.
"""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
from sflow_convert import autoencoder, flux, text_encoders
from sflow_convert.engine import ConversionError, Table
from sflow_convert.sources import Tensors, find_files, open_files, read_json

from sflow_jax.families.family import Family
from sflow_jax.families.flux1 import DEV_SCHEDULER, FLUX1, SCHNELL_SCHEDULER
from sflow_jax.models.autoencoder import Autoencoder, AutoencoderConfig
from sflow_jax.models.clip import ClipText, ClipTextConfig
from sflow_jax.models.flux1 import Flux, FluxConfig
from sflow_jax.models.t5 import T5Config, T5Encoder

PUBLISHED_PICTURE_SIZE = 1024
T5_TIED = "encoder.embed_tokens.weight"


@dataclasses.dataclass(frozen=True)
class Network:
    """One network of the source: what builds it, its config in our terms, its table, its tensors."""

    build: type
    config: Any
    table: Table
    tensors: Tensors


@dataclasses.dataclass(frozen=True)
class Source:
    """Everything that a conversion needs."""

    family: Family
    variant: str
    networks: dict[str, Network]
    scheduler: dict[str, Any]
    picture_size: int
    tokenizers: dict[str, Path]

    @property
    def configs(self) -> dict[str, Any]:
        """Network name → its config."""
        return {name: network.config for name, network in self.networks.items()}


def flux1_source(
    networks: dict[str, Network], scheduler: dict[str, Any], picture_size: int, text_encoders_folder: Path
) -> Source:
    """A FLUX.1 of any layout: dev for models with a guidance input, schnell for those without."""
    networks = networks | open_text_encoders(text_encoders_folder)
    variant = "dev" if networks["transformer"].config.guidance else "schnell"
    return Source(FLUX1, variant, networks, scheduler, picture_size, tokenizers(FLUX1, text_encoders_folder))


def rename_clip(name: str) -> str | None:
    """transformers writes CLIP text weights with and without a prefix; position ids are not weights."""
    name = name if name.startswith("text_model.") else f"text_model.{name}"
    return None if name == "text_model.embeddings.position_ids" else name


def rename_t5(name: str) -> str | None:
    """T5 files may store the tied embedding a second time, under the encoder's name."""
    return None if name == T5_TIED else name


def check_tied(files: list[Path]) -> None:
    """ConversionError unless the second copy of T5's embedding, where there is one, equals the first."""
    copies = open_files(files, lambda name: name if name in ("shared.weight", T5_TIED) else None)
    if len(copies.names) == 2:
        first, second = (copies.read(name, None) for name in copies.names)
        if not np.array_equal(first, second):
            raise ConversionError(
                f"{T5_TIED} differs from shared.weight in {files[0].parent}: this is no T5 of FLUX"
            )


def rename_single_file(name: str) -> str:
    """Some tools prefix the transformer's tensors."""
    return name.removeprefix("model.diffusion_model.")


def open_text_encoders(folder: Path) -> dict[str, Network]:
    """CLIP from `text_encoder/`, T5 from `text_encoder_2/`."""
    clip_folder, t5_folder = folder / "text_encoder", folder / "text_encoder_2"
    clip_config = ClipTextConfig.from_hf(read_json(clip_folder / "config.json"))
    t5_config = T5Config.from_hf(read_json(t5_folder / "config.json"))
    t5_files = find_files(t5_folder)
    check_tied(t5_files)
    return {
        "clip": Network(
            ClipText,
            clip_config,
            text_encoders.clip_text_table(clip_config),
            open_files(find_files(clip_folder), rename_clip),
        ),
        "t5": Network(T5Encoder, t5_config, text_encoders.t5_table(t5_config), open_files(t5_files, rename_t5)),
    }


def open_diffusers(folder: Path, text_encoders_folder: Path) -> Source:
    """The diffusers layout."""
    flux_config = FluxConfig.from_hf(read_json(folder / "transformer" / "config.json"))
    vae_json = read_json(folder / "vae" / "config.json")
    vae_config = AutoencoderConfig.from_hf(vae_json)
    networks = {
        "transformer": Network(
            Flux, flux_config, flux.diffusers_table(flux_config), open_files(find_files(folder / "transformer"))
        ),
        "autoencoder": Network(
            Autoencoder, vae_config, autoencoder.diffusers_table(vae_config), open_files(find_files(folder / "vae"))
        ),
    }
    scheduler = read_json(folder / "scheduler" / "scheduler_config.json")
    size = vae_json.get("sample_size", PUBLISHED_PICTURE_SIZE)
    return flux1_source(networks, scheduler, size, text_encoders_folder)


def open_single_files(transformer: Path, text_encoders_folder: Path) -> Source:
    """Black Forest Labs' layout, `ae.safetensors` beside the transformer's file."""
    transformer_tensors = open_files([transformer], rename_single_file)
    vae_tensors = open_files([transformer.parent / "ae.safetensors"])
    try:
        flux_config = flux.config_from_single_file(transformer_tensors.shapes)
        vae_config = autoencoder.config_from_single_file(vae_tensors.shapes)
    except (KeyError, ValueError) as error:
        raise ConversionError(f"{transformer.parent} does not hold a FLUX.1 model: no tensor {error}") from error
    networks = {
        "transformer": Network(Flux, flux_config, flux.single_file_table(flux_config), transformer_tensors),
        "autoencoder": Network(Autoencoder, vae_config, autoencoder.single_file_table(vae_config), vae_tensors),
    }
    scheduler = DEV_SCHEDULER if flux_config.guidance else SCHNELL_SCHEDULER
    return flux1_source(networks, scheduler, PUBLISHED_PICTURE_SIZE, text_encoders_folder)


def tokenizers(family: Family, folder: Path) -> dict[str, Path]:
    """The family's tokenizer folders by name; ConversionError if one is missing."""
    folders = {name: folder / name for name in family.tokenizers.values()}
    for path in folders.values():
        if not path.is_dir():
            raise ConversionError(f"{path} is missing; the source is not a complete checkpoint")
    return folders


def open_source(source: Path, text_encoders_folder: Path | None = None) -> Source:
    """Find out which layout `source` has, and open it; ConversionError if it is neither."""
    if not source.exists():
        raise ConversionError(f"no source at {source}")
    if source.is_file():
        return open_single_files(source, text_encoders_folder or source.parent)
    if (source / "transformer").is_dir():
        return open_diffusers(source, text_encoders_folder or source)
    singles = sorted(source.glob("flux1-*.safetensors"))
    if len(singles) == 1:
        return open_single_files(singles[0], text_encoders_folder or source)
    contents = (
        f"{len(singles)} flux1-*.safetensors files"
        if singles
        else "neither transformer/ nor flux1-*.safetensors (nor, as DINOv2 and CLIP have it, config.json)"
    )
    raise ConversionError(f"{source} is not a FLUX checkpoint in a known layout: it has {contents}")
