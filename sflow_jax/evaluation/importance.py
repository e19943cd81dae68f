"""Vital layers by edits: a sweep that scores each layer by what injecting in it alone is worth, see `layers.worth`.

It is an evaluation with each layer alone, in a folder that `sflow evaluate --layers-alone` goes on with; and a
sweep's summary of it, which is compared, exported and saved as one.
"""

import dataclasses
from typing import Any

import numpy as np
from etils import epath

from sflow_jax.errors import SettingError
from sflow_jax.evaluation.benchmarks import open_benchmark
from sflow_jax.evaluation.cases import Benchmark
from sflow_jax.evaluation.layers import Effects, known_interval, layer_effects
from sflow_jax.evaluation.methods import check_methods, each_layer, parse_methods, recipe_of
from sflow_jax.evaluation.run import evaluate
from sflow_jax.pipeline import StableFlow
from sflow_jax.progress import Progress
from sflow_jax.runs.worker import Worker
from sflow_jax.settings import (
    DEFAULT_SCENES,
    EDITS,
    EMBEDDED_MODELS,
    PAINTED,
    EvaluationSettings,
    LayerEditSettings,
)
from sflow_jax.storage.checkpoint import ModelInfo
from sflow_jax.storage.paths import absolute
from sflow_jax.vitality.find import EDITS_FOLDER
from sflow_jax.vitality.plan import rule_of
from sflow_jax.vitality.scores import MEASURES, Rule, VariantScore, agreement, choice_of, rank_correlation
from sflow_jax.vitality.summary import Halves, PromptScore, Summary

# Without a region, which would keep by itself what injection is to keep; of painted scenes, the paper's own case.
OF_PHOTOS, OF_PAINTED = "coupled:region=none", "reference"


@dataclasses.dataclass(frozen=True)
class EditSweep:
    """What is edited and how: checked, with the networks that judge, but without the model's weights.

    method: its label. evaluation: with that method, once for no injection and once a layer.
    """

    benchmark: Benchmark
    method: str
    evaluation: EvaluationSettings
    rule: Rule


def plan_edit_sweep(settings: LayerEditSettings, info: ModelInfo, checkpoint: str) -> EditSweep:
    """What the settings ask for of a model; SettingError where they do not fit it. checkpoint: its name."""
    embedded, painted = checkpoint in EMBEDDED_MODELS, settings.sources == PAINTED
    if settings.photos is None and settings.scenes is None and not embedded:
        raise SettingError(
            "`photos` is needed, lines of image, source and edit; or `scenes`, if the model paints the embedded "
            "world, whose right answers are known"
        )
    if settings.photos is None and settings.clip is not None:
        raise SettingError("`clip` has no effect on scenes, whose attributes are read; leave it out")
    if settings.photos is not None and settings.clip is None and not embedded:
        raise SettingError("`clip` is needed with `photos`: it says how far edits happen")
    method = settings.methods or (OF_PAINTED if painted else OF_PHOTOS)
    if (found := len(parse_methods(method))) != 1:
        raise SettingError(f"`methods` must be one, whose layers are compared, found {found}")
    check_methods(StableFlow.edit, parse_methods(method))
    layers = info.resolve_layers(settings.layers)
    if not layers:
        raise SettingError("`layers` names no layer to measure")
    rule = rule_of(settings)
    rule.check(len(layers))
    names = ("sources", "limit", "seed", "steps", "guidance", "height", "width", "clip", "clip_tokenizer")
    evaluation = EvaluationSettings(
        **{name: getattr(settings, name) for name in names},
        methods=each_layer(method, layers),
        scenes=settings.scenes or DEFAULT_SCENES,
        edits_at_once=settings.batch,
    )
    benchmark = open_benchmark({"photos": settings.photos}, evaluation, info, checkpoint)
    return EditSweep(benchmark, method, evaluation, rule)


