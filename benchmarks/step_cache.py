"""What step caching saves and costs on the embedded model, by the least change that makes layers be evaluated.

    python benchmarks/step_cache.py

Pictures of held-out captions, four at once: evaluations that left layers out, seconds against none, PSNR to the
pictures without it, captions wholly right. A sweep: its vital set and the rank correlation of vitality with that
without it. Known-answer edits: rate and dB. Everything in one process; writes JSON.
"""

import logging
import tempfile
import time
from pathlib import Path
from typing import Any

import click
import numpy as np
from common import SEED, out_option, versions, write_json
from scipy.stats import spearmanr

from sflow_jax import StableFlow
from sflow_jax.commands.console import use_compilation_cache
from sflow_jax.evaluation.known import KnownAnswers
from sflow_jax.evaluation.run import evaluate
from sflow_jax.measures.metrics import bounded_psnr
from sflow_jax.settings import EMBEDDED, EvaluationSettings, SweepSettings
from sflow_jax.toyworld.reader import AttributeReader
from sflow_jax.toyworld.scenes import sample_scene

TOGETHER, PROMPTS = 4, 16
METHODS = "coupled,reference"


class Counter(logging.Handler):
    """Adds up what the solver says of evaluations."""

    def __init__(self):
        super().__init__(logging.INFO)
        self.left_out = self.all = 0

    def emit(self, record: logging.LogRecord) -> None:
        """Only the one line has two numbers."""
        left_out, total = record.args
        self.left_out, self.all = self.left_out + left_out, self.all + total

    def share(self) -> float:
        """Evaluations that left layers out, since it was asked last."""
        share = self.left_out / max(1, self.all)
        self.left_out = self.all = 0
        return round(share, 3)


def measure_pictures(flow: StableFlow, pictures: int, counter: Counter, plain: np.ndarray | None) -> dict[str, Any]:
    """Figures of pictures of held-out captions, and the pictures themselves."""
    rng = np.random.default_rng(SEED + 2)
    scenes = [sample_scene(rng, "held-out") for _ in range(pictures)]
    captions, images = [scene.caption(i) for i, scene in enumerate(scenes)], []
    flow.generate(captions[:TOGETHER], progress=False)
    counter.share()
    start = time.perf_counter()
    for first in range(0, pictures, TOGETHER):
        seeds = list(range(first, first + TOGETHER))
        images.append(flow.generate(captions[first : first + TOGETHER], seed=seeds, progress=False).images)
    seconds, images = time.perf_counter() - start, np.concatenate(images)
    right = [named == scene.attributes() for named, scene in zip(AttributeReader()(images).named, scenes)]
    figures = {"left_out": counter.share(), "seconds": round(seconds, 1), "right": float(np.mean(right))}
    if plain is not None:
        figures["psnr_db"] = round(float(np.median([bounded_psnr(one, two) for one, two in zip(images, plain)])), 1)
    return figures | {"images": images}


def measure_sweep(flow: StableFlow, counter: Counter) -> dict[str, Any]:
    """The vital set, every layer's vitality, and seconds."""
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        summary = flow.find_vital_layers(f"{folder}/run", SweepSettings(limit=PROMPTS), progress=False)
    return {
        "vital": list(summary.choice.layers),
        "vitality": summary.vitality.tolist(),
        "seconds": round(time.perf_counter() - start, 1),
        "left_out": counter.share(),
    }


def measure_edits(flow: StableFlow, scenes: int, counter: Counter) -> dict[str, Any]:
    """Rates and dB of known-answer edits, by method."""
    settings = EvaluationSettings(methods=METHODS, scenes=scenes, seed=SEED)
    bench = KnownAnswers.on(flow.info.canvas(), scenes, SEED)
    with tempfile.TemporaryDirectory() as folder:
        summary = evaluate(flow, bench, settings, f"{folder}/run", progress=False)
    return {
        method.method: {"happened": str(method.rate), **{x: round(v, 2) for x, v in method.means.items()}}
        for method in summary.methods
    } | {"left_out": counter.share()}


@click.command()
@click.option("--least", "changes", type=float, multiple=True, help="Least changes [0, 0.02, 0.05, 0.1, 0.2].")
@click.option("--pictures", default=64, show_default=True, help="Captions painted.")
@click.option("--scenes", default=4, show_default=True, help="Drawn scenes, six edits each.")
@out_option("step_cache.json")
def main(changes: tuple[float, ...], pictures: int, scenes: int, out: Path) -> None:
    """Measure step caching."""
    use_compilation_cache()
    counter, rows, plain = Counter(), [], {}
    solver = logging.getLogger("sflow_jax.sampling.solve")
    solver.setLevel(logging.INFO)
    solver.addHandler(counter)
    for least in changes or (0.0, 0.02, 0.05, 0.1, 0.2):
        flow = StableFlow.load(EMBEDDED, step_cache=least)
        painted = measure_pictures(flow, pictures, counter, plain.get("images"))
        images = painted.pop("images")
        row = {"least": least, "pictures": painted, "sweep": measure_sweep(flow, counter)}
        row["edits"] = measure_edits(flow, scenes, counter)
        plain = plain or {"images": images, "vitality": row["sweep"]["vitality"]}
        correlation = spearmanr(plain["vitality"], row["sweep"]["vitality"]).statistic
        row["sweep"]["rank_correlation"] = round(float(correlation), 3)
        rows.append(row)
        click.echo(row)
    write_json(out, versions("jax") | {"together": TOGETHER, "prompts": PROMPTS, "scenes": scenes, "rows": rows})
    click.echo(f"written to {out}")


if __name__ == "__main__":
    main()
