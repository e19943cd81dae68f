"""What both tables of compiled programs share: cases, memory of a chip, and the JSON that they go on from."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jax.stages import Compiled

from sflow_jax.catalogue import find_info
from sflow_jax.machine.chips import parse_machine
from sflow_jax.planning import costs
from sflow_jax.planning.costs import EDIT_MEMBERS, roofline
from sflow_jax.planning.lowering import weight_bytes
from sflow_jax.settings import Placement

# What `sflow info --plan` reads of both tables.
SHIPPED = Path(costs.__file__).with_name(costs.COMPILED)
MODELS = ("flux-dev", "flux-schnell", "sd3-medium", "sd35-medium", "sd35-large")
SIDES = (512, 1024)
# Groups on every shard of the batch.
GROUPS = {"edit": 1, "sweep": 2}
MEMBERS = {"edit": EDIT_MEMBERS, "sweep": 1}
SHIPPED_FIELDS = ("slice", "model", "work", "side", "mesh", "memory", "quantisation", "compiler")

Case = dict[str, Any]
Row = dict[str, Any]
Mesh = dict[str, int]


def step_case(work: str, mesh: Mesh, proposed: bool) -> Case:
    """A step of the transformer."""
    shards = mesh.get("data", 1) * mesh.get("fsdp", 1)
    return {
        "network": "transformer",
        "work": work,
        "mesh": mesh,
        "groups": shards * GROUPS[work],
        "members": MEMBERS[work],
        "proposed": proposed,
    }


def memory_figures(case: Case, placement: Placement, compiled: Compiled, *, apart: tuple[str, ...] = ()) -> dict:
    """Bytes of a chip: of this program's parts, and all together; `on_host` of its host.

    apart: networks that wait elsewhere.
    """
    info, used = find_info(case["model"])[0], compiled.memory_analysis()
    weights = weight_bytes(info, placement) | dict.fromkeys(apart, 0)
    inputs = used.argument_size_in_bytes - weights[case["network"]]
    outputs = used.output_size_in_bytes - used.alias_size_in_bytes
    return {
        "weights": weights[case["network"]],
        "on_host": used.host_argument_size_in_bytes,
        "inputs": inputs,
        "temporaries": used.temp_size_in_bytes,
        # All networks stay where they are while one runs.
        "memory": sum(weights.values()) + inputs + used.temp_size_in_bytes + outputs,
    }


def least_times(case: Case, side: int, row: Row) -> dict[str, Any]:
    """The roofline of a transformer's step, from its weights and what it sends."""
    (info, words), (chip, count) = find_info(case["model"]), parse_machine(case["slice"])
    tokens, batch = info.canvas(side, side).tokens, case["groups"] * case["members"]
    sent = sum(row["sent"].values())
    return roofline(info, chip, count, tokens, words, batch, weights=row["weights"], sent=sent)


def mesh_name(mesh: Mesh) -> str:
    """data=2,tensor=4, without the axes of size 1."""
    return ",".join(f"{axis}={size}" for axis, size in mesh.items() if size > 1) or "one chip"


def times_cell(row: Row) -> str:
    """Milliseconds of a step: the least, and what products, memory and network allow."""
    if "step_seconds" not in row:
        return "—"
    parts = ", ".join(f"{1e3 * row[f'{part}_seconds']:.0f}" for part in ("product", "memory", "network"))
    return f"{1e3 * row['step_seconds']:.0f} ({parts})"


def ship(rows: list[Row], compiler: str) -> str:
    """JSON with a row a line: the proposed meshes' memory by this compiler, and what others said before."""
    others = [row for row in json.loads(SHIPPED.read_text()) if row["compiler"] != compiler]
    own = [
        {name: row[name] for name in SHIPPED_FIELDS if name in row}
        | {"batch": row["groups"] * row["members"], "compiler": compiler}
        for row in rows
        if row["proposed"] and row["network"] == "transformer"
    ]
    ordered = sorted([*others, *own], key=lambda row: row["compiler"] != "TPU")
    return "[\n" + ",\n".join(map(json.dumps, ordered)) + "\n]\n"


def read_rows(out: Path, identity: Callable[[Row], tuple]) -> dict[tuple, Row]:
    """What an earlier run has written, by what it is about."""
    rows = json.loads(out.read_text())["rows"] if out.exists() else []
    return {identity(row): row for row in rows}
