"""One denoising step of a mid-size SD3.5-medium, here and in diffusers on torch, side by side on the CPU.

    python benchmarks/sd3_step.py
    python benchmarks/sd3_step.py --side 512 --guidance 1

With guidance a step computes two rows, as the published pipeline does; at guidance 1 one. Both libraries take
turns in one process, as in `step.py`; the figure that counts is the median of the pairwise ratios. Prints a table
and writes JSON.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import jax
import numpy as np
import torch
from common import alternate, compared, out_option, use_all_cores, versions, write_json
from diffusers import SD3Transformer2DModel
from flax import nnx
from sflow_convert.engine import assemble, plan_reads
from sflow_convert.sd3 import diffusers_table

from sflow_jax.machine.meshes import batch_sharding
from sflow_jax.models.layers import parameter_count, parameters, with_parameters
from sflow_jax.models.sd3 import PATCH, Sd3Conditioning, Sd3Config
from sflow_jax.pictures.canvas import Canvas
from sflow_jax.pictures.latents import unpack
from sflow_jax.sampling.control import LayerControl
from sflow_jax.sampling.guidance import interleave
from sflow_jax.sampling.solve import take_step
from sflow_jax.sampling.solvers import EULER
from sflow_jax.sampling.steps import Blank, State
from sflow_jax.storage.checkpoint import published_info

CONFIG = Sd3Config(layers=12, dual_layers=6, heads=8, text_width=1024, pooled_width=512, qk_norm=True)
MEDIUM, _ = published_info("sd35-medium")
INFO = dataclasses.replace(MEDIUM, configs=MEDIUM.configs | {"transformer": CONFIG})
WORDS = 128
SIGMA, SIGMA_NEXT = 1.0, 0.9
GUIDANCES, SIDES = (1.0, 5.0), (256, 512)


@dataclasses.dataclass(frozen=True)
class Inputs:
    """Of one step, float32: latents [1, s, c], and conditioning of the prompt and of the negative one."""

    latents: np.ndarray
    prompt: Sd3Conditioning
    negative: Sd3Conditioning

    @classmethod
    def draw(cls, canvas: Canvas) -> "Inputs":
        """Standard normal numbers, the same at every call."""
        rng = np.random.default_rng(0)
        draw = lambda *shape: rng.standard_normal((1, *shape), np.float32)
        texts = (Sd3Conditioning(draw(WORDS, CONFIG.text_width), draw(CONFIG.pooled_width)) for _ in range(2))
        return cls(draw(canvas.tokens, CONFIG.in_channels), *texts)


def same_weights() -> tuple[torch.nn.Module, nnx.Module]:
    """diffusers' transformer and ours with the same random weights."""
    torch.manual_seed(0)
    theirs = SD3Transformer2DModel(
        in_channels=CONFIG.in_channels // PATCH**2,
        num_layers=CONFIG.layers,
        attention_head_dim=CONFIG.head_dim,
        num_attention_heads=CONFIG.heads,
        joint_attention_dim=CONFIG.text_width,
        caption_projection_dim=CONFIG.width,
        pooled_projection_dim=CONFIG.pooled_width,
        pos_embed_max_size=CONFIG.position_side,
        dual_attention_layers=tuple(range(CONFIG.dual_layers)),
        qk_norm="rms_norm",
    ).eval()
    tensors = {name: tensor.numpy() for name, tensor in theirs.state_dict().items()}
    module = INFO.abstract_network("transformer")
    shapes = {path: leaf.shape for path, leaf in parameters(module).items()}
    reads = plan_reads(diffusers_table(CONFIG), shapes)
    arrays = assemble(reads, shapes, lambda name, part: tensors[name][part or ...], np.float32)
    return theirs, with_parameters(module, jax.device_put(dict(arrays)))


