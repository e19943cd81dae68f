"""`sflow edit`: edits of a generated picture or a photo."""

import dataclasses
import time
from typing import TYPE_CHECKING, Any

import click
import numpy as np

from sflow_jax.commands.console import Command, say
from sflow_jax.commands.methods import method_options, region_options, shaped_region
from sflow_jax.commands.options import (
    Chosen,
    model_options,
    out_option,
    placement_record,
    record,
    refuse_unused,
    settings_options,
)
from sflow_jax.editing.methods import REFERENCE, find_method
from sflow_jax.errors import SettingError
from sflow_jax.pictures.files import open_picture
from sflow_jax.pictures.grids import captioned_grid
from sflow_jax.results import Inversion
from sflow_jax.settings import EditSettings, as_record, check_prompts
from sflow_jax.storage.folders import output_folder

if TYPE_CHECKING:
    from sflow_jax.results import Edit
    from sflow_jax.storage.folders import Folder

# Settings that only one kind of source has.
OF_PHOTOS, OF_GENERATED, OF_INVERTING = ("nudge", "unnudge", "replay"), ("seed",), ("nudge",)


@click.command(
    cls=Command,
    epilog="""
    sflow edit -m checkpoints/flux-dev -p "A dog standing" -e "A dog sitting" -e "A dog in the snow" -o dog

    sflow edit -m checkpoints/flux-dev --image man.jpg -p "A man in a park" -e "A man in a park with a dog" -o man

    sflow edit -m checkpoints/flux-dev --image man.jpg -p "A man in a park" -e "A man at sea" --method coupled -o
    sea

    sflow edit -m checkpoints/flux-dev --image man.jpg -p "A man" -e "A man in a hat" --region hat.png --paste -o
    hat

    sflow edit -m checkpoints/flux-dev --inversion man -p "A man in a park" -e "A man at sea" --layers 0-2,17 -o sea
    """,
)
@model_options()
@click.option("--prompt", "-p", required=True, help="The source: what it shows, or what to paint.")
@click.option("--edit", "-e", "edits", multiple=True, required=True, help="What an edit shows; repeat for more.")
@click.option("--image", help="A photo to edit; without it, the source is generated.")
@click.option("--inversion", help="Folder of `sflow invert`, instead of --image.")
@settings_options(EditSettings)
@method_options
@region_options
@out_option
def edit(
    chosen: Chosen,
    prompt: str,
    edits: tuple[str, ...],
    image: str | None,
    inversion: str | None,
    settings: EditSettings,
    numbers: dict[str, Any],
    shape: dict[str, Any],
    out: str,
) -> None:
    """Edit a generated picture or a photo: source.png, edit-1.png …, grid.png, edit.json.

    Where a method keeps to a region, region-1.png … show it: white may change.
    """
    if image and inversion:
        raise SettingError("give `image` or `inversion`, not both")
    method = find_method(settings.method or REFERENCE).changed(**numbers)
    if not (image or inversion):
        refuse_unused(OF_PHOTOS, "without a photo (--image or --inversion)")
    elif method.name == REFERENCE:
        refuse_unused(OF_GENERATED, "on a photo")
    if inversion:
        refuse_unused(OF_INVERTING, "with an inversion, which has its own")
    stored = None if inversion is None else Inversion.load(inversion)
    # A bad file should not cost a model's loading.
    photo = None if image is None else open_picture(image)
    check_prompts([prompt, *edits])
    region = shaped_region(settings.region or (method.region if any(shape.values()) else None), shape)
    asked = dataclasses.replace(settings, region=region, method_options=numbers)
    reports = chosen.join()
    info = chosen.check(settings)
    if (settings.layers or method.layers) == "vital":
        info.resolve_layers("vital")
    with output_folder(out if reports else None, "edit.json") as folder:
        flow, loading = chosen.load()
        start = time.perf_counter()
        result = flow.edit(prompt, list(edits), image=photo, inversion=stored, **as_record(asked), progress=reports)
        seconds = {"load": loading, "edit": time.perf_counter() - start}
        save_edit(folder, result, [f"source: {prompt}", *edits])
        unused = (*(OF_GENERATED if image or inversion else OF_PHOTOS), "method_options")
        kept = {name: value for name, value in as_record(result.settings).items() if name not in unused}
        about = {"prompt": prompt, "edits": edits, "image": image, "inversion": inversion, **kept}
        about |= {
            "region": settings.region or method.region,
            "region_shape": shape,
            "evaluations": result.evaluations,
        }
        about["method_settings"] = dataclasses.asdict(result.method)
        folder.json("edit.json", record(chosen.model, about | placement_record(flow.painter.placement), seconds))
    if reports:
        say(f"source and {len(edits)} edits in {out}")


def save_edit(folder: "Folder", result: "Edit", captions: list[str]) -> None:
    """Pictures of the source, the edits and their regions, one by one and side by side."""
    folder.picture("source.png", result.images[0])
    for i, picture in enumerate(result.images[1:], 1):
        folder.picture(f"edit-{i}.png", picture)
    folder.image("grid.png", captioned_grid(result.images, captions))
    for i, region in enumerate(() if result.regions is None else result.regions, 1):
        side = result.images.shape[1] // len(region)
        folder.picture(f"region-{i}.png", np.repeat(np.kron(region, np.ones((side, side)))[..., None], 3, axis=-1))
