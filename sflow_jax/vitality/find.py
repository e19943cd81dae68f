"""Finding a model's vital layers: from settings to a summary and a report in a run folder."""

import json
from typing import Any

from etils import epath

from sflow_jax.catalogue import EMBEDDED_FEATURES, find_features, load_features, save_vital_layers
from sflow_jax.errors import SettingError
from sflow_jax.machine.processes import describe_devices, package_versions
from sflow_jax.measures.features import Features, load_info
from sflow_jax.models.layers import parameter_dtype
from sflow_jax.painter import Painter
from sflow_jax.progress import Progress, as_progress
from sflow_jax.runs.folder import MANIFEST, RunFolder, read_manifest
from sflow_jax.runs.worker import Worker
from sflow_jax.settings import EDITS, EMBEDDED_MODELS, SweepSettings, check_path
from sflow_jax.storage.checkpoint import ModelInfo
from sflow_jax.storage.checksums import text_digest
from sflow_jax.storage.files import LONGEST_TEXT, read_bytes
from sflow_jax.vitality.adaptive import Elimination
from sflow_jax.vitality.pictures import keeper
from sflow_jax.vitality.plan import SweepPlan, elimination_of, plan_sweep, rule_of
from sflow_jax.vitality.scores import SURE
from sflow_jax.vitality.summary import Summary, summarise
from sflow_jax.vitality.sweep import Sweep, spent

SCORES_FILE = "scores.json"
# Of an evaluation's folder: the report and the scores of its layers as a sweep.
EDITS_FOLDER = "vital"


def find_vital_layers(
    painter: Painter,
    settings: SweepSettings,
    out: epath.PathLike,
    *,
    worker: Worker = Worker(),
    wait: bool = False,
    progress: bool | Progress = True,
) -> Summary | None:
    """Bypass each layer for many prompts, compare the pictures, and choose the vital set (method: the paper's).

    out: the run's folder, local or gs://; a run that stopped goes on. Writes report.html, scores.json, scores.csv
    and charts there. worker: this process's share, of several that share the folder; None is returned where others
    have work left, unless told to `wait` (processes that know each other; then the first writes the report). Raises
    SettingError for settings that do not fit the model, before anything is painted.
    """
    check_path("out", out)
    plan, rule = check_sweep(settings, painter.info, painter.checkpoint), rule_of(settings)
    elimination = elimination_of(settings, plan)
    features = load_feature_networks(settings, painter.checkpoint)
    manifest = manifest_of(painter, features, plan, settings, elimination)
    folder = RunFolder(out, manifest, labels=("model", "title"))
    sweep = Sweep(
        painter,
        features,
        plan,
        folder,
        worker=worker,
        keep=keeper(folder, plan, settings.keep_images),
        progress=as_progress(progress),
    )
    table = sweep.adaptive(elimination) if elimination else sweep.exhaustive(wait=wait)
    if table is None:
        return None
    summary = summarise(table, manifest, rule)
    if worker.index == 0 or not wait:
        from sflow_jax.vitality.report import write_report  # draws with matplotlib, which is slow to import

        write_report(folder, plan, summary, costs(folder))
    return summary


def check_sweep(settings: SweepSettings, info: ModelInfo, checkpoint: str) -> SweepPlan:
    """What a sweep would paint; SettingError for all that can be known without loading a network."""
    plan = plan_sweep(settings, info, checkpoint)
    rule_of(settings).check(sum(map(plan.is_layer, plan.variants)))
    for _, kind, place in feature_places(settings, checkpoint):
        if place in EMBEDDED_FEATURES:
            continue
        found = load_info(find_features(place)).kind
        if found != kind:
            raise SettingError(f"{place} is a {found}, where a {kind} is needed")
    return plan


def feature_places(settings: SweepSettings, checkpoint: str) -> list[tuple[str, str, str]]:
    """(name, kind, folder) of the networks that compare pictures; SettingError if the one that must be is not."""
    embedded = checkpoint in EMBEDDED_MODELS
    dino = settings.features or ("toyworld" if embedded else None)
    clip = settings.clip or ("toyworld-clip" if embedded else None)
    if dino is None:
        raise SettingError(
            "`features` is needed: a DINOv2, such as facebook/dinov2-giant or a converted folder; "
            "only the embedded models have their own"
        )
    places = (("dino", "dinov2", dino), ("clip", "clip", clip))
    return [(name, kind, str(place)) for name, kind, place in places if place is not None]