def our_step(network: nnx.Module, canvas: Canvas, inputs: Inputs, guidance: float) -> Callable[[], np.ndarray]:
    """The product's own compiled step, with control masks."""
    place, branches = batch_sharding(None, 1), guidance != 1
    conditioning = interleave(inputs.prompt, inputs.negative, 1) if branches else inputs.prompt
    conditioning, scale = jax.device_put(conditioning, place), np.full(1, guidance, np.float32)
    (evaluation,) = EULER.evaluations(SIGMA, SIGMA_NEXT)
    blank = Blank.of(1, 1, canvas.tokens, CONFIG.in_channels)
    step = blank.step(evaluation, LayerControl.none(1, 1, CONFIG.layers).interventions(0))
    options = {"canvas": canvas, "sharding": place, "kernel": "auto", "branches": branches}

    def run() -> np.ndarray:
        zeros = np.zeros_like(inputs.latents)
        # A step uses up its state.
        state = jax.device_put(State(inputs.latents, zeros, zeros), place, may_alias=False)
        return np.asarray(take_step(network, conditioning, scale, state, step, **options)[0].latents)

    return run


def their_step(model: torch.nn.Module, canvas: Canvas, inputs: Inputs, guidance: float) -> Callable[[], np.ndarray]:
    """The pipeline's step in torch: both branches in one batch, then Euler."""
    rows = [inputs.negative, inputs.prompt] if guidance != 1 else [inputs.prompt]
    joined = Sd3Conditioning.concatenate(rows)
    text, pooled = (torch.tensor(np.array(x)) for x in (joined.text, joined.pooled))
    latents = torch.tensor(np.array(unpack(inputs.latents, canvas.rows, canvas.columns))).permute(0, 3, 1, 2)
    arguments = {"encoder_hidden_states": text, "pooled_projections": pooled, "return_dict": False}

    @torch.no_grad()
    def run() -> np.ndarray:
        times = torch.full((len(rows),), 1000 * SIGMA)
        (velocity,) = model(latents.repeat(len(rows), 1, 1, 1), timestep=times, **arguments)
        if guidance != 1:
            negative, prompted = velocity.chunk(2)
            velocity = negative + guidance * (prompted - negative)
        return (latents + (SIGMA_NEXT - SIGMA) * velocity).numpy()

    return run


def measure(theirs: torch.nn.Module, ours: nnx.Module, side: int, guidance: float, runs: int) -> dict[str, Any]:
    """A row of the table."""
    canvas = INFO.canvas(side, side)
    inputs = Inputs.draw(canvas)
    steps = our_step(ours, canvas, inputs, guidance), their_step(theirs, canvas, inputs, guidance)
    result, expected = unpack(steps[0](), canvas.rows, canvas.columns).transpose(0, 3, 1, 2), steps[1]()
    alternate(*steps, runs=2)
    seconds = alternate(*steps, runs=runs)
    return {
        "tokens": canvas.tokens,
        "guidance": guidance,
        "ours_ms": 1e3 * float(np.median(seconds[:, 0])),
        "diffusers": compared(seconds[:, 0], seconds[:, 1]),
        "relative_difference": float(np.linalg.norm(result - expected) / np.linalg.norm(expected)),
    }


@click.command()
@click.option("--runs", default=15, show_default=True, help="Turns a row.")
@click.option("--side", "sides", type=int, multiple=True, help="Height and width [256 and 512].")
@click.option("--guidance", "guidances", type=float, multiple=True, help="Guidance scales [1 and 5].")
@out_option("sd3_step.json")
def main(runs: int, sides: tuple[int, ...], guidances: tuple[float, ...], out: Path) -> None:
    """Time one denoising step of SD3.5 against diffusers on this CPU."""
    threads = use_all_cores()
    theirs, ours = same_weights()
    million = parameter_count(ours) / 1e6
    click.echo(f"SD3.5, hidden {CONFIG.width}, {CONFIG.layers} layers of which {CONFIG.dual_layers} dual,")
    click.echo(f"{million:.0f} M parameters, float32, {WORDS} text tokens")
    rows = []
    for side in sides or SIDES:
        for guidance in guidances or GUIDANCES:
            row = measure(theirs, ours, side, guidance, runs)
            rows.append(row)
            theirs_took, (low, high) = row["diffusers"], row["diffusers"]["ratio_quartiles"]
            click.echo(
                f"{row['tokens']:>5} tokens, guidance {guidance:g}: ours {row['ours_ms']:.1f} ms, diffusers "
                f"{theirs_took['ms']:.1f} ms, ratio {theirs_took['ratio']:.2f} ({low:.2f}–{high:.2f}), difference "
                f"{row['relative_difference']:.1e}"
            )
    write_json(out, {"threads": threads, "versions": versions("jax", "torch", "diffusers"), "rows": rows})


if __name__ == "__main__":
    main()
