"""`sflow vital`: find the vital layers of a model, by pictures or by edits, and compare sweeps."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click

from sflow_jax.commands.command import Command
from sflow_jax.commands.options import Chosen, model_options, refuse_unused, settings_options, worker_of
from sflow_jax.commands.output import answer, json_option, say, shown
from sflow_jax.errors import SettingError
from sflow_jax.runs.worker import Worker, parse_place
from sflow_jax.settings import (
    AUTOMATIC,
    EDITS,
    EMBEDDED_MODELS,
    PICTURES,
    PUBLISHED,
    SWEEPS,
    LayerEditSettings,
    Placement,
    SweepSettings,
    as_record,
)

if TYPE_CHECKING:
    from sflow_jax.vitality.summary import Summary

# What --save says of the model that all share.
A_DAY = 86_400
WAY_BACK = {
    name: f", for you alone; back to its own set with: sflow vital -m {name} --unsave" for name in EMBEDDED_MODELS
}


@click.command(
    cls=Command,
    epilog="""
    sflow vital -m toyworld --out vital

    sflow vital -m checkpoints/flux-dev --features checkpoints/dinov2-giant --batch 8 --adaptive --out vital --save

    sflow vital -m toyworld --by edits --scenes 8 --out worth

    sflow vital -m checkpoints/flux-dev --by edits --photos lines.csv --clip checkpoints/clip --out worth

    sflow vital -m gs://bucket/flux-dev --features gs://bucket/dinov2 --worker 3/8 --out gs://bucket/vital

    sflow vital -m flux-dev --dry-run --mesh tensor=4 --step-seconds 1.5

    sflow vital --out vital --export layers.json

    sflow vital --compare vital-15-steps vital-8-steps vital-4-steps --out compared
    """,
)
@model_options(required=False)
@click.option(
    "--by",
    type=click.Choice(SWEEPS),
    default=PICTURES,
    show_default=True,
    help="What scores a layer: pictures painted without it, or edits in which it alone injects.",
)
@settings_options(SweepSettings)
@settings_options(LayerEditSettings, name="of_edits", beside=SweepSettings)
@click.option("--worker", default="1/1", help="This process's share, such as 2/8; all share the folder.")
@click.option("--dry-run", is_flag=True, help=f"Only say what it would take; {', '.join(PUBLISHED)} need no files.")
@click.option("--step-seconds", type=float, help="Of --dry-run: seconds of one step of one batch.")
@click.option("--save", is_flag=True, help="Record the vital set in the checkpoint: --layers vital then uses it.")
@click.option("--force", is_flag=True, help="Of --save: also a set that less than 90 % of resamples agree on.")
@click.option(
    "--unsave", is_flag=True, help="Forget what --save recorded for an embedded model: its own set again."
)
@click.option(
    "--export",
    help="Write layers, scores and sets into this JSON file; without --model of the finished run in --out.",
)
@click.option("--compare", "compared", nargs=2, help="Compare two or more finished sweeps instead.")
@click.argument("more", nargs=-1, metavar="")
@click.option("--out", "-o", help="Folder of the run, local or gs://.")
@json_option
def vital(
    chosen: Chosen,
    by: str,
    settings: SweepSettings,
    of_edits: LayerEditSettings,
    worker: str,
    dry_run: bool,
    step_seconds: float | None,
    save: bool,
    force: bool,
    unsave: bool,
    export: str | None,
    compared: tuple[str, str] | None,
    more: tuple[str, ...],
    out: str | None,
) -> None:
    """Find a model's vital layers: bypass each layer, and see how much the pictures change.

    Writes report.html, scores.json, scores.csv and charts into the run's folder. Run it again to go on.

    With --by edits instead inject in each layer alone, and see how much more the edits keep and how many fewer
    happen: of scenes of the embedded models, or of --photos with --clip. Steps and guidance are then the method's
    own, and --batch counts edits of one picture. The run's folder is one of sflow evaluate --layers-alone; the
    sweep's files are in vital/ there.
    """
    if more and not compared:
        raise SettingError(f"{more[0]!r} is not an option; only `compare` takes names of runs")
    check_options(settings, dry_run, save, force, step_seconds)
    check_by(by)
    check_export(export, dry_run or unsave or bool(compared))
    if unsave:
        say(forget(chosen))
    elif compared:
        refuse_unused(["model", "by", "save", "dry_run", *as_record(settings)], "with --compare")
        compare_runs((*compared, *more), out)
    elif export is not None and chosen.model is None and out is not None:
        refuse_unused(["by", "save", "worker", *as_record(settings)], "with --export of a finished run")
        export_run(out, export)
    elif chosen.model is None or (out is None and not dry_run):
        raise SettingError("`model` and `out` are needed; or `compare` two finished sweeps")
    elif dry_run:
        planned = plan_of(chosen, settings, worker, step_seconds, out)
        answer(planned, "\n".join(describe(planned)))
    elif by == EDITS:
        shared = as_record(settings).keys() & as_record(of_edits).keys()
        of_edits = dataclasses.replace(of_edits, **{name: getattr(settings, name) for name in shared})
        find(chosen, of_edits, worker, save, force, out, export)
    else:
        find(chosen, settings, worker, save, force, out, export)


def check_options(
    settings: SweepSettings, dry_run: bool, save: bool, force: bool, step_seconds: float | None
) -> None:
    """SettingError for options that would change nothing."""
    if not settings.adaptive:
        refuse_unused(["error"], "without --adaptive")
    if not dry_run:
        refuse_unused(["step_seconds"], "without --dry-run")
    if dry_run and save:
        refuse_unused(["save"], "with --dry-run")
    if step_seconds is not None and not 0 < step_seconds < A_DAY:
        raise SettingError(f"`step_seconds` must be above 0 and below {A_DAY}, found {step_seconds}")
    if not save and force:
        refuse_unused(["force"], "without --save")


def check_by(by: str) -> None:
    """SettingError for options of the other kind of sweep."""
    names = {
        PICTURES: [field.name for field in dataclasses.fields(SweepSettings)],
        EDITS: [field.name for field in dataclasses.fields(LayerEditSettings)],
    }
    (other,) = names.keys() - {by}
    only = [name for name in names[other] if name not in names[by]]
    if by == EDITS:
        refuse_unused([*only, "dry_run"], "with --by edits")
    else:
        refuse_unused(only, "without --by edits")


def check_export(export: str | None, instead: bool) -> None:
    """SettingError, before anything is painted, for a layer file that could not be written. instead: of a sweep."""
    if export is None:
        return
    if instead:
        refuse_unused(["export"], "with --dry-run, --unsave or --compare")
    from sflow_jax.vitality.layer_file import check_layer_file

    check_layer_file(export)


def export_run(run: str, file: str) -> None:
    """Write a finished run's layer file."""
    from sflow_jax.vitality.find import read_summary
    from sflow_jax.vitality.layer_file import write_layer_file

    say(f"written: {write_layer_file(file, read_summary(run))}")


