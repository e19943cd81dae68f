"""FLUX and SD3 on TPU slices, compiled by the real TPU compiler with no TPU present.

    pip install ".[tpu-aot]"
    python benchmarks/tpu_aot.py --only v5e-8 --side 512

For every slice, model, size and mesh: compile time, memory of a chip, bytes sent between chips, and the least
time of a step by published peak figures (products, memory, network), which says what bounds it. Nothing is run.
Rows that the JSON already has are kept, so that an interrupted table goes on. Writes JSON and Markdown.
"""

import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

# Before jax is imported: the compiler must not look for chips, and may run beside others.
os.environ |= {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "true",
}

import click
import jax
import jax.numpy as jnp
from aot import (
    GROUPS,
    MODELS,
    SHIPPED,
    SIDES,
    Case,
    Mesh,
    Row,
    least_times,
    memory_figures,
    mesh_name,
    read_rows,
    ship,
    step_case,
    times_cell,
)
from collectives import sent
from common import RESULTS, out_option, versions, write_json, write_text
from jax.experimental import topologies
from jax.stages import Lowered
from tqdm.auto import tqdm
from traffic import copied_in_loops, kernels

from sflow_jax.catalogue import find_info
from sflow_jax.families.flux1 import t5_features
from sflow_jax.machine.chips import Chip, parse_machine
from sflow_jax.machine.meshes import batch_sharding, make_mesh
from sflow_jax.models.layers import parameter_count
from sflow_jax.planning.costs import EDIT_MEMBERS, propose_mesh
from sflow_jax.planning.lowering import GIB, abstract_weights, lower_decode, lower_step
from sflow_jax.settings import Placement
from sflow_jax.storage.checkpoint import ModelInfo

TABLE = "tpu_aot.json"
# Slice → the compiler's name of its topology.
SLICES = {
    "v5e-1": "v5e:1x1",
    "v6e-1": "v6e:1x1",
    "v5e-4": "v5e:2x2",
    "v5e-8": "v5e:2x4",
    "v5e-16": "v5e:4x4",
    "v5e-256": "v5e:16x16",
    "v6e-4": "v6e:2x2",
    "v6e-8": "v6e:2x4",
    "v6e-256": "v6e:16x16",
    "v5p-8": "v5p:2x2x1",
    "v5p-128": "v5p:4x4x4",
}
# Compiled on every mesh that is worth knowing, the others on the proposed ones.
MAIN = MODELS[0]
# Chips that a sweep's model is split over at most, and an edit's at least, for the sake of comparison.
MOST_SPLIT, LEAST_SPLIT = 8, 4
# Of a chip's memory, for a transformer of eight bits.
ROOM_FOR_EIGHT_BITS = 0.6

HEADING = """\
# FLUX and SD3 on TPU slices, compiled without a TPU

`python benchmarks/tpu_aot.py`: the TPU compiler's own memory analysis and HLO, in bfloat16 with splash
attention. An edit is a source and three edits (data: so many at once); a sweep two pictures a shard. SD3
computes two rows an element, for its guidance.
Memory counts all networks' weights on a chip, and what this program adds. Times are **estimates**: the
least that published peaks of products, memory and network allow for one step; nothing was run. Bold:
proposed by `--mesh auto`. On one chip T5 waits on the host, and copying offloaded blocks is not counted.

`weights_copied` in the JSON: bytes of kernels that a step's loops copy or gather before their products. Rows
without it are older, and count a collective that the compiler spreads over several kernels in each of them.

| slice | model | side | what | mesh | batch | compile s | weights GiB | temporaries GiB \
| all of chip GiB | sent GB | step ms (products, memory, network) | bound by |
| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |
"""


