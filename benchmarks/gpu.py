"""One denoising step of full-size FLUX.1-dev on an accelerator, beside diffusers on torch in the same run.

    python benchmarks/gpu.py

Random bfloat16 weights made on the device; 1024², batches of 1, 2 (source and edit) and 4 (source and three edits,
which is compared with their batch of 4). For each: ms a step, utilisation (the step's operations a second over
those of a large matrix product measured in the same run), peak memory, compile time; diffusers eager and under
torch.compile; ours besides with eight-bit blocks, with the layers unrolled, and with blocks in host memory. Without
an accelerator everything runs at reduced size on the CPU, and the JSON says that hardware figures are owed.
"""

import gc
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Two libraries share one device.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import click
import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax import nnx
from sflow_jax.checkpoint import abstract_network
from sflow_jax.costs import step_flops
from step import their_transformer

from sflow_jax.machine.meshes import batch_sharding, parameter_shardings
from sflow_jax.models.flux1 import FluxConfig, position_ids
from sflow_jax.models.layers import parameters, with_parameters
from sflow_jax.pictures.canvas import Canvas
from sflow_jax.sampling.solve import take_step as step_latents
from sflow_jax.sampling.steps import Step
from sflow_jax.storage.placement import place_network as settle

RESULTS = Path(__file__).resolve().parent / "results" / "gpu.json"
BATCHES = (1, 2, 4)
WORDS = 512
# What stands in for FLUX.1-dev where there is no accelerator.
REDUCED = FluxConfig(double_blocks=1, single_blocks=2, heads=4, head_dim=64, rotary_axes=(8, 28, 28))
# Name → changes of our step: none, eight-bit blocks, unrolled layers, blocks in host memory.
VARIANTS: dict[str, dict[str, Any]] = {
    "bfloat16": {},
    "int8": {"quantisation": "int8"},
    "fp8": {"quantisation": "fp8"},
    "offload": {"offload": True},
}


def random_weights(config: FluxConfig, quantisation: str | None = None, offload: bool = False) -> nnx.Module:
    """Normal numbers of the size that trained weights have, made where they stay."""
    module = abstract_network("transformer", config)
    leaves = parameters(module)

    @jax.jit
    def draw(key: jax.Array) -> dict[str, jax.Array]:
        keys = jax.random.split(key, len(leaves))
        return {
            path: 0.02 * jax.random.normal(k, leaf.shape, jnp.bfloat16)
            for k, (path, leaf) in zip(keys, leaves.items())
        }

    places = parameter_shardings("transformer", {path: leaf.shape for path, leaf in leaves.items()}, None)
    network = with_parameters(module, draw(jax.random.key(0)))
    if quantisation is None and not offload:
        return network
    return settle(network, places, quantisation=quantisation, offload=offload)


def our_step(network: nnx.Module, canvas: Canvas, batch: int) -> tuple[Callable[[], Any], float]:
    """The product's compiled step, injecting in half of the layers where there is an edit; and its compile time."""
    config, place = network.config, batch_sharding(None, 1)
    rng = np.random.default_rng(0)

    def draw(*shape: int) -> jax.Array:
        return jax.device_put(jnp.asarray(rng.standard_normal(shape, np.float32), jnp.bfloat16), place)

    inject = np.zeros((batch, config.layers), bool)
    inject[1:, ::2] = True
    nothing = np.zeros((1, canvas.tokens, config.in_channels), np.float32)
    step = Step(*map(np.float32, (1, 0.9, 1)), inject, np.zeros_like(inject), nothing, nothing, np.asarray(False))
    given = (
        (draw(batch, WORDS, config.text_width), draw(batch, config.pooled_width)),
        np.full(batch, 3.5, np.float32),
        position_ids(canvas.rows, canvas.columns),
    )
    latents = jax.device_put(rng.standard_normal((batch, canvas.tokens, config.in_channels), np.float32), place)
    start = time.perf_counter()
    compiled = step_latents.lower(network, *given, latents, step, sharding=place, kernel="auto").compile()
    seconds = time.perf_counter() - start

    def run() -> None:
        nonlocal latents
        latents, done = compiled(network, *given, latents, step)
        done.block_until_ready()

    return run, seconds


