"""FLUX on TPU slices, compiled by the real TPU compiler with no TPU present.

    pip install ".[tpu-aot]"
    python benchmarks/tpu_aot.py --only v5e-8 --side 512

For every slice, model, size and mesh: compile time, memory of a chip, bytes sent between chips, and the least
time of a step by published peak figures (products, memory, network), which says what bounds it. Nothing is run.
Rows that the JSON already has are kept, so that an interrupted table goes on. Writes JSON and Markdown.
"""

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

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
from collectives import sent
from jax.experimental import topologies
from jax.stages import Lowered
from tqdm.auto import tqdm

from sflow_jax.catalogue import find_info
from sflow_jax.machine.chips import parse_machine
from sflow_jax.machine.meshes import make_mesh
from sflow_jax.pictures.canvas import Canvas
from sflow_jax.planning import lower_text
from sflow_jax.planning.costs import COMPILED, propose_mesh, roofline
from sflow_jax.planning.lowering import GIB, lower_decode, lower_step, weight_bytes

RESULTS = Path(__file__).resolve().parent / "results" / "tpu_aot.json"
# What `sflow info --plan` reads of it.
SHIPPED = Path(__file__).resolve().parent.parent / "sflow_jax" / COMPILED
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
MODELS = ("flux-dev", "flux-schnell")
SIDES = (512, 1024)
# One source and three edits.
EDIT_MEMBERS = 4


