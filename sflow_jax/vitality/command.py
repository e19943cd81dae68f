"""`sflow vital`: find the vital layers of a model, and compare two sweeps."""

import dataclasses
import hashlib
import io
import json
from collections.abc import Callable
from typing import Any

import click
import jax
import numpy as np
from etils import epath
from PIL import Image

from sflow_jax.checkpoint import ModelInfo, load_info, save_info
from sflow_jax.console import Command, one_line_errors, parse_layers, parse_place
from sflow_jax.embedded import NAME as EMBEDDED
from sflow_jax.embedded import resolve
from sflow_jax.features import Features, load_features
from sflow_jax.models.layers import parameter_dtype
from sflow_jax.options import Chosen, optional_model_options, record
from sflow_jax.pipeline import StableFlow, resolve_layers
from sflow_jax.planning import find_info
from sflow_jax.vitality.adaptive import Elimination
from sflow_jax.vitality.dry_run import describe
from sflow_jax.vitality.folder import MANIFEST, RunFolder, read_manifest, write_atomically
from sflow_jax.vitality.prompts import BUILTIN, TOYWORLD, load_prompts
from sflow_jax.vitality.scores import Rule, Variant
from sflow_jax.vitality.summary import Summary, summarise
from sflow_jax.vitality.sweep import Plan, Sweep, Worker, make_variants, spent

# The paper's scan.
STEPS, GUIDANCE = 15, 3.5
# Longest side of a thumbnail, pixels.
THUMBNAIL = 384
PICTURES = "pictures"
# Prompts whose pictures the report shows.
SHOWN = 3


