"""The Layers page without its page: bars of vitality, small sweeps, pictures of a bypassed layer."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import UInt8

from sflow_jax.errors import SettingError
from sflow_jax.pictures.canvas import Canvas
from sflow_jax.pictures.files import to_uint8
from sflow_jax.pipeline import StableFlow
from sflow_jax.runs.folder import RunFolder, read_manifest
from sflow_jax.settings import EMBEDDED, SweepSettings
from sflow_jax.studio.desk import Watch
from sflow_jax.vitality.find import check_sweep, read_summary
from sflow_jax.vitality.layer_file import LayerFile, layer_file, read_layer_file
from sflow_jax.vitality.pictures import kept_comparisons
from sflow_jax.vitality.plan import SweepPlan, make_variants
from sflow_jax.vitality.summary import Summary

MOST_PROMPTS, MOST_SWEEP_STEPS, PROMPTS_SHOWN = 16, 50, 4
# Of `sflow vital -m toyworld --limit 16`.
EMBEDDED_LAYERS = Path(__file__).parent / "toyworld-layers.json"


@dataclass(frozen=True)
class Bar:
    """A layer in the chart. vitality: None where nobody measured it."""

    layer: int
    kind: str
    vitality: float | None
    vital: bool


@dataclass(frozen=True)
class Opened:
    """A finished sweep and its folder."""

    folder: str
    summary: Summary


@dataclass(frozen=True)
class Bypassed:
    """A prompt's picture without a layer, beside the one with all."""

    prompt: str
    reference: UInt8[np.ndarray, "y x 3"]
    picture: UInt8[np.ndarray, "y x 3"]


def bars(flow: StableFlow, opened: Opened | None = None) -> list[Bar]:
    """One a layer: of a sweep, else of what ships with the embedded model, else without heights."""
    info, measured = flow.info, _measured(flow, opened)
    kinds = [kind for kind, count in info.layer_kinds for _ in range(count)]
    return [Bar(i, kind, measured.get(i), i in (info.vital_layers or ())) for i, kind in enumerate(kinds)]


def _measured(flow: StableFlow, opened: Opened | None) -> dict[int, float]:
    file: LayerFile | None = None
    if opened is not None and fits(flow, opened):
        file = layer_file(opened.summary)
    elif flow.painter.checkpoint == EMBEDDED:
        file = read_layer_file(EMBEDDED_LAYERS)
    return {entry.layer: entry.vitality for entry in file.layers if entry.vitality is not None} if file else {}


def fits(flow: StableFlow, opened: Opened) -> bool:
    """Whether a sweep is of a model with these layers."""
    return tuple(map(tuple, opened.summary.settings["layer_kinds"])) == tuple(map(tuple, flow.info.layer_kinds))


def open_run(folder: str) -> Opened:
    """A finished run's folder; SettingError for others."""
    return Opened(folder, read_summary(folder))


def sweep(flow: StableFlow, under: Path, prompts: int, steps: int, features: str | None, watch: Watch) -> Opened:
    """A small sweep in a folder of its settings, where one that was stopped goes on."""
    if not 1 <= prompts <= MOST_PROMPTS or not 1 <= steps <= MOST_SWEEP_STEPS:
        raise SettingError(f"a sweep here has 1 to {MOST_PROMPTS} prompts and 1 to {MOST_SWEEP_STEPS} steps")
    settings = SweepSettings(limit=prompts, steps=steps, features=features)
    check_sweep(settings, flow.info, flow.painter.checkpoint)
    folder = under / "sweeps" / f"{prompts}-prompts-{steps}-steps"
    summary = flow.find_vital_layers(folder, settings, progress=watch.progress)
    return Opened(str(folder), summary)


def pictures_without(opened: Opened, layer: int) -> list[Bypassed]:
    """What a sweep's folder kept of a layer, for its first prompts."""
    plan = _plan(opened.summary)
    folder = RunFolder(opened.folder, read_manifest(opened.folder))
    kept = kept_comparisons(folder, plan, PROMPTS_SHOWN)
    return [Bypassed(one.prompt, one.reference, one.bypassed[layer]) for one in kept if layer in one.bypassed]


def _plan(summary: Summary) -> SweepPlan:
    """What a sweep painted, as far as its pictures' names depend on it."""
    known, layers = summary.settings, [score.layers[0] for score in summary.layers]
    variants, anywhere = make_variants(layers, known["steps"]), Canvas(1, 1, 1, 1)
    return SweepPlan(
        tuple(known["prompts"]), known.get("seeds", 1), known["steps"], 0.0, anywhere, batch=1, variants=variants
    )


def paint_without(
    flow: StableFlow, prompt: str, layers: tuple[int, ...], seed: int, watch: Watch
) -> tuple[UInt8[np.ndarray, "y x 3"], UInt8[np.ndarray, "y x 3"]]:
    """A prompt painted with all layers, and without some."""
    if not prompt.strip():
        raise SettingError("the `prompt` is empty: say what to paint")
    on_step = watch.preview(flow.painter, flow.info.canvas())
    both = (flow.generate([prompt], bypass=bypass, seed=seed, on_step=on_step, progress=watch.progress)
            for bypass in ((), layers))  # fmt: skip
    whole, without = (to_uint8(painted.images[0]) for painted in both)
    return whole, without
