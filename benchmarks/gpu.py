"""One denoising step of full-size FLUX.1-dev on an accelerator, beside diffusers on torch in the same run.

    python benchmarks/gpu.py

Random bfloat16 weights made on the device; 1024², batches of 1, 2 (source and edit) and 4 (source and three edits,
which is compared with their batch of 4). For each: ms a step, utilisation (the step's operations a second over
those of a large matrix product measured in the same run), peak memory, compile time; diffusers eager and under
torch.compile; ours besides with eight-bit blocks, with the layers unrolled, and with blocks in host memory. Without
an accelerator everything runs at reduced size on the CPU, and the JSON says that hardware figures are owed.
"""

import dataclasses
import gc
import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

# Two libraries share one device.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import click
import jax
import jax.numpy as jnp
import numpy as np
import torch
from common import (
    StepInputs,
    diffusers_transformer,
    flux_dev,
    median_seconds,
    out_option,
    versions,
    write_json,
)
from flax import nnx

from sflow_jax.machine.meshes import batch_sharding, parameter_shardings
from sflow_jax.models.flux1 import FluxConditioning, FluxConfig
from sflow_jax.models.layers import parameters, with_parameters
from sflow_jax.pictures.canvas import Canvas
from sflow_jax.planning.lowering import lower_step
from sflow_jax.sampling.control import LayerControl
from sflow_jax.sampling.solvers import EULER
from sflow_jax.sampling.steps import Blank, State
from sflow_jax.settings import Placement
from sflow_jax.storage.checkpoint import ModelInfo
from sflow_jax.storage.placement import place_network, placement_of

BATCHES = (1, 2, 4)
# What stands in for FLUX.1-dev where there is no accelerator.
REDUCED = FluxConfig(double_blocks=1, single_blocks=2, heads=4, head_dim=64, rotary_axes=(8, 28, 28))
# Spread of trained weights.
SPREAD = 0.02
# Name → how our step's weights are stored: as they are, in eight bits, blocks in host memory.
VARIANTS = {
    "bfloat16": Placement(dtype="bfloat16"),
    "int8": Placement(dtype="bfloat16", quantisation="int8"),
    "fp8": Placement(dtype="bfloat16", quantisation="fp8"),
    "offload": Placement(dtype="bfloat16", offload=True),
}
# What our plain step is divided by: (library, variant).
COMPARED = (("diffusers", "eager"), ("diffusers", "compiled"), ("sflow_jax", "int8"), ("sflow_jax", "fp8"))


@dataclasses.dataclass(frozen=True)
class Setting:
    """What is measured. words: text tokens. times: steps timed. rate: operations a second of a large product."""

    info: ModelInfo
    canvas: Canvas
    words: int
    times: int
    rate: float

    @property
    def config(self) -> FluxConfig:
        """The transformer's sizes."""
        return self.info.configs["transformer"]

    @property
    def guidance(self) -> float:
        """The model's default."""
        return self.info.defaults.guidance

    def inputs(self, batch: int) -> StepInputs:
        """Random latents and conditioning."""
        return StepInputs.draw(self.config, self.canvas, self.words, batch)

    def milliseconds(self, run: Callable[[], Any]) -> float:
        """Median of a call."""
        return 1e3 * median_seconds(run, self.times)


def random_weights(info: ModelInfo, placement: Placement) -> nnx.Module:
    """Normal numbers of the size that trained weights have, made where they stay."""
    module, spec = info.abstract_network("transformer"), info.family.networks["transformer"]
    leaves = parameters(module)

    @jax.jit
    def draw(key: jax.Array) -> dict[str, jax.Array]:
        keys = jax.random.split(key, len(leaves))
        return {
            path: SPREAD * jax.random.normal(k, leaf.shape, placement.dtype)
            for k, (path, leaf) in zip(keys, leaves.items())
        }

    places = parameter_shardings("transformer", {path: leaf.shape for path, leaf in leaves.items()}, None)
    return place_network(with_parameters(module, draw(jax.random.key(0))), places, placement_of(spec, placement))