def forget(chosen: Chosen) -> str:
    """Undo `--save` on an embedded model; a line about it."""
    from sflow_jax.embedded import forget_layers

    name = chosen.model
    if name not in EMBEDDED_MODELS:
        models = " or ".join(EMBEDDED_MODELS)
        raise SettingError(f"`unsave` is for `model` {models}; convert others again, or save another set")
    return f"{name} has its own vital layers again" if forget_layers(name) else f"nothing was saved for {name}"


def find(
    chosen: Chosen,
    settings: SweepSettings | LayerEditSettings,
    worker: str,
    save: bool,
    force: bool,
    out: str,
    export: str | None = None,
) -> None:
    """Sweep, or go on with a sweep, and say what was found."""
    from sflow_jax.vitality.find import EDITS_FOLDER, record_vital_layers

    mine, together = worker_of(worker, chosen), chosen.coordinator is not None
    reports, by_edits = mine.index == 0 or not together, isinstance(settings, LayerEditSettings)
    sweep = by_edits_of(chosen, settings) if by_edits else by_pictures_of(chosen, settings)
    flow, _ = chosen.load(alone=True)
    summary = sweep(flow, out, settings, worker=mine, wait=together, progress=shown(reports))
    if summary is None:
        say(f"this worker's share is done; the last of {mine.count} workers to finish writes the report")
    elif reports:
        report = f"{out}/{EDITS_FOLDER}/report.html" if by_edits else f"{out}/report.html"
        answer(dataclasses.asdict(summary), f"vital layers: {described_choice(summary)}; {report}")
        if save:
            file = record_vital_layers(chosen.model, summary, force=force)
            say(f"saved in {file}{WAY_BACK.get(chosen.model, '')}")
        if export is not None:
            export_run(out, export)


