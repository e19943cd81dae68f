"""`sflow evaluate`: ways of editing compared on a benchmark."""

import click

from sflow_jax.commands.command import Command
from sflow_jax.commands.options import Chosen, model_options, refuse_unused, settings_options, worker_of
from sflow_jax.commands.output import say, shown
from sflow_jax.errors import SettingError
from sflow_jax.settings import PICTURES, EvaluationSettings

# What only some benchmarks use.
OF_SCENES, OF_FILES = ("scenes", "turns", "sources"), ("features", "clip", "clip_tokenizer", "lpips")


@click.command(
    cls=Command,
    epilog="""
    sflow evaluate -m toyworld --known-answers --scenes 12 --methods reference,none --out known

    sflow evaluate -m toyworld --known-answers --turns 4 --methods coupled,uniinv --out drift

    sflow evaluate -m checkpoints/flux-dev --pie PIE-Bench_v1 --clip checkpoints/clip --worker 3/8 --out gs://bucket/pie

    sflow evaluate -m checkpoints/flux-dev --captions coco.csv --clip checkpoints/clip --out coco

    sflow evaluate -m checkpoints/flux-dev --photos my.csv --layers-alone --methods coupled --beside vital -o worth

    sflow evaluate --draw-pie drawn --scenes 2
    """,
)
@model_options(required=False)
@click.option("--known-answers", is_flag=True, help="Drawn scenes of the embedded world: right answers are known.")
@click.option("--pie", help="Folder in PIE-Bench's layout: mapping_file.json, annotation_images/.")
@click.option("--captions", help="CSV or JSON lines of image, source, edit: the paper's COCO protocol.")
@click.option(
    "--photos", help="The same lines; what is kept outside the automatic region, and CLIP text with --clip."
)
@click.option("--draw-pie", help="Draw a small set in PIE-Bench's layout into a new folder instead.")
@settings_options(EvaluationSettings)
@click.option(
    "--beside", help="Of --layers-alone: a finished sweep of sflow vital, whose vitality is shown beside."
)
@click.option("--worker", default="1/1", help="This process's share, such as 2/8; all share the folder.")
@click.option("--out", "-o", help="Folder of the run, local or gs://.")
def evaluate(
    chosen: Chosen,
    known_answers: bool,
    pie: str | None,
    captions: str | None,
    photos: str | None,
    draw_pie: str | None,
    settings: EvaluationSettings,
    beside: str | None,
    worker: str,
    out: str | None,
) -> None:
    """Compare ways of editing on a benchmark.

    Writes report.html, scores.csv, summary.md, summary.json and a chart into the run's folder. Run it again to go
    on. With --layers-alone also layers.md, layers.csv and their charts.
    """
    files = {"pie": pie, "captions": captions, "photos": photos}
    asked = {"known_answers": known_answers, **files, "draw_pie": draw_pie}
    if sum(map(bool, asked.values())) != 1:
        raise SettingError(f"give one of {', '.join(f'`{name}`' for name in asked)}")
    if any(files.values()):
        refuse_unused(OF_SCENES, "on pictures of a file")
    else:
        refuse_unused(OF_FILES, "on drawn scenes")
    if not settings.layers_alone:
        refuse_unused(["beside"], "without --layers-alone")
    if draw_pie:
        draw(draw_pie, settings)
    elif chosen.model is None or out is None:
        raise SettingError("`model` and `out` are needed")
    else:
        compare(chosen, files, settings, beside, worker, out)


def draw(folder: str, settings: EvaluationSettings) -> None:
    """Draw a set in PIE-Bench's layout."""
    from sflow_jax.evaluation.drawn_pie import draw_pie

    refuse_unused(
        ("model", "out", "methods", "limit", "steps", "guidance", "turns", "sources", "worker"), "with --draw-pie"
    )
    say(f"{draw_pie(folder, settings.scenes, settings.seed)} pictures in {folder}")


def compare(
    chosen: Chosen,
    files: dict[str, str | None],
    settings: EvaluationSettings,
    beside: str | None,
    worker: str,
    out: str,
) -> None:
    """Evaluate, or go on with an evaluation, and say what came out."""
    from sflow_jax.evaluation.benchmarks import open_benchmark
    from sflow_jax.evaluation.layers import layers_alone, to_markdown
    from sflow_jax.evaluation.methods import check_methods, each_layer, parse_methods
    from sflow_jax.evaluation.run import evaluate
    from sflow_jax.pipeline import StableFlow

    check_methods(StableFlow.edit, parse_methods(settings.methods))
    if settings.layers_alone:
        each_layer(settings.methods, ())
    vitality = None if beside is None else vitality_of(beside)
    own, together = worker_of(worker, chosen), chosen.coordinator is not None
    benchmark = open_benchmark(files, settings, chosen.check(settings), chosen.model)
    flow, _ = chosen.load(alone=True)
    reports = own.index == 0 or not together
    summary = evaluate(
        flow, benchmark, settings, out, worker=own, wait=together, vitality=vitality, progress=shown(reports)
    )
    if summary is None:
        say(f"this worker's share is done; the last of {own.count} workers to finish writes the report")
    elif reports:
        alone = to_markdown(layers_alone(benchmark, summary, vitality))
        say("\n".join(part for part in (summary.to_markdown(), alone, f"{out}/report.html") if part))


def vitality_of(run: str) -> dict[int, float]:
    """Layer → its vitality by a finished sweep; SettingError for one by edits, which says what this will say."""
    from sflow_jax.vitality.find import read_summary

    found = read_summary(run)
    if found.by != PICTURES:
        raise SettingError(f"`beside` takes a sweep by {PICTURES}, {run} is one by {found.by}")
    return {score.layers[0]: score.vitality for score in found.layers}
