"""Meshes and times for machines that have a name, from published figures and from what the compiler said."""

import dataclasses
import importlib.resources
import json
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from jax.sharding import AbstractMesh

from sflow_jax.editing.bank import tensor_bytes
from sflow_jax.errors import SettingError
from sflow_jax.machine.chips import Chip
from sflow_jax.machine.meshes import AXES
from sflow_jax.planning.lowering import GIB, weight_bytes
from sflow_jax.sampling.guidance import BRANCHES
from sflow_jax.settings import Placement
from sflow_jax.storage.checkpoint import ModelInfo

# Bytes of a chip for all but weights (at most half of it): temporaries, inputs, the compiled programs, pictures
# being decoded.
RESERVE = 4 * GIB
# A source and three edits; the paper's number of prompts.
EDIT_MEMBERS, SWEEP_PROMPTS = 4, 64
KEYS_AND_VALUES = 2
COMPILED = "compiled.json"


def roofline(
    info: ModelInfo, chip: Chip, chips: int, tokens: int, words: int, batch: int, *, weights: int, sent: float
) -> dict[str, Any]:
    """The least seconds of one step by published peaks: of products, memory and network, and which bounds it.

    All three overlap, and the batch is spread evenly over the chips. weights: bytes that every chip reads; sent:
    bytes that it sends.
    """
    seconds = {
        "product": info.family.step_flops(info.configs, tokens, words, batch) / (chips * chip.flops),
        "memory": weights / chip.bandwidth,
        "network": sent / chip.network,
    }
    bound = max(seconds, key=seconds.get)
    times = {f"{part}_seconds": value for part, value in seconds.items()}
    return {**times, "step_seconds": seconds[bound], "bound": bound}


def abstract_mesh(sizes: Mapping[str, int]) -> AbstractMesh:
    """A mesh of no devices, for plans."""
    return AbstractMesh(tuple(sizes.get(axis, 1) for axis in AXES), AXES)


