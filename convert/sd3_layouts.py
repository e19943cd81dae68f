"""The published layouts of SD3 and SD3.5, read into one description.

- diffusers: `transformer/`, `vae/`, `text_encoder/` (CLIP-L), `text_encoder_2/` (CLIP-G), `text_encoder_3/` (T5,
  may be absent), the tokenizers of these, `scheduler/`.
- Stability: one file with prefixes for the transformer, the autoencoder and, in some files, the text encoders;
  otherwise these are in folders as diffusers has them, and so are the tokenizers always.
"""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from sflow_convert import text_encoders
from sflow_convert.engine import ConversionError, Shape
from sflow_convert.parts import (
    PUBLISHED_PICTURE_SIZE,
    Network,
    Places,
    Source,
    autoencoder_of,
    open_autoencoder,
    rename_clip,
    tied,
    tokenizers,
)
from sflow_convert.sd3 import config_from_single_file, diffusers_table, single_file_table
from sflow_convert.sources import INCOMPLETE, Tensors, find_files, open_files, read_config

from sflow_jax.families.sd3 import SCHEDULER, SD3, variant_of
from sflow_jax.models.autoencoder import AutoencoderConfig
from sflow_jax.models.clip import ClipText, ClipTextConfig
from sflow_jax.models.sd3 import Sd3, Sd3Config, sample_size
from sflow_jax.models.t5 import T5Config, T5Encoder
from sflow_jax.storage.files import read_json

PIPELINE, NETWORK = "StableDiffusion3Pipeline", "SD3Transformer2DModel"
TRANSFORMER, VAE = "model.diffusion_model.", "first_stage_model."
ENCODERS = {name: f"text_encoders.{name}." for name in ("clip_l", "clip_g", "t5xxl")}
WEIGHTS = "transformer."
# Beside the weights of a text encoder; nothing that the transformer sees depends on it.
LOGIT_SCALE = "logit_scale"
# Every single file has it, and no other model's.
FIRST = "joint_blocks.0.context_block.attn.qkv.weight"
# Names that a message quotes.
SHOWN = 8


def recognises(source: Path) -> bool:
    """Whether a folder or a file is one of SD3's layouts."""
    file = source if source.is_file() else _single_file(source)
    if file is not None:
        names = open_files([file]).files
        return FIRST in names or TRANSFORMER + FIRST in names
    for file, name in ((source / "transformer" / "config.json", NETWORK), (source / "model_index.json", PIPELINE)):
        if file.is_file():
            return read_json(file, dict[str, Any], ConversionError, INCOMPLETE).get("_class_name") == name
    return False


def open_sd3(source: Path, places: Places) -> Source:
    """Either layout. places: where encoders, tokenizers and autoencoder are, by default in or beside the source."""
    if places.model is not None:
        raise ConversionError(f"{source} is SD3, so `family` {places.model} is wrong")
    single = source if source.is_file() else _single_file(source)
    return open_diffusers(source, places) if single is None else open_single_file(single, places)


def open_diffusers(folder: Path, places: Places) -> Source:
    """The diffusers layout."""
    stated = folder / "transformer" / "config.json"
    config = read_config(stated, Sd3Config.from_hf)
    tensors = open_files(find_files(folder / "transformer"))
    networks = {
        "transformer": Network(Sd3, config, diffusers_table(config), tensors),
        "autoencoder": _autoencoder(places.autoencoder or folder / "vae"),
        **open_text_encoders(places.text_encoders or folder),
    }
    scheduler_file = folder / "scheduler" / "scheduler_config.json"
    scheduler = read_json(scheduler_file, dict[str, Any], ConversionError, INCOMPLETE)
    size = read_config(stated, sample_size) * networks["autoencoder"].config.downsampling
    return _source(networks, scheduler, size, places.text_encoders or folder)


def open_text_encoders(folder: Path) -> dict[str, Network]:
    """Both CLIPs, and T5 where there is one."""
    networks = {}
    for name, place in (("clip_l", "text_encoder"), ("clip_g", "text_encoder_2")):
        config = read_config(folder / place / "config.json", lambda x: ClipTextConfig.from_hf(x, projected=True))
        tensors = open_files(find_files(folder / place), rename_clip)
        networks[name] = Network(ClipText, config, text_encoders.clip_text_table(config), tensors)
    place = folder / "text_encoder_3"
    if place.is_dir():
        config = read_config(place / "config.json", T5Config.from_hf)
        tensors = tied(open_files(find_files(place)))
        networks["t5"] = Network(T5Encoder, config, text_encoders.t5_table(config), tensors)
    return networks


def open_single_file(file: Path, places: Places) -> Source:
    """Stability's layout: what the file does not hold is in folders, and the tokenizers always are."""
    everything, folder = open_files([file]), places.text_encoders or file.parent
    prefix = TRANSFORMER if TRANSFORMER + FIRST in everything.files else ""
    encoders = {name: everything.below(start) for name, start in ENCODERS.items()}
    encoders = {name: tensors for name, tensors in encoders.items() if tensors.files}
    if prefix:
        _check_names(everything, file)
    tensors = everything.below(prefix)
    networks = {
        "transformer": _single_file_transformer(tensors, file),
        "autoencoder": _single_file_autoencoder(everything.below(VAE), places.autoencoder or folder / "vae"),
        **(_single_file_encoders(encoders, file) if encoders else open_text_encoders(folder)),
    }
    return _source(networks, SCHEDULER, PUBLISHED_PICTURE_SIZE, folder)


