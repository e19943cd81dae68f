"""The benchmark that settings name, checked before a model's weights are read."""

from collections.abc import Mapping

from sflow_jax.evaluation.captions import CaptionBench, read_captions
from sflow_jax.evaluation.cases import Benchmark
from sflow_jax.evaluation.known import KnownAnswers
from sflow_jax.evaluation.networks import load_networks
from sflow_jax.evaluation.photos import PhotoBench
from sflow_jax.evaluation.pie import PieBench, read_mapping
from sflow_jax.settings import EvaluationSettings
from sflow_jax.storage.checkpoint import ModelInfo


def open_benchmark(
    files: Mapping[str, str | None], settings: EvaluationSettings, info: ModelInfo, checkpoint: str
) -> Benchmark:
    """That of the one file (pie, captions or photos) that is named, else the embedded world's known answers.

    info, checkpoint: of the model that edits, and its name. SettingError for files that cannot be read, or a size
    that does not fit.
    """
    canvas = info.canvas(settings.height, settings.width)
    pie, captions, photos = (files.get(name) for name in ("pie", "captions", "photos"))
    if pie:
        annotations = read_mapping(pie)[: settings.limit]
        return PieBench(pie, annotations, load_networks(settings, checkpoint, info))
    if captions:
        lines = read_captions(captions)[: settings.limit]
        return CaptionBench(captions, lines, canvas, load_networks(settings, checkpoint, info))
    if photos:
        lines = read_captions(photos)[: settings.limit]
        return PhotoBench.of(photos, lines, canvas, load_networks(settings, checkpoint, info), settings.seed)
    scenes = min(settings.scenes, settings.limit or settings.scenes)
    return KnownAnswers.on(canvas, scenes, settings.seed, settings.turns, settings.sources)