@click.command(
    cls=Command,
    epilog="""
    sflow vital -m toyworld --out vital

    sflow vital -m checkpoints/flux-dev --features checkpoints/dinov2-giant --batch 8 --adaptive --out vital --save

    sflow vital -m gs://bucket/flux-dev --features gs://bucket/dinov2 --worker 3/8 --out gs://bucket/vital

    sflow vital -m flux-dev --dry-run --mesh tensor=4 --step-seconds 1.5

    sflow vital --compare vital-15-steps vital-4-steps --out compared
    """,
)
@optional_model_options
@click.option("--prompts", help="builtin, toyworld, or a text file with a prompt a line [what fits the model].")
@click.option("--limit", type=int, help="Only the first so many prompts.")
@click.option("--seeds", type=int, default=1, show_default=True, help="Pictures of each prompt.")
@click.option("--steps", type=int, default=STEPS, show_default=True, help="Steps of the solver.")
@click.option("--guidance", type=float, default=GUIDANCE, show_default=True, help="Guidance scale.")
@click.option("--height", type=int, help="Height in pixels [the model's default].")
@click.option("--width", type=int, help="Width in pixels [the model's default].")
@click.option("--batch", type=int, default=8, show_default=True, help="Pictures painted at once.")
@click.option("--layers", default="all", show_default=True, help="Layers to measure, such as 0-18,25.")
@click.option("--windows", type=int, default=1, show_default=True, help="Also bypass in each of so many parts.")
@click.option("--pairs", default="none", show_default=True, help="Also bypass every two of these layers.")
@click.option("--features", help="Converted DINOv2 that compares the pictures [the embedded model has its own].")
@click.option("--clip", help="Converted CLIP for a second opinion [the embedded model has its own].")
@click.option("--top", type=int, help="The vital set is the so many most vital layers.")
@click.option("--threshold", type=float, help="The vital set is the layers of at least this vitality.")
@click.option("--adaptive", is_flag=True, help="Stop measuring a layer once its place is clear.")
@click.option("--error", type=float, default=0.05, show_default=True, help="Of --adaptive: chance of another set.")
@click.option("--worker", default="1/1", help="This process's share, such as 2/8; all share the folder.")
@click.option(
    "--dry-run", is_flag=True, help="Only say what it would take; flux-dev and flux-schnell need no files."
)
@click.option("--step-seconds", type=float, help="Of --dry-run: seconds of one step of one batch.")
@click.option("--keep-images", type=click.Choice(["thumbnails", "all", "none"]), default="thumbnails")
@click.option("--save", is_flag=True, help="Record the vital set in the checkpoint: --layers vital then uses it.")
@click.option("--compare", "compared", nargs=2, help="Compare two finished sweeps instead.")
@click.option("--out", "-o", help="Folder of the run, local or gs://.")
@one_line_errors
def vital(chosen: Chosen, compared: tuple[str, str] | None, out: str | None, **asked: Any) -> None:
    """Find a model's vital layers: bypass each layer, and see how much the pictures change.

    Writes report.html, scores.json, scores.csv and charts into the run's folder. Run it again to go on.
    """
    if compared:
        return compare_runs(compared, out)
    if chosen.model is None or (out is None and not asked["dry_run"]):
        raise ValueError("--model and --out are needed; or --compare two finished sweeps")
    rule = rule_of(asked["top"], asked["threshold"])
    if asked["dry_run"]:
        return dry_run(chosen, asked, rule, out)
    worker = worker_of(asked["worker"], chosen)
    flow, _ = chosen.load(alone=True)
    features = load_networks(chosen.model, asked["features"], asked["clip"])
    plan = plan_of(flow.info, chosen.model, asked)
    elimination = elimination_of(asked, rule, plan)
    settings = settings_of(flow, chosen, features, plan, asked, elimination)
    folder, together = RunFolder(out, settings), chosen.coordinator is not None
    sweep = Sweep(
        flow, features, plan, folder, worker=worker, keep=keeper(folder, plan, asked["keep_images"]),
        progress=worker.index == 0 or not together,
    )  # fmt: skip
    table = sweep.adaptive(elimination) if elimination else sweep.exhaustive(wait=together)
    if table is None:
        click.echo(f"this worker's share is done; the last of {worker.count} workers to finish writes the report")
    if table is None or (together and worker.index > 0):
        return
    from sflow_jax.vitality.report import write_report  # draws, which takes a second to import

    summary = summarise(table, settings, rule)
    write_report(folder.path, summary, comparisons(folder, plan), costs(sweep))
    if asked["save"]:
        save(chosen.model, summary)
    choice = summary.choice
    click.echo(
        f"vital layers: {', '.join(map(str, choice.layers)) or 'none'} ({choice.rule}; the same in "
        f"{choice.confidence:.0%} of resamples); {out}/report.html"
    )


def compare_runs(runs: tuple[str, str], out: str | None) -> None:
    """Say how far two finished sweeps agree, and show it in `out` if that is given."""
    from sflow_jax.vitality.comparison import compare, write_comparison  # draws, as below

    told = compare(*(read_summary(run) for run in runs), names=runs)
    if out is not None:
        write_comparison(out, told)
    click.echo(str(told))


def read_summary(run: str) -> Summary:
    """A finished sweep's; ValueError if there is none."""
    file = epath.Path(run) / "scores.json"
    if not file.exists():
        raise ValueError(f"no finished sweep at {run} (no {file.name}); make one with: sflow vital --out {run}")
    return Summary.from_json(file.read_text())


def dry_run(chosen: Chosen, asked: dict[str, Any], rule: Rule, out: str | None) -> None:
    """Say what the sweep would take."""
    info, words = find_info(chosen.model)
    plan, workers = plan_of(info, chosen.model, asked), Worker.parse(asked["worker"]).count
    if chosen.process is not None:
        workers = parse_place(chosen.process, "--process")[1]
    told = describe(
        info, words, plan, dtype=chosen.dtype or "bfloat16", mesh=chosen.mesh, quantisation=chosen.quantize,
        offload=chosen.offload, workers=workers,
        elimination=elimination_of(asked, rule, plan), step_seconds=asked["step_seconds"],
        picture_seconds=None if out is None else picture_seconds(out),
    )  # fmt: skip
    click.echo("\n".join(told))