def _check_names(everything: Tensors, file: Path) -> None:
    """ConversionError for tensors that no network takes."""
    inner = (f"{start}{part}" for start in ENCODERS.values() for part in (WEIGHTS, LOGIT_SCALE))
    known = (TRANSFORMER, VAE, *inner)
    strange = sorted(name for name in everything.files if not name.startswith(known))
    if strange:
        raise ConversionError(f"{file} has tensors that SD3 does not: {', '.join(strange[:SHOWN])}")


def _single_file_transformer(tensors: Tensors, file: Path) -> Network:
    try:
        config = config_from_single_file(tensors.shapes)
    except (KeyError, ValueError, IndexError, ZeroDivisionError) as error:
        raise ConversionError(f"{file} does not hold an SD3 model: no tensor {error}") from error
    return Network(Sd3, config, single_file_table(config), tensors)


def _single_file_autoencoder(inner: Tensors, elsewhere: Path) -> Network:
    """From the file itself, or from where it is otherwise."""
    return _scaled(autoencoder_of(inner)) if inner.files else _autoencoder(elsewhere)


def _autoencoder(place: Path) -> Network:
    """A folder of diffusers, or a single file."""
    network = open_autoencoder(place)
    return network if place.is_dir() else _scaled(network)


def _scaled(network: Network) -> Network:
    """An autoencoder that came without a config: with SD3's scaling."""
    published = AutoencoderConfig.sd3()
    scaling = {"scaling_factor": published.scaling_factor, "shift_factor": published.shift_factor}
    return dataclasses.replace(network, config=dataclasses.replace(network.config, **scaling))


def _single_file_encoders(encoders: Mapping[str, Tensors], file: Path) -> dict[str, Network]:
    """What a file holds of both CLIPs and T5; ConversionError where it has one CLIP alone."""
    if not {"clip_l", "clip_g"} <= encoders.keys():
        raise ConversionError(f"{file} holds {', '.join(encoders)}, but not both CLIPs")
    networks = {}
    for name, build in (("clip_l", ClipTextConfig.large), ("clip_g", ClipTextConfig.giant)):
        tensors = encoders[name].below(WEIGHTS).only(rename_clip)
        config = _read_sizes(lambda shapes, build=build: _clip_sizes(build(), shapes), tensors, file)
        networks[name] = Network(ClipText, config, text_encoders.clip_text_table(config), tensors)
    if "t5xxl" in encoders:
        tensors = tied(encoders["t5xxl"].below(WEIGHTS))
        config = _read_sizes(_t5_sizes, tensors, file)
        networks["t5"] = Network(T5Encoder, config, text_encoders.t5_table(config), tensors)
    return networks


def _read_sizes(read: Callable[[Mapping[str, Shape]], Any], tensors: Tensors, file: Path) -> Any:
    """A config from tensors' shapes; ConversionError names a missing one."""
    try:
        return read(tensors.shapes)
    except (KeyError, ValueError, IndexError, ZeroDivisionError) as error:
        raise ConversionError(f"{file} does not hold SD3's text encoders: no tensor {error}") from error


def _t5_sizes(shapes: Mapping[str, Shape]) -> T5Config:
    block = "encoder.block.0.layer.0.SelfAttention"
    buckets, heads = shapes[f"{block}.relative_attention_bias.weight"]
    vocabulary, width = shapes["shared.weight"]
    return dataclasses.replace(
        T5Config.xxl(),
        vocabulary=vocabulary,
        width=width,
        heads=heads,
        head_dim=shapes[f"{block}.q.weight"][0] // heads,
        mlp_width=shapes["encoder.block.0.layer.1.DenseReluDense.wi_0.weight"][0],
        layers=len({name.split(".")[2] for name in shapes if name.startswith("encoder.block.")}),
        position_buckets=buckets,
    )


def _clip_sizes(config: ClipTextConfig, shapes: Mapping[str, Shape]) -> ClipTextConfig:
    """A CLIP with the sizes that a file's tensors have. Its heads keep the published width of 64.

    A CLIP-L without projection in the file has none: its pooled vector is what others multiply by the identity.
    """
    blocks = {name.split(".")[3] for name in shapes if name.startswith("text_model.encoder.layers.")}
    vocabulary, width = shapes["text_model.embeddings.token_embedding.weight"]
    projection = shapes.get("text_projection.weight")
    return dataclasses.replace(
        config,
        vocabulary=vocabulary,
        width=width,
        heads=width * config.heads // config.width,
        mlp_width=shapes["text_model.encoder.layers.0.mlp.fc1.weight"][0],
        layers=len(blocks),
        positions=shapes["text_model.embeddings.position_embedding.weight"][0],
        projection=projection and projection[0],
    )


def _single_file(folder: Path) -> Path | None:
    """The only `sd3*.safetensors` of a folder."""
    singles = sorted(folder.glob("sd3*.safetensors"))
    return singles[0] if len(singles) == 1 and not (folder / "transformer").is_dir() else None


def _source(networks: dict[str, Network], scheduler: dict[str, Any], size: int, folder: Path) -> Source:
    variant = variant_of(networks["transformer"].config)
    return Source(SD3, variant, networks, scheduler, size, tokenizers(SD3, folder, networks))
