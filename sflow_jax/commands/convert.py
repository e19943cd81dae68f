"""`sflow-convert`: a published FLUX checkpoint, DINOv2 or CLIP → a folder that `sflow` reads."""

from pathlib import Path

import click

from sflow_jax.commands.console import Command, run_command
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
    help="Folder of text_encoder, text_encoder_2, tokenizer and tokenizer_2, if not in SOURCE.",
)
@click.option("--vital-layers", help="Record these layers as vital, such as 0,1,17-18.")
def command(
    source: Path,
    destination: str,
    dtype: str | None,
    overwrite: bool,
    text_encoders: Path | None,
    vital_layers: str | None,
) -> None:
    """Convert a FLUX.1 checkpoint (dev, schnell, Krea) from SOURCE to DESTINATION.

    SOURCE is a diffusers folder, or Black Forest Labs' flux1-*.safetensors (or its folder) with
    ae.safetensors beside it. Or it is a Hugging Face folder of DINOv2 or CLIP, with which pictures are compared.
    Only safetensors are read. DESTINATION is a new folder, local or gs://.
    """
    from sflow_convert.features import convert_features, is_feature_folder, open_features
    from sflow_convert.job import convert
    from sflow_convert.layouts import open_source

    from sflow_jax.sampling.control import parse_layers

    if is_feature_folder(source):
        if text_encoders or vital_layers:
            raise SettingError(f"`text_encoders` and `vital_layers` are for FLUX checkpoints, and {source} is none")
        features = convert_features(open_features(source), destination, dtype=dtype, overwrite=overwrite)
        click.echo(f"{destination}: features of {features.name}, {features.dtype}.")
        return
    layers = None if vital_layers is None else parse_layers(vital_layers)
    if isinstance(layers, str):
        raise SettingError(f"`vital_layers` takes numbers, not {layers!r}")
    info = convert(
        open_source(source, text_encoders), destination, dtype=dtype, overwrite=overwrite, vital_layers=layers
    )
    click.echo(f"{destination}: {info.title}, {info.dtype}. Look at it with: sflow info {destination}")


def main() -> None:
    """Entry point."""
    run_command(command)
