"""`sflow-convert`: a published FLUX.1 or SD3 checkpoint, DINOv2 or CLIP → a folder that `sflow` reads."""

from pathlib import Path
from typing import TYPE_CHECKING

import click

from sflow_jax.commands.command import Command
from sflow_jax.commands.console import run_command
from sflow_jax.commands.options import refuse_unused
from sflow_jax.commands.output import QUIET, asked, say, warn
from sflow_jax.errors import SettingError

if TYPE_CHECKING:
    from sflow_convert.hub import Repository
    from sflow_convert.parts import Places

DTYPES = ("float32", "float16", "bfloat16")


@click.command(
    cls=Command,
    epilog="""
    sflow-convert black-forest-labs/FLUX.1-dev checkpoints/flux-dev

    sflow-convert ~/models/FLUX.1-dev checkpoints/flux-dev

    sflow-convert ~/models/flux1-dev.safetensors checkpoints/flux-dev --text-encoders ~/models/FLUX.1-dev

    sflow-convert ~/models/FLUX.1-dev checkpoints/drawn --lora drawing.safetensors:0.8

    sflow-convert ~/models/FLUX.1-schnell gs://bucket/flux-schnell --dtype bfloat16 --overwrite

    sflow-convert facebook/dinov2-giant checkpoints/dinov2-giant
    """,
)
@click.argument("source")
@click.argument("destination", required=False)
@click.option("--dtype", type=click.Choice(DTYPES), help="Dtype to store; by default the source's own.")
@click.option("--overwrite", is_flag=True, help="Replace a checkpoint (or features) at DESTINATION.")
@click.option(
    "--text-encoders",
    type=click.Path(path_type=Path),
    help="Folder of the text encoders (text_encoder …) and tokenizers (tokenizer …), if not in SOURCE.",
)
@click.option(
    "--autoencoder",
    type=click.Path(path_type=Path),
    help="A VAE's folder or file such as ae.safetensors, if not in SOURCE.",
)
@click.option("--family", help="flux-dev or flux-schnell, for files that do not say which they are.")
@click.option(
    "--lora",
    multiple=True,
    metavar="FILE[:SCALE]",
    help="Merge a LoRA into the weights, times SCALE (1); may be repeated.",
)
@click.option("--vital-layers", help="Record these layers as vital, such as 0,1,17-18.")
def command(
    source: str,
    destination: str | None,
    dtype: str | None,
    overwrite: bool,
    text_encoders: Path | None,
    autoencoder: Path | None,
    family: str | None,
    lora: tuple[str, ...],
    vital_layers: str | None,
) -> None:
    """Convert a checkpoint of FLUX.1 (dev, schnell, Krea), SD3 or SD3.5 from SOURCE to DESTINATION.

    SOURCE is a diffusers folder (also one of the hub's cache); or Black Forest Labs' flux1-*.safetensors
    (or its folder) with ae.safetensors beside it; or Stability's sd3*.safetensors, with or without text encoders
    in it; or one file with all networks. Tokenizers are always folders, beside a file or in --text-encoders.
    Or SOURCE is a Hugging Face folder of DINOv2 or CLIP, with which pictures are compared. Only safetensors are
    read. DESTINATION is a new folder, local or gs://.

    Or SOURCE is ORG/NAME or ORG/NAME@REVISION of the Hugging Face Hub, where no such path is: what conversion
    reads of it is downloaded into the Hub's cache (HF_HOME, HF_TOKEN, HF_HUB_OFFLINE … are honoured). Without
    DESTINATION it is kept where --model ORG/NAME finds it.
    """
    from sflow_convert.features import convert_features, is_feature_folder, open_features
    from sflow_convert.hub import parse_repository
    from sflow_convert.job import convert
    from sflow_convert.layouts import Places, open_source
    from sflow_convert.lora import Lora

    from sflow_jax.catalogue import repository_title
    from sflow_jax.sampling.control import parse_layers

    layers = None if vital_layers is None else parse_layers(vital_layers)
    if isinstance(layers, str):
        raise SettingError(f"`vital_layers` takes numbers, not {layers!r}")
    merged = [Lora.parse(text) for text in lora]
    places, repository = Places(text_encoders, autoencoder, family), parse_repository(source)
    folder, title = Path(source), ""
    if repository is not None:
        folder, destination = fetched(repository, destination, places, dtype, overwrite)
        title = repository_title(repository)
    if destination is None:
        raise SettingError("DESTINATION is missing; only a repository of the Hub has a place of its own")
    if is_feature_folder(folder):
        refuse_unused(
            ["text_encoders", "autoencoder", "family", "lora", "vital_layers"],
            f"on {source}, for these are for FLUX checkpoints",
        )
        features = convert_features(
            open_features(folder), destination, dtype=dtype, overwrite=overwrite, progress=not asked(QUIET)
        )
        say(f"{destination}: features of {features.name}, {features.dtype}.")
        say_what_stays(repository)
        return
    info = convert(
        open_source(folder, places),
        destination,
        dtype=dtype,
        overwrite=overwrite,
        vital_layers=layers,
        title=title,
        loras=merged,
        progress=not asked(QUIET),
    )
    say(f"{destination}: {info.title}, {info.dtype}. Look at it with: sflow info {destination}")
    say_what_stays(repository)


def fetched(
    repository: "Repository", destination: str | None, places: "Places", dtype: str | None, overwrite: bool
) -> "tuple[Path, str]":
    """A repository's files, downloaded unless the destination is taken, and where they go."""
    from sflow_convert.hub import fetch
    from sflow_convert.job import check_free

    from sflow_jax.catalogue import repository_folder
    from sflow_jax.storage.checkpoint import INFO_FILE

    destination = destination or str(repository_folder(repository))
    # What may be replaced depends on what the files are; that is looked at later.
    if not overwrite:
        check_free(destination, INFO_FILE, "a checkpoint", overwrite)
    return fetch(repository, destination, places=places, dtype=dtype, announce=warn), destination


def say_what_stays(repository: "Repository | None") -> None:
    """A line about the downloaded files, which are not needed any more."""
    if repository is not None:
        say(f"Its download is still in the Hub's cache; remove it with: hf cache rm model/{repository.id}")


def main() -> None:
    """Entry point."""
    run_command(command)
