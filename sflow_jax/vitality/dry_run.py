"""What a sweep will take, before anything is painted and without weights."""

import dataclasses
import datetime
from collections.abc import Mapping
from typing import Any

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


def plan_work(
    info: ModelInfo, words: int, plan: SweepPlan, placement: Placement, elimination: Elimination | None = None
) -> dict[str, Any]:
    """Units, batches, the compiled shape and memory a device, as JSON may hold them; see `describe_work`.

    words: text tokens. placement: with a mesh and a dtype. ValueError for sizes or meshes that do not fit the
    model.
    """
    mesh, canvas = placement.mesh, plan.canvas
    weights = weight_bytes(info, placement)
    # XLA for CPU widens bfloat16 weights, so the step is compiled in float32: an upper bound for bfloat16.
    plain = Placement(mesh=mesh, dtype=jnp.float32, attention="xla")
    step = lower_step(info, plain, canvas, groups=plan.batch, members=1, words=words)
    temporaries = step.compile().memory_analysis().temp_size_in_bytes
    least = None if elimination is None else Work.of(plan, min(FIRST, len(plan.prompts))).pictures
    return {
        "model": info.title,
        "dtype": jnp.dtype(placement.dtype).name,
        "height": canvas.height,
        "width": canvas.width,
        "steps": plan.steps,
        "layers": info.layers,
        "variants": len(plan.variants),
        "prompts": len(plan.prompts),
        "seeds": plan.seeds,
        "batch": plan.batch,
        "work": dataclasses.asdict(Work.of(plan, len(plan.prompts))),
        "least_pictures": least,
        "latents": [plan.batch, canvas.tokens, info.channels],
        "words": words,
        "devices": 1 if mesh is None else mesh.size,
        "mesh": None if mesh is None else dict(mesh.shape),
        "weights_bytes": dict(weights),
        "step_bytes": temporaries,
    }


def describe_work(planned: Mapping[str, Any]) -> list[str]:
    """Lines of a `plan_work`."""
    work, weights, mesh = planned["work"], planned["weights_bytes"], planned["mesh"]
    split = ",".join(f"{axis}={size}" for axis, size in (mesh or {}).items() if size > 1)
    axes = "no mesh" if mesh is None else split or "no split"
    lines = [
        f"{planned['model']}, {planned['dtype']}, {planned['width']}×{planned['height']}, "
        f"{planned['steps']} steps, {planned['layers']} layers",
        f"units: {work['pictures'] - work['references']:,} pictures with something bypassed "
        f"({planned['variants']} variants × {planned['prompts']} prompts × {planned['seeds']}), "
        f"and {work['references']:,} references",
        f"batches: {work['batches']:,} of {planned['batch']}, {work['steps']:,} steps in all; one compiled step: "
        f"latents {planned['latents']}, {planned['words']} text tokens",
        f"memory of each of {planned['devices']} devices ({axes}):",
        *(f"  {name:12} {size / GIB:8.2f} GiB of weights" for name, size in weights.items()),
        f"  {'one step':12} {planned['step_bytes'] / GIB:8.2f} GiB of temporaries at most (compiled in float32 "
        "with XLA's attention for CPU)",
        f"  {'all':12} {(sum(weights.values()) + planned['step_bytes']) / GIB:8.2f} GiB, without the networks "
        "that compare pictures",
    ]
    if planned["least_pictures"] is not None:
        lines.append(f"adaptive: at least {planned['least_pictures']:,} pictures, at most {work['pictures']:,}")
    return lines


def plan_time(
    plan: SweepPlan, workers: int, *, step_seconds: float | None, picture_seconds: float | None
) -> dict[str, Any]:
    """Each worker's seconds, from those of a step of a batch, else of a picture as measured."""
    work = Work.of(plan, len(plan.prompts))
    seconds = work.steps * step_seconds if step_seconds is not None else work.pictures * picture_seconds
    return {
        "workers": workers,
        "seconds_each": seconds / workers,
        "step_seconds": step_seconds,
        "picture_seconds": picture_seconds,
    }


def describe_time(planned: Mapping[str, Any]) -> str:
    """A line of a `plan_time`."""
    if planned["step_seconds"] is not None:
        origin = f"{planned['step_seconds']:g} s a step, as given; text and decoding come on top"
    else:
        origin = f"{planned['picture_seconds']:.2g} s a picture, as measured in this run"
    each = datetime.timedelta(seconds=round(planned["seconds_each"]))
    return f"time: {each} (hours:minutes:seconds) on each of {planned['workers']} workers ({origin})"
