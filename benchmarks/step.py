"""One denoising step of a mid-size FLUX, here and in diffusers on torch, side by side on the CPU.

    python benchmarks/step.py

The two alternate in one process, so that a machine whose speed drifts slows both alike; the figure that
counts is the median of the pairwise ratios. Prints a table, says how much of a step is matrix products (the
rest is memory traffic, norms, softmax and overhead), and writes JSON.
"""

import json
import os
import time
from collections.abc import Callable
from pathlib import Path

import click
import jax
import jax.numpy as jnp
import numpy as np
import torch
from diffusers import FluxTransformer2DModel
from sflow_convert import flux as table
from sflow_convert.engine import assemble, plan
from sflow_jax.checkpoint import abstract_network
from sflow_jax.costs import step_flops

from sflow_jax.machine.meshes import batch_sharding
from sflow_jax.models.flux1 import FluxConfig, position_ids
from sflow_jax.models.layers import parameter_count, parameters, with_parameters
from sflow_jax.sampling.solve import take_step as step_latents
from sflow_jax.sampling.steps import Step

CONFIG = FluxConfig(
    double_blocks=4, single_blocks=8, heads=8, head_dim=64, rotary_axes=(8, 28, 28), text_width=1024
)
ROWS = COLUMNS = 32
WORDS = 128
RESULTS = Path(__file__).parent / "results" / "step.json"


def their_transformer(config: FluxConfig) -> FluxTransformer2DModel:
    """diffusers' transformer of the same sizes, with its random weights."""
    return FluxTransformer2DModel(
        num_layers=config.double_blocks,
        num_single_layers=config.single_blocks,
        attention_head_dim=config.head_dim,
        num_attention_heads=config.heads,
        joint_attention_dim=config.text_width,
        guidance_embeds=True,
        axes_dims_rope=config.rotary_axes,
    ).eval()


def build() -> tuple[FluxTransformer2DModel, object]:
    """The same random weights in both libraries."""
    torch.manual_seed(0)
    theirs = their_transformer(CONFIG)
    state = {name: tensor.numpy() for name, tensor in theirs.state_dict().items()}
    module = abstract_network("transformer", CONFIG)
    targets = {path: leaf.shape for path, leaf in parameters(module).items()}
    reads = plan(table.diffusers_table(CONFIG), targets)
    arrays = assemble(reads, targets, lambda name, part: state[name][part or ...], np.float32)
    return theirs, with_parameters(module, jax.device_put(dict(arrays)))


def inputs(batch: int) -> dict[str, np.ndarray]:
    """Random latents and features."""
    generator = np.random.default_rng(0)
    tokens = ROWS * COLUMNS // 4
    shapes = {
        "latents": (tokens, CONFIG.in_channels),
        "text": (WORDS, CONFIG.text_width),
        "pooled": (CONFIG.pooled_width,),
    }
    return {name: generator.standard_normal((batch, *shape), np.float32) for name, shape in shapes.items()}


