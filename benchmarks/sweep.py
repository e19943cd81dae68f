"""How fast a sweep is: (layer, prompt) pairs a second, here and written plainly with diffusers on torch.

    python benchmarks/sweep.py

The plain sweep is a loop over layers: the embedded model's published folder in `FluxPipeline`, a bypassed block
returns its input, DINOv2 from transformers compares. Both paint the same prompts from the same noise in batches of
the same size, in turns, so that a machine whose speed drifts slows both alike. Ours also measures PSNR and SSIM and
writes its run folder. Then: what `--adaptive` makes of it, what windows save, and how speed and memory grow with
the batch. Prints tables and writes JSON.
"""

import contextlib
import dataclasses
import itertools
import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import click
import numpy as np
import torch
from common import out_option, versions, write_json
from diffusers import FluxPipeline
from transformers import AutoImageProcessor, Dinov2Model

from sflow_jax.catalogue import ASSETS, load_features
from sflow_jax.commands.console import use_compilation_cache
from sflow_jax.painter import Painter
from sflow_jax.planning.lowering import lower_step
from sflow_jax.runs.folder import RunFolder
from sflow_jax.settings import EMBEDDED, Placement, SweepSettings
from sflow_jax.vitality.plan import SweepPlan, elimination_of, plan_sweep, rule_of
from sflow_jax.vitality.scores import choose
from sflow_jax.vitality.summary import Table
from sflow_jax.vitality.sweep import Sweep, spent

BATCHES = (1, 2, 4, 8, 16, 32)
WINDOWS = 3
# Small batches paint so many prompts all the same: the time of one would be mostly noise.
FEWEST_PROMPTS = 4


class PlainSweep:
    """The loop that one would write with diffusers, with a plan's steps, guidance and size."""

    def __init__(self, plan: SweepPlan):
        self.pipe = FluxPipeline.from_pretrained(ASSETS, torch_dtype=torch.float32)
        self.pipe.set_progress_bar_config(disable=True)
        self.dino = Dinov2Model.from_pretrained(ASSETS / "dinov2").eval()
        self.processor = AutoImageProcessor.from_pretrained(ASSETS / "dinov2")
        transformer = self.pipe.transformer
        self.blocks = [*transformer.transformer_blocks, *transformer.single_transformer_blocks]
        self.settings = {
            "num_inference_steps": plan.steps,
            "guidance_scale": plan.guidance,
            "height": plan.canvas.height,
            "width": plan.canvas.width,
        }

    @torch.no_grad()
    def __call__(self, prompts: list[str], noise: np.ndarray) -> np.ndarray:
        """Similarity of every prompt's picture without each layer, [p, n]. noise: [p, s, c]."""
        words = self.pipe.tokenizer_2.model_max_length
        text, pooled, _ = self.pipe.encode_prompt(prompts, None, max_sequence_length=words)

        def features() -> torch.Tensor:
            pictures = self.pipe(
                prompt_embeds=text, pooled_prompt_embeds=pooled, latents=torch.tensor(noise), **self.settings
            ).images
            return self.dino(**self.processor(pictures, return_tensors="pt")).last_hidden_state[:, 0]

        reference, similarities = features(), []
        for block in self.blocks:
            with bypassed(block):
                similarities.append(torch.cosine_similarity(features(), reference).numpy())
        return np.stack(similarities, axis=1)


@contextlib.contextmanager
def bypassed(block: torch.nn.Module) -> Iterator[None]:
    """Let a block of either kind hand on what it is given."""
    block.forward = lambda hidden_states, encoder_hidden_states, **others: (encoder_hidden_states, hidden_states)
    try:
        yield
    finally:
        del block.forward


class Swept(NamedTuple):
    """One sweep. pictures: painted, references too. seconds: of painting and scoring."""

    table: Table
    pictures: int
    seconds: float


class OurSweeps:
    """Sweeps of the same model by the product, each in a new folder."""

    def __init__(self, settings: SweepSettings):
        self.painter, self.features = Painter.load(EMBEDDED), {"dino": load_features(EMBEDDED)}
        self.settings = settings
        self.plan = plan_sweep(settings, self.painter.info, EMBEDDED)

    @property
    def layers(self) -> int:
        """Of the model."""
        return self.painter.layers

    def sweep(self, prompts: Sequence[str], **changes: Any) -> Swept:
        """A sweep of some prompts. changes: of the settings."""
        settings = dataclasses.replace(self.settings, **changes)
        own = plan_sweep(settings, self.painter.info, EMBEDDED)
        plan = dataclasses.replace(own, prompts=tuple(prompts))
        elimination = elimination_of(settings, plan)
        with tempfile.TemporaryDirectory() as temporary:
            folder = RunFolder(Path(temporary) / "run", {"plan": str(plan)})
            sweep = Sweep(self.painter, self.features, plan, folder)
            start = time.perf_counter()
            table = sweep.exhaustive() if elimination is None else sweep.adaptive(elimination)
            seconds = time.perf_counter() - start
            return Swept(table, spent(folder)[0], seconds)

    def noise(self, count: int) -> np.ndarray:
        """What a sweep's first references start from, [count, s, c]."""
        return np.stack([self.painter.noise(self.plan.canvas, number) for number in range(count)])

    def step_memory(self, batch: int) -> int:
        """Temporaries of one compiled step, bytes."""
        painter = self.painter
        lowered = lower_step(
            painter.info,
            Placement(dtype="float32"),
            self.plan.canvas,
            groups=batch,
            members=1,
            words=painter.prompts.words,
        )
        return lowered.compile().memory_analysis().temp_size_in_bytes