def our_step(
    setting: Setting, placement: Placement, network: nnx.Module, batch: int
) -> tuple[Callable[[], Any], float]:
    """The product's compiled step, injecting in half of the layers where there is an edit; and its compile time."""
    config, canvas, place = setting.config, setting.canvas, batch_sharding(None, 1)
    lowered = lower_step(setting.info, placement, canvas, groups=1, members=batch, words=setting.words)
    start = time.perf_counter()
    compiled = lowered.compile()
    compile_seconds = time.perf_counter() - start
    control = LayerControl.none(1, batch, config.layers).injecting(
        range(0, config.layers, 2), elements=range(1, batch)
    )
    blank = jax.device_put(Blank.of(1, batch, canvas.tokens, config.in_channels), place)
    (evaluation,) = EULER.evaluations(1.0, 0.9)
    step, inputs = blank.step(evaluation, control.interventions(0)), setting.inputs(batch)
    conditioning = inputs.conditioning(placement.dtype, place)
    guidance = np.full(batch, setting.guidance, np.float32)
    state = jax.device_put(State(inputs.latents, np.zeros_like(inputs.latents)), place, may_alias=False)

    def run() -> None:
        nonlocal state
        state, _, done = compiled(network, conditioning, guidance, state, step)
        done.block_until_ready()

    return run, compile_seconds


def peak_memory() -> int | None:
    """Most bytes in use on the device so far, where it says."""
    statistics = jax.local_devices()[0].memory_stats()
    return statistics and statistics.get("peak_bytes_in_use")


def step_figures(setting: Setting, placement: Placement, network: nnx.Module, batch: int) -> dict[str, Any]:
    """Of our step."""
    run, compile_seconds = our_step(setting, placement, network, batch)
    milliseconds = setting.milliseconds(run)
    work = setting.info.family.step_flops(setting.info.configs, setting.canvas.tokens, setting.words, batch)
    return {
        "ms": milliseconds,
        "utilisation": 1e3 * work / milliseconds / setting.rate,
        "compile_seconds": compile_seconds,
        "peak_bytes": peak_memory(),
    }


def forward_figures(setting: Setting, network: nnx.Module, unroll: bool) -> dict[str, Any]:
    """Of the transformer alone, one picture, layers scanned or unrolled."""
    inputs, place = setting.inputs(1), batch_sharding(None, 1)
    arguments = network, jax.device_put(inputs.latents, place), inputs.conditioning(jnp.bfloat16, place)

    @jax.jit
    def velocity(network: nnx.Module, latents: jax.Array, conditioning: FluxConditioning) -> jax.Array:
        sigma = jnp.ones(1)
        return network(
            latents, conditioning, sigma=sigma, guidance=sigma, canvas=setting.canvas, unroll=unroll
        ).velocity

    return {"ms": setting.milliseconds(lambda: velocity(*arguments).block_until_ready())}


def their_transformer(config: FluxConfig, device: str) -> torch.nn.Module:
    """diffusers' transformer with random bfloat16 weights, made on the device."""
    with torch.device(device):
        torch.set_default_dtype(torch.bfloat16)
        model = diffusers_transformer(config)
        torch.set_default_dtype(torch.float32)
    return model


def their_figures(setting: Setting, module: torch.nn.Module, batch: int, device: str) -> dict[str, Any]:
    """Of diffusers' transformer."""
    arguments = setting.inputs(batch).for_diffusers(
        setting.canvas, setting.guidance, device=device, dtype=torch.bfloat16
    )

    @torch.no_grad()
    def run() -> None:
        module(**arguments)
        if device == "cuda":
            torch.cuda.synchronize()

    return {"ms": setting.milliseconds(run)}


def product_rate(side: int) -> float:
    """Operations a second of one bfloat16 product of square matrices: what utilisation is measured against."""
    left, right = (jax.random.normal(jax.random.key(i), (side, side), jnp.bfloat16) for i in range(2))
    product = jax.jit(jnp.matmul)
    return 2 * side**3 / median_seconds(lambda: product(left, right).block_until_ready(), 20)


