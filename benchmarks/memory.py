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
from pathlib import Path

import click
import ml_dtypes
import numpy as np

RESULTS = Path(__file__).resolve().parent / "results" / "memory.json"
DOUBLE_BLOCKS, SINGLE_BLOCKS = 4, 12
SHARD = 1 << 30
GIB = 2**30


class Watch:
    """The most anonymous memory that this process held while the block ran, bytes above the beginning."""

    def __enter__(self) -> "Watch":
        self.before = self.peak = self._held()
        self.running = True
        self.thread = threading.Thread(target=self._follow, daemon=True)
        self.thread.start()
        self.start = time.perf_counter()
        return self

    def __exit__(self, *_) -> None:
        self.seconds = time.perf_counter() - self.start
        self.running = False
        self.thread.join()

    def _held(self) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * int(next(line for line in lines if line.startswith("RssAnon")).split()[1])

    def _follow(self) -> None:
        while self.running:
            self.peak = max(self.peak, self._held())
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
    from safetensors.numpy import save_file
    from sflow_convert import flux as table
    from sflow_convert.engine import plan, source_shapes
    from sflow_jax.checkpoint import abstract_network

    from sflow_jax.catalogue import ASSETS
    from sflow_jax.models.flux1 import FluxConfig
    from sflow_jax.models.layers import parameters

    shutil.copytree(ASSETS, folder, dirs_exist_ok=True)
    (folder / "transformer" / "diffusion_pytorch_model.safetensors").unlink()
    file = folder / "transformer" / "config.json"
    config = json.loads(file.read_text()) | {
        "num_layers": double_blocks,
        "num_single_layers": single_blocks,
        "num_attention_heads": 24,
        "attention_head_dim": 128,
        "axes_dims_rope": [16, 56, 56],
    }
    file.write_text(json.dumps(config))
    ours = FluxConfig.from_hf(config)
    targets = {path: leaf.shape for path, leaf in parameters(abstract_network("transformer", ours)).items()}
    shapes = source_shapes(plan(table.diffusers_table(ours), targets))
    rng, shards, held = np.random.default_rng(0), [{}], 0
    for name, shape in shapes.items():
        size = 2 * math.prod(shape)
        if held + size > SHARD:
            shards.append({})
            held = 0
        shards[-1][name], held = shape, held + size
    weight_map = {}
    for number, shard in enumerate(shards, 1):
        name = f"diffusion_pytorch_model-{number:05d}-of-{len(shards):05d}.safetensors"
        tensors = {
            tensor: (rng.standard_normal(shape, np.float32) * 0.02).astype(ml_dtypes.bfloat16)
            for tensor, shape in shard.items()
        }
        save_file(tensors, folder / "transformer" / name)
        weight_map |= dict.fromkeys(shard, name)
    index = folder / "transformer" / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    return sum(2 * math.prod(shape) for shape in shapes.values())


def convert(folder: Path) -> None:
    """In a process of its own: convert, and print figures."""
    from sflow_convert.job import convert as run
    from sflow_convert.layouts import open_source

    source = open_source(folder / "source")
    with Watch() as watch:
        run(source, folder / "converted", dtype="bfloat16", overwrite=True, progress=False)
    print(json.dumps(watch.figures()))


def restore(folder: Path, index: int, count: int, port: int) -> None:
    """In one of several processes: restore the transformer on a mesh over all of them, and print figures."""
    import jax

    from sflow_jax.machine.meshes import make_mesh
    from sflow_jax.storage.checkpoint import load_info, load_network

    if count > 1:
        jax.distributed.initialize(f"localhost:{port}", count, index)
    info, mesh = load_info(folder / "converted"), make_mesh({"fsdp": count}, jax.devices())
    with Watch() as watch:
        config = info.configs["transformer"]
        network = load_network(folder / "converted", "transformer", config, dtype="bfloat16", mesh=mesh)
        jax.block_until_ready(network)
    held = sum(shard.data.nbytes for leaf in jax.tree.leaves(network) for shard in leaf.addressable_shards)
    print(json.dumps(watch.figures() | {"weights": held}))


def start(*arguments) -> subprocess.Popen:
    """This script again, on one CPU device."""
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=1"}
    command = [sys.executable, __file__, *map(str, arguments)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)


def finish(processes: list[subprocess.Popen]) -> list[dict]:
    """The figures of each."""
    said = [process.communicate()[0] for process in processes]
    if any(process.returncode for process in processes):
        raise click.ClickException("a process failed; see above")
    return [json.loads(text.splitlines()[-1]) for text in said]


@click.command()
@click.option(
    "--folder", required=True, type=click.Path(path_type=Path), help="Scratch space, 20 GB; emptied after."
)
@click.option("--double", default=DOUBLE_BLOCKS, show_default=True, help="Double blocks.")
@click.option("--single", default=SINGLE_BLOCKS, show_default=True, help="Single blocks.")
@click.option("--out", default=RESULTS, show_default=True, type=click.Path(path_type=Path), help="JSON file.")
def main(folder: Path, double: int, single: int, out: Path) -> None:
    """Measure peak memory of conversion, and of restoring in one, two and four processes."""
    size = write_source(folder / "source", double, single)
    click.echo(f"transformer: {double} + {single} blocks, {size / GIB:.2f} GiB in bfloat16")
    (converting,) = finish([start("convert", folder)])
    figures = {"weights": size, "blocks": [double, single], "convert": converting, "restore": {}}
    shown = ("anonymous", "resident")
    told = {name: converting[name] / GIB for name in shown}
    click.echo(f"convert: {told['anonymous']:.2f} GiB anonymous, {told['resident']:.2f} resident, mapped files too")
    for count in (1, 2, 4):
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        rows = finish([start("restore", folder, index, count, port) for index in range(count)])
        figures["restore"][count] = rows
        most = max(row["anonymous"] for row in rows) / GIB
        click.echo(f"restore in {count}: {most:.2f} GiB a process, of which weights {rows[0]['weights'] / GIB:.2f}")
    shutil.rmtree(folder)
    out.write_text(json.dumps(figures, indent=2) + "\n")
    click.echo(f"written to {out}")


if __name__ == "__main__":
    if sys.argv[1:2] == ["convert"]:
        convert(Path(sys.argv[2]))
    elif sys.argv[1:2] == ["restore"]:
        restore(Path(sys.argv[2]), *map(int, sys.argv[3:]))
    else:
        main()
