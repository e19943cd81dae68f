"""The conversion itself: check everything, then write a new checkpoint beside the destination, then rename."""

import dataclasses
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
from etils import epath
from flax import nnx
from jax.typing import DTypeLike
from sflow_convert.engine import ConversionError, Read, assemble, check, plan_reads
from sflow_convert.layouts import Network, Source
from sflow_convert.lora import Changes, Lora, plan_changes
from sflow_convert.sources import digest

from sflow_jax.models.layers import parameters, with_parameters
from sflow_jax.progress import counted
from sflow_jax.sampling.control import check_layers
from sflow_jax.settings import check_path
from sflow_jax.storage.checkpoint import INFO_FILE, ModelInfo, abstract, save_info, save_network
from sflow_jax.storage.checksums import all_files, write_checksums
from sflow_jax.storage.folders import new_folder, recover
from sflow_jax.storage.paths import absolute, is_remote
from sflow_jax.storage.tokenizers import ADVICE, load_tokenizer

DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
# Network → its reads, and its parameters' shapes.
NetworkReads = dict[str, tuple[list[Read], dict[str, tuple[int, ...]]]]
# Written at once where files cannot be reserved.
ZEROS = 1 << 24
STORED = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


def checked_reads(networks: Mapping[str, Network]) -> NetworkReads:
    """Reads and parameter shapes of every network; ConversionError lists the faults of all of them."""
    checked, problems = {}, []
    for name, network in networks.items():
        targets = {p: leaf.shape for p, leaf in parameters(abstract(network.build, network.config)).items()}
        reads = plan_reads(network.table, targets)
        try:
            check(reads, network.tensors.shapes, targets)
        except ConversionError as error:
            problems.append(f"{name}: {error}")
        checked[name] = (reads, targets)
    if problems:
        raise ConversionError(" | ".join(problems))
    return checked


def stored_dtype(network: Network) -> str:
    """The dtype of a network's weights; ConversionError for mixed or unknown ones."""
    dtypes = sorted(set(network.tensors.dtypes.values()))
    if len(dtypes) != 1 or dtypes[0] not in STORED:
        raise ConversionError(f"weights are stored as {', '.join(dtypes)}; say which `dtype` to write")
    return STORED[dtypes[0]]


def known_vital_layers(
    source: Source, asked: Iterable[int] | None, origin: str
) -> tuple[tuple[int, ...] | None, str]:
    """Layers to record and where they come from: asked for, or the published ones of a model of these sizes."""
    if asked is not None:
        return check_layers(asked, source.family.layers(source.configs)), origin
    known = source.family.known_vital_layers(source.configs)
    return (None, "") if known is None else (known.layers, known.origin)


def write_network(
    folder: epath.Path,
    name: str,
    network: Network,
    reads_and_shapes: tuple[list[Read], dict],
    dtype: str,
    done: Callable[[int], None],
    changes: Changes | None = None,
) -> None:
    """Assemble one network in files of a scratch folder (memory stays free), and save it with Orbax.

    done: hears the size of every tensor that was read. changes: what LoRA files add to it.
    """
    reads, targets = reads_and_shapes
    # Beside the destination, where there is room; a remote destination leaves the machine's own place.
    place = None if is_remote(folder) else str(folder)
    with tempfile.TemporaryDirectory(prefix="scratch-", dir=place) as scratch:

        def allocate(path: str, shape: tuple[int, ...], dtype: DTypeLike) -> np.ndarray:
            reserve(f"{scratch}/{path}", math.prod(shape) * np.dtype(dtype).itemsize)
            return np.memmap(f"{scratch}/{path}", dtype, "r+", shape=shape)

        def read(source: str, part: tuple[slice, ...] | None) -> np.ndarray:
            array = network.tensors.read(source, part)
            done(array.size)
            return array

        change = (lambda read: None) if changes is None else changes.of
        save_network(folder, name, dict(assemble(reads, targets, read, DTYPES[dtype], allocate, change)))