def side_by_side(ours: OurSweeps, plain: PlainSweep, runs: int) -> dict[str, Any]:
    """Both sweeps over blocks of prompts, in turns; the first block of each warms up."""
    batch, prompts = ours.plan.batch, itertools.cycle(ours.plan.prompts)
    seconds, difference = [], 0.0
    for _ in range(runs + 1):
        block = list(itertools.islice(prompts, batch))
        start = time.perf_counter()
        expected = plain(block, ours.noise(batch))
        their_seconds = time.perf_counter() - start
        swept = ours.sweep(block)
        difference = max(difference, float(np.abs(swept.table.values["dino"] - expected).max()))
        seconds.append((swept.seconds, their_seconds))
    rates = batch * ours.layers / np.array(seconds[1:])
    ratios = rates[:, 0] / rates[:, 1]
    return {
        "ours_pairs_per_second": float(np.median(rates[:, 0])),
        "diffusers_pairs_per_second": float(np.median(rates[:, 1])),
        "ratio": float(np.median(ratios)),
        "ratio_range": [float(ratios.min()), float(ratios.max())],
        "largest_difference_of_a_similarity": difference,
    }


def whole_sweeps(ours: OurSweeps, plain_rate: float) -> dict[str, Any]:
    """All prompts, exhaustively and adaptively: both answer for every (layer, prompt) pair.

    plain_rate: pairs a second of diffusers' exhaustive sweep.
    """
    figures, prompts = {}, ours.plan.prompts
    for name, adaptive in (("exhaustive", False), ("adaptive", True)):
        swept = ours.sweep(prompts, adaptive=adaptive)
        rate = len(prompts) * ours.layers / swept.seconds
        figures[name] = {
            "vital": choose(swept.table.values["dino"], range(ours.layers), rule_of(ours.settings)).layers,
            "pictures": swept.pictures,
            "seconds": swept.seconds,
            "pairs_per_second": rate,
            "ratio_to_diffusers": rate / plain_rate,
        }
    return figures


def windows_figures(ours: OurSweeps) -> dict[str, Any]:
    """Pictures a second with and without windows: late windows start from the reference's latents."""
    figures, block = {"windows": WINDOWS}, ours.plan.prompts[: ours.plan.batch]
    for name, count in (("layers", 1), ("layers and windows", WINDOWS)):
        swept = ours.sweep(block, windows=count)
        rate = swept.pictures / swept.seconds
        figures[name] = {"pictures": swept.pictures, "seconds": swept.seconds, "pictures_per_second": rate}
    return figures


def batch_figures(ours: OurSweeps, runs: int) -> list[dict[str, Any]]:
    """Speed and memory of the step, batch by batch."""
    rows, prompts = [], ours.plan.prompts
    for batch in BATCHES:
        block = prompts[: max(batch, FEWEST_PROMPTS)]
        # The first one compiles.
        ours.sweep(prompts[:batch], batch=batch)
        seconds = np.median([ours.sweep(block, batch=batch).seconds for _ in range(runs)])
        rate = len(block) * ours.layers / seconds
        rows.append({"batch": batch, "pairs_per_second": float(rate), "temporaries": ours.step_memory(batch)})
    return rows


def describe(results: dict[str, Any]) -> Iterator[str]:
    """The results in lines."""
    compared, windows = results["side_by_side"], results["windows"]
    low, high = compared["ratio_range"]
    yield (
        f"(layer, prompt) pairs a second, batch {results['batch']}, {results['steps']} steps: "
        f"ours {compared['ours_pairs_per_second']:.1f}, diffusers {compared['diffusers_pairs_per_second']:.1f}, "
        f"ratio {compared['ratio']:.2f} ({low:.2f}–{high:.2f}); similarities differ by at most "
        f"{compared['largest_difference_of_a_similarity']:.1e}"
    )
    for name, figures in results["whole"].items():
        yield (
            f"{name}, all prompts: vital {figures['vital']}, {figures['pictures']} pictures, "
            f"{figures['seconds']:.1f} s, {figures['ratio_to_diffusers']:.2f} times diffusers' exhaustive rate"
        )
    for name in ("layers", "layers and windows"):
        yield f"{name}: {windows[name]['pictures_per_second']:.1f} pictures a second"
    yield f"{'batch':>5} {'pairs a second':>15} {'temporaries MiB':>16}"
    for row in results["batches"]:
        yield f"{row['batch']:>5} {row['pairs_per_second']:15.1f} {row['temporaries'] / 2**20:16.1f}"


@click.command()
@click.option("--runs", default=5, show_default=True, help="Blocks of prompts side by side.")
@click.option("--batch", default=SweepSettings.batch, show_default=True, help="Pictures at once.")
@click.option("--steps", type=int, help="Steps of the solver [the model's default].")
@out_option("sweep.json")
def main(runs: int, batch: int, steps: int | None, out: Path) -> None:
    """Time the embedded model's sweep against diffusers on this CPU."""
    use_compilation_cache()
    torch.set_num_threads(os.cpu_count())
    ours = OurSweeps(SweepSettings(batch=batch, steps=steps))
    compared = side_by_side(ours, PlainSweep(ours.plan), runs)
    results = {
        "cores": os.cpu_count(),
        "versions": versions("jax", "torch"),
        "batch": batch,
        "steps": ours.plan.steps,
        "side_by_side": compared,
        "whole": whole_sweeps(ours, compared["diffusers_pairs_per_second"]),
        "windows": windows_figures(ours),
        "batches": batch_figures(ours, runs),
    }
    for line in describe(results):
        click.echo(line)
    write_json(out, results)
    click.echo(f"written to {out}")


if __name__ == "__main__":
    main()
