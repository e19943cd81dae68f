"""Meshes and times for machines that have a name, from published figures and from what the compiler said."""

import dataclasses
import importlib.resources
import json
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from jax.sharding import AbstractMesh

from sflow_jax.checkpoint import ModelInfo
from sflow_jax.hardware import Chip
from sflow_jax.latents import Canvas
from sflow_jax.models.flux import FluxConfig
from sflow_jax.planning import GIB, weight_bytes
from sflow_jax.sharding import AXES

# Bytes of a chip for all but weights: temporaries, inputs, the compiled programs, pictures being decoded.
RESERVE = 4 * GIB
# The paper's edit of a photo (its inversion on top) and its sweep: steps, and pictures of 57 layers × 64 prompts.
EDIT_MEMBERS, EDIT_STEPS, SWEEP_STEPS, SWEEP_PROMPTS = 4, 15, 15, 64
COMPILED = "compiled.json"


def step_flops(config: FluxConfig, tokens: int, words: int, batch: int) -> float:
    """Floating point operations of one step: the products over tokens (a multiply-add is two), and attention.

    tokens: of the image; words: of the text. Norms, softmax, and products of one vector a picture are left out.
    """
    joint, width = tokens + words, config.width
    # q, k, v and out take 4 d², the MLP 2 · ratio · d², in a block of either kind.
    products = 2 * (4 + 2 * config.mlp_ratio) * width**2 * joint * config.layers
    attention = 4 * joint**2 * width * config.layers
    ends = 2 * width * (2 * config.in_channels * tokens + config.text_width * words)
    return float(batch * (products + attention + ends))


def roofline(
    config: FluxConfig, chip: Chip, chips: int, tokens: int, words: int, batch: int, *, weights: int, sent: float
) -> dict[str, Any]:
    """The least seconds of one step by published peaks: of products, memory and network, and which bounds it.

    All three overlap, and the batch is spread evenly over the chips. weights: bytes that every chip reads; sent:
    bytes that it sends.
    """
    seconds = {
        "product": step_flops(config, tokens, words, batch) / (chips * chip.flops),
        "memory": weights / chip.bandwidth,
        "network": sent / chip.network,
    }
    bound = max(seconds, key=seconds.get)
    times = {f"{part}_seconds": value for part, value in seconds.items()}
    return {**times, "step_seconds": seconds[bound], "bound": bound}


