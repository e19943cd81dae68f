"""One denoising step of a mid-size FLUX, here and in diffusers on torch, side by side on the CPU.

    python benchmarks/step.py
    python benchmarks/step.py --side 128 --side 512 --batch 1 --compiled

All take turns in one process, so that a machine whose speed drifts slows them alike; the figure that counts is the
median of the pairwise ratios. `--compiled` adds diffusers through `torch.compile`, which needs a C++ compiler.
Prints a table, says how much of a step is matrix products (the rest is memory traffic, norms, softmax and
overhead), and writes JSON.
"""

from collections.abc import Callable, Iterable
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
    compared,
    diffusers_transformer,
    flux_dev,
    out_option,
    take_turns,
    use_all_cores,
    versions,
    write_json,
)
from flax import nnx
from sflow_convert import flux as table
from sflow_convert.engine import assemble, plan_reads

from sflow_jax.machine.meshes import batch_sharding
from sflow_jax.models.flux1 import FluxConfig
from sflow_jax.models.layers import parameter_count, parameters, with_parameters
from sflow_jax.pictures.canvas import Canvas
from sflow_jax.sampling.control import LayerControl
from sflow_jax.sampling.solve import take_step
from sflow_jax.sampling.solvers import EULER
from sflow_jax.sampling.steps import Blank, State

CONFIG = FluxConfig(
    double_blocks=4, single_blocks=8, heads=8, head_dim=64, rotary_axes=(8, 28, 28), text_width=1024
)
INFO, _ = flux_dev(CONFIG)
WORDS = 128
GUIDANCE = INFO.defaults.guidance
SIGMA, SIGMA_NEXT = 1.0, 0.9
BATCHES = (1, 2)
# Pixels; 64 to 4,096 image tokens.
SIDES = (128, 256, 512, 768, 1024)


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


def matrix_work(canvas: Canvas, batch: int) -> float:
    """GFLOP of one step's matrix products over tokens: projections and MLPs, and attention."""
    return INFO.family.step_flops(INFO.configs, canvas.tokens, WORDS, batch) / 1e9


def product_rates(canvas: Canvas, runs: int) -> tuple[float, float]:
    """GFLOP/s of both libraries on the step's own kinds of product, d → 3 d, d → 4 d and 4 d → d, each alone."""
    tokens, width, product = canvas.tokens + WORDS, CONFIG.width, jax.jit(jnp.matmul)
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


def our_step(network: nnx.Module, canvas: Canvas, inputs: StepInputs) -> Callable[[], np.ndarray]:
    """The product's own compiled step, with control masks, one group of as many members as the batch has."""
    place, batch = batch_sharding(None, 1), len(inputs.latents)
    blank = Blank.of(1, batch, canvas.tokens, CONFIG.in_channels)
    control = LayerControl.none(1, batch, CONFIG.layers)
    (evaluation,) = EULER.evaluations(SIGMA, SIGMA_NEXT)
    step = blank.step(evaluation, control.interventions(0))
    conditioning, guidance = inputs.conditioning(np.float32, place), np.full(batch, GUIDANCE, np.float32)

    def run() -> np.ndarray:
        start = State(inputs.latents, np.zeros_like(inputs.latents))
        # A step uses up its state.
        state = jax.device_put(start, place, may_alias=False)
        moved, *_ = take_step(
            network, conditioning, guidance, state, step, canvas=canvas, sharding=place, kernel="auto"
        )
        return np.asarray(moved.latents)

    return run


def their_step(model: Callable, canvas: Canvas, inputs: StepInputs) -> Callable[[], np.ndarray]:
    """The same Euler step in torch."""
    arguments = inputs.for_diffusers(canvas, GUIDANCE)

    @torch.no_grad()
    def run() -> np.ndarray:
        (velocity,) = model(**arguments)
        return (arguments["hidden_states"] + (SIGMA_NEXT - SIGMA) * velocity).numpy()

    return run


