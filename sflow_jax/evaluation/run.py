"""The harness: every method on every case of a benchmark, resumable, and shared by several workers.

The unit of work is a case and a method; its edits are one batch. A unit's scores, small pictures, passes and
seconds go to the run folder as one part.
"""

import dataclasses
import functools
import io
import resource
import sys
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from etils import epath
from jaxtyping import UInt8
from PIL import Image

from sflow_jax.evaluation.cases import Benchmark, Case
from sflow_jax.evaluation.layers import layers_alone
from sflow_jax.evaluation.methods import (
    AUTOENCODER,
    Method,
    Painted,
    check_methods,
    each_layer,
    edit_case,
    parse_methods,
    through_autoencoder,
)
from sflow_jax.evaluation.photos import PhotoBench
from sflow_jax.evaluation.summary import Row, Summary, summarise
from sflow_jax.machine.processes import describe_devices, package_versions
from sflow_jax.pipeline import StableFlow
from sflow_jax.progress import Progress, as_progress
from sflow_jax.runs.folder import RunFolder
from sflow_jax.runs.sharing import Part, SharedWork
from sflow_jax.runs.worker import Worker
from sflow_jax.settings import MODEL_SHAPE, EvaluationSettings
from sflow_jax.vitality.find import model_record

# Longest side of a picture that the run's folder keeps for the report, pixels.
THUMBNAIL = 256
SMALL = 128
JPEG_QUALITY = 90
# What a run's scores depend on, beside the benchmark and the model.
RECORDED = ("methods", "steps", "guidance", "height", "width", "edits_at_once")


def evaluate(
    flow: StableFlow,
    benchmark: Benchmark,
    settings: EvaluationSettings,
    out: epath.PathLike,
    *,
    worker: Worker = Worker(),
    wait: bool = False,
    vitality: Mapping[int, float] | None = None,
    progress: bool | Progress = True,
) -> Summary | None:
    """Edit every case with every method, judge the pictures, and write tables, a chart and a report into `out`.

    out: the run's folder, local or gs://; a run that stopped goes on, with equal numbers but for seconds. worker:
    this process's share, of several that share the folder; None is returned where others have work left, unless
    told to `wait`. vitality: layer → a sweep's, to be shown beside layers alone. SettingError for methods and
    settings that do not fit, before anything is painted.
    """
    if settings.layers_alone:
        # What it stands for, so that a run goes on whichever way it is asked for.
        settings = dataclasses.replace(
            settings, methods=each_layer(settings.methods, range(flow.layers)), layers_alone=False
        )
    methods = parse_methods(settings.methods)
    check_methods(flow.edit, methods)
    if isinstance(benchmark, PhotoBench) and benchmark.find is None:
        sizes = {"height": settings.height, "width": settings.width, "size": MODEL_SHAPE}
        benchmark.find = functools.partial(flow.region, **sizes, seed=settings.seed, progress=False)
    manifest = {**model_record(flow.painter), **benchmark.record(), "noise_seed": settings.seed}
    manifest |= {name: getattr(settings, name) for name in RECORDED}
    run = Run(
        flow,
        benchmark,
        settings,
        methods,
        RunFolder(out, manifest, labels=("model",)),
        worker,
        as_progress(progress),
    )
    if not run.finish(wait):
        return None
    summary = summarise(benchmark, run.rows(), run.labels, manifest, run.costs())
    if worker.index == 0 or not wait:
        from sflow_jax.evaluation.report import write_report  # draws with matplotlib, which is slow to import

        write_report(run.folder, benchmark, summary, run.picture, layers_alone(benchmark, summary, vitality))
    return summary


