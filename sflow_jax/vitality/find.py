"""Finding a model's vital layers: from settings to a summary and a report in a run folder."""

import dataclasses
import hashlib
import json
from typing import Any

from etils import epath

from sflow_jax.catalogue import find_checkpoint, load_features
from sflow_jax.errors import SettingError
from sflow_jax.machine.processes import describe_devices, package_versions
from sflow_jax.measures.features import Features
from sflow_jax.models.layers import parameter_dtype
from sflow_jax.painter import Painter
from sflow_jax.progress import Progress, as_progress
from sflow_jax.runs.folder import MANIFEST, RunFolder, read_manifest
from sflow_jax.runs.worker import Worker
from sflow_jax.settings import EMBEDDED, SweepSettings
from sflow_jax.storage.checkpoint import load_info, save_info
from sflow_jax.vitality.adaptive import Elimination
from sflow_jax.vitality.pictures import keeper
from sflow_jax.vitality.plan import SweepPlan, elimination_of, plan_sweep, rule_of
from sflow_jax.vitality.summary import Summary, summarise
from sflow_jax.vitality.sweep import Sweep, spent

SCORES_FILE = "scores.json"


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
    plan, rule = plan_sweep(settings, painter.info, painter.checkpoint), rule_of(settings)
    rule.check(sum(map(plan.is_layer, plan.variants)))
    elimination = elimination_of(settings, plan)
    features = load_feature_networks(settings, painter.checkpoint)
    manifest = manifest_of(painter, features, plan, settings, elimination)
    folder = RunFolder(out, manifest)
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


def load_feature_networks(settings: SweepSettings, checkpoint: str) -> dict[str, Features]:
    """The networks that compare pictures; SettingError if one is needed or of another kind."""
    embedded = checkpoint == EMBEDDED
    dino = settings.features or ("toyworld" if embedded else None)
    clip = settings.clip or ("toyworld-clip" if embedded else None)
    if dino is None:
        raise SettingError(
            "`features` is needed: a converted DINOv2 (sflow-convert facebook-dinov2-giant DEST); "
            "only the embedded model has its own"
        )
    networks = {}
    for name, kind, place in (("dino", "dinov2", dino), ("clip", "clip", clip)):
        if place is not None:
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
    source = json.dumps([info.source_digests, dtype], sort_keys=True)
    digest = hashlib.sha256(source.encode()).hexdigest()[:16]
    return {"model": painter.checkpoint, "family": info.variant, "checkpoint": digest, "dtype": dtype}


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
    """A finished sweep's; SettingError if there is none."""
    file = epath.Path(run) / SCORES_FILE
    if not file.exists():
        raise SettingError(f"no finished sweep at {run} (no {file.name}); make one with: sflow vital --out {run}")
    return Summary.from_json(file.read_text())


def picture_seconds(run: epath.PathLike) -> float | None:
    """Seconds a picture, of what a run has done so far; None where there is nothing yet."""
    if not (epath.Path(run) / MANIFEST).exists():
        return None
    pictures, seconds = spent(RunFolder(run, read_manifest(run)))
    return seconds / pictures if pictures else None


def save_vital_layers(checkpoint: epath.PathLike, summary: Summary) -> None:
    """Record a sweep's vital set in the checkpoint: the layers "vital" are then these."""
    folder = find_checkpoint(checkpoint)
    prompts, settings = len(summary.settings["prompts"]), summary.settings
    origin = f"sflow vital: {summary.choice.rule}, {prompts} prompts, {settings['steps']} steps"
    save_info(
        folder,
        dataclasses.replace(load_info(folder), vital_layers=summary.choice.layers, vital_layers_origin=origin),
    )
