"""Peak memory of converting and of restoring real sizes, on this machine's CPU.

    python benchmarks/memory.py --folder /tmp/memory

Writes a checkpoint with FLUX.1-dev's hidden size but fewer blocks (random bfloat16 weights; the other networks are
the embedded model's), converts it, and restores its transformer in one, two and four processes that share a mesh.
Every figure is read in a process of its own: anonymous memory (which the system cannot take back; files mapped into
memory it can), above what the process held before it began. Prints a table and writes JSON.
"""

import json
import math
import os
import resource
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import click
import jax
import ml_dtypes
import numpy as np
from common import out_option, write_json
from safetensors.numpy import save_file
from sflow_convert import flux as table
from sflow_convert.engine import Shape, plan_reads, source_shapes
from sflow_convert.job import convert
from sflow_convert.layouts import open_source

from sflow_jax.catalogue import ASSETS
from sflow_jax.machine.meshes import make_mesh
from sflow_jax.models.flux1 import Flux, FluxConfig
from sflow_jax.models.layers import parameters
from sflow_jax.planning.lowering import GIB
from sflow_jax.settings import Placement
from sflow_jax.storage.checkpoint import abstract, load_info, load_network

DOUBLE_BLOCKS, SINGLE_BLOCKS = 4, 12
DTYPE = "bfloat16"
# Bytes of a file of weights, and of one of their numbers.
SHARD, NUMBER = 1 << 30, 2
# Spread of trained weights.
SPREAD = 0.02
PROCESSES = (1, 2, 4)
# What this benchmark makes in its folder.
SOURCE, CONVERTED = "source", "converted"
WEIGHTS = "diffusion_pytorch_model"


class Watch:
    """The most anonymous memory that this process held while the block ran, bytes above the beginning."""

    def __enter__(self) -> "Watch":
        self.before = self.peak = self._anonymous()
        self.running = True
        self.thread = threading.Thread(target=self._follow, daemon=True)
        self.thread.start()
        self.start = time.perf_counter()
        return self

    def __exit__(self, *_) -> None:
        self.seconds = time.perf_counter() - self.start
        self.running = False
        self.thread.join()

    def _anonymous(self) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * int(next(line for line in lines if line.startswith("RssAnon")).split()[1])

    def _follow(self) -> None:
        while self.running:
            self.peak = max(self.peak, self._anonymous())
            time.sleep(0.005)

    def figures(self) -> dict[str, float]:
        """As JSON has them."""
        return {
            "anonymous": self.peak - self.before,
            "before": self.before,
            "resident": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
            "seconds": round(self.seconds, 1),
        }


def write_source(folder: Path, double_blocks: int, single_blocks: int) -> int:
    """A published folder with a transformer of real width; bytes of its weights."""
    shutil.copytree(ASSETS, folder, dirs_exist_ok=True)
    transformer = folder / "transformer"
    (transformer / f"{WEIGHTS}.safetensors").unlink()
    config, dev = json.loads((transformer / "config.json").read_text()), FluxConfig.dev()
    config |= {
        "num_layers": double_blocks,
        "num_single_layers": single_blocks,
        "num_attention_heads": dev.heads,
        "attention_head_dim": dev.head_dim,
        "axes_dims_rope": dev.rotary_axes,
    }
    (transformer / "config.json").write_text(json.dumps(config))
    shapes = published_shapes(FluxConfig.from_hf(config))
    write_weights(transformer, shapes)
    return sum(NUMBER * math.prod(shape) for shape in shapes.values())


def published_shapes(config: FluxConfig) -> dict[str, Shape]:
    """Name → shape of every tensor of a diffusers transformer."""
    ours = {path: leaf.shape for path, leaf in parameters(abstract(Flux, config)).items()}
    return source_shapes(plan_reads(table.diffusers_table(config), ours))


def sharded(shapes: Mapping[str, Shape]) -> Iterator[dict[str, Shape]]:
    """The tensors of each file in turn."""
    shard, total = {}, 0
    for name, shape in shapes.items():
        size = NUMBER * math.prod(shape)
        if shard and total + size > SHARD:
            yield shard
            shard, total = {}, 0
        shard[name], total = shape, total + size
    yield shard