def matrix_work(batch: int) -> float:
    """GFLOP of one step's matrix products over tokens: projections and MLPs, and attention."""
    return step_flops(CONFIG, ROWS * COLUMNS // 4, WORDS, batch) / 1e9


def product_rates(runs: int) -> tuple[float, float]:
    """GFLOP/s of both libraries on the step's own kinds of product, d → 3 d, d → 4 d and 4 d → d, each alone."""
    tokens, width, product = ROWS * COLUMNS // 4 + WORDS, CONFIG.width, jax.jit(jnp.matmul)
    flops, total = 0.0, np.zeros(2)
    for inner, outer in ((width, 3 * width), (width, 4 * width), (4 * width, width)):
        left, right = (np.ones(shape, np.float32) for shape in ((tokens, inner), (inner, outer)))
        ours, theirs = jax.device_put((left, right)), (torch.tensor(left), torch.tensor(right.T.copy()))
        pair = (
            lambda given=ours: product(*given).block_until_ready(),
            lambda given=theirs: torch.nn.functional.linear(*given),
        )
        alternate(*pair, runs=10)
        total += np.median(alternate(*pair, runs=5 * runs), axis=0)
        flops += 2 * tokens * inner * outer / 1e9
    return tuple(flops / total)


def our_step(module, given: dict[str, np.ndarray], batch: int) -> Callable[[], np.ndarray]:
    """The product's own compiled step, with control masks, one group of `batch` members."""
    place = batch_sharding(None, 1)
    mask = np.zeros((batch, CONFIG.layers), bool)
    nothing = np.zeros((1, *given["latents"].shape[1:]), np.float32)
    step = Step(np.float32(1), np.float32(0.9), np.float32(1), mask, mask, nothing, nothing, np.asarray(False))
    features = jax.device_put((given["text"], given["pooled"]), place)
    guidance, ids = np.full(batch, 3.5, np.float32), position_ids(ROWS, COLUMNS)

    def run() -> np.ndarray:
        # A step uses up its latents.
        latents = jax.device_put(given["latents"], place, may_alias=False)
        return np.asarray(
            step_latents(module, features, guidance, ids, latents, step, sharding=place, kernel="xla")[0]
        )

    return run


def their_step(model: FluxTransformer2DModel, given: dict[str, np.ndarray], batch: int) -> Callable[[], np.ndarray]:
    """The same Euler step in torch."""
    tensors = {name: torch.tensor(value) for name, value in given.items()}
    ids, text_ids = torch.tensor(position_ids(ROWS, COLUMNS)), torch.zeros(WORDS, 3)

    @torch.no_grad()
    def run() -> np.ndarray:
        velocity = model(
            hidden_states=tensors["latents"],
            encoder_hidden_states=tensors["text"],
            pooled_projections=tensors["pooled"],
            timestep=torch.ones(batch),
            guidance=torch.full((batch,), 3.5),
            img_ids=ids,
            txt_ids=text_ids,
            return_dict=False,
        )[0]
        return (tensors["latents"] - 0.1 * velocity).numpy()

    return run


def alternate(first: Callable, second: Callable, runs: int) -> np.ndarray:
    """Seconds [runs, 2] of two functions called in turn."""
    seconds = np.empty((runs, 2))
    for i in range(runs):
        for j, function in enumerate((first, second)):
            start = time.perf_counter()
            function()
            seconds[i, j] = time.perf_counter() - start
    return seconds


@click.command()
@click.option("--runs", default=20, show_default=True, help="Pairs of steps a batch size.")
@click.option("--out", default=RESULTS, show_default=True, type=click.Path(path_type=Path), help="JSON file.")
def main(runs: int, out: Path) -> None:
    """Time one denoising step against diffusers on this CPU."""
    torch.set_num_threads(os.cpu_count())
    theirs, ours = build()
    million = parameter_count(ours) / 1e6
    blocks = f"{CONFIG.double_blocks} + {CONFIG.single_blocks} blocks"
    click.echo(f"FLUX, hidden {CONFIG.width}, {blocks}, {million:.0f} M parameters, float32")
    click.echo(f"{ROWS * COLUMNS // 4} image + {WORDS} text tokens, {os.cpu_count()} cores, {runs} pairs")
    click.echo(
        f"{'batch':>5} {'ours ms':>9} {'diffusers ms':>13} {'ratio':>7} {'ratio range':>15} {'difference':>11}"
    )
    rows, rates = [], product_rates(runs)
    for batch in (1, 2):
        given = inputs(batch)
        pair = our_step(ours, given, batch), their_step(theirs, given, batch)
        results = [function() for function in pair]
        difference = float(np.linalg.norm(results[0] - results[1]) / np.linalg.norm(results[1]))
        alternate(*pair, runs=2)
        seconds = alternate(*pair, runs=runs)
        ratios = seconds[:, 0] / seconds[:, 1]
        row = {
            "batch": batch,
            "ours_ms": 1e3 * float(np.median(seconds[:, 0])),
            "diffusers_ms": 1e3 * float(np.median(seconds[:, 1])),
            "ratio": float(np.median(ratios)),
            "ratio_quartiles": np.quantile(ratios, [0.25, 0.75]).tolist(),
            "relative_difference": difference,
        }
        # What the step's matrix products would take at the rate that they reach alone.
        share = [
            matrix_work(batch) / rate / row[name] * 1e3 for rate, name in zip(rates, ("ours_ms", "diffusers_ms"))
        ]
        row["share_of_step_in_matrix_products"] = dict(zip(("ours", "diffusers"), share))
        low, high = row["ratio_quartiles"]
        click.echo(
            f"{batch:>5} {row['ours_ms']:9.1f} {row['diffusers_ms']:13.1f} {row['ratio']:7.2f} "
            f"{low:7.2f}–{high:.2f} {difference:11.1e}"
        )
        rows.append(row)
        click.echo(
            f"      its {matrix_work(batch):.1f} GFLOP of matrix products are {share[0]:.0%} of our step, "
            f"{share[1]:.0%} of theirs"
        )
    click.echo(f"products alone: ours {rates[0]:.0f} GFLOP/s, theirs {rates[1]:.0f} GFLOP/s")
    versions = {"jax": jax.__version__, "torch": torch.__version__}
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(
        json.dumps({"cores": os.cpu_count(), "versions": versions, "product_gflops": rates, "rows": rows}, indent=2)
        + "\n"
    )
    click.echo(f"written to {out}")


if __name__ == "__main__":
    main()
