"""FLUX and SD3 on GPUs, compiled by the real GPU compiler with no GPU present.

    pip install ".[gpu-aot]"
    python benchmarks/gpu_aot.py --only h100x1 --side 1024

For every machine, model, size, batch and kind of numbers: compile time, memory of a chip, kernels, where the bytes
of a step go by kind, the least time of each kind by published peaks, and bytes sent between chips. Nothing is run.
Rows that the JSON already has are kept, so that an interrupted table goes on. Writes JSON and Markdown.

What a compiler without a GPU cannot know: no product is tuned (`--products cublas` are cuBLASLt's, likely nearer to
what a GPU would choose than the untuned kernels of `triton`), and cuDNN's workspace is left out.
"""

import dataclasses
import os
import sys
import time
from pathlib import Path

# Before jax is imported: its own process needs no GPU.
os.environ["JAX_PLATFORMS"] = "cpu"

import click
import jax
from aot import (
    GROUPS,
    MODELS,
    SHIPPED,
    SIDES,
    Case,
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
from traffic import ATTENTION, BYTE_KINDS, COPIED, TIME_KINDS, bytes_by_kind, kernels, seconds_by_kind

from sflow_jax.catalogue import find_info
from sflow_jax.machine.chips import parse_machine
from sflow_jax.machine.meshes import make_mesh
from sflow_jax.planning.costs import propose_mesh
from sflow_jax.planning.lowering import GIB, lower_step
from sflow_jax.settings import Placement

TABLE = "gpu_aot.json"
MACHINES = ("h100x1", "h200x1", "a100x1", "b200x1", "h100x8")
QUANTISATIONS = ("bf16", "int8", "fp8")
ATTENTIONS = ("cudnn", "xla")
PRODUCTS = ("cublas", "triton")
# Version that the targets' cuDNN has, as jax writes it.
CUDNN = 91000


@dataclasses.dataclass(frozen=True)
class Target:
    """What the compiler asks about a GPU, as its driver tells it.

    cores: multiprocessors. lanes: of a core. shared: bytes of a core's shared memory; a block gets 1 KiB less.
    cache: bytes. clock: GHz. capability: of CUDA. own: with instructions that only it has. links: of NVLink.
    """

    name: str
    cores: int
    shared: int
    bandwidth: int
    cache: int
    memory: int
    clock: float
    capability: int
    own: bool = True
    lanes: int = 128
    links: int = 18

    def text(self) -> str:
        """As the compiler reads it."""
        feature = "ACCELERATED_FEATURES" if self.own else "NONE"
        return f"""
            gpu_device_info {{
              threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
              shared_memory_per_block: 49152 shared_memory_per_block_optin: {self.shared - 1024}
              shared_memory_per_core: {self.shared}
              core_count: {self.cores} fpus_per_core: {self.lanes} clock_rate_ghz: {self.clock}
              block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
              thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
              registers_per_core_limit: 65536 registers_per_block_limit: 65536
              memory_bandwidth: {self.bandwidth} l2_cache_size: {self.cache}
              device_memory_size: {self.memory} device_address_bits: 64 ecc_enabled: true
              pcie_bandwidth: 34359738368
              cuda_compute_capability {{ major: {self.capability} feature_extension: {feature} }}
              platform_version: "Compute Capability {self.capability}.0{"a" if self.own else ""}"
              device_vendor: "NVIDIA Corporation" name: "{self.name}"
              driver_version: "13.0.0" runtime_version: "12.9.0" compile_time_toolkit_version: "12.9.0"
              dnn_version: "9.10.0"
              device_interconnect_info {{ active_links: {self.links} }}
            }}
            platform_name: "CUDA"
            dnn_version_info {{ major: 9 minor: 10 patch: 0 }}
            runtime_version {{ major: 12 minor: 9 patch: 0 }}
            device_description_str: "{self.name}"
        """


TARGETS = {
    "h100": Target("NVIDIA H100 80GB HBM3", 132, 233_472, 3_352_320_000_000, 52_428_800, 84_942_979_072, 1.98, 9),
    "h200": Target(
        "NVIDIA H200 141GB HBM3e", 132, 233_472, 4_800_000_000_000, 52_428_800, 151_397_597_184, 1.98, 9
    ),
    "a100": Target(
        "NVIDIA A100-SXM4-80GB", 108, 167_936, 2_039_040_000_000, 41_943_040, 85_100_068_864, 1.41, 8,
        own=False, lanes=64, links=12,
    ),
    "b200": Target("NVIDIA B200", 148, 233_472, 7_672_320_000_000, 132_644_864, 191_514_411_008, 1.965, 10),
}  # fmt: skip

HEADING = f"""\
# FLUX and SD3 on GPUs, compiled without a GPU

`python benchmarks/gpu_aot.py`: the GPU compiler's own memory analysis and HLO. An edit is a source and three
edits, a sweep two pictures a shard; SD3 computes two rows an element, for its guidance. Memory counts all networks'
weights on a chip, and what this program adds but for cuDNN's workspace. Products are cuBLASLt's, or untuned Triton
kernels. Bytes and times are **estimates**: a kernel reads its operands and writes its results once, and takes the
least that published peaks of products or memory allow; kernels follow one another. XLA's attention counts as
products and elementwise. Nothing was run; the command goes on with what is missing here.

Bytes of a step, GB: {", ".join(BYTE_KINDS)}. Least time, ms: {", ".join(TIME_KINDS)}.

| machine | model | side | what | numbers | attention | products | mesh | batch | compile s | temporaries GiB \
| all of chip GiB | kernels | bytes GB ({len(BYTE_KINDS)} kinds) | sum | least ms ({len(TIME_KINDS)} kinds) | sum \
| sent GB | roofline ms (products, memory, network) |
| {" | ".join(["---"] * 19)} |
"""


def cases(machine: str, model: str) -> list[Case]:
    """Both kinds of work on the proposed mesh, in all numbers that the chip has; FLUX.1-dev also in other ways."""
    (chip, count), (info, _) = parse_machine(machine), find_info(model)
    chosen = []
    for work in GROUPS:
        mesh, _ = propose_mesh(info, chip, count, work)
        case = step_case(work, mesh, True) | {"slice": machine, "model": model}
        chosen.append(case | way("bf16", "cudnn", "cublas"))
        if model != MODELS[0]:
            continue
        others = [("bf16", "xla", "cublas"), ("bf16", "cudnn", "triton"), ("int8", "cudnn", "cublas")]
        others += [("fp8", "cudnn", "cublas")] if chip.fp8_speedup > 1 else []
        chosen += [case | way(*other) | {"proposed": other[0] != "bf16"} for other in others]
    return chosen


def way(numbers: str, attention: str, products: str) -> Case:
    """How a case is computed."""
    quantisation = None if numbers == "bf16" else numbers
    return {"numbers": numbers, "attention": attention, "products": products, "quantisation": quantisation}


def devices_of(machine: str) -> list[jax.Device]:
    """The machine's GPUs, known to the compiler alone. ClickException where it is not installed."""
    chip, count = parse_machine(machine)
    try:
        target = TARGETS[chip.name].text()
        topology = topologies.get_topology_desc(platform="cuda", target_config=target, topology=f"1x1x{count}")
    except (RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise click.ClickException(f"no GPU compiler ({reason}); pip install '.[gpu-aot]'") from error
    return topology.devices


def answer_for_cudnn() -> None:
    """jax asks the installed cuDNN for its version before it lowers attention; the targets have one."""
    from jax._src.cudnn import fused_attention_stablehlo

    fused_attention_stablehlo.check_cudnn_version = lambda: CUDNN


def lower(case: Case, side: int, placement: Placement) -> Lowered:
    """The case's step, lowered for its machine."""
    info, words = find_info(case["model"])
    shape = {"groups": case["groups"], "members": case["members"], "words": words}
    return lower_step(info, placement, info.canvas(side, side), **shape)


def measure(case: Case, side: int) -> Row:
    """A row of the table."""
    chip, count = parse_machine(case["slice"])
    placement = Placement(
        dtype="bfloat16",
        mesh=make_mesh(case["mesh"], devices_of(case["slice"])),
        attention=case["attention"],
        quantisation=case["quantisation"],
    )
    lowered = lower(case, side, placement)
    start = time.perf_counter()
    compiled = lowered.compile({"xla_gpu_enable_triton_gemm": case["products"] == "triton"})
    seconds = time.perf_counter() - start
    hlo = compiled.as_text()
    row = {**case, "side": side, "chips": count, "compile_seconds": round(seconds, 1)}
    row |= memory_figures(case, placement, compiled) | {"chip_memory": chip.memory, "sent": sent(hlo)}
    row["fits"] = row["memory"] <= chip.memory
    return row | read_kernels(hlo, chip) | least_times(case, side, row)


def read_kernels(hlo: str, chip) -> Row:
    """How many kernels of which kinds run in a step, their bytes and least times, and copies of weights."""
    found = kernels(hlo)
    return {
        "kernels": sum(kernel.times for kernel in found),
        "attention_kernels": sum(kernel.times for kernel in found if kernel.kind == ATTENTION),
        "copies_of_weights": sum(kernel.times for kernel in found if kernel.kind == COPIED),
        "bytes": bytes_by_kind(found),
        "seconds": seconds_by_kind(found, chip.flops, chip.bandwidth, chip.fp8_speedup),
    }


def identity(row: Row) -> tuple:
    """What a row is about."""
    names = ("slice", "model", "work", "side", "numbers", "attention", "products")
    return (*(row[name] for name in names), row["groups"], tuple(sorted(row["mesh"].items())))


def table_line(row: Row) -> str:
    """The row as Markdown."""
    by_kind, seconds = row["bytes"], row["seconds"]
    sent_cell = ", ".join(f"{kind} {size / 1e9:.2f}" for kind, size in sorted(row["sent"].items()) if size > 5e6)
    cells = (
        row["slice"],
        row["model"],
        row["side"],
        row["work"],
        row["numbers"],
        row["attention"],
        row["products"],
        mesh_name(row["mesh"]),
        row["groups"] * row["members"],
        f"{row['compile_seconds']:.0f}",
        f"{row['temporaries'] / GIB:.2f}",
        f"{row['memory'] / GIB:.1f} of {row['chip_memory'] / GIB:.1f}",
        row["kernels"],
        ", ".join(f"{by_kind[kind] / 1e9:.1f}" for kind in BYTE_KINDS),
        f"{sum(by_kind.values()) / 1e9:.1f}",
        ", ".join(f"{1e3 * seconds[kind]:.1f}" for kind in TIME_KINDS),
        f"{1e3 * sum(seconds.values()):.1f}",
        sent_cell or "0",
        times_cell(row),
    )
    return f"| {' | '.join(map(str, cells))} |\n"


def save_rows(out: Path, rows: dict[tuple, Row]) -> list[Row]:
    """JSON and Markdown, in the order of machines and models; the rows in that order."""
    order = {name: place for place, name in enumerate((*MACHINES, *MODELS, *QUANTISATIONS, *ATTENTIONS))}
    names = ("slice", "model", "numbers", "attention")
    ordered = sorted(
        rows.values(), key=lambda row: (*(order[row[name]] for name in names), row["work"], row["side"])
    )
    write_json(out, versions("jax") | {"rows": ordered})
    write_text(out.with_suffix(".md"), HEADING + "".join(map(table_line, ordered)))
    return ordered


@click.command()
@click.option("--only", type=click.Choice(MACHINES), multiple=True, help="Machines [all]; repeat for more.")
@click.option("--model", "models", type=click.Choice(MODELS), multiple=True, help="Models [all].")
@click.option("--side", "sides", type=int, multiple=True, help="Height and width [512 and 1024].")
@click.option("--work", "works", type=click.Choice(list(GROUPS)), multiple=True, help="Kinds of work [both].")
@click.option("--numbers", "numbers", type=click.Choice(QUANTISATIONS), multiple=True, help="Of blocks [all].")
@click.option("--attention", "attentions", type=click.Choice(ATTENTIONS), multiple=True, help="Kernels [both].")
@click.option("--products", "products", type=click.Choice(PRODUCTS), multiple=True, help="Kernels [both].")
@click.option("--fresh", is_flag=True, help="Compile again what the JSON has.")
@out_option(TABLE)
def main(only, models, sides, works, numbers, attentions, products, fresh: bool, out: Path) -> None:
    """Compile FLUX and SD3 for GPUs, and say what fits and where its bytes go."""
    answer_for_cudnn()
    rows = read_rows(out, identity)
    asked = {"work": works, "numbers": numbers, "attention": attentions, "products": products}
    wanted = [
        (case, side)
        for name in only or MACHINES
        for model in models or MODELS
        for side in sides or SIDES
        for case in cases(name, model)
        if all(not choice or case[name] in choice for name, choice in asked.items())
    ]
    for case, side in tqdm(wanted, desc="compiling", unit="program", file=sys.stderr):
        key = identity({**case, "side": side})
        if fresh or key not in rows:
            rows[key] = measure(case, side)
            save_rows(out, rows)
    ordered = save_rows(out, rows)
    click.echo(HEADING + "".join(map(table_line, ordered)))
    if out.resolve() == RESULTS / TABLE:
        write_text(SHIPPED, ship(ordered, "GPU"))
    unfit = [row for row in rows.values() if not row["fits"]]
    if unfit:
        raise click.ClickException(f"{len(unfit)} rows do not fit their chip")


if __name__ == "__main__":
    main()