def cases(name: str, model: str) -> list[Case]:
    """Meshes and batches worth knowing: the proposed ones, and for FLUX.1-dev their alternatives."""
    chip, count = parse_machine(name)
    about = {"slice": name, "model": model}
    if count == 1:
        return [{**about, **case} for case in single_chip_cases(chip, model)]
    (info, _), chosen = find_info(model), []
    for work in GROUPS:
        proposed, _ = propose_mesh(info, chip, count, work)
        others = alternatives(proposed, count, work) if model == MAIN else ()
        chosen += [step_case(work, mesh, mesh is proposed) for mesh in (proposed, *others)]
    if model == MAIN:
        chosen += other_networks(propose_mesh(info, chip, count, "edit")[0])
    return [{**about, **case} for case in chosen]


def single_chip_cases(chip: Chip, model: str) -> list[Case]:
    """One chip is too small for all in bfloat16: blocks in eight bits or in host memory, and T5 waits there."""
    numbers = parameter_count(find_info(model)[0].abstract_network("transformer"))
    shared = {"network": "transformer", "work": "edit", "mesh": {}, "groups": 1, "members": EDIT_MEMBERS}
    return [
        {**shared, "proposed": False, "changes": changes}
        for changes in ({"quantisation": "int8"}, {"offload": True})
        if changes.get("offload") or numbers < ROOM_FOR_EIGHT_BITS * chip.memory
    ]