def cases(name: str, model: str) -> list[dict[str, Any]]:
    """Meshes and batches worth knowing: the proposed ones, and for FLUX.1-dev their alternatives."""
    chip, count = parse_machine(name)
    configs = find_info(model)[0].configs
    if count == 1:
        # One chip is too small for all in bfloat16: T5 waits on the host.
        alone = {"slice": name, "model": model, "network": "transformer", "work": "edit", "mesh": {}, "groups": 1}
        return [
            {**alone, "members": EDIT_MEMBERS, "proposed": False, "changes": changes}
            for changes in ({"quantisation": "int8"}, {"offload": True})
            if changes.get("offload") or chip.memory > 20e9
        ]
    found = []
    for work, members, groups in (("edit", EDIT_MEMBERS, 1), ("sweep", 1, 2)):
        proposed, _ = propose_mesh(configs, chip, count, work)
        meshes = [proposed]
        if model == "flux-dev":
            smaller, larger = proposed["tensor"] // 2, proposed["tensor"] * 2
            if work == "edit" and proposed["tensor"] > 4:
                meshes.append({"data": count // smaller, "tensor": smaller})
            if work == "sweep" and larger <= min(8, count):
                meshes.append({"data": count // larger, "tensor": larger})
            if work == "sweep" and proposed["tensor"] > 1:
                meshes.append({"data": proposed["data"], "fsdp": proposed["tensor"]})
        for mesh in meshes:
            ways = mesh.get("data", 1) * mesh.get("fsdp", 1)
            found.append(
                {
                    "slice": name,
                    "model": model,
                    "network": "transformer",
                    "work": work,
                    "mesh": mesh,
                    "groups": ways * groups,
                    "members": members,
                    "proposed": mesh is proposed,
                }
            )
    if model == "flux-dev":
        mesh = propose_mesh(configs, chip, count, "edit")[0]
        for network in ("t5", "autoencoder"):
            ways = mesh["data"] if network == "autoencoder" else 1
            shape = {"groups": ways, "members": 1, "proposed": True}
            found.append({"slice": name, "model": model, "network": network, "work": "edit", "mesh": mesh, **shape})
    return found


def lower(case: dict[str, Any], side: int, devices: list) -> Lowered:
    """The case's program, lowered for its slice in bfloat16."""
    info, words = find_info(case["model"])
    mesh, canvas = make_mesh(case["mesh"], devices), Canvas.of(side, side, info.configs["autoencoder"].downsampling)
    shared = {"dtype": "bfloat16", "mesh": mesh}
    if case["network"] == "t5":
        return lower_text(info.configs["t5"], words=words, **shared)
    if case["network"] == "autoencoder":
        return lower_decode(info.configs["autoencoder"], pictures=case["groups"], canvas=canvas, **shared)
    shared |= case.get("changes", {})
    return lower_step(
        info.configs["transformer"],
        groups=case["groups"],
        members=case["members"],
        canvas=canvas,
        words=words,
        **shared,
    )


def measure(case: dict[str, Any], side: int) -> dict[str, Any]:
    """A row of the table."""
    chip, count = parse_machine(case["slice"])
    devices = topologies.get_topology_desc(platform="tpu", topology_name=SLICES[case["slice"]]).devices
    lowered = lower(case, side, devices)
    start = time.perf_counter()
    compiled = lowered.compile()
    seconds = time.perf_counter() - start
    used, collectives = compiled.memory_analysis(), sent(compiled.as_text())
    info, words = find_info(case["model"])
    mesh = make_mesh(case["mesh"], devices)
    weights = weight_bytes(info.configs, "bfloat16", mesh, **case.get("changes", {}))
    if count == 1:
        weights["t5"] = 0
    row = {
        **case,
        "side": side,
        "chips": count,
        "compile_seconds": round(seconds, 1),
        "weights": weights[case["network"]],
        "on_host": used.host_argument_size_in_bytes,
        "inputs": used.argument_size_in_bytes - weights[case["network"]],
        "temporaries": used.temp_size_in_bytes,
        # All networks stay where they are while one runs.
        "memory": sum(weights.values())
        + used.argument_size_in_bytes
        - weights[case["network"]]
        + used.temp_size_in_bytes
        + used.output_size_in_bytes
        - used.alias_size_in_bytes,
        "chip_memory": chip.memory,
        "sent": collectives,
    }
    row["fits"] = row["memory"] <= chip.memory
    if case["network"] == "transformer":
        canvas = Canvas.of(side, side, info.configs["autoencoder"].downsampling)
        batch = case["groups"] * case["members"]
        row |= roofline(
            info.configs["transformer"], chip, count, canvas.tokens, words, batch,
            weights=row["weights"], sent=sum(collectives.values()),
        )  # fmt: skip
    return row


def identity(row: dict[str, Any]) -> tuple:
    """What a row is about."""
    mesh = tuple(sorted(row["mesh"].items()))
    changes = tuple(sorted(row.get("changes", {}).items()))
    return row["slice"], row["model"], row["network"], row["work"], mesh, row["groups"], row["side"], changes


def name_of(mesh: dict[str, int]) -> str:
    """data=2,tensor=4, without the axes of size 1."""
    return ",".join(f"{axis}={size}" for axis, size in mesh.items() if size > 1) or "one chip"


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as Markdown."""
    lines = [
        "# FLUX on TPU slices, compiled without a TPU",
        "",
        "`python benchmarks/tpu_aot.py`: the TPU compiler's own memory analysis and HLO, in bfloat16 with splash",
        "attention. An edit is a source and three edits (data: so many at once); a sweep two pictures a shard.",
        "Memory counts all networks' weights on a chip, and what this program adds. Times are **estimates**: the",
        "least that published peaks of products, memory and network allow for one step; nothing was run. Bold:",
        "proposed by `--mesh auto`. On one chip T5 waits on the host, and copying offloaded blocks is not counted.",
        "",
        "| slice | model | side | what | mesh | batch | compile s | weights GiB | temporaries GiB "
        "| all of chip GiB | sent GB | step ms (products, memory, network) | bound by |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        mesh = name_of(row["mesh"])
        mesh = f"**{mesh}**" if row["proposed"] else mesh
        mesh += "".join(
            f", {'offload' if key == 'offload' else value}" for key, value in row.get("changes", {}).items()
        )
        by_kind = ", ".join(f"{kind} {size / 1e9:.2f}" for kind, size in sorted(row["sent"].items()) if size > 5e6)
        times = "—"
        if "step_seconds" in row:
            parts = ", ".join(f"{1e3 * row[f'{part}_seconds']:.0f}" for part in ("product", "memory", "network"))
            times = f"{1e3 * row['step_seconds']:.0f} ({parts})"
        what = row["work"] if row["network"] == "transformer" else row["network"]
        lines.append(
            f"| {row['slice']} | {row['model']} | {row['side']} | {what} | {mesh} "
            f"| {row['groups'] * row['members']} | {row['compile_seconds']:.0f} | {row['weights'] / GIB:.2f} "
            f"| {row['temporaries'] / GIB:.2f} | {row['memory'] / GIB:.1f} of {row['chip_memory'] / GIB:.1f} "
            f"| {by_kind or '0'} | {times} | {row.get('bound', '—')} |"
        )
    return "\n".join(lines) + "\n"


def shipped(rows: list[dict[str, Any]]) -> str:
    """The proposed meshes' memory, as JSON with a row a line."""
    kept = [
        {name: row[name] for name in ("slice", "model", "work", "side", "mesh", "memory")}
        | {"batch": row["groups"] * row["members"]}
        for row in rows
        if row["proposed"] and row["network"] == "transformer"
    ]
    return "[\n" + ",\n".join(map(json.dumps, kept)) + "\n]\n"


def write(file: Path, text: str) -> None:
    """A whole file or none."""
    temporary = file.with_name(f"{file.name}.partial")
    temporary.write_text(text)
    temporary.replace(file)


@click.command()
@click.option("--only", type=click.Choice(list(SLICES)), multiple=True, help="Slices [all]; repeat for more.")
@click.option("--model", "models", type=click.Choice(MODELS), multiple=True, help="Models [both].")
@click.option("--side", "sides", type=int, multiple=True, help="Height and width [512 and 1024].")
@click.option("--work", "works", type=click.Choice(["edit", "sweep"]), multiple=True, help="Kinds of work [both].")
@click.option("--mesh", "meshes", multiple=True, help="Meshes, such as data=2,tensor=4 [all].")
@click.option("--network", "networks", multiple=True, help="Networks [transformer, t5, autoencoder].")
@click.option("--fresh", is_flag=True, help="Compile again what the JSON has.")
@click.option("--out", default=RESULTS, show_default=True, type=click.Path(path_type=Path), help="JSON file.")
def main(only, models, sides, works, meshes, networks, fresh, out: Path) -> None:
    """Compile FLUX for TPU slices, and say what fits and what bounds it."""
    rows = {
        identity(row): row for row in (json.loads(out.read_text())["rows"] if out.exists() and not fresh else [])
    }
    wanted = [
        (case, side)
        for name in only or SLICES
        for model in models or MODELS
        for case in cases(name, model)
        for side in sides or SIDES
        if (not works or case["work"] in works)
        and (not meshes or name_of(case["mesh"]) in meshes)
        and (not networks or case["network"] in networks)
        and (case["network"] != "t5" or side == SIDES[0])
    ]
    out.parent.mkdir(parents=True, exist_ok=True)
    for case, side in tqdm(wanted, desc="compiling", unit="program", file=sys.stderr):
        key = identity({**case, "side": side})
        if key in rows:
            rows[key] |= case
            continue
        rows[key] = measure(case, side)
        kept = sorted(rows.values(), key=lambda row: (list(SLICES).index(row["slice"]), MODELS.index(row["model"])))
        write(out, json.dumps({"jax": jax.__version__, "rows": kept}, indent=2) + "\n")
        write(out.with_suffix(".md"), table(kept))
    print(table(list(rows.values())))
    if out.resolve() == RESULTS:
        write(SHIPPED, shipped(list(rows.values())))
    unfit = [row for row in rows.values() if not row["fits"]]
    if unfit:
        raise click.ClickException(f"{len(unfit)} rows do not fit their chip")


if __name__ == "__main__":
    main()