def forward(network: nnx.Module, canvas: Canvas, batch: int, unroll: bool) -> Callable[[], Any]:
    """The transformer alone, layers scanned or unrolled."""
    config, tokens = network.config, canvas.tokens

    @jax.jit
    def compute(network: nnx.Module, latents: jax.Array) -> jax.Array:
        text, pooled = (
            jnp.ones((batch, *s), jnp.bfloat16) for s in ((WORDS, config.text_width), (config.pooled_width,))
        )
        ids = jnp.asarray(position_ids(canvas.rows, canvas.columns))
        sigma = jnp.ones(batch)
        return network(latents, text, pooled, timestep=sigma, guidance=sigma, image_ids=ids, unroll=unroll)

    latents = jnp.ones((batch, tokens, config.in_channels))
    return lambda: compute(network, latents).block_until_ready()


def their_step(config: FluxConfig, canvas: Canvas, device: str) -> tuple[torch.nn.Module, Callable]:
    """diffusers' transformer with random weights on the same device, and a maker of steps of some batch."""
    with torch.device(device):
        torch.set_default_dtype(torch.bfloat16)
        model = their_transformer(config)
        torch.set_default_dtype(torch.float32)

    def step(batch: int, module: torch.nn.Module) -> Callable[[], Any]:
        options = {"device": device, "dtype": torch.bfloat16}
        given = {
            "hidden_states": torch.randn(batch, canvas.tokens, config.in_channels, **options),
            "encoder_hidden_states": torch.randn(batch, WORDS, config.text_width, **options),
            "pooled_projections": torch.randn(batch, config.pooled_width, **options),
            "timestep": torch.ones(batch, **options),
            "guidance": torch.full((batch,), 3.5, **options),
            "img_ids": torch.tensor(position_ids(canvas.rows, canvas.columns), device=device),
            "txt_ids": torch.zeros(WORDS, 3, device=device),
        }

        @torch.no_grad()
        def run() -> None:
            module(**given, return_dict=False)
            if device == "cuda":
                torch.cuda.synchronize()

        return run

    return model, step


def product_rate(side: int) -> float:
    """Operations a second of one bfloat16 product of square matrices: what utilisation is measured against."""
    left, right = (jax.random.normal(jax.random.key(i), (side, side), jnp.bfloat16) for i in range(2))
    product = jax.jit(jnp.matmul)
    return 2 * side**3 / median(lambda: product(left, right).block_until_ready(), 20)


def median(run: Callable[[], Any], times: int) -> float:
    """Seconds of a call, after three that do not count."""
    for _ in range(3):
        run()
    seconds = []
    for _ in range(times):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return float(np.median(seconds))


def peak_memory() -> int | None:
    """Most bytes in use on the device so far, where it says."""
    told = jax.local_devices()[0].memory_stats()
    return told and told.get("peak_bytes_in_use")