def propose_mesh(
    info: ModelInfo, chip: Chip, devices: int, work: str, placement: Placement = Placement()
) -> tuple[dict[str, int], str]:
    """Axis sizes for so many chips, and why.

    work: "edit", where a picture should be there soon: split it over as many chips as its heads allow. "sweep",
    where many pictures should: split a model only as far as it must be to fit, and pictures over the rest.
    Chips are left over where the model fits no split of all of them. Raises SettingError where it fits none at all.
    """
    heads = [info.configs[name].heads for name, spec in info.networks.items() if spec.large]
    needed, reserve = {}, min(RESERVE, chip.memory / 2)
    for size in range(1, devices + 1):
        if all(count % size == 0 for count in heads):
            mesh = abstract_mesh({"data": devices // size, "tensor": size})
            planned = dataclasses.replace(placement, dtype=jnp.bfloat16, mesh=mesh)
            needed[size] = sum(weight_bytes(info, planned).values()) + reserve
    fitting = [size for size, needs in needed.items() if needs <= chip.memory]
    fitting = [size for size in fitting if devices % size == 0] or fitting
    if not fitting:
        left = {"`quantisation`": placement.quantisation, "`offload`": placement.offload}
        advice = " or ".join(["more chips", *(name for name, chosen in left.items() if not chosen)])
        raise SettingError(
            f"{devices} {chip.name} cannot hold this model: {min(needed.values()) / GIB:.1f} GiB a chip are needed "
            f"and {chip.memory / GIB:.1f} there; take {advice}"
        )
    tensor = max(fitting) if work == "edit" else min(fitting)
    why = "every chip works on one picture" if work == "edit" else "the least split that fits"
    reason = f"tensor={tensor}: {why}, {needed[tensor] / GIB:.1f} of {chip.memory / GIB:.1f} GiB a chip"
    if devices >= 2 * tensor:
        reason += f"; data={devices // tensor}: so many groups of pictures at once"
    if devices % tensor:
        reason += f"; {devices % tensor} of {devices} chips are left over"
    return {"data": devices // tensor, "tensor": tensor}, reason


def bytes_sent(info: ModelInfo, tokens: int, words: int, batch: int, tensor: int) -> float:
    """Bytes that one chip sends in a step of `batch` elements split over `tensor` chips, in bfloat16, by rings."""
    numbers = info.family.summed_numbers(info.configs) * batch * (tokens + words)
    return numbers * 2 * 2 * (tensor - 1) / tensor


def compiled_row(
    machine: str, model: str | None, work: str, side: int, quantisation: str | None = None
) -> dict[str, Any] | None:
    """What the machine's compiler said of the proposed mesh, in the table that ships; None where not asked."""
    file = importlib.resources.files("sflow_jax.planning") / COMPILED
    wanted = machine, model, work, side, quantisation
    for row in json.loads(file.read_text()) if file.is_file() else []:
        if (row["slice"], row["model"], row["work"], row["side"], row.get("quantisation")) == wanted:
            return row
    return None


@dataclasses.dataclass(frozen=True)
class Work:
    """Something to plan: `pictures` batches of `members`, of `steps` each. kind: "edit" or "sweep"."""

    kind: str
    members: int
    pictures: int
    steps: int
    what: str


def usual_work(info: ModelInfo) -> tuple[Work, ...]:
    """A picture, the paper's edit and its sweep, at the model's defaults."""
    defaults, sweep = info.defaults, (info.layers + 1) * SWEEP_PROMPTS
    return (
        Work("edit", 1, 1, defaults.steps, f"picture, {defaults.steps} steps"),
        Work(
            "edit", EDIT_MEMBERS, 1, defaults.edit_steps,
            f"edit, a source and {EDIT_MEMBERS - 1} edits, {defaults.edit_steps} steps",
        ),
        Work("sweep", 1, sweep, defaults.sweep_steps, f"sweep, {info.layers} layers × {SWEEP_PROMPTS} prompts"),
    )  # fmt: skip


def plan_machine(
    info: ModelInfo, words: int, machine: str, chip: Chip, count: int, placement: Placement = Placement()
) -> dict[str, Any]:
    """Mesh, memory and seconds for a picture, an edit and a sweep, as JSON may hold them; see `describe_plan`.

    machine: its name, such as v6e-8. SettingError where the model does not fit.
    """
    if placement.quantisation == "fp8":
        chip = dataclasses.replace(chip, flops=chip.flops * chip.fp8_speedup)
    return {
        "model": info.title,
        "machine": machine,
        "chip": chip.name,
        "chips": count,
        "picture_size": info.picture_size,
        "quantisation": placement.quantisation,
        "offload": placement.offload,
        "kv_cache_bytes": _bank_bytes(info),
        "kv_cache_steps": info.defaults.real_steps,
        "works": [_planned_work(info, words, machine, chip, count, placement, work) for work in usual_work(info)],
    }


def _bank_bytes(info: ModelInfo) -> int | None:
    """What `--kv-cache` keeps of an edit's source in a step, in the vital layers; None where none are known."""
    if info.vital_layers is None:
        return None
    branches = BRANCHES if info.family.guidance == "branches" else 1
    tensors = KEYS_AND_VALUES * len(info.vital_layers)
    return tensors * tensor_bytes(info, info.canvas().tokens, branches, jnp.bfloat16)


def _planned_work(
    info: ModelInfo, words: int, machine: str, chip: Chip, count: int, placement: Placement, work: Work
) -> dict[str, Any]:
    """One kind of work. step_bytes: of a compiled step, None where no compiler was asked."""
    tokens = info.canvas().tokens
    mesh, why = propose_mesh(info, chip, count, work.kind, placement)
    # One picture keeps one data shard busy; a sweep all of them.
    shards = mesh["data"] if work.kind == "sweep" else 1
    weights = weight_bytes(info, dataclasses.replace(placement, dtype=jnp.bfloat16, mesh=abstract_mesh(mesh)))
    sent = bytes_sent(info, tokens, words, work.members, mesh["tensor"])
    least = roofline(
        info, chip, mesh["tensor"], tokens, words, work.members, weights=weights["transformer"], sent=sent
    )
    row = None
    if not placement.offload:
        name, side = _published_name(info), info.picture_size
        row = compiled_row(machine.lower(), name, work.kind, side, placement.quantisation)
    return {
        "what": work.what,
        "mesh": mesh,
        "why": why,
        "weights_bytes": sum(weights.values()),
        "step_bytes": None if row is None else row["memory"] - sum(weights.values()),
        "compiler": None if row is None else row["compiler"],
        "batch": None if row is None else row["batch"],
        "seconds": least["step_seconds"] * work.steps * work.pictures / shards,
        "bound": least["bound"],
    }


def describe_plan(plan: Mapping[str, Any]) -> list[str]:
    """Lines of a `plan_machine`, each number with where it comes from."""
    side = plan["picture_size"]
    lines = [
        f"{plan['model']} on {plan['chips']} × {plan['chip']}, {side}×{side}, {plan['quantisation'] or 'bfloat16'}"
    ]
    for work in plan["works"]:
        lines += _described_work(work)
    if plan["kv_cache_bytes"] is not None:
        size, steps = plan["kv_cache_bytes"] / GIB, plan["kv_cache_steps"]
        lines.append(
            f"--kv-cache: {size:.2f} GiB a step in the vital layers, "
            f"{steps * size:.1f} GiB for {steps} steps (exact)"
        )
    if plan["offload"]:
        lines.append(
            "offload: the transformer's blocks cross from the host in every step, which is not counted here"
        )
    return lines


def _described_work(work: Mapping[str, Any]) -> list[str]:
    """Lines of one kind of work."""
    memory = f"{RESERVE / GIB:.0f} GiB set aside (estimated)"
    if work["step_bytes"] is not None:
        step = work["step_bytes"] / GIB
        memory = f"{step:.2f} GiB for a step (by the {work['compiler']} compiler, batch {work['batch']})"
    return [
        work["what"],
        f"  mesh    {','.join(f'{axis}={size}' for axis, size in work['mesh'].items())} ({work['why']})",
        f"  memory  {work['weights_bytes'] / GIB:.2f} GiB of weights a chip (exact), {memory}",
        f"  time    at least {duration(work['seconds'])} (estimated from published peaks, bound by "
        f"{work['bound']}; text and decoding on top)",
    ]


def _published_name(info: ModelInfo) -> str | None:
    """The name under which the compiler's table has a model of these sizes."""
    models = info.family.published.items()
    return next((name for name, model in models if model.configs == info.configs), None)


def duration(seconds: float) -> str:
    """Seconds below two minutes, else minutes or hours."""
    if seconds < 120:
        return f"{seconds:.2g} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
