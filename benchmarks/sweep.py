"""How fast a sweep is: (layer, prompt) pairs a second, here and written plainly with diffusers on torch.

    python benchmarks/sweep.py

The plain sweep is a loop over layers: the embedded model's published folder in `FluxPipeline`, a bypassed block
returns its input, DINOv2 from transformers compares. Both paint the same prompts from the same noise in batches of
the same size, in turns, so that a machine whose speed drifts slows both alike. Ours also measures PSNR and SSIM and
writes its run folder. Then: what `--adaptive` makes of it, what windows save, and how speed and memory grow with
the batch. Prints tables and writes JSON.
"""

import contextlib
import json
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import click
import jax
import jax.numpy as jnp
import numpy as np
import torch
from diffusers import FluxPipeline
from transformers import AutoImageProcessor, Dinov2Model

from sflow_jax.catalogue import ASSETS, load_features
from sflow_jax.commands.console import use_compilation_cache
from sflow_jax.measures.features import Features
from sflow_jax.pictures.canvas import Canvas
from sflow_jax.pictures.latents import draw_noise
from sflow_jax.pipeline import StableFlow
from sflow_jax.planning.lowering import lower_step
from sflow_jax.runs.folder import RunFolder
from sflow_jax.vitality.adaptive import Elimination
from sflow_jax.vitality.plan import Plan, make_variants
from sflow_jax.vitality.prompts import load_prompts
from sflow_jax.vitality.scores import Rule, choose
from sflow_jax.vitality.summary import Table
from sflow_jax.vitality.sweep import Sweep, spent

RESULTS = Path(__file__).parent / "results" / "sweep.json"
BATCHES = (1, 2, 4, 8, 16, 32)
SIZE = 64


class PlainSweep:
    """The loop that one would write with diffusers."""

    def __init__(self, steps: int, guidance: float):
        self.pipe = FluxPipeline.from_pretrained(ASSETS, torch_dtype=torch.float32)
        self.pipe.set_progress_bar_config(disable=True)
        self.dino = Dinov2Model.from_pretrained(ASSETS / "dinov2").eval()
        self.processor = AutoImageProcessor.from_pretrained(ASSETS / "dinov2")
        transformer = self.pipe.transformer
        self.blocks = [*transformer.transformer_blocks, *transformer.single_transformer_blocks]
        self.settings = dict(num_inference_steps=steps, guidance_scale=guidance, height=SIZE, width=SIZE)

    @torch.no_grad()
    def __call__(self, prompts: list[str], noise: np.ndarray) -> np.ndarray:
        """Similarity of every prompt's picture without each layer, [p, n]."""
        words = self.pipe.tokenizer_2.model_max_length
        text, pooled, _ = self.pipe.encode_prompt(prompts, None, max_sequence_length=words)

        def features() -> torch.Tensor:
            pictures = self.pipe(
                prompt_embeds=text, pooled_prompt_embeds=pooled, latents=torch.tensor(noise), **self.settings
            ).images
            return self.dino(**self.processor(pictures, return_tensors="pt")).last_hidden_state[:, 0]

        reference, found = features(), []
        for block in self.blocks:
            with bypassed(block):
                found.append(torch.cosine_similarity(features(), reference).numpy())
        return np.stack(found, axis=1)


@contextlib.contextmanager
def bypassed(block: torch.nn.Module) -> Iterator[None]:
    """Let a block of either kind hand on what it is given."""
    block.forward = lambda hidden_states, encoder_hidden_states, **others: (encoder_hidden_states, hidden_states)
    try:
        yield
    finally:
        del block.forward


class Ours:
    """Sweeps of the same model by the product, each in a new folder."""

    def __init__(self, steps: int, guidance: float):
        self.flow = StableFlow.load("toyworld")
        self.features: dict[str, Features] = {"dino": load_features("toyworld")}
        self.steps, self.guidance = steps, guidance

    def sweep(
        self, prompts: list[str], batch: int, *, windows: int = 1, elimination: Elimination | None = None
    ) -> tuple[Table, int, float]:
        """Its table, pictures painted, and seconds."""
        variants = make_variants(range(self.flow.layers), self.steps, windows=windows)
        plan = Plan(tuple(prompts), 1, self.steps, self.guidance, SIZE, SIZE, batch, variants)
        with tempfile.TemporaryDirectory() as temporary:
            folder = RunFolder(Path(temporary) / "run", {"plan": str(plan)})
            sweep = Sweep(self.flow, self.features, plan, folder, progress=False)
            start = time.perf_counter()
            table = sweep.exhaustive() if elimination is None else sweep.adaptive(elimination)
            seconds = time.perf_counter() - start
            return table, spent(folder)[0], seconds

    @property
    def canvas(self) -> Canvas:
        return Canvas.of(SIZE, SIZE, self.flow.autoencoder.config.downsampling)

    def noise(self, count: int) -> np.ndarray:
        """What a sweep's first references start from."""
        channels = self.flow.transformer.config.in_channels
        return np.stack([draw_noise(i, self.canvas.tokens, channels) for i in range(count)])

    def step_memory(self, batch: int) -> int:
        """Temporaries of one compiled step, bytes."""
        lowered = lower_step(
            self.flow.transformer.config,
            dtype=jnp.float32,
            mesh=None,
            groups=batch,
            members=1,
            canvas=self.canvas,
            words=self.flow.prompts.t5_length,
        )
        return lowered.compile().memory_analysis().temp_size_in_bytes


