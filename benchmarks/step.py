"""One denoising step of a mid-size FLUX, here and in diffusers on torch, side by side on the CPU.

    python benchmarks/step.py

The two alternate in one process, so that a machine whose speed drifts slows both alike; the figure that
counts is the median of the pairwise ratios. Prints a table, says how much of a step is matrix products (the
rest is memory traffic, norms, softmax and overhead), and writes JSON.
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import jax
import jax.numpy as jnp
import numpy as np
import torch
from common import (
    StepInputs,
    alternate,
    diffusers_transformer,
    flux_dev,
    out_option,
    versions,
    write_json,
)
from flax import nnx
from sflow_convert import flux as table
from sflow_convert.engine import assemble, plan_reads

from sflow_jax.machine.meshes import batch_sharding
from sflow_jax.models.flux1 import FluxConfig
from sflow_jax.models.layers import parameter_count, parameters, with_parameters
from sflow_jax.sampling.control import LayerControl
from sflow_jax.sampling.solve import take_step
from sflow_jax.sampling.solvers import EULER
from sflow_jax.sampling.steps import Blank, State

CONFIG = FluxConfig(
    double_blocks=4, single_blocks=8, heads=8, head_dim=64, rotary_axes=(8, 28, 28), text_width=1024
)
INFO, _ = flux_dev(CONFIG)
CANVAS = INFO.canvas(256, 256)
WORDS = 128
GUIDANCE = INFO.defaults.guidance
SIGMA, SIGMA_NEXT = 1.0, 0.9
BATCHES = (1, 2)


def same_weights() -> tuple[torch.nn.Module, nnx.Module]:
    """diffusers' transformer and ours with the same random weights."""
    torch.manual_seed(0)
    theirs = diffusers_transformer(CONFIG)
    tensors = {name: tensor.numpy() for name, tensor in theirs.state_dict().items()}
    module = INFO.abstract_network("transformer")
    shapes = {path: leaf.shape for path, leaf in parameters(module).items()}
    reads = plan_reads(table.diffusers_table(CONFIG), shapes)
    arrays = assemble(reads, shapes, lambda name, part: tensors[name][part or ...], np.float32)
    return theirs, with_parameters(module, jax.device_put(dict(arrays)))


def matrix_work(batch: int) -> float:
    """GFLOP of one step's matrix products over tokens: projections and MLPs, and attention."""
    return INFO.family.step_flops(INFO.configs, CANVAS.tokens, WORDS, batch) / 1e9


def product_rates(runs: int) -> tuple[float, float]:
    """GFLOP/s of both libraries on the step's own kinds of product, d → 3 d, d → 4 d and 4 d → d, each alone."""
    tokens, width, product = CANVAS.tokens + WORDS, CONFIG.width, jax.jit(jnp.matmul)
    gflop, seconds = 0.0, np.zeros(2)
    for inner, outer in ((width, 3 * width), (width, 4 * width), (4 * width, width)):
        left, right = (np.ones(shape, np.float32) for shape in ((tokens, inner), (inner, outer)))
        ours, theirs = jax.device_put((left, right)), (torch.tensor(left), torch.tensor(right.T.copy()))
        pair = (
            lambda factors=ours: product(*factors).block_until_ready(),
            lambda factors=theirs: torch.nn.functional.linear(*factors),
        )
        alternate(*pair, runs=10)
        seconds += np.median(alternate(*pair, runs=5 * runs), axis=0)
        gflop += 2 * tokens * inner * outer / 1e9
    return tuple(gflop / seconds)


def our_step(network: nnx.Module, inputs: StepInputs) -> Callable[[], np.ndarray]:
    """The product's own compiled step, with control masks, one group of as many members as the batch has."""
    place, batch = batch_sharding(None, 1), len(inputs.latents)
    blank = Blank.of(1, batch, CANVAS.tokens, CONFIG.in_channels)
    control = LayerControl.none(1, batch, CONFIG.layers)
    (evaluation,) = EULER.evaluations(SIGMA, SIGMA_NEXT)
    step = blank.step(evaluation, control.interventions(0))
    conditioning, guidance = inputs.conditioning(np.float32, place), np.full(batch, GUIDANCE, np.float32)

    def run() -> np.ndarray:
        start = State(inputs.latents, np.zeros_like(inputs.latents))
        # A step uses up its state.
        state = jax.device_put(start, place, may_alias=False)
        moved, _, _ = take_step(
            network, conditioning, guidance, state, step, canvas=CANVAS, sharding=place, kernel="auto"
        )
        return np.asarray(moved.latents)

    return run