def write_weights(folder: Path, shapes: Mapping[str, Shape]) -> None:
    """Random tensors in files of one gigabyte, and their index."""
    rng, shards, file_of = np.random.default_rng(0), list(sharded(shapes)), {}
    for number, shard in enumerate(shards, 1):
        file = f"{WEIGHTS}-{number:05d}-of-{len(shards):05d}.safetensors"
        tensors = {
            name: (SPREAD * rng.standard_normal(shape, np.float32)).astype(ml_dtypes.bfloat16)
            for name, shape in shard.items()
        }
        save_file(tensors, folder / file)
        file_of |= dict.fromkeys(shard, file)
    (folder / f"{WEIGHTS}.safetensors.index.json").write_text(json.dumps({"weight_map": file_of}))


def convert_here(folder: Path) -> None:
    """In a process of its own: convert, and print figures."""
    source = open_source(folder / SOURCE)
    with Watch() as watch:
        convert(source, folder / CONVERTED, dtype=DTYPE, overwrite=True, progress=False)
    print(json.dumps(watch.figures()))


def restore_here(folder: Path, index: int, count: int, port: int) -> None:
    """In one of several processes: restore the transformer on a mesh over all of them, and print figures."""
    if count > 1:
        jax.distributed.initialize(f"localhost:{port}", count, index)
    info = load_info(folder / CONVERTED)
    placement = Placement(dtype=DTYPE, mesh=make_mesh({"fsdp": count}, jax.devices()))
    with Watch() as watch:
        network = load_network(folder / CONVERTED, info, "transformer", placement)
        jax.block_until_ready(network)
    weights = sum(shard.data.nbytes for leaf in jax.tree.leaves(network) for shard in leaf.addressable_shards)
    print(json.dumps(watch.figures() | {"weights": weights}))


def start(*arguments: Any) -> subprocess.Popen:
    """This script again, on one CPU device."""
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=1"}
    command = [sys.executable, __file__, *map(str, arguments)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)


def finish(processes: list[subprocess.Popen]) -> list[dict[str, Any]]:
    """The figures of each: the last line that it prints."""
    printed = [process.communicate()[0] for process in processes]
    if any(process.returncode for process in processes):
        raise click.ClickException("a process failed; see above")
    return [json.loads(text.splitlines()[-1]) for text in printed]


def restore_in(count: int, folder: Path) -> list[dict[str, Any]]:
    """The figures of so many processes that restore together."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    return finish([start("restore", folder, index, count, port) for index in range(count)])


@click.command()
@click.option(
    "--folder", required=True, type=click.Path(path_type=Path), help="Scratch space, 20 GB; emptied after."
)
@click.option("--double", default=DOUBLE_BLOCKS, show_default=True, help="Double blocks.")
@click.option("--single", default=SINGLE_BLOCKS, show_default=True, help="Single blocks.")
@out_option("memory.json")
def main(folder: Path, double: int, single: int, out: Path) -> None:
    """Measure peak memory of conversion, and of restoring in one, two and four processes."""
    size = write_source(folder / SOURCE, double, single)
    click.echo(f"transformer: {double} + {single} blocks, {size / GIB:.2f} GiB in {DTYPE}")
    (converting,) = finish([start("convert", folder)])
    anonymous, resident = (converting[name] / GIB for name in ("anonymous", "resident"))
    click.echo(f"convert: {anonymous:.2f} GiB anonymous, {resident:.2f} resident, mapped files too")
    figures = {"weights": size, "blocks": [double, single], "convert": converting, "restore": {}}
    for count in PROCESSES:
        figures["restore"][count] = rows = restore_in(count, folder)
        most, weights = max(row["anonymous"] for row in rows) / GIB, rows[0]["weights"] / GIB
        click.echo(f"restore in {count}: {most:.2f} GiB a process, of which weights {weights:.2f}")
    for name in (SOURCE, CONVERTED):
        shutil.rmtree(folder / name)
    write_json(out, figures)
    click.echo(f"written to {out}")


if __name__ == "__main__":
    if sys.argv[1:2] == ["convert"]:
        convert_here(Path(sys.argv[2]))
    elif sys.argv[1:2] == ["restore"]:
        restore_here(Path(sys.argv[2]), *map(int, sys.argv[3:]))
    else:
        main()