def propose_mesh(
    configs: Mapping[str, Any], chip: Chip, devices: int, work: str, **changes: Any
) -> tuple[dict[str, int], str]:
    """Axis sizes for so many chips, and why.

    work: "edit", where a picture should be there soon: split it over as many chips as its heads allow. "sweep",
    where many pictures should: split a model only as far as it must be to fit, and pictures over the rest.
    configs: network → config. changes: see `weight_bytes`. Raises ValueError where the weights do not fit.
    """
    sizes = [
        size
        for size in range(1, devices + 1)
        if devices % size == 0 and all(configs[name].heads % size == 0 for name in ("transformer", "t5"))
    ]
    needed = {}
    for size in sizes:
        mesh = AbstractMesh((devices // size, 1, size), AXES)
        needed[size] = sum(weight_bytes(configs, jnp.bfloat16, mesh, **changes).values()) + RESERVE
    fitting = [size for size in sizes if needed[size] <= chip.memory]
    if not fitting:
        raise ValueError(
            f"{devices} {chip.name} cannot hold this model: {min(needed.values()) / GIB:.1f} GiB a chip are needed "
            f"and {chip.memory / GIB:.1f} there; take more chips, --quantize or --offload"
        )
    tensor = max(fitting) if work == "edit" else min(fitting)
    why = "every chip works on one picture" if work == "edit" else "the least split that fits"
    told = f"tensor={tensor}: {why}, {needed[tensor] / GIB:.1f} of {chip.memory / GIB:.1f} GiB a chip"
    if devices > tensor:
        told += f"; data={devices // tensor}: so many groups of pictures at once"
    return {"data": devices // tensor, "tensor": tensor}, told


def bytes_sent(config: FluxConfig, tokens: int, words: int, batch: int, tensor: int) -> float:
    """Bytes that one chip sends in a step of `batch` elements split over `tensor` chips, in bfloat16.

    Two sums over chips in each double block and one in each single block, by rings.
    """
    sums = 2 * config.double_blocks + config.single_blocks
    return sums * batch * (tokens + words) * config.width * 2 * 2 * (tensor - 1) / tensor


def compiled(machine: str, model: str, work: str, side: int) -> dict[str, Any] | None:
    """What the TPU compiler said of the proposed mesh, from the table that ships; None where it was not asked."""
    file = importlib.resources.files("sflow_jax") / COMPILED
    for row in json.loads(file.read_text()) if file.is_file() else []:
        if (row["slice"], row["model"], row["work"], row["side"]) == (machine, model, work, side):
            return row
    return None


def describe_plan(
    info: ModelInfo, words: int, machine: str, chip: Chip, count: int, *, quantisation: str | None, offload: bool
) -> list[str]:
    """Lines: mesh, memory and seconds for an edit, a picture and a sweep, each with where it comes from.

    machine: its name, such as v6e-8. ValueError where the model does not fit.
    """
    config, side = info.configs["transformer"], info.picture_size
    if quantisation == "fp8":
        chip = dataclasses.replace(chip, flops=chip.flops * chip.fp8_speedup)
    tokens = Canvas.of(side, side, info.configs["autoencoder"].downsampling).tokens
    changes = {"quantisation": quantisation, "offload": offload}
    told = [f"FLUX.1 {info.family} on {count} × {chip.name}, {side}×{side}, {quantisation or 'bfloat16'}"]
    sweep = (config.layers + 1) * SWEEP_PROMPTS
    # A schnell picture takes four steps whatever it is for.
    few = 4 if info.family == "schnell" else None
    generation = few or 28
    for work, members, pictures, steps, what in (
        ("edit", 1, 1, generation, f"picture, {generation} steps"),
        ("edit", EDIT_MEMBERS, 1, few or EDIT_STEPS, f"edit, a source and 3 edits, {few or EDIT_STEPS} steps"),
        ("sweep", 1, sweep, few or SWEEP_STEPS, f"sweep, {config.layers} layers × {SWEEP_PROMPTS} prompts"),
    ):
        mesh, why = propose_mesh(info.configs, chip, count, work, **changes)
        # One picture keeps one data shard busy; a sweep all of them.
        shards = mesh["data"] if work == "sweep" else 1
        weights = weight_bytes(
            info.configs, jnp.bfloat16, AbstractMesh((mesh["data"], 1, mesh["tensor"]), AXES), **changes
        )
        sent = bytes_sent(config, tokens, words, members, mesh["tensor"])
        least = roofline(
            config, chip, mesh["tensor"], tokens, words, members, weights=weights["transformer"], sent=sent
        )
        seconds = least["step_seconds"] * steps * pictures / shards
        row = None if quantisation or offload else compiled(machine.lower(), f"flux-{info.family}", work, side)
        beside = f"{RESERVE / GIB:.0f} GiB set aside (estimated)"
        if row:
            step = (row["memory"] - sum(weights.values())) / GIB
            beside = f"{step:.2f} GiB for a step (by the TPU compiler, batch {row['batch']})"
        told += [
            what,
            f"  mesh    {','.join(f'{axis}={size}' for axis, size in mesh.items())} ({why})",
            f"  memory  {sum(weights.values()) / GIB:.2f} GiB of weights a chip (exact), {beside}",
            f"  time    at least {duration(seconds)} (estimated from published peaks, bound by {least['bound']}; "
            "text and decoding on top)",
        ]
    if offload:
        told.append(
            "offload: the transformer's blocks cross from the host in every step, which is not counted here"
        )
    return told


def duration(seconds: float) -> str:
    """Seconds below two minutes, else minutes or hours."""
    if seconds < 120:
        return f"{seconds:.2g} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
