"""`sflow vital`: find the vital layers of a model, and compare two sweeps."""

import dataclasses
import math
from typing import TYPE_CHECKING, Any

import click

from sflow_jax.commands.command import Command
from sflow_jax.commands.options import Chosen, model_options, refuse_unused, settings_options, worker_of
from sflow_jax.commands.output import answer, json_option, say, shown
from sflow_jax.errors import SettingError
from sflow_jax.runs.worker import Worker, parse_place
from sflow_jax.settings import AUTOMATIC, EMBEDDED_MODELS, PUBLISHED, Placement, SweepSettings, as_record

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

    sflow vital -m gs://bucket/flux-dev --features gs://bucket/dinov2 --worker 3/8 --out gs://bucket/vital

    sflow vital -m flux-dev --dry-run --mesh tensor=4 --step-seconds 1.5

    sflow vital --out vital --export layers.json

    sflow vital --compare vital-15-steps vital-8-steps vital-4-steps --out compared
    """,
)
@model_options(required=False)
@settings_options(SweepSettings)
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
    settings: SweepSettings,
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
    """
    if more and not compared:
        raise SettingError(f"{more[0]!r} is not an option; only `compare` takes names of runs")
    check_options(settings, dry_run, save, force, step_seconds)
    check_export(export, dry_run or unsave or bool(compared))
    if unsave:
        say(forget(chosen))
    elif compared:
        refuse_unused(["model", "save", "dry_run", *as_record(settings)], "with --compare")
        compare_runs((*compared, *more), out)
    elif export is not None and chosen.model is None and out is not None:
        refuse_unused(["save", "worker", *as_record(settings)], "with --export of a finished run")
        export_run(out, export)
    elif chosen.model is None or (out is None and not dry_run):
        raise SettingError("`model` and `out` are needed; or `compare` two finished sweeps")
    elif dry_run:
        planned = plan_of(chosen, settings, worker, step_seconds, out)
        answer(planned, "\n".join(describe(planned)))
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
    settings: SweepSettings,
    worker: str,
    save: bool,
    force: bool,
    out: str,
    export: str | None = None,
) -> None:
    """Sweep, or go on with a sweep, and say what was found."""
    from sflow_jax.vitality.find import check_sweep, record_vital_layers

    mine, together = worker_of(worker, chosen), chosen.coordinator is not None
    check_sweep(settings, chosen.check(settings), chosen.model)
    flow, _ = chosen.load(alone=True)
    reports = mine.index == 0 or not together
    summary = flow.find_vital_layers(out, settings, worker=mine, wait=together, progress=shown(reports))
    if summary is None:
        say(f"this worker's share is done; the last of {mine.count} workers to finish writes the report")
    elif reports:
        answer(dataclasses.asdict(summary), f"vital layers: {described_choice(summary)}; {out}/report.html")
        if save:
            file = record_vital_layers(chosen.model, summary, force=force)
            say(f"saved in {file}{WAY_BACK.get(chosen.model, '')}")
        if export is not None:
            export_run(out, export)


def described_choice(summary: "Summary") -> str:
    """The set, how it was chosen, and how sure it is."""
    choice = summary.choice
    layers = ", ".join(map(str, choice.layers)) or "none"
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