class Run:
    """A model, a benchmark, methods, and the folder that holds what is done."""

    def __init__(
        self,
        flow: StableFlow,
        benchmark: Benchmark,
        settings: EvaluationSettings,
        methods: tuple[Method, ...],
        folder: RunFolder,
        worker: Worker,
        progress: Progress,
    ):
        self.flow, self.benchmark, self.settings, self.folder = flow, benchmark, settings, folder
        self.progress, self.done = progress, 0
        self.methods = {method.label: method for method in methods}
        self.labels = [*self.methods, *([AUTOENCODER] if benchmark.cases[0].answers is not None else [])]
        names = ("seconds", "passes", "memory", "remarks", *(f"score_{x.name}" for x in benchmark.columns))
        self.shared = SharedWork(folder, worker, self._measure, self._enter, self._report, names)
        # (number of a label, number of a case) → its part.
        self.parts: dict[tuple[int, int], Part] = {}

    def finish(self, wait: bool) -> bool:
        """Do this worker's share; whether everything is there."""
        # Case by case, so that what is there at any time says as much of every method.
        units = [(label, case) for case in range(len(self.benchmark.cases)) for label in range(len(self.labels))]
        batches = {number: np.array([unit]) for number, unit in enumerate(units)}
        if wait:
            self.shared.finish("edits", batches)
            return True
        return not self.shared.do_share("edits", batches)

    def rows(self) -> list[Row]:
        """One an edited picture: method by method, in the benchmark's order."""
        return [
            self._row(label, case, self.parts[label, case], i)
            for label in range(len(self.labels))
            for case in range(len(self.benchmark.cases))
            for i in range(len(self.benchmark.cases[case].edits))
        ]

    def picture(self, row: Row, source: bool) -> UInt8[np.ndarray, "y x 3"]:
        """The edited picture of a row, or the source that its method painted; at most `THUMBNAIL` pixels a side."""
        name = "source" if source else f"picture{row.number}"
        case = next(i for i, case in enumerate(self.benchmark.cases) if case.name == row.case)
        part = self.parts[self.labels.index(row.method), case]
        with Image.open(io.BytesIO(part[name].tobytes())) as opened:
            return np.asarray(opened.convert("RGB"))

    def costs(self) -> dict[str, Any]:
        """What the run took, all workers together."""
        peaks = [float(part["memory"]) for part in self.parts.values()]
        return {
            "seconds of editing": round(sum(float(part["seconds"]) for part in self.parts.values()), 1),
            "peak memory, GiB": round(max(peaks), 2),
            "device": describe_devices(),
            **package_versions(),
        }

    def _measure(self, units: np.ndarray) -> Part:
        """Edit one case by one method, and judge the pictures."""
        ((label, number),) = units.tolist()
        case = self.benchmark.cases[number]
        painted = self._paint(self.labels[label], case, number)
        part = {}
        if painted.source is not None:
            case, part = dataclasses.replace(case, picture=painted.source), {"source": _thumbnail(painted.source)}
        pictures = self.benchmark.keep(self.folder.path, self.labels[label], case, painted.images)
        scores, remarks = self.benchmark.score(case, pictures)
        part |= {f"score_{name}": np.array([score[name] for score in scores]) for name in scores[0]}
        part |= {f"picture{i}": _thumbnail(picture) for i, picture in enumerate(pictures)}
        return part | {
            "remarks": np.array(remarks, dtype=np.str_),
            "passes": np.array(painted.passes),
            "seconds": np.array(painted.seconds),
            "memory": np.array(peak_memory()),
        }

    def _paint(self, label: str, case: Case, number: int) -> Painted:
        if label == AUTOENCODER:
            return through_autoencoder(self.flow, case)
        return edit_case(self.flow, self.methods[label], case, self.settings, self.settings.seed + number)

    def _enter(self, part: Part) -> None:
        ((label, case),) = part["units"].tolist()
        self.parts[label, case] = part

    def _report(self, units: int, note: str) -> None:
        self.done += units
        total = len(self.labels) * len(self.benchmark.cases)
        self.progress(self.done, total, f"evaluating: {note}" if note else "evaluating")

    def _row(self, label: int, number: int, part: Part, i: int) -> Row:
        case = self.benchmark.cases[number]
        return Row(
            method=self.labels[label],
            case=case.name,
            number=i,
            group=case.groups[i],
            prompt=case.sources[i],
            edit=case.edits[i],
            scores={column.name: float(part[f"score_{column.name}"][i]) for column in self.benchmark.columns},
            remark=str(part["remarks"][i]),
            passes=float(part["passes"]),
            # A batch's share: what one edit takes beside others of the same picture.
            seconds=float(part["seconds"]) / len(case.edits),
        )


def peak_memory() -> float:
    """Most memory so far, GiB: of the device where it tells, else of this process."""
    statistics = jax.local_devices()[0].memory_stats() or {}
    if "peak_bytes_in_use" in statistics:
        return statistics["peak_bytes_in_use"] / 2**30
    # Linux says kilobytes, macOS bytes.
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def _thumbnail(picture: UInt8[np.ndarray, "y x 3"]) -> UInt8[np.ndarray, " bytes"]:
    """A picture file for the report: small pictures exactly, larger ones scaled down."""
    image, data = Image.fromarray(picture), io.BytesIO()
    if max(image.size) <= SMALL:
        image.save(data, "PNG")
    else:
        image.thumbnail((THUMBNAIL, THUMBNAIL), Image.Resampling.LANCZOS)
        image.save(data, "JPEG", quality=JPEG_QUALITY)
    return np.frombuffer(data.getvalue(), np.uint8)
