"""`sflow edit`: edits of a generated picture or a photo."""

import dataclasses
import time
from typing import TYPE_CHECKING, Any

import click

from sflow_jax.commands.command import Command
from sflow_jax.commands.jobs import jobs_option
from sflow_jax.commands.methods import method_options, region_options, shaped_region
from sflow_jax.commands.options import Chosen, model_options, out_option, refuse_unused, settings_options
from sflow_jax.commands.output import say, shown
from sflow_jax.commands.repeat import from_option
from sflow_jax.commands.sources import ChosenSource, source_options
from sflow_jax.commands.trial import candidates_table, describe_candidates, save_candidates, trial_options
from sflow_jax.editing.methods import Method
from sflow_jax.errors import SettingError
from sflow_jax.settings import EditSettings, as_record, check_prompts

if TYPE_CHECKING:
    from sflow_jax.pipeline import StableFlow
    from sflow_jax.storage.folders import Folder

# Settings that every candidate of a trial shares.
SHARED_BY_TRIALS = ("layers", "seed", "region", "method_options", "height", "width", "size")


@click.command(
    cls=Command,
    epilog="""
    sflow edit -m checkpoints/flux-dev -p "A dog standing" -e "A dog sitting" -e "A dog in the snow" -o dog

    sflow edit -m checkpoints/flux-dev --image man.jpg -p "A man in a park" -e "A man in a park with a dog" -o man

    sflow edit -m checkpoints/flux-dev --image man.jpg -p "A man in a park" -e "A man at sea" --method coupled -o s

    sflow edit -m checkpoints/flux-dev --image man.jpg -p "A man" -e "A man, a hat" --region hat.png --paste -o hat

    sflow edit -m checkpoints/flux-dev --image man.jpg -p "A man" -e "A man, hat" --try coupled,uniinv --choose -o t

    sflow edit -m checkpoints/flux-dev --continue hat/edit.json -e "A man, a hat, sea" --method coupled -o next

    sflow edit --from sea/edit-1.png -e "A man in the snow" --seed 7 -o snow

    sflow edit -m checkpoints/flux-dev --jobs edits.yaml -o many

    sflow edit -m checkpoints/flux-dev --inversion man -p "A man in a park" -e "A man at sea" --layers 0-2,17 -o sea
    """,
)
@model_options()
@from_option("edit", "try")
@jobs_option
@source_options
@click.option("--edit", "-e", "edits", multiple=True, help="What an edit shows; repeat for more.")
@settings_options(EditSettings)
@method_options
@region_options
@trial_options
@out_option
def edit(
    chosen: Chosen,
    source: ChosenSource,
    edits: tuple[str, ...],
    settings: EditSettings,
    numbers: dict[str, Any],
    shape: dict[str, Any],
    trial: dict[str, Any] | None,
    choose: bool,
    out: str,
) -> None:
    """Edit a generated picture or a photo: source.png, edit-1.png …, grid.png, edit.json.

    Where a method keeps to a region, region-1.png … show it: white may change. What --try paints is in
    candidates.png.
    """
    from sflow_jax.records import write_record
    from sflow_jax.storage.folders import output_folder

    if not edits:
        raise SettingError("`edit` is missing: say what an edit shows, or name a file of `jobs`")
    method = source.method(settings, numbers)
    refuse_unused_settings(source, method, settings)
    check_prompts([source.prompt, *edits])
    wanted = settings.region or (method.region if any(shape.values()) else None)
    asked = dataclasses.replace(source.sized(settings), region=shaped_region(wanted, shape), method_options=numbers)
    if trial is not None:
        check_trial(edits, settings, source)
    reports = chosen.join()
    info = chosen.check(settings)
    if (settings.layers or method.layers) == "vital":
        info.resolve_layers("vital")
    with output_folder(out if reports else None, "edit.json") as folder:
        flow, loading = chosen.load()
        start = time.perf_counter()
        about = source.files | recorded_region(settings.region, shape)
        if trial is None:
            # A shaped region is known by the name that it was made from; else the edit knows its own.
            about |= {} if wanted is None else {"region": wanted}
            result = flow.edit(
                source.prompt, list(edits), **source.of_edit(), **as_record(asked), progress=shown(reports)
            )
            seconds = {"load": loading, "edit": time.perf_counter() - start}
            dataclasses.replace(result, record=result.record | about).write(folder, seconds)
        else:
            about |= {"edits": list(edits), "region": settings.region, "source": source.kind}
            record = save_trial(flow, folder, source, asked, about, trial, choose, reports)
            write_record(folder, record, {"load": loading, "edit": time.perf_counter() - start})
    if reports:
        say(f"source and {len(edits)} edits in {out}" if trial is None else f"candidates in {out}")


def refuse_unused_settings(source: ChosenSource, method: Method, settings: EditSettings) -> None:
    """SettingError for options that change nothing with such a source."""
    for name, why in source.unused(method, settings):
        refuse_unused([name], why)


def recorded_region(region: str | None, shape: dict[str, Any]) -> dict[str, Any]:
    """How a region was shaped, and the checksum of the mask's file where it is one."""
    from sflow_jax.editing.edit import region_checksum

    return {"region_checksum": region_checksum(region), "region_shape": shape}


def check_trial(edits: tuple[str, ...], settings: EditSettings, source: ChosenSource) -> None:
    """SettingError for options that a trial does not share among its candidates."""
    if len(edits) != 1:
        raise SettingError(f"`try` takes one `edit`, found {len(edits)}")
    if settings.method is not None:
        raise SettingError("give `method` or `try`, not both")
    if source.stored is not None:
        raise SettingError("`try` inverts as each method does; give `image` instead of `inversion`")


def save_trial(
    flow: "StableFlow",
    folder: "Folder",
    source: ChosenSource,
    asked: EditSettings,
    about: dict[str, Any],
    trial: dict[str, Any],
    choose: bool,
    progress: bool,
) -> dict[str, Any]:
    """Try, and save all candidates; returns their record. about: its part of source, edit and region."""
    shared = {name: getattr(asked, name) for name in SHARED_BY_TRIALS}
    sources = {name: value for name, value in source.of_edit().items() if name != "inversion"}
    tried = flow.try_edits(source.prompt, about["edits"][0], **sources, **trial, **shared, progress=shown(progress))
    known = describe_candidates(tried)
    record = {
        "command": "try",
        **shared,
        **about,
        "trial": trial,
        "choose": choose,
        "candidates": known,
        "evaluations": tried.evaluations,
        **flow.painter.record(),
    }
    save_candidates(folder, tried, source.prompt, choose, record)
    if progress:
        say(candidates_table(known))
    return record
