"""`sflow-convert`: a published FLUX.1 or SD3 checkpoint, DINOv2 or CLIP → a folder that `sflow` reads."""

from pathlib import Path

import click

from sflow_jax.commands.console import Command, run_command, say
from sflow_jax.commands.options import refuse_unused
from sflow_jax.errors import SettingError

DTYPES = ("float32", "float16", "bfloat16")


@click.command(
    cls=Command,
    epilog="""
    sflow-convert ~/models/FLUX.1-dev checkpoints/flux-dev

    sflow-convert ~/models/flux1-dev.safetensors checkpoints/flux-dev --text-encoders ~/models/FLUX.1-dev

    sflow-convert ~/models/FLUX.1-schnell gs://bucket/flux-schnell --dtype bfloat16 --overwrite

    sflow-convert ~/models/dinov2-giant checkpoints/dinov2-giant
    """,
)
@click.argument("source", type=click.Path(path_type=Path))
@click.argument("destination")
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
@click.option("--vital-layers", help="Record these layers as vital, such as 0,1,17-18.")
def command(
    source: Path,
    destination: str,
    dtype: str | None,
    overwrite: bool,
    text_encoders: Path | None,
    autoencoder: Path | None,
    family: str | None,
    vital_layers: str | None,
) -> None:
    """Convert a checkpoint of FLUX.1 (dev, schnell, Krea), SD3 or SD3.5 from SOURCE to DESTINATION.

    SOURCE is a diffusers folder (also one of the hub's cache); or Black Forest Labs' flux1-*.safetensors
    (or its folder) with ae.safetensors beside it; or Stability's sd3*.safetensors, with or without text encoders
    in it; or one file with all networks. Tokenizers are always folders, beside a file or in --text-encoders.
    Or SOURCE is a Hugging Face folder of DINOv2 or CLIP, with which pictures are compared. Only safetensors are
    read. DESTINATION is a new folder, local or gs://.
    """
    from sflow_convert.features import convert_features, is_feature_folder, open_features
    from sflow_convert.job import convert
    from sflow_convert.layouts import Places, open_source

    from sflow_jax.sampling.control import parse_layers

    if is_feature_folder(source):
        refuse_unused(
            ["text_encoders", "autoencoder", "family", "vital_layers"],
            f"on {source}, for these are for FLUX checkpoints",
        )
        features = convert_features(open_features(source), destination, dtype=dtype, overwrite=overwrite)
        say(f"{destination}: features of {features.name}, {features.dtype}.")
        return
    layers = None if vital_layers is None else parse_layers(vital_layers)
    if isinstance(layers, str):
        raise SettingError(f"`vital_layers` takes numbers, not {layers!r}")
    info = convert(
        open_source(source, Places(text_encoders, autoencoder, family)),
        destination,
        dtype=dtype,
        overwrite=overwrite,
        vital_layers=layers,
    )
    say(f"{destination}: {info.title}, {info.dtype}. Look at it with: sflow info {destination}")


def main() -> None:
    """Entry point."""
    run_command(command)
