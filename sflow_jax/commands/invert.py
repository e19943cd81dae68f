"""`sflow invert`: a photo's path to noise, kept for many edits."""

import time
from typing import TYPE_CHECKING

import click

from sflow_jax.commands.command import Command
from sflow_jax.commands.options import Chosen, model_options, out_option, settings_options
from sflow_jax.commands.output import say, shown
from sflow_jax.settings import InversionSettings, as_record, check_prompts

if TYPE_CHECKING:
    from PIL import Image

    from sflow_jax.pipeline import StableFlow
    from sflow_jax.results import Generation, Inversion


@click.command(
    cls=Command,
    epilog="""
    sflow invert -m checkpoints/flux-dev --image photo.jpg -p "A man in a park" -o man

    sflow edit -m checkpoints/flux-dev --inversion man -p "A man in a park" -e "A man dancing in a park" -o dancing
    """,
)
@model_options()
@click.option("--image", required=True, help="The photo.")
@click.option("--prompt", "-p", required=True, help="What the photo shows.")
@settings_options(InversionSettings)
@out_option
def invert(chosen: Chosen, image: str, prompt: str, settings: InversionSettings, out: str) -> None:
    """Invert a photo: its path to noise for later edits, reconstruction.png, inversion.json."""
    from sflow_jax.pictures.files import open_picture
    from sflow_jax.records import photo_record, write_record
    from sflow_jax.storage.folders import output_folder

    photo = open_picture(image)
    check_prompts([prompt])
    reports = chosen.join()
    chosen.check(settings)
    with output_folder(out if reports else None, "inversion.json") as folder:
        flow, loading = chosen.load()
        start = time.perf_counter()
        inversion = flow.invert(photo, prompt, **as_record(settings), kv_cache="off", progress=shown(reports))
        seconds = {"load": loading, "invert": time.perf_counter() - start}
        again, figures = reconstruct(flow, photo, inversion, reports)
        inversion.save(folder.path)
        psnr = {"psnr_db": {name: round(value, 2) for name, value in figures.items()}}
        record = {**inversion.record, **photo_record(image), **psnr}
        folder.picture("reconstruction.png", again.images[0], record)
        write_record(folder, record, seconds)
    if reports:
        say(f"{out}: " + ", ".join(f"{name} {value:.1f} dB" for name, value in figures.items()))


def reconstruct(
    flow: "StableFlow", photo: "Image.Image", inversion: "Inversion", reports: bool
) -> "tuple[Generation, dict[str, float]]":
    """The photo painted again from its noise, and how near it comes, in dB."""
    from sflow_jax.measures.metrics import psnr
    from sflow_jax.pictures.files import fit_picture, to_unit

    settings = inversion.settings
    size = {"height": settings["height"], "width": settings["width"]}
    again = flow.generate(
        [settings["prompt"]],
        steps=settings["steps"],
        guidance=settings["guidance"],
        noise=inversion.trajectory[-1],
        negative=settings["negative"],
        skip_layers=settings["skip_layers"],
        skip_scale=settings["skip_scale"],
        skip_window=settings["skip_window"],
        progress=shown(reports),
        **size,
    )
    truth = to_unit(fit_picture(photo, **size))
    plain = flow.decode(again.latents / settings["nudge"], **size)
    encoded = flow.decode(inversion.trajectory[:1] / settings["nudge"], **size)
    return again, {
        "reconstruction": psnr(again.images[0], truth),
        "reconstruction, nudge undone": psnr(plain[0], truth),
        "autoencoder alone": psnr(encoded[0], truth),
    }