def picture_seconds(out: str) -> float | None:
    """Seconds a picture, of what a run has done so far; None where there is nothing yet."""
    if not (epath.Path(out) / MANIFEST).exists():
        return None
    pictures, seconds = spent(RunFolder(out, read_manifest(out)))
    return seconds / pictures if pictures else None


def worker_of(worker: str, chosen: Chosen) -> Worker:
    """This process's share: as told, or its place among the processes that it joins; ValueError for both."""
    told = Worker.parse(worker)
    if chosen.coordinator is not None and told != Worker():
        raise ValueError("give --worker for processes that share only the folder, or --coordinator, not both")
    chosen.meet()
    return told if chosen.coordinator is None else Worker(jax.process_index(), jax.process_count())


def elimination_of(asked: dict[str, Any], rule: Rule, plan: Plan) -> Elimination | None:
    """When an adaptive sweep stops, or None for an exhaustive one; ValueError where it has more than layers."""
    if not asked["adaptive"]:
        return None
    if asked["windows"] > 1 or asked["pairs"] != "none":
        raise ValueError("--adaptive measures layers alone; leave out --windows and --pairs")
    return Elimination(rule, len(plan.prompts), asked["error"])


def rule_of(top: int | None, threshold: float | None) -> Rule:
    """From the options; ValueError for both."""
    if top is not None and threshold is not None:
        raise ValueError("give --top or --threshold, not both")
    if top is not None:
        return Rule("top", top)
    return Rule() if threshold is None else Rule("threshold", threshold)


def load_networks(model: str, features: str | None, clip: str | None) -> dict[str, Features]:
    """The networks that compare pictures; ValueError if one is needed or of another kind."""
    if model == EMBEDDED:
        features, clip = features or "toyworld", clip or "toyworld-clip"
    if features is None:
        raise ValueError(
            "--features is needed: a converted DINOv2 (sflow-convert facebook-dinov2-giant DEST); "
            "only the embedded model has its own"
        )
    found = {}
    for name, kind, place in (("dino", "dinov2", features), ("clip", "clip", clip)):
        if place is not None:
            found[name] = load_features(place)
            if found[name].kind != kind:
                raise ValueError(f"{place} is a {found[name].kind}, where a {kind} is needed")
    return found


def plan_of(info: ModelInfo, model: str, asked: dict[str, Any]) -> Plan:
    """What to paint, from the options."""
    source = asked["prompts"] or (TOYWORLD if model == EMBEDDED else BUILTIN)
    prompts = load_prompts(source)[: asked["limit"]]
    layers = resolve_layers(info, parse_layers(asked["layers"]))
    if not layers:
        raise ValueError("--layers names no layer to measure")
    pairs = resolve_layers(info, parse_layers(asked["pairs"]))
    variants = make_variants(layers, asked["steps"], windows=asked["windows"], pairs=pairs)
    size = {name: asked[name] or info.picture_size for name in ("height", "width")}
    return Plan(
        tuple(prompts), asked["seeds"], asked["steps"], asked["guidance"], **size, batch=asked["batch"],
        variants=variants,
    )  # fmt: skip


def settings_of(
    flow: StableFlow,
    chosen: Chosen,
    features: dict[str, Features],
    plan: Plan,
    asked: dict[str, Any],
    elimination: Elimination | None,
) -> dict[str, Any]:
    """Everything that the scores depend on: the run's manifest."""
    dtype = parameter_dtype(flow.transformer).name + (f", {chosen.quantize}" if chosen.quantize else "")
    source = json.dumps([flow.info.source_digests, dtype], sort_keys=True)
    told = {
        "model": chosen.model,
        "family": flow.info.family,
        "checkpoint": hashlib.sha256(source.encode()).hexdigest()[:16],
        "dtype": dtype,
        "double_blocks": flow.transformer.config.double_blocks,
        "features": {name: f"{network.name} ({network.digest})" for name, network in features.items()},
        **{name: getattr(plan, name) for name in ("steps", "guidance", "height", "width", "seeds", "batch")},
        "layers": [variant.layers[0] for variant in plan.variants if plan.is_layer(variant)],
        "windows": asked["windows"],
        "pairs": asked["pairs"],
        "sweep": "exhaustive"
        if elimination is None
        else f"adaptive, {elimination.rule}, error {elimination.error:g}",
        "prompts": list(plan.prompts),
    }
    return told


