"""What a sweep will take, before anything is painted and without weights."""

import dataclasses
import datetime

import jax.numpy as jnp

from sflow_jax.planning.lowering import GIB, lower_step, weight_bytes
from sflow_jax.settings import Placement
from sflow_jax.storage.checkpoint import ModelInfo
from sflow_jax.vitality.adaptive import FIRST, Elimination
from sflow_jax.vitality.plan import SweepPlan


@dataclasses.dataclass(frozen=True)
class Work:
    """How much there is to paint: pictures, references among them, batches, and steps of a batch."""

    pictures: int
    references: int
    batches: int
    steps: int

    @classmethod
    def of(cls, plan: SweepPlan, prompts: int) -> "Work":
        """With so many of the plan's prompts."""
        units = plan.units(range(prompts), range(len(plan.variants)))
        batches, references = plan.batches(units), prompts * plan.seeds
        painting = -(-references // plan.batch)
        steps = painting * plan.steps + sum(plan.steps - plan.first_step(batch) for batch in batches)
        return cls(references + len(units), references, painting + len(batches), steps)


def describe_sweep(
    info: ModelInfo, words: int, plan: SweepPlan, placement: Placement, elimination: Elimination | None = None
) -> list[str]:
    """Lines that tell units, batches, the compiled shape and memory a device.

    words: text tokens. placement: with a mesh and a dtype. ValueError for sizes or meshes that do not fit the
    model.
    """
    mesh, canvas = placement.mesh, plan.canvas
    weights = weight_bytes(info, placement)
    # XLA for CPU widens bfloat16 weights, so the step is compiled in float32: an upper bound for bfloat16.
    plain = Placement(mesh=mesh, dtype=jnp.float32, attention="xla")
    step = lower_step(info, plain, canvas, groups=plan.batch, members=1, words=words)
    temporaries = step.compile().memory_analysis().temp_size_in_bytes
    work = Work.of(plan, len(plan.prompts))
    devices = 1 if mesh is None else mesh.size
    axes = "no mesh" if mesh is None else ",".join(f"{a}={n}" for a, n in mesh.shape.items() if n > 1) or "no split"
    lines = [
        f"{info.title}, {jnp.dtype(placement.dtype).name}, {canvas.width}×{canvas.height}, {plan.steps} steps, "
        f"{info.layers} layers",
        f"units: {work.pictures - work.references:,} pictures with something bypassed ({len(plan.variants)} "
        f"variants × {len(plan.prompts)} prompts × {plan.seeds}), and {work.references:,} references",
        f"batches: {work.batches:,} of {plan.batch}, {work.steps:,} steps in all; one compiled step: latents "
        f"[{plan.batch}, {canvas.tokens}, {info.channels}], {words} text tokens",
        f"memory of each of {devices} devices ({axes}):",
        *(f"  {name:12} {size / GIB:8.2f} GiB of weights" for name, size in weights.items()),
        f"  {'one step':12} {temporaries / GIB:8.2f} GiB of temporaries at most (compiled in float32 "
        "with XLA's attention for CPU)",
        f"  {'all':12} {(sum(weights.values()) + temporaries) / GIB:8.2f} GiB, without the networks "
        "that compare pictures",
    ]
    if elimination is not None:
        least = Work.of(plan, min(FIRST, len(plan.prompts)))
        lines.append(f"adaptive: at least {least.pictures:,} pictures, at most {work.pictures:,}")
    return lines


def describe_time(
    plan: SweepPlan, workers: int, *, step_seconds: float | None, picture_seconds: float | None
) -> str:
    """A line: each worker's time, from the seconds of a step of a batch, else of a picture as measured."""
    work = Work.of(plan, len(plan.prompts))
    if step_seconds is not None:
        seconds = work.steps * step_seconds
        origin = f"{step_seconds:g} s a step, as given; text and decoding come on top"
    else:
        seconds = work.pictures * picture_seconds
        origin = f"{picture_seconds:.2g} s a picture, as measured in this run"
    each = datetime.timedelta(seconds=round(seconds / workers))
    return f"time: {each} (hours:minutes:seconds) on each of {workers} workers ({origin})"
