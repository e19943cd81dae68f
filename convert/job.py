"""The conversion itself: check everything, then write a new checkpoint beside the destination, then rename."""

import math
import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path

import ml_dtypes
import numpy as np
from etils import epath
from jax.typing import DTypeLike
from tqdm.auto import tqdm

from sflow_convert.engine import ConversionError, Read, assemble, check, plan
from sflow_convert.layouts import Network, Source
from sflow_convert.sources import digest
from sflow_jax.checkpoint import INFO_FILE, ModelInfo, abstract_network, save_info, save_network
from sflow_jax.control import FLUX_DEV_CODE, check_layers
from sflow_jax.models.flux import FluxConfig
from sflow_jax.models.layers import parameters

DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
STORED = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


def planned(source: Source) -> dict[str, tuple[list[Read], dict[str, tuple[int, ...]]]]:
    """Reads and parameter shapes of every network; ConversionError lists the faults of all of them."""
    plans, problems = {}, []
    for name, network in source.networks.items():
        targets = {p: leaf.shape for p, leaf in parameters(abstract_network(name, network.config)).items()}
        reads = plan(network.table, targets)
        try:
            check(reads, network.tensors.shapes, targets)
        except ConversionError as error:
            problems.append(f"{name}: {error}")
        plans[name] = (reads, targets)
    if problems:
        raise ConversionError("\n".join(problems))
    return plans


def stored_dtype(network: Network) -> str:
    """The dtype of a network's weights; ConversionError for mixed or unknown ones."""
    found = sorted(network.tensors.dtypes)
    if len(found) != 1 or found[0] not in STORED:
        raise ConversionError(f"weights are stored as {', '.join(found)}; say which dtype to write with --dtype")
    return STORED[found[0]]


def known_vital_layers(config: FluxConfig, asked: Iterable[int] | None) -> tuple[tuple[int, ...] | None, str]:
    """Layers to record and where they come from: asked for, or the published ones of FLUX.1-dev."""
    if asked is not None:
        return check_layers(asked, config.layers), "given at conversion"
    if config == FluxConfig.dev():
        return FLUX_DEV_CODE, "Stable Flow's code, measured by its authors on FLUX.1-dev"
    return None, ""


def write_network(
    folder: epath.Path, name: str, network: Network, plan_: tuple[list[Read], dict], dtype: str, bar: tqdm
) -> None:
    """Assemble one network in files of a scratch folder (memory stays free), and save it with Orbax."""
    reads, targets = plan_
    with tempfile.TemporaryDirectory(prefix="sflow-convert-") as scratch:

        def allocate(path: str, shape: tuple[int, ...], dtype: DTypeLike) -> np.ndarray:
            return np.memmap(f"{scratch}/{path}", dtype, "w+", shape=shape)

        def read(source: str, part: tuple[slice, ...] | None) -> np.ndarray:
            array = network.tensors.read(source, part)
            bar.update(array.size)
            return array

        save_network(folder, name, dict(assemble(reads, targets, read, DTYPES[dtype], allocate)))


def convert(
    source: Source,
    destination: epath.PathLike,
    *,
    dtype: str | None = None,
    overwrite: bool = False,
    vital_layers: Iterable[int] | None = None,
    progress: bool = True,
) -> ModelInfo:
    """Write `source` as a converted checkpoint at `destination`, whole or not at all.

    dtype: one of `DTYPES`, by default the transformer's own. Raises ConversionError for a source that does
    not fit, and for a destination that exists (unless `overwrite`, and then only a checkpoint is replaced).
    """
    destination = epath.Path(destination)
    if destination.exists():
        if not overwrite:
            raise ConversionError(f"{destination} exists; choose another place or say --overwrite")
        if not (destination / INFO_FILE).exists():
            raise ConversionError(f"{destination} is not a checkpoint, so --overwrite does not replace it")
    plans = planned(source)
    config = source.networks["transformer"].config
    layers, origin = known_vital_layers(config, vital_layers)
    dtype = dtype or stored_dtype(source.networks["transformer"])
    files = [path for network in source.networks.values() for path in network.tensors.paths]
    size = sum(path.stat().st_size for path in files)
    partial = destination.with_name(f"{destination.name}.partial")
    if partial.exists():
        partial.rmtree()
    partial.mkdir(parents=True)
    try:
        digests = {}
        with tqdm(total=size, desc="checking", unit="B", unit_scale=True, disable=not progress) as bar:
            for path in files:
                digests[f"{path.parent.name}/{path.name}"] = digest(path, bar.update)
        numbers = sum(math.prod(shape) for network in source.networks.values() for shape in network.tensors.shapes.values())
        with tqdm(total=numbers, desc="converting", unit="", unit_scale=True, disable=not progress) as bar:
            for name, network in source.networks.items():
                write_network(partial, name, network, plans[name], dtype, bar)
        for name, folder in source.tokenizers.items():
            copy_files(folder, partial / name)
        info = ModelInfo(
            family=source.family,
            picture_size=source.picture_size,
            dtype=dtype,
            configs={name: network.config for name, network in source.networks.items()},
            scheduler={key: value for key, value in source.scheduler.items() if not key.startswith("_")},
            source_digests=digests,
            vital_layers=layers,
            vital_layers_origin=origin,
        )
        save_info(partial, info)
        if destination.exists():
            destination.rmtree()
        partial.rename(destination)
    except BaseException:
        partial.rmtree(missing_ok=True)
        raise
    return info


def copy_files(source: Path, destination: epath.Path) -> None:
    """Copy the files of a flat folder, to a local or remote place."""
    destination.mkdir()
    for file in sorted(source.iterdir()):
        if file.is_file():
            with file.open("rb") as reader, (destination / file.name).open("wb") as writer:
                shutil.copyfileobj(reader, writer)