def their_step(model: torch.nn.Module, inputs: StepInputs) -> Callable[[], np.ndarray]:
    """The same Euler step in torch."""
    arguments = inputs.for_diffusers(CANVAS, GUIDANCE)

    @torch.no_grad()
    def run() -> np.ndarray:
        (velocity,) = model(**arguments)
        return (arguments["hidden_states"] + (SIGMA_NEXT - SIGMA) * velocity).numpy()

    return run


def measure(theirs: torch.nn.Module, ours: nnx.Module, batch: int, runs: int, rates: tuple) -> dict[str, Any]:
    """A row of the table. rates: GFLOP/s of products alone, ours and theirs."""
    inputs = StepInputs.draw(CONFIG, CANVAS, WORDS, batch)
    pair = our_step(ours, inputs), their_step(theirs, inputs)
    result, expected = (step() for step in pair)
    alternate(*pair, runs=2)
    seconds = alternate(*pair, runs=runs)
    ratios, medians = seconds[:, 0] / seconds[:, 1], np.median(seconds, axis=0)
    # What the step's matrix products would take at the rate that they reach alone.
    shares = matrix_work(batch) / np.array(rates) / medians
    return {
        "batch": batch,
        "ours_ms": 1e3 * float(medians[0]),
        "diffusers_ms": 1e3 * float(medians[1]),
        "ratio": float(np.median(ratios)),
        "ratio_quartiles": np.quantile(ratios, [0.25, 0.75]).tolist(),
        "relative_difference": float(np.linalg.norm(result - expected) / np.linalg.norm(expected)),
        "share_of_step_in_matrix_products": dict(zip(("ours", "diffusers"), shares.tolist())),
    }


def describe(row: dict[str, Any]) -> str:
    """The row's lines of the printed table."""
    low, high = row["ratio_quartiles"]
    share = row["share_of_step_in_matrix_products"]
    return (
        f"{row['batch']:>5} {row['ours_ms']:9.1f} {row['diffusers_ms']:13.1f} {row['ratio']:7.2f} "
        f"{low:7.2f}–{high:.2f} {row['relative_difference']:11.1e}\n"
        f"      its {matrix_work(row['batch']):.1f} GFLOP of matrix products are {share['ours']:.0%} of our step, "
        f"{share['diffusers']:.0%} of theirs"
    )


@click.command()
@click.option("--runs", default=20, show_default=True, help="Pairs of steps a batch size.")
@out_option("step.json")
def main(runs: int, out: Path) -> None:
    """Time one denoising step against diffusers on this CPU."""
    cores = os.cpu_count()
    torch.set_num_threads(cores)
    theirs, ours = same_weights()
    million = parameter_count(ours) / 1e6
    blocks = f"{CONFIG.double_blocks} + {CONFIG.single_blocks} blocks"
    click.echo(f"FLUX, hidden {CONFIG.width}, {blocks}, {million:.0f} M parameters, float32")
    click.echo(f"{CANVAS.tokens} image + {WORDS} text tokens, {cores} cores, {runs} pairs")
    click.echo(
        f"{'batch':>5} {'ours ms':>9} {'diffusers ms':>13} {'ratio':>7} {'ratio range':>15} {'difference':>11}"
    )
    rows, rates = [], product_rates(runs)
    for batch in BATCHES:
        rows.append(measure(theirs, ours, batch, runs, rates))
        click.echo(describe(rows[-1]))
    click.echo(f"products alone: ours {rates[0]:.0f} GFLOP/s, theirs {rates[1]:.0f} GFLOP/s")
    surroundings = {"cores": cores, "versions": versions("jax", "torch")}
    write_json(out, surroundings | {"product_gflops": rates, "rows": rows})
    click.echo(f"written to {out}")


if __name__ == "__main__":
    main()
