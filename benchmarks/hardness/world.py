"""What cases share, made once: a small random FLUX as published and converted, features, an inversion, a sweep."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
from PIL import Image
from safetensors.numpy import save_file

ROOT = Path(__file__).resolve().parents[2]
ASSETS = ROOT / "sflow_jax" / "toyworld" / "assets"
# Part → the command that makes it, run in the world's folder.
COMMANDS = {
    "converted": ("sflow-convert", "source", "converted", "--vital-layers", "0,2,3"),
    "plain": ("sflow-convert", "source", "plain"),
    "dino": ("sflow-convert", "dino_source", "dino", "--dtype", "float32"),
    "clip": ("sflow-convert", "clip_source", "clip", "--dtype", "float32"),
    "wide": ("sflow-convert", "wide_source", "wide"),
    "painted_wide": (
        *("sflow", "generate", "-m", "wide", "-p", "a cat", "--steps", "1"),
        *("--height", "64", "--width", "64", "--out", "painted_wide"),
    ),
    "painted": ("sflow", "generate", "-m", "converted", "-p", "a cat", "--steps", "1", "--out", "painted"),
    "inversion": (
        *("sflow", "invert", "-m", "converted", "--image", "photo.png", "-p", "a cat"),
        *("--steps", "2", "--out", "inversion"),
    ),
    # These compile what many cases use.
    "edited": (
        *("sflow", "edit", "-m", "converted", "-p", "a cat", "-e", "a dog"),
        *("--steps", "1", "--out", "edited"),
    ),
    "inverted": (
        *("sflow", "invert", "-m", "converted", "--image", "photo.png", "-p", "a cat"),
        *("--steps", "1", "--out", "inverted"),
    ),
    "swept": (
        *("sflow", "vital", "-m", "converted", "--features", "dino", "--prompts", "prompts.txt"),
        *("--limit", "2", "--steps", "1", "--layers", "0-1", "--batch", "2", "--out", "swept"),
    ),
    "run": (
        *("sflow", "vital", "-m", "converted", "--features", "dino", "--limit", "2", "--steps", "1"),
        *("--layers", "0-2", "--batch", "4", "--prompts", "prompts.txt", "--out", "run"),
    ),
}
NEEDS = {
    "single": ("wide_source",),
    "wide": ("wide_source",),
    "painted_wide": ("wide",),
    "converted": ("source",),
    "plain": ("source",),
    "dino": ("dino_source",),
    "clip": ("clip_source",),
    "painted": ("converted",),
    "inversion": ("converted", "photo.png"),
    "run": ("converted", "dino", "prompts.txt"),
    "edited": ("converted",),
    "inverted": ("converted", "photo.png"),
    "swept": ("converted", "dino", "prompts.txt"),
}
ORDER = (
    *("source", "wide_source", "single", "dino_source", "clip_source", "photo.png", "prompts.txt"),
    *(
        "converted",
        "plain",
        "wide",
        "painted_wide",
        "dino",
        "clip",
        "painted",
        "inversion",
        "run",
        "edited",
        "inverted",
        "swept",
    ),
)


def needed(parts: Iterable[str]) -> list[str]:
    """Parts and all that these are made of, in the order of making."""
    wanted = set(parts)
    for part in reversed(ORDER):
        if part in wanted:
            wanted.update(NEEDS.get(part, ()))
    return [part for part in ORDER if part in wanted]


def make(world: Path, parts: Iterable[str], run: Callable[[tuple[str, ...], Path], None]) -> None:
    """Make the parts that are not there yet. run: runs one command in a folder, and raises where it fails."""
    world.mkdir(parents=True, exist_ok=True)
    for part in needed(parts):
        if not (world / part).exists():
            if part in COMMANDS:
                run(COMMANDS[part], world)
            else:
                WRITERS[part](world)
    # Whoever a case runs as.
    for path in (world, *world.rglob("*")):
        path.chmod(0o755 if path.is_dir() else 0o644)


# Of an autoencoder whose norms have 32 groups, as single files are taken to have.
WIDE = {"block_out_channels": (32, 64, 64, 96), "norm_num_groups": 32}


def write_published(folder: Path, vae: dict) -> None:
    """A small FLUX, in a process of its own, since torch is large."""
    program = (
        f"import pathlib, published; published.VAE |= {vae!r}; "
        f"published.write_diffusers(pathlib.Path({str(folder)!r}))"
    )
    environment = os.environ | {"PYTHONWARNINGS": "ignore", "PYTHONPATH": str(ROOT / "tests")}
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment)
    if ended.returncode:
        raise RuntimeError(ended.stderr)


def write_single(world: Path) -> None:
    """Black Forest Labs' layout of the same weights, with the folders of text encoders beside the two files."""
    from sflow_convert import autoencoder, flux
    from sflow_convert.engine import assemble, export, plan_reads
    from sflow_convert.job import checked_reads
    from sflow_convert.layouts import open_source

    networks = open_source(world / "wide_source").networks
    folder = world / "single"
    folder.mkdir()
    for name, file, table in (
        ("transformer", "flux1-dev.safetensors", flux.single_file_table),
        ("autoencoder", "ae.safetensors", autoencoder.single_file_table),
    ):
        network = networks[name]
        reads, shapes = checked_reads({name: network})[name]
        arrays = dict(assemble(reads, shapes, network.tensors.read, "float32"))
        tensors = export(plan_reads(table(network.config), shapes), arrays)
        save_file({key: tensor.copy() for key, tensor in tensors.items()}, folder / file)
    for part in ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"):
        shutil.copytree(world / "wide_source" / part, folder / part)


def write_photo(world: Path) -> None:
    """A smooth picture, 64 × 48."""
    y, x = np.mgrid[0:48, 0:64] / 48
    levels = np.stack([np.sin(3 * x + y) / 2 + 0.5, np.cos(4 * y) / 2 + 0.5, x * y / 1.4], axis=-1)
    Image.fromarray((levels * 255).astype(np.uint8)).save(world / "photo.png")


WRITERS: dict[str, Callable[[Path], object]] = {
    "source": lambda world: write_published(world / "source", {}),
    "wide_source": lambda world: write_published(world / "wide_source", WIDE),
    "single": write_single,
    "dino_source": lambda world: shutil.copytree(ASSETS / "dinov2", world / "dino_source"),
    "clip_source": lambda world: shutil.copytree(ASSETS / "clip", world / "clip_source"),
    "photo.png": write_photo,
    "prompts.txt": lambda world: (world / "prompts.txt").write_text("a cat\na dog\na hat\n"),
}