def attempt(run: Callable[[], Any]) -> Any:
    """A figure, or why there is none: one variant that a machine cannot do should not lose the others."""
    try:
        return run()
    except Exception as error:  # compilers and allocators raise many kinds
        return {"failed": f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"}


def measure_ours(config: FluxConfig, canvas: Canvas, times: int, rate: float) -> list[dict[str, Any]]:
    """Rows of every variant and batch, and of the layers scanned and unrolled."""
    rows = []
    for name, changes in VARIANTS.items():
        network = attempt(lambda changes=changes: random_weights(config, **changes))
        for batch in BATCHES:

            def figures(network=network, batch=batch) -> dict[str, Any]:
                run, compiling = our_step(network, canvas, batch)
                seconds = median(run, times)
                work = step_flops(config, canvas.tokens, WORDS, batch)
                return {
                    "ms": 1e3 * seconds,
                    "utilisation": work / seconds / rate,
                    "compile_seconds": compiling,
                    "peak_bytes": peak_memory(),
                }

            found = network if isinstance(network, dict) else attempt(figures)
            rows.append({"library": "sflow_jax", "variant": name, "batch": batch, **found})
            click.echo(json.dumps(rows[-1]))
        if name == "bfloat16":
            for unroll in (False, True):
                told = attempt(lambda u=unroll, n=network: {"ms": 1e3 * median(forward(n, canvas, 1, u), times)})
                variant = "transformer alone, " + ("unrolled" if unroll else "scanned")
                rows.append({"library": "sflow_jax", "variant": variant, "batch": 1, **told})
                click.echo(json.dumps(rows[-1]))
        del network
        gc.collect()
    return rows


def measure_theirs(config: FluxConfig, canvas: Canvas, times: int, device: str, compiling: bool) -> list[dict]:
    """diffusers, eager and compiled."""
    model, step = their_step(config, canvas, device)
    rows = []
    for name in ("eager", "compiled") if compiling else ("eager",):
        module = model if name == "eager" else torch.compile(model, mode="max-autotune-no-cudagraphs")
        for batch in BATCHES:
            found = attempt(lambda b=batch, m=module: {"ms": 1e3 * median(step(b, m), times)})
            rows.append({"library": "diffusers", "variant": name, "batch": batch, **found})
            click.echo(json.dumps(rows[-1]))
    return rows


def ratios(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Ours over theirs, batch by batch, and eight bits over sixteen."""
    ms = {(row["library"], row["variant"], row["batch"]): row["ms"] for row in rows if "ms" in row}
    found = {}
    for batch in BATCHES:
        ours = ms.get(("sflow_jax", "bfloat16", batch))
        for library, variant in (
            ("diffusers", "eager"),
            ("diffusers", "compiled"),
            ("sflow_jax", "int8"),
            ("sflow_jax", "fp8"),
        ):
            other = ms.get((library, variant, batch))
            if ours and other:
                found[f"bfloat16 / {library} {variant}, batch {batch}"] = ours / other
    return found


@click.command()
@click.option("--times", type=int, help="Steps timed [20; 3 on a CPU].")
@click.option("--compile/--no-compile", "compiling", default=None, help="torch.compile [only on an accelerator].")
@click.option("--out", default=RESULTS, show_default=True, type=click.Path(path_type=Path), help="JSON file.")
def main(times: int | None, compiling: bool | None, out: Path) -> None:
    """Time FLUX.1-dev's step on this accelerator against diffusers."""
    accelerated = jax.default_backend() != "cpu"
    config, side = (FluxConfig.dev(), 1024) if accelerated else (REDUCED, 128)
    times = times or (20 if accelerated else 3)
    compiling = accelerated if compiling is None else compiling
    canvas = Canvas.of(side, side, 8)
    rate = product_rate(8192 if accelerated else 1024)
    click.echo(f"{jax.devices()[0].device_kind}: {rate / 1e12:.2f} TFLOP/s in a product of square matrices")
    rows = measure_ours(config, canvas, times, rate)
    rows += measure_theirs(config, canvas, times, "cuda" if torch.cuda.is_available() else "cpu", compiling)
    told = {
        "device": jax.devices()[0].device_kind,
        "hardware": "measured" if accelerated else "owed: no accelerator here; a reduced model ran on the CPU",
        "side": side,
        "blocks": [config.double_blocks, config.single_blocks],
        "hidden": config.width,
        "product_flops": rate,
        "versions": {"jax": jax.__version__, "torch": torch.__version__},
        "rows": rows,
        "ratios": ratios(rows),
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(told, indent=2) + "\n")
    for name, ratio in told["ratios"].items():
        click.echo(f"{name}: {ratio:.2f}")
    click.echo(f"{told['hardware']}; written to {out}")


if __name__ == "__main__":
    main()