def alternatives(proposed: Mesh, count: int, work: str) -> Iterator[Mesh]:
    """Other meshes of so many chips that are worth comparing with the proposed one."""
    split = proposed["tensor"]
    if work == "edit" and split > LEAST_SPLIT:
        yield {"data": count // (split // 2), "tensor": split // 2}
    if work == "sweep" and 2 * split <= min(MOST_SPLIT, count):
        yield {"data": count // (2 * split), "tensor": 2 * split}
    if work == "sweep" and split > 1:
        yield {"data": proposed["data"], "fsdp": split}


def other_networks(mesh: Mesh) -> Iterator[Case]:
    """A prompt through T5, and a picture a shard through the decoder."""
    for network, groups in (("t5", 1), ("autoencoder", mesh["data"])):
        shape = {"groups": groups, "members": 1, "proposed": True}
        yield {"network": network, "work": "edit", "mesh": mesh, **shape}


def placement_of(case: Case, devices: list[jax.Device]) -> Placement:
    """bfloat16 on the case's mesh, with its changes."""
    return Placement(dtype="bfloat16", mesh=make_mesh(case["mesh"], devices), **case.get("changes", {}))


def lower_text(info: ModelInfo, placement: Placement, words: int) -> Lowered:
    """One prompt through T5, lowered from abstract arguments."""
    ids = jax.ShapeDtypeStruct((1, words), jnp.int32, sharding=batch_sharding(placement.mesh, 1))
    return t5_features.lower(abstract_weights(info, "t5", placement), ids)


def lower(case: Case, side: int, placement: Placement) -> Lowered:
    """The case's program, lowered for its slice."""
    info, words = find_info(case["model"])
    canvas = info.canvas(side, side)
    if case["network"] == "t5":
        return lower_text(info, placement, words)
    if case["network"] == "autoencoder":
        return lower_decode(info, placement, canvas, case["groups"])
    return lower_step(info, placement, canvas, groups=case["groups"], members=case["members"], words=words)


def measure(case: Case, side: int) -> Row:
    """A row of the table."""
    chip, count = parse_machine(case["slice"])
    devices = topologies.get_topology_desc(platform="tpu", topology_name=SLICES[case["slice"]]).devices
    placement = placement_of(case, devices)
    lowered = lower(case, side, placement)
    start = time.perf_counter()
    compiled = lowered.compile()
    seconds = time.perf_counter() - start
    row = {**case, "side": side, "chips": count, "compile_seconds": round(seconds, 1)}
    # One chip has no room for T5, which waits on the host.
    row |= memory_figures(case, placement, compiled, apart=("t5",) if count == 1 else ())
    hlo = compiled.as_text()
    row |= {"chip_memory": chip.memory, "sent": sent(hlo)}
    row["fits"] = row["memory"] <= chip.memory
    if case["network"] == "transformer":
        row |= least_times(case, side, row) | {"weights_copied": copied_in_loops(kernels(hlo))}
    return row


def identity(row: Row) -> tuple:
    """What a row is about."""
    mesh = tuple(sorted(row["mesh"].items()))
    changes = tuple(sorted(row.get("changes", {}).items()))
    return row["slice"], row["model"], row["network"], row["work"], mesh, row["groups"], row["side"], changes


def mesh_cell(row: Row) -> str:
    """The mesh, bold where it is proposed, and what else is changed."""
    name = mesh_name(row["mesh"])
    changes = ("offload" if setting == "offload" else value for setting, value in row.get("changes", {}).items())
    return ", ".join([f"**{name}**" if row["proposed"] else name, *changes])


def table_line(row: Row) -> str:
    """The row as Markdown."""
    by_kind = ", ".join(f"{kind} {size / 1e9:.2f}" for kind, size in sorted(row["sent"].items()) if size > 5e6)
    cells = (
        row["slice"],
        row["model"],
        row["side"],
        row["work"] if row["network"] == "transformer" else row["network"],
        mesh_cell(row),
        row["groups"] * row["members"],
        f"{row['compile_seconds']:.0f}",
        f"{row['weights'] / GIB:.2f}",
        f"{row['temporaries'] / GIB:.2f}",
        f"{row['memory'] / GIB:.1f} of {row['chip_memory'] / GIB:.1f}",
        by_kind or "0",
        times_cell(row),
        row.get("bound", "—"),
    )
    return f"| {' | '.join(map(str, cells))} |\n"


def table(rows: list[Row]) -> str:
    """The rows as Markdown."""
    return HEADING + "".join(map(table_line, rows))


def save_rows(out: Path, rows: dict[tuple, Row]) -> None:
    """JSON and Markdown, in the order of slices and models."""
    slices = list(SLICES)
    ordered = sorted(rows.values(), key=lambda row: (slices.index(row["slice"]), MODELS.index(row["model"])))
    write_json(out, versions("jax") | {"rows": ordered})
    write_text(out.with_suffix(".md"), table(ordered))


@click.command()
@click.option("--only", type=click.Choice(list(SLICES)), multiple=True, help="Slices [all]; repeat for more.")
@click.option("--model", "models", type=click.Choice(MODELS), multiple=True, help="Models [all].")
@click.option("--side", "sides", type=int, multiple=True, help="Height and width [512 and 1024].")
@click.option("--work", "works", type=click.Choice(list(GROUPS)), multiple=True, help="Kinds of work [both].")
@click.option("--mesh", "meshes", multiple=True, help="Meshes, such as data=2,tensor=4 [all].")
@click.option("--network", "networks", multiple=True, help="Networks [transformer, t5, autoencoder].")
@click.option("--fresh", is_flag=True, help="Compile again what the JSON has.")
@out_option(TABLE)
def main(only, models, sides, works, meshes, networks, fresh: bool, out: Path) -> None:
    """Compile FLUX and SD3 for TPU slices, and say what fits and what bounds it."""
    rows = {} if fresh else read_rows(out, identity)
    wanted = [
        (case, side)
        for name in only or SLICES
        for model in models or MODELS
        for case in cases(name, model)
        for side in sides or SIDES
        if (not works or case["work"] in works)
        and (not meshes or mesh_name(case["mesh"]) in meshes)
        and (not networks or case["network"] in networks)
        # Text has no size.
        and (case["network"] != "t5" or side == SIDES[0])
    ]
    for case, side in tqdm(wanted, desc="compiling", unit="program", file=sys.stderr):
        key = identity({**case, "side": side})
        if key in rows:
            rows[key] |= case
        else:
            rows[key] = measure(case, side)
            save_rows(out, rows)
    click.echo(table(list(rows.values())))
    if out.resolve() == RESULTS / TABLE:
        write_text(SHIPPED, ship(list(rows.values()), "TPU"))
    unfit = [row for row in rows.values() if not row["fits"]]
    if unfit:
        raise click.ClickException(f"{len(unfit)} rows do not fit their chip")


if __name__ == "__main__":
    main()