def find_layers_by_edits(
    flow: StableFlow,
    out: epath.PathLike,
    settings: LayerEditSettings = LayerEditSettings(),
    *,
    plan: EditSweep | None = None,
    worker: Worker = Worker(),
    wait: bool = False,
    progress: bool | Progress = True,
) -> Summary | None:
    """Edit without injection and with each layer's alone, and choose the layers whose injection is worth most.

    The summary is a sweep's whose score is `layers.worth`: dB gained outside the edit, halved where a twentieth of
    the edits is lost by it (of photos: outside the automatic region, and of CLIP's similarity with the caption).
    out: the run's folder, as of `evaluate`; the sweep's report is in its folder `vital`. plan: what
    `plan_edit_sweep` made of the settings, where that is there. worker, wait: as of `find_vital_layers`.
    SettingError for settings that do not fit, before anything is painted.
    """
    plan = plan or plan_edit_sweep(settings, flow.info, flow.painter.checkpoint)
    made = evaluate(flow, plan.benchmark, plan.evaluation, out, worker=worker, wait=wait, progress=progress)
    if made is None:
        return None
    effects = layer_effects(plan.benchmark, made)[plan.method]
    summary = summarise_effects(effects, _record(flow, plan, made.settings, effects.layers), plan.rule)
    if worker.index == 0 or not wait:
        from sflow_jax.vitality.report import write_report_files  # draws with matplotlib, which is slow to import

        write_report_files(absolute(out) / EDITS_FOLDER, summary, (), made.costs)
    return summary


def summarise_effects(effects: Effects, settings: dict[str, Any], rule: Rule) -> Summary:
    """A sweep's summary whose scores are what each layer is worth. settings: with steps, of the method."""
    scores, again = effects.worth, effects.resampled_worth()
    unknown = dict.fromkeys(MEASURES[1:], float("nan"))
    ends, pictures = known_interval(again).T, len(effects.success)
    return Summary(
        settings=settings | {"by": EDITS},
        layers=tuple(
            VariantScore((layer,), 0, settings["steps"], pictures, float(score), float(low), float(high), **unknown)
            for layer, score, (low, high) in zip(effects.layers, scores, ends)
        ),
        windows=(),
        pairs=(),
        choice=choice_of(scores, again, effects.layers, rule),
        rank_correlations={},
        halves=_halves(effects, rule),
        by_prompt=tuple(
            PromptScore(number, tuple(row.tolist()), *[(float("nan"),) * len(row)] * len(unknown))
            for number, row in enumerate(effects.worth_by_picture)
        ),
    )


def _halves(effects: Effects, rule: Rule) -> Halves | None:
    """Even against odd pictures; None where a half does not know a layer."""
    halves = [effects.of(slice(first, None, 2)) for first in (0, 1)]
    if any(len(half.success) == 0 or np.isnan(half.worth).any() for half in halves):
        return None
    sets = tuple(choice_of(half.worth, half.worth[None], half.layers, rule).layers for half in halves)
    return Halves(rank_correlation(halves[0].worth, halves[1].worth), agreement(*sets), sets)


def _record(flow: StableFlow, plan: EditSweep, manifest: dict[str, Any], layers: tuple[int, ...]) -> dict[str, Any]:
    """A sweep's settings: those of the run, with what its defaults stand for."""
    info, case = flow.info, plan.benchmark.cases[0]
    # The method's own numbers do not depend on layers.
    recipe = recipe_of(flow, parse_methods(plan.method)[0], case, plan.evaluation)
    canvas = info.canvas(plan.evaluation.height, plan.evaluation.width)
    asked = plan.evaluation.guidance
    return {
        **{name: value for name, value in manifest.items() if name != "methods"},
        "title": info.title,
        "layer_kinds": [list(kind) for kind in info.layer_kinds],
        "method": plan.method,
        "steps": recipe.steps,
        "guidance": recipe.guidance if asked is None else asked,
        "height": canvas.height,
        "width": canvas.width,
        "layers": list(layers),
        "prompts": [case.prompt for case in plan.benchmark.cases],
    }