def load_feature_networks(settings: SweepSettings, checkpoint: str) -> dict[str, Features]:
    """The networks that compare pictures; SettingError if one is needed or of another kind."""
    networks = {}
    for name, kind, place in feature_places(settings, checkpoint):
        networks[name] = load_features(place)
        if networks[name].kind != kind:
            raise SettingError(f"{place} is a {networks[name].kind}, where a {kind} is needed")
    return networks


def manifest_of(
    painter: Painter,
    features: dict[str, Features],
    plan: SweepPlan,
    settings: SweepSettings,
    elimination: Elimination | None,
) -> dict[str, Any]:
    """Everything that the scores depend on."""
    sweep = "exhaustive"
    if elimination is not None:
        sweep = f"adaptive, {elimination.rule}, error {elimination.error:g}"
    return {
        **model_record(painter),
        "title": painter.info.title,
        "layer_kinds": [list(kind) for kind in painter.info.layer_kinds],
        "features": {name: f"{network.name} ({network.digest})" for name, network in features.items()},
        "steps": plan.steps,
        "guidance": plan.guidance,
        "height": plan.canvas.height,
        "width": plan.canvas.width,
        "seeds": plan.seeds,
        "batch": plan.batch,
        "layers": [variant.layers[0] for variant in plan.variants if plan.is_layer(variant)],
        "windows": settings.windows,
        "pairs": settings.pairs,
        "sweep": sweep,
        "prompts": list(plan.prompts),
    }


def model_record(painter: Painter) -> dict[str, str]:
    """Which model computed, in which numbers; `checkpoint` is a digest of both."""
    info, quantisation = painter.info, painter.placement.quantisation
    dtype = parameter_dtype(painter.transformer).name + (f", {quantisation}" if quantisation else "")
    if painter.placement.step_cache:
        dtype += f", step cache {painter.placement.step_cache:g}"
    source = json.dumps([info.source_digests, dtype], sort_keys=True)
    return {
        "model": painter.checkpoint, "family": info.variant, "checkpoint": text_digest(source), "dtype": dtype,
    }  # fmt: skip


def costs(folder: RunFolder) -> dict[str, Any]:
    """What a run took; seconds are of all workers together."""
    pictures, seconds = spent(folder)
    return {
        "pictures": pictures,
        "seconds": round(seconds, 1),
        "device": describe_devices(),
        **package_versions(),
    }


def read_summary(run: epath.PathLike) -> Summary:
    """A finished sweep's, by pictures or by edits; SettingError if there is none."""
    file = epath.Path(run) / SCORES_FILE
    if not file.exists() and (by_edits := epath.Path(run) / EDITS_FOLDER / SCORES_FILE).exists():
        file = by_edits
    if not file.exists():
        raise SettingError(f"no finished sweep at {run} (no {file.name}); make one with: sflow vital --out {run}")
    try:
        return Summary.from_json(read_bytes(file, LONGEST_TEXT))
    except ValueError as error:
        raise SettingError(f"{file}: {error}") from error


def picture_seconds(run: epath.PathLike) -> float | None:
    """Seconds a picture, of what a run has done so far; None where there is nothing yet."""
    if not (epath.Path(run) / MANIFEST).exists():
        return None
    pictures, seconds = spent(RunFolder(run, read_manifest(run)))
    return seconds / pictures if pictures else None


def record_vital_layers(checkpoint: str, summary: Summary, *, force: bool = False) -> epath.Path:
    """Record a sweep's vital set in the checkpoint: the layers "vital" are then these. Returns the file changed.

    SettingError for a set that few resamples of the prompts agree on, unless `force`.
    """
    choice, settings = summary.choice, summary.settings
    if choice.confidence < SURE and not force:
        raise SettingError(
            f"not saved: only {choice.confidence:.0%} of resamples choose this set ({SURE:.0%} are needed); paint "
            f"more {summary.importance.case}s, choose with `top`, or say `force`"
        )
    how = f" --by edits, {settings.get('method')}" if summary.by == EDITS else ""
    counted = f"{len(settings['prompts'])} {summary.importance.case}s"
    origin = f"sflow vital{how}: {choice.rule}, {counted}, {settings['steps']} steps"
    return save_vital_layers(checkpoint, choice.layers, origin)
