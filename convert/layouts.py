"""The published layouts of a checkpoint, recognised and read into one description; those of FLUX.1 here.

- diffusers: `transformer/`, `vae/`, `text_encoder/`, `text_encoder_2/`, `tokenizer/`, `tokenizer_2/`,
  `scheduler/`; also as the hub's cache has it, above `snapshots/`.
- Black Forest Labs: `flux1-*.safetensors` and `ae.safetensors`, with the folders of text encoders and
  tokenizers beside them.
- All in one file: the same with `model.diffusion_model.`, `vae.` and `text_encoders.` before the names, with the
  folders of tokenizers beside it.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from sflow_convert import flux, sd3_layouts, text_encoders
from sflow_convert.engine import ConversionError
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
from sflow_convert.sources import (
    INCOMPLETE,
    Tensors,
    check_kind,
    find_files,
    open_files,
    read_config,
)

from sflow_jax.families.flux1 import DEV_SCHEDULER, FLUX1, SCHNELL_SCHEDULER
from sflow_jax.models.autoencoder import picture_size
from sflow_jax.models.clip import ClipText, ClipTextConfig
from sflow_jax.models.flux1 import Flux, FluxConfig
from sflow_jax.models.sd3 import Sd3Config
from sflow_jax.models.t5 import T5Config, T5Encoder
from sflow_jax.storage.files import read_json

# Names of the two models, for those that cannot be told apart by what they are.
MODELS = {"flux-dev": "dev", "flux-schnell": "schnell"}
# What stands before the names of a single file's transformer, autoencoder and text encoders.
TRANSFORMER_PREFIXES = ("model.diffusion_model.", "diffusion_model.", "transformer.", "")
AUTOENCODER_PREFIXES = ("first_stage_model.", "vae.")
TEXT_PREFIXES = {"clip": "text_encoders.clip_l.transformer.", "t5": "text_encoders.t5xxl.transformer."}
# Input channels of single files of other models of the family.
OTHER_MODELS = {384: "FLUX.1 Fill", 128: "FLUX.1 Canny, Depth or another with a control picture"}


def open_source(source: Path, places: Places | Path | None = None) -> Source:
    """Find out which layout `source` has, and open it; ConversionError if it has none that is known.

    places: where the rest is; a path is that of the text encoders.
    """
    places = places if isinstance(places, Places) else Places(places)
    if places.model is not None and places.model not in MODELS:
        raise ConversionError(f"unknown `family` {places.model!r}; choose one of {', '.join(MODELS)}")
    for path in (source, places.text_encoders, places.autoencoder):
        if path is not None and not path.exists():
            raise ConversionError(f"no source at {path}")
    source = source if source.is_file() else snapshot(source)
    if sd3_layouts.recognises(source):
        return sd3_layouts.open_sd3(source, places)
    if source.is_file():
        return open_single_files(source, places)
    if (source / "transformer").is_dir():
        return open_diffusers(source, places)
    singles = sorted(source.glob("flux1-*.safetensors"))
    if len(singles) == 1:
        return open_single_files(singles[0], places)
    contents = (
        f"{len(singles)} flux1-*.safetensors files; name one of them"
        if singles
        else "neither transformer/ nor flux1-*.safetensors (nor, as DINOv2 and CLIP have it, config.json)"
    )
    raise ConversionError(f"{source} is not a FLUX checkpoint in a known layout: it has {contents}")


def snapshot(folder: Path) -> Path:
    """The snapshot that a folder of the hub's cache stands for; any other folder itself."""
    if not (folder / "snapshots").is_dir():
        return folder
    snapshots = sorted(path for path in (folder / "snapshots").iterdir() if path.is_dir())
    reference = folder / "refs" / "main"
    current = reference.read_text().strip() if reference.is_file() else ""
    chosen = [path for path in snapshots if path.name == current] or snapshots
    if len(chosen) != 1:
        raise ConversionError(f"{folder} has {len(chosen)} snapshots; name one of those in {folder / 'snapshots'}")
    return chosen[0]


def open_diffusers(folder: Path, places: Places) -> Source:
    """The diffusers layout."""
    check_pipeline(folder / "model_index.json")
    flux_config = read_config(folder / "transformer" / "config.json", FluxConfig.from_hf)
    tensors = open_files(find_files(folder / "transformer"))
    networks = {
        "transformer": Network(Flux, flux_config, flux.diffusers_table(flux_config), tensors),
        "autoencoder": open_autoencoder(places.autoencoder or folder / "vae"),
        **open_text_encoders(places.text_encoders or folder),
    }
    scheduler_file = folder / "scheduler" / "scheduler_config.json"
    scheduler = read_json(scheduler_file, dict[str, Any], ConversionError, INCOMPLETE)
    vae_config = (places.autoencoder or folder / "vae") / "config.json"
    size = read_config(vae_config, picture_size) if vae_config.is_file() else PUBLISHED_PICTURE_SIZE
    # Of models without guidance as an input schnell alone has a constant schedule.
    distilled = not scheduler.get("use_dynamic_shifting", False)
    variant = find_variant(flux_config, places.model, "schnell" if distilled else None, folder)
    return Source(FLUX1, variant, networks, scheduler, size, tokenizers(FLUX1, places.text_encoders or folder))


def check_configs(folder: Path) -> None:
    """ConversionError for a diffusers folder that is not supported, as far as its configs say.

    Its weights may be absent. Single files have no config.
    """
    if not (folder / "transformer").is_dir():
        return
    stated = folder / "transformer" / "config.json"
    if sd3_layouts.recognises(folder):
        read_config(stated, Sd3Config.from_hf)
        return
    check_pipeline(folder / "model_index.json")
    read_config(stated, FluxConfig.from_hf)