def measure(
    opponents: dict[str, Callable], ours: nnx.Module, side: int, batch: int, runs: int, rates: tuple
) -> dict[str, Any]:
    """A row of the table. opponents: name → diffusers' transformer. rates: GFLOP/s of products, ours and theirs."""
    canvas = INFO.canvas(side, side)
    inputs = StepInputs.draw(CONFIG, canvas, WORDS, batch)
    steps = [our_step(ours, canvas, inputs)]
    steps += [their_step(model, canvas, inputs) for model in opponents.values()]
    result, expected = (step() for step in steps[:2])
    take_turns(steps, runs=2)
    seconds = take_turns(steps, runs=runs)
    medians = np.median(seconds, axis=0)
    # What the step's matrix products would take at the rate that they reach alone.
    shares = matrix_work(canvas, batch) / np.array(rates) / medians[:2]
    row = {
        "tokens": canvas.tokens,
        "batch": batch,
        "gflop": matrix_work(canvas, batch),
        "ours_ms": 1e3 * float(medians[0]),
        "relative_difference": float(np.linalg.norm(result - expected) / np.linalg.norm(expected)),
        "share_of_step_in_matrix_products": dict(zip(("ours", "diffusers"), shares.tolist())),
    }
    for place, name in enumerate(opponents, 1):
        row[name] = compared(seconds[:, 0], seconds[:, place])
    return row


def describe(row: dict[str, Any], opponents: Iterable[str]) -> str:
    """The row's lines of the printed table."""
    share, lines = row["share_of_step_in_matrix_products"], []
    for name in opponents:
        low, high = row[name]["ratio_quartiles"]
        lines.append(
            f"{row['tokens']:>6} {row['batch']:>5} {row['ours_ms']:9.1f} {name:>20} {row[name]['ms']:9.1f} "
            f"{row[name]['ratio']:6.2f} {low:6.2f}–{high:.2f} {row['relative_difference']:10.1e}"
        )
    lines.append(
        f"      its {row['gflop']:.1f} GFLOP of matrix products are {share['ours']:.0%} of our step, "
        f"{share['diffusers']:.0%} of theirs"
    )
    return "\n".join(lines)


@click.command()
@click.option("--runs", default=20, show_default=True, help="Turns a row; fewer where a step takes long.")
@click.option("--side", "sides", type=int, multiple=True, help="Height and width [128, 256, 512, 768, 1024].")
@click.option("--batch", "batches", type=int, multiple=True, help="Batch sizes [1 and 2].")
@click.option("--compiled", is_flag=True, help="Also diffusers through torch.compile.")
@out_option("step.json")
def main(runs: int, sides: tuple[int, ...], batches: tuple[int, ...], compiled: bool, out: Path) -> None:
    """Time one denoising step against diffusers on this CPU."""
    pools = use_all_cores()
    theirs, ours = same_weights()
    opponents = {"diffusers": theirs}
    if compiled:
        # A program a row of the table; beyond its limit torch goes on without compiling.
        torch._dynamo.config.recompile_limit = 1_000
        opponents["diffusers, compiled"] = torch.compile(theirs, dynamic=False)
    million = parameter_count(ours) / 1e6
    blocks = f"{CONFIG.double_blocks} + {CONFIG.single_blocks} blocks"
    click.echo(f"FLUX, hidden {CONFIG.width}, {blocks}, {million:.0f} M parameters, float32")
    click.echo(f"{WORDS} text tokens, threads: ours {pools['ours']}, torch's {pools['diffusers']}")
    click.echo(
        f"{'tokens':>6} {'batch':>5} {'ours ms':>9} {'opponent':>20} {'ms':>9} {'ratio':>6} {'quartiles':>11} "
        f"{'difference':>10}"
    )
    rows, rates = [], product_rates(INFO.canvas(256, 256), runs)
    for side in sides or SIDES:
        for batch in batches or BATCHES:
            turns = max(3, min(runs, round(runs * 512 / INFO.canvas(side, side).tokens)))
            rows.append(measure(opponents, ours, side, batch, turns, rates))
            click.echo(describe(rows[-1], opponents))
    click.echo(f"products alone: ours {rates[0]:.0f} GFLOP/s, theirs {rates[1]:.0f} GFLOP/s")
    surroundings = {"threads": pools, "versions": versions("jax", "torch")}
    write_json(out, surroundings | {"product_gflops": rates, "rows": rows})
    click.echo(f"written to {out}")


if __name__ == "__main__":
    main()