def attempt(function: Callable[..., Any], *arguments: Any) -> Any:
    """Its result, or why there is none: one variant that a machine cannot do should not lose the others."""
    try:
        return function(*arguments)
    except Exception as error:  # compilers and allocators raise many kinds
        return {"failed": f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"}


def measure_ours(setting: Setting) -> Iterator[dict[str, Any]]:
    """Rows of every variant and batch, and of the layers scanned and unrolled."""
    for name, placement in VARIANTS.items():
        network = attempt(random_weights, setting.info, placement)
        failed = isinstance(network, dict)
        for batch in BATCHES:
            figures = network if failed else attempt(step_figures, setting, placement, network, batch)
            yield {"library": "sflow_jax", "variant": name, "batch": batch, **figures}
        if name == "bfloat16" and not failed:
            for unroll, how in ((False, "scanned"), (True, "unrolled")):
                figures = attempt(forward_figures, setting, network, unroll)
                yield {"library": "sflow_jax", "variant": f"transformer alone, {how}", "batch": 1, **figures}
        # The next variant needs the room.
        del network
        gc.collect()


def measure_theirs(setting: Setting, device: str, compiling: bool) -> Iterator[dict[str, Any]]:
    """Rows of diffusers, eager and compiled."""
    model = their_transformer(setting.config, device)
    for name in ("eager", "compiled") if compiling else ("eager",):
        module = model if name == "eager" else torch.compile(model, mode="max-autotune-no-cudagraphs")
        for batch in BATCHES:
            figures = attempt(their_figures, setting, module, batch, device)
            yield {"library": "diffusers", "variant": name, "batch": batch, **figures}


def measure(setting: Setting, device: str, compiling: bool) -> list[dict[str, Any]]:
    """All rows, each told as soon as it is there."""
    rows = []
    for measured in (measure_ours(setting), measure_theirs(setting, device, compiling)):
        for row in measured:
            click.echo(json.dumps(row))
            rows.append(row)
    return rows


def ratios(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Ours over theirs, batch by batch, and sixteen bits over eight."""
    ms = {(row["library"], row["variant"], row["batch"]): row["ms"] for row in rows if "ms" in row}
    return {
        f"bfloat16 / {library} {variant}, batch {batch}": ms["sflow_jax", "bfloat16", batch]
        / ms[library, variant, batch]
        for batch in BATCHES
        for library, variant in COMPARED
        if {("sflow_jax", "bfloat16", batch), (library, variant, batch)} <= ms.keys()
    }


@click.command()
@click.option("--times", type=int, help="Steps timed [20; 3 on a CPU].")
@click.option("--compile/--no-compile", "compiling", default=None, help="torch.compile [only on an accelerator].")
@out_option("gpu.json")
def main(times: int | None, compiling: bool | None, out: Path) -> None:
    """Time FLUX.1-dev's step on this accelerator against diffusers."""
    accelerated, kind = jax.default_backend() != "cpu", jax.devices()[0].device_kind
    info, words = flux_dev(None if accelerated else REDUCED)
    side = info.picture_size if accelerated else 128
    rate = product_rate(8192 if accelerated else 1024)
    click.echo(f"{kind}: {rate / 1e12:.2f} TFLOP/s in a product of square matrices")
    setting = Setting(info, info.canvas(side, side), words, times or (20 if accelerated else 3), rate)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rows = measure(setting, device, accelerated if compiling is None else compiling)
    results = {
        "device": kind,
        "hardware": "measured" if accelerated else "owed: no accelerator here; a reduced model ran on the CPU",
        "side": side,
        "blocks": [setting.config.double_blocks, setting.config.single_blocks],
        "hidden": setting.config.width,
        "product_flops": rate,
        "versions": versions("jax", "torch"),
        "rows": rows,
        "ratios": ratios(rows),
    }
    write_json(out, results)
    for name, ratio in results["ratios"].items():
        click.echo(f"{name}: {ratio:.2f}")
    click.echo(f"{results['hardware']}; written to {out}")


if __name__ == "__main__":
    main()