def check_pipeline(index: Path) -> None:
    """ConversionError for a pipeline of diffusers that is no FLUX.1 for text alone."""
    if not index.is_file():
        return
    pipeline = read_json(index, dict[str, Any], ConversionError, INCOMPLETE).get("_class_name", "FluxPipeline")
    if pipeline != "FluxPipeline":
        raise ConversionError(
            f"{index.parent} is of {pipeline}, which is not supported: FLUX.1 dev, schnell and Krea are"
        )


def find_variant(config: FluxConfig, model: str | None, seen: str | None, source: Path) -> str:
    """dev for models with a guidance input; of others what was asked for, or `seen`. ConversionError if unclear."""
    if config.guidance:
        if model == "flux-schnell":
            raise ConversionError(f"{source} has guidance as an input, so `family` flux-schnell is wrong")
        return "dev"
    if model is None and seen is None:
        raise ConversionError(
            f"{source} has no guidance input, and may be schnell or a de-distilled dev (which also needs true "
            f"guidance, not supported here); say `family` {' or '.join(MODELS)}"
        )
    return seen if model is None else MODELS[model]


def open_single_files(file: Path, places: Places) -> Source:
    """Black Forest Labs' layout, `ae.safetensors` beside the transformer's file; or all in one file."""
    everything = open_files([file])
    tensors = everything.only(without_prefix(everything, TRANSFORMER_PREFIXES, "img_in.weight"))
    check_kind(tensors)
    width = tensors.shapes.get("img_in.weight", (0, 0))[-1]
    if width in OTHER_MODELS:
        raise ConversionError(f"{file} is {OTHER_MODELS[width]} ({width} input channels), which is not supported")
    if "kontext" in file.name.lower():
        raise ConversionError(f"{file} is FLUX.1 Kontext by its name, which is not supported")
    try:
        flux_config = flux.config_from_single_file(tensors.shapes)
    except (KeyError, ValueError, IndexError, ZeroDivisionError) as error:
        raise ConversionError(f"{file} does not hold a FLUX.1 model: no tensor {error}") from error
    networks = {
        "transformer": Network(Flux, flux_config, flux.single_file_table(flux_config), tensors),
        "autoencoder": _inner_autoencoder(everything, file, places),
        **(_inner_text_encoders(everything) or open_text_encoders(places.text_encoders or file.parent)),
    }
    variant = find_variant(flux_config, places.model, "schnell" if "schnell" in file.name.lower() else None, file)
    scheduler = SCHNELL_SCHEDULER if variant == "schnell" else DEV_SCHEDULER
    folders = tokenizers(FLUX1, places.text_encoders or file.parent)
    return Source(FLUX1, variant, networks, scheduler, PUBLISHED_PICTURE_SIZE, folders)


def without_prefix(tensors: Tensors, prefixes: tuple[str, ...], mark: str) -> Callable[[str], str | None]:
    """A renaming that takes off the prefix of the network that has the tensor `mark`, and leaves out all others."""
    prefix = next((prefix for prefix in prefixes if prefix + mark in tensors.files), None)
    if prefix is None:
        # Nothing fits: all names are shown as they are.
        return lambda name: name
    inside = any(name.startswith(others) for name in tensors.files for others in TEXT_PREFIXES.values())
    elsewhere = (*AUTOENCODER_PREFIXES, "text_encoders.") if inside or prefix else ()
    return lambda name: (
        name.removeprefix(prefix) if name.startswith(prefix) and not name.startswith(elsewhere) else None
    )


def _inner_autoencoder(everything: Tensors, file: Path, places: Places) -> Network:
    """From the file itself, from where the user says, or from `ae.safetensors` beside it."""
    for prefix in AUTOENCODER_PREFIXES if places.autoencoder is None else ():
        inner = everything.below(prefix)
        if inner.files:
            return autoencoder_of(inner)
    return open_autoencoder(places.autoencoder or file.parent / "ae.safetensors")


def _inner_text_encoders(everything: Tensors) -> dict[str, Network] | None:
    """Both text encoders of a file that has all in one, at their published sizes; None where it has none."""
    clip, t5 = (everything.below(prefix) for prefix in TEXT_PREFIXES.values())
    if not clip.files or not t5.files:
        return None
    clip_config, t5_config = ClipTextConfig.large(), T5Config.xxl()
    # Their logit scale and projection belong to the whole CLIP.
    clip = clip.only(lambda name: rename_clip(name) if name.startswith("text_model.") else None)
    return {
        "clip": Network(ClipText, clip_config, text_encoders.clip_text_table(clip_config), clip),
        "t5": Network(T5Encoder, t5_config, text_encoders.t5_table(t5_config), tied(t5)),
    }


def open_text_encoders(folder: Path) -> dict[str, Network]:
    """CLIP from `text_encoder/`, T5 from `text_encoder_2/`."""
    clip_folder, t5_folder = folder / "text_encoder", folder / "text_encoder_2"
    clip_config = read_config(clip_folder / "config.json", ClipTextConfig.from_hf)
    t5_config = read_config(t5_folder / "config.json", T5Config.from_hf)
    clip, t5 = open_files(find_files(clip_folder), rename_clip), tied(open_files(find_files(t5_folder)))
    return {
        "clip": Network(ClipText, clip_config, text_encoders.clip_text_table(clip_config), clip),
        "t5": Network(T5Encoder, t5_config, text_encoders.t5_table(t5_config), t5),
    }
