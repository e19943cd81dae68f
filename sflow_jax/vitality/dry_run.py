"""What a sweep will take, before anything is painted and without weights."""

import dataclasses
import datetime
import math

import jax.numpy as jnp

from sflow_jax.checkpoint import ModelInfo
from sflow_jax.latents import Canvas
from sflow_jax.planning import lower_step, planned_devices, weight_bytes
from sflow_jax.sharding import make_mesh, parse_mesh
from sflow_jax.vitality.adaptive import FIRST, Elimination
from sflow_jax.vitality.sweep import Plan

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Work:
    """How much there is to paint: pictures, references among them, batches, and steps of a batch."""

    pictures: int
    references: int
    batches: int
    steps: int

    @classmethod
    def of(cls, plan: Plan, prompts: int) -> "Work":
        """With so many of the plan's prompts."""
        units = plan.units(range(prompts), range(len(plan.variants)))
        batches, references = plan.batches(units), prompts * plan.seeds
        painting = -(-references // plan.batch)
        steps = painting * plan.steps + sum(plan.steps - plan.first_step(batch) for batch in batches)
        return cls(references + len(units), references, painting + len(batches), steps)


def describe(
    info: ModelInfo,
    words: int,
    plan: Plan,
    *,
    dtype: str,
    mesh: str | None,
    quantisation: str | None,
    offload: bool,
    workers: int,
    elimination: Elimination | None,
    step_seconds: float | None,
    picture_seconds: float | None,
) -> list[str]:
    """Lines that tell units, batches, the compiled shape, memory a device, and time.

    words: text tokens. step_seconds: of one step of one batch, given. picture_seconds: of one picture, as measured
    in an unfinished run. ValueError for sizes or meshes that do not fit the model.
    """
    sizes = {} if mesh is None else parse_mesh(mesh)
    devices = planned_devices(math.prod(sizes.values()))
    placed = make_mesh(sizes, devices) if sizes else None
    config, autoencoder = info.configs["transformer"], info.configs["autoencoder"]
    canvas = Canvas.of(plan.height, plan.width, autoencoder.downsampling)
    weights = weight_bytes(info.configs, dtype, placed, quantisation=quantisation, offload=offload)
    # XLA for CPU widens bfloat16 weights, so the step is compiled in float32: an upper bound for bfloat16.
    shape = dict(groups=plan.batch, members=1, canvas=canvas, words=words)
    used = lower_step(config, dtype=jnp.float32, mesh=placed, **shape).compile().memory_analysis()
    work = Work.of(plan, len(plan.prompts))
    told = [
        f"FLUX.1 {info.family}, {dtype}, {plan.width}×{plan.height}, {plan.steps} steps, {config.layers} layers",
        f"units: {work.pictures - work.references:,} pictures with something bypassed ({len(plan.variants)} "
        f"variants × {len(plan.prompts)} prompts × {plan.seeds}), and {work.references:,} references",
        f"batches: {work.batches:,} of {plan.batch}, {work.steps:,} steps in all; one compiled step: latents "
        f"[{plan.batch}, {canvas.tokens}, {config.in_channels}], text [{plan.batch}, {words}, {config.text_width}]",
        f"memory of each of {len(devices)} devices ({mesh or 'no mesh'}):",
        *(f"  {name:12} {size / GIB:8.2f} GiB of weights" for name, size in weights.items()),
        f"  {'one step':12} {used.temp_size_in_bytes / GIB:8.2f} GiB of temporaries at most (compiled in float32 "
        "with XLA's attention for CPU)",
        f"  {'all':12} {(sum(weights.values()) + used.temp_size_in_bytes) / GIB:8.2f} GiB, without the networks "
        "that compare pictures",
    ]
    if elimination is not None:
        least = Work.of(plan, min(FIRST, len(plan.prompts)))
        told.append(f"adaptive: at least {least.pictures:,} pictures, at most {work.pictures:,}")
    if step_seconds is None and picture_seconds is None:
        return [*told, "time: give --step-seconds, or --out of a run that has begun"]
    if step_seconds is not None:
        seconds, origin = (
            work.steps * step_seconds,
            f"{step_seconds:g} s a step, as given; text and decoding come on top",
        )
    else:
        seconds, origin = (
            work.pictures * picture_seconds,
            f"{picture_seconds:.2g} s a picture, as measured in this run",
        )
    each = datetime.timedelta(seconds=round(seconds / workers))
    return [*told, f"time: {each} (hours:minutes:seconds) on each of {workers} workers ({origin})"]