def picture_name(plan: Plan, reference: int, variant: Variant | None) -> str:
    """File name without its ending, such as `prompt-003-seed-0-without-17`."""
    name = f"prompt-{reference // plan.seeds:03d}-seed-{reference % plan.seeds}"
    if variant is None:
        return f"{name}-reference"
    name += f"-without-{'+'.join(map(str, variant.layers))}"
    return name if plan.spans_all_steps(variant) else f"{name}-in-steps-{variant.first}-{variant.last - 1}"


def keeper(folder: RunFolder, plan: Plan, keep: str) -> Callable[[int, Variant | None, np.ndarray], None] | None:
    """Writes pictures into the run's folder: whole as PNG, or thumbnails as JPEG; None to keep none."""
    if keep == "none":
        return None
    (folder.path / PICTURES).mkdir(exist_ok=True)
    kind, ending = ("PNG", "png") if keep == "all" else ("JPEG", "jpg")

    def write(reference: int, variant: Variant | None, picture: np.ndarray) -> None:
        image, data = Image.fromarray(picture), io.BytesIO()
        if keep == "thumbnails":
            image.thumbnail((THUMBNAIL, THUMBNAIL))
        image.save(data, kind, **({"quality": 90} if kind == "JPEG" else {}))
        name = picture_name(plan, reference, variant)
        write_atomically(folder.path / PICTURES / f"{name}.{ending}", data.getvalue())

    return write


def comparisons(folder: RunFolder, plan: Plan) -> list:
    """The first prompts' pictures that the run kept, with every single layer bypassed."""
    from sflow_jax.vitality.report import Comparison

    found = []
    for prompt in range(min(SHOWN, len(plan.prompts))):
        reference = _picture(folder, picture_name(plan, prompt * plan.seeds, None))
        if reference is None:
            return found
        bypassed = {
            variant.layers[0]: _picture(folder, picture_name(plan, prompt * plan.seeds, variant))
            for variant in plan.variants
            if plan.is_layer(variant)
        }
        kept = {layer: picture for layer, picture in bypassed.items() if picture is not None}
        found.append(Comparison(plan.prompts[prompt], 0, reference, kept))
    return found


def _picture(folder: RunFolder, name: str) -> np.ndarray | None:
    for ending in ("png", "jpg"):
        file = folder.path / PICTURES / f"{name}.{ending}"
        if file.exists():
            with file.open("rb") as opened, Image.open(opened) as image:
                return np.asarray(image.convert("RGB"))
    return None


def costs(sweep: Sweep) -> dict[str, Any]:
    """What the run took; seconds are of all workers together."""
    painted, seconds = spent(sweep.folder)
    told = record("", {}, {})
    return {
        "pictures": painted,
        "seconds": round(seconds, 1),
        "device": told["device"],
        **told["versions"],
    }


def save(model: str, summary: Summary) -> None:
    """Record the vital set in the checkpoint."""
    folder = resolve(model)
    prompts, settings = len(summary.settings["prompts"]), summary.settings
    origin = f"sflow vital: {summary.choice.rule}, {prompts} prompts, {settings['steps']} steps"
    save_info(
        folder,
        dataclasses.replace(load_info(folder), vital_layers=summary.choice.layers, vital_layers_origin=origin),
    )