def reserve(path: str, size: int) -> None:
    """A file of so many bytes, which the disk has room for: writing to a map of it cannot fail. OSError if not."""
    with open(path, "wb") as file:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file.fileno(), 0, size)
            return
        for start in range(0, size, ZEROS):
            file.write(bytes(min(ZEROS, size - start)))


def check_room(destination: epath.PathLike, reads: NetworkReads, dtype: str) -> None:
    """ConversionError where the disk has no room: for all networks, and for the largest once more, as scratch."""
    if is_remote(destination):
        return
    numbers = [sum(map(math.prod, targets.values())) for _, targets in reads.values()]
    needed = (sum(numbers) + max(numbers)) * np.dtype(DTYPES[dtype]).itemsize
    place = next(parent for parent in absolute(destination).parents if parent.exists())
    free = shutil.disk_usage(place).free
    if needed > free:
        raise ConversionError(
            f"{destination} needs {needed / 1e9:.1f} GB to be written; {place} has {free / 1e9:.1f} GB free"
        )


def check_tokenizers(source: Source) -> None:
    """Load every tokenizer once; ConversionError for what would fail later, or make pictures of nonsense.

    A tokenizer whose name is a network's must have no more tokens than that network has embeddings.
    """
    for name, place in source.family.tokenizers.items():
        if name not in source.networks:
            continue
        folder = source.tokenizers[place]
        try:
            tokenizer = load_tokenizer(folder)
        except ValueError as error:
            raise ConversionError(str(error).replace("convert the source again", ADVICE)) from error
        size = getattr(source.configs.get(name), "vocabulary", None)
        largest = max(tokenizer.get_vocab().values(), default=-1)
        if size is not None and largest >= size:
            raise ConversionError(
                f"{folder} has a token of number {largest}, and its text encoder has {size} embeddings: take the "
                "tokenizer that belongs to it, without added tokens"
            )


def check_free(destination: epath.PathLike, info_file: str, what: str, overwrite: bool) -> None:
    """ConversionError if something is at `destination`, or, with `overwrite`, something else than `what`.

    info_file: the file by which `what` is recognised.
    """
    if not os.fspath(destination):
        raise ConversionError("the destination has no name")
    check_path("destination", destination)
    destination = epath.Path(destination)
    recover(destination)
    if not destination.exists():
        return
    if not overwrite:
        raise ConversionError(f"{destination} exists; choose another place or say `overwrite`")
    if not (destination / info_file).exists():
        raise ConversionError(f"{destination} is not {what}, so `overwrite` does not replace it")


def convert(
    source: Source,
    destination: epath.PathLike,
    *,
    dtype: str | None = None,
    overwrite: bool = False,
    vital_layers: Iterable[int] | None = None,
    vital_origin: str = "given at conversion",
    title: str = "",
    loras: Sequence[Lora] = (),
    progress: bool = True,
) -> ModelInfo:
    """Write `source` as a converted checkpoint at `destination`, whole or not at all.

    dtype: one of `DTYPES`, by default the transformer's own. vital_layers, vital_origin: what to record of them; by
    default what the paper's authors found, for FLUX.1-dev. title: what people call the model, where that is not the
    family's name for it. loras: LoRA files whose changes are added to the weights. Raises ConversionError for a
    source or a LoRA that does not fit, and for a destination that exists (unless `overwrite`, and then only a
    checkpoint is replaced).
    """
    # Before the reads, which take a while.
    check_free(destination, INFO_FILE, "a checkpoint", overwrite)
    layers, origin = known_vital_layers(source, vital_layers, vital_origin)
    reads = checked_reads(source.networks)
    changes = plan_changes(source, {name: targets for name, (_, targets) in reads.items()}, loras)
    check_tokenizers(source)
    info = ModelInfo(
        family=source.family,
        variant=source.variant,
        picture_size=_fitting_size(source),
        dtype=dtype or stored_dtype(source.networks["transformer"]),
        configs=source.configs,
        scheduler={key: value for key, value in source.scheduler.items() if not key.startswith("_")},
        vital_layers=layers,
        vital_layers_origin=origin,
        named=_title_with(loras, title or source.family.title(source.variant)) if loras else title,
    )
    check_size(info)
    check_room(destination, reads, info.dtype)
    with new_folder(destination, replace=overwrite) as folder:
        info = dataclasses.replace(info, source_digests=source_digests(source.networks, progress, loras))
        write_networks(folder, source.networks, reads, info.dtype, progress, changes)
        for name, tokenizer in source.tokenizers.items():
            copy_files(tokenizer, folder / name)
        save_info(folder, info)
        record_checksums(folder, INFO_FILE, progress)
    return info