def side_by_side(ours: Ours, plain: PlainSweep, prompts: list[str], batch: int, runs: int) -> dict:
    """Both sweeps over blocks of prompts, in turns; the first block of each warms up."""
    pairs, rates, difference = batch * ours.flow.layers, [], 0.0
    for run in range(runs + 1):
        block = [prompts[(run * batch + i) % len(prompts)] for i in range(batch)]
        start = time.perf_counter()
        theirs = plain(block, ours.noise(batch))
        theirs_seconds = time.perf_counter() - start
        table, _, seconds = ours.sweep(block, batch)
        difference = max(difference, float(np.abs(table.values["dino"] - theirs).max()))
        rates.append((pairs / seconds, pairs / theirs_seconds))
    rates = np.array(rates[1:])
    ratios = rates[:, 0] / rates[:, 1]
    return {
        "ours_pairs_per_second": float(np.median(rates[:, 0])),
        "diffusers_pairs_per_second": float(np.median(rates[:, 1])),
        "ratio": float(np.median(ratios)),
        "ratio_range": [float(ratios.min()), float(ratios.max())],
        "largest_difference_of_a_similarity": difference,
    }


def whole_sweeps(ours: Ours, prompts: list[str], batch: int) -> dict:
    """All prompts, exhaustively and adaptively: both answer for every (layer, prompt) pair."""
    told, layers = {}, list(range(ours.flow.layers))
    for name, elimination in (("exhaustive", None), ("adaptive", Elimination(Rule(), len(prompts)))):
        table, pictures, seconds = ours.sweep(prompts, batch, elimination=elimination)
        told[name] = {
            "vital": choose(table.values["dino"], layers, Rule()).layers,
            "pictures": pictures,
            "seconds": seconds,
            "pairs_per_second": len(prompts) * len(layers) / seconds,
        }
    return told


def windows_figures(ours: Ours, prompts: list[str], batch: int, windows: int = 3) -> dict:
    """Pictures a second with and without windows: late windows start from the reference's latents."""
    told = {}
    for name, count in (("layers", 1), ("layers and windows", windows)):
        _, pictures, seconds = ours.sweep(prompts, batch, windows=count)
        told[name] = {"pictures": pictures, "seconds": seconds, "pictures_per_second": pictures / seconds}
    return {"windows": windows, **told}


def batch_figures(ours: Ours, prompts: list[str], runs: int) -> list[dict]:
    """Speed and memory of the step, batch by batch."""
    rows = []
    for batch in BATCHES:
        block = prompts[: max(batch, 4)]
        ours.sweep(prompts[:batch], batch)
        seconds = np.median([ours.sweep(block, batch)[2] for _ in range(runs)])
        rate = len(block) * ours.flow.layers / seconds
        rows.append({"batch": batch, "pairs_per_second": float(rate), "temporaries": ours.step_memory(batch)})
    return rows


@click.command()
@click.option("--runs", default=5, show_default=True, help="Blocks of prompts side by side.")
@click.option("--batch", default=8, show_default=True, help="Pictures at once.")
@click.option("--steps", default=15, show_default=True, help="Steps of the solver.")
@click.option("--out", default=RESULTS, show_default=True, type=click.Path(path_type=Path), help="JSON file.")
def main(runs: int, batch: int, steps: int, out: Path) -> None:
    """Time the embedded model's sweep against diffusers on this CPU."""
    use_compilation_cache()
    torch.set_num_threads(os.cpu_count())
    prompts = load_prompts("toyworld")
    ours, plain = Ours(steps, 3.5), PlainSweep(steps, 3.5)
    beside = side_by_side(ours, plain, prompts, batch, runs)
    click.echo(
        f"(layer, prompt) pairs a second, batch {batch}, {steps} steps: "
        f"ours {beside['ours_pairs_per_second']:.1f}, diffusers {beside['diffusers_pairs_per_second']:.1f}, "
        f"ratio {beside['ratio']:.2f} "
        f"({beside['ratio_range'][0]:.2f}–{beside['ratio_range'][1]:.2f}); similarities differ by at most "
        f"{beside['largest_difference_of_a_similarity']:.1e}"
    )
    whole = whole_sweeps(ours, prompts, batch)
    for name, told in whole.items():
        told["ratio_to_diffusers"] = told["pairs_per_second"] / beside["diffusers_pairs_per_second"]
        click.echo(
            f"{name}, {len(prompts)} prompts: vital {told['vital']}, {told['pictures']} pictures, "
            f"{told['seconds']:.1f} s, {told['ratio_to_diffusers']:.2f} times diffusers' exhaustive rate"
        )
    windows = windows_figures(ours, prompts[:batch], batch)
    for name in ("layers", "layers and windows"):
        click.echo(f"{name}: {windows[name]['pictures_per_second']:.1f} pictures a second")
    rows = batch_figures(ours, prompts, runs)
    click.echo(f"{'batch':>5} {'pairs a second':>15} {'temporaries MiB':>16}")
    for row in rows:
        click.echo(f"{row['batch']:>5} {row['pairs_per_second']:15.1f} {row['temporaries'] / 2**20:16.1f}")
    told = {"cores": os.cpu_count(), "versions": {"jax": jax.__version__, "torch": torch.__version__}}
    told |= {"batch": batch, "steps": steps, "side_by_side": beside, "whole": whole, "windows": windows}
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps({**told, "batches": rows}, indent=1) + "\n")
    click.echo(f"written to {out}")


if __name__ == "__main__":
    main()