def by_pictures_of(chosen: Chosen, settings: SweepSettings) -> Callable[..., "Summary | None"]:
    """The sweep by pictures, checked before any weights are read."""
    from sflow_jax.pipeline import StableFlow
    from sflow_jax.vitality.find import check_sweep

    check_sweep(settings, chosen.check(settings), chosen.model)
    return StableFlow.find_vital_layers


def by_edits_of(chosen: Chosen, settings: LayerEditSettings) -> Callable[..., "Summary | None"]:
    """The sweep by edits, checked alike, with the networks that judge them."""
    from sflow_jax.evaluation.importance import find_layers_by_edits, plan_edit_sweep

    plan = plan_edit_sweep(settings, chosen.check(settings), chosen.model)
    return functools.partial(find_layers_by_edits, plan=plan)


def described_choice(summary: "Summary") -> str:
    """The set, how it was chosen, and how sure it is."""
    choice = summary.choice
    layers = ", ".join(map(str, choice.layers)) or "none"
    if all(math.isnan(score.vitality) for score in summary.layers):
        return "none (nothing is known: no edit happens without injection)"
    return f"{layers} ({choice.rule}; the same in {choice.confidence:.0%} of resamples)"


def compare_runs(runs: tuple[str, ...], out: str | None) -> None:
    """Say how far finished sweeps agree, every two of them, and show it in `out` if that is given."""
    from sflow_jax.vitality.comparison import compare_all, write_comparison
    from sflow_jax.vitality.find import read_summary

    comparison = compare_all([read_summary(run) for run in runs], runs)
    if out is not None:
        write_comparison(out, comparison)
    agreed = {name: value for name, value in vars(comparison).items() if name != "runs"}
    answer(agreed, str(comparison))


def plan_of(
    chosen: Chosen, settings: SweepSettings, worker: str, step_seconds: float | None, out: str | None
) -> dict[str, Any]:
    """What the sweep would take. time: None where nothing says how long a step or a picture takes."""
    from sflow_jax.catalogue import find_info
    from sflow_jax.vitality.dry_run import plan_time, plan_work
    from sflow_jax.vitality.find import picture_seconds
    from sflow_jax.vitality.plan import elimination_of, plan_sweep

    info, words = find_info(chosen.model)
    plan, workers = plan_sweep(settings, info, chosen.model), Worker.parse(worker).count
    if chosen.process is not None:
        workers = parse_place(chosen.process, "process")[1]
    planned = plan_work(info, words, plan, placement_to_plan(chosen), elimination_of(settings, plan))
    measured = None if out is None else picture_seconds(out)
    if step_seconds is None and measured is None:
        return planned | {"time": None}
    return planned | {"time": plan_time(plan, workers, step_seconds=step_seconds, picture_seconds=measured)}


def describe(planned: dict[str, Any]) -> list[str]:
    """The same in lines."""
    from sflow_jax.vitality.dry_run import describe_time, describe_work

    time = planned["time"]
    unknown = "time: give --step-seconds, or --out of a run that has begun"
    return [*describe_work(planned), unknown if time is None else describe_time(time)]


def placement_to_plan(chosen: Chosen) -> Placement:
    """The placement to plan for: on devices that are made up, but for a mesh that is proposed for those here."""
    from sflow_jax.machine.meshes import make_mesh, parse_mesh
    from sflow_jax.planning.lowering import planned_devices
    from sflow_jax.planning.meshes import placed

    placement = dataclasses.replace(chosen.placement, dtype=chosen.placement.dtype or "bfloat16")
    if placement.mesh is None:
        return placement
    if placement.mesh == AUTOMATIC:
        return dataclasses.replace(placement, mesh=placed(chosen.model, chosen.placement, "sweep").mesh)
    sizes = parse_mesh(placement.mesh)
    return dataclasses.replace(placement, mesh=make_mesh(sizes, planned_devices(math.prod(sizes.values()))))