def record_checksums(folder: epath.Path, info_file: str, progress: bool) -> None:
    """Write down what the finished folder holds. info_file: holds its own checksum."""
    size = sum(path.stat().length for name, path in all_files(folder) if name != info_file)
    with counted(size, "checksums", progress) as done:
        write_checksums(folder, leave=(info_file,), progress=done)


def check_size(info: ModelInfo) -> None:
    """ConversionError for a picture size, the autoencoder's, that is not whole tokens."""
    try:
        info.canvas()
    except ValueError as error:
        raise ConversionError(
            f"the autoencoder's config.json says sample_size {info.picture_size}, which is not a multiple of "
            f"{info.family.token_side(info.configs)} pixels, or too large: correct it"
        ) from error


def _title_with(loras: Sequence[Lora], title: str) -> str:
    """A model's title with what is merged into it, in one line."""
    names = (f"{lora.path.name} × {lora.scale:g}" for lora in loras)
    return f"{title} with {', '.join(names)}"


def _fitting_size(source: Source) -> int:
    """The source's picture size, or the largest that the network can place, where that is less."""
    most = source.family.most_tokens(source.configs)
    largest = source.picture_size if most is None else most * source.family.token_side(source.configs)
    return min(source.picture_size, largest)


def source_digests(networks: Mapping[str, Network], progress: bool, loras: Sequence[Lora] = ()) -> dict[str, str]:
    """sha256 of every weight file, by folder and name; of LoRA files by number, name and scale."""
    files = [path for network in networks.values() for path in network.tensors.paths]
    named = {f"{path.parent.name}/{path.name}": path for path in files}
    named |= {f"lora-{number}/{lora}": lora.path for number, lora in enumerate(loras, 1)}
    size = sum(path.stat().st_size for path in named.values())
    with counted(size, "checking", progress) as done:
        return {name: digest(path, done) for name, path in named.items()}


def write_networks(
    folder: epath.Path,
    networks: Mapping[str, Network],
    reads: NetworkReads,
    dtype: str,
    progress: bool,
    changes: Mapping[str, Changes] | None = None,
) -> None:
    """Convert one network after the other. changes: what LoRA files add to each."""
    shapes = [shape for network in networks.values() for shape in network.tensors.shapes.values()]
    with counted(sum(map(math.prod, shapes)), "converting", progress) as done:
        for name, network in networks.items():
            write_network(folder, name, network, reads[name], dtype, done, (changes or {}).get(name))


def copy_files(source: Path, destination: epath.Path) -> None:
    """Copy the files of a flat folder, to a local or remote place."""
    destination.mkdir()
    for file in sorted(source.iterdir()):
        if file.is_file():
            with file.open("rb") as reader, (destination / file.name).open("wb") as writer:
                shutil.copyfileobj(reader, writer)


def in_memory(network: Network, dtype: str = "float32") -> nnx.Module:
    """One network straight into memory; ConversionError lists the tensors that do not fit."""
    reads, targets = checked_reads({"network": network})["network"]
    arrays = dict(assemble(reads, targets, network.tensors.read, DTYPES[dtype]))
    return with_parameters(abstract(network.build, network.config), jax.device_put(arrays))
