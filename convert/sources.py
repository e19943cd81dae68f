"""Where weights come from: safetensors files of the published layouts. Pickle is never read."""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from sflow_convert.engine import ConversionError, Shape

INDEX_SUFFIX = ".safetensors.index.json"
CHUNK = 1 << 22


@dataclasses.dataclass(frozen=True)
class Tensors:
    """The tensors of one network: which file holds each, and its shape and dtype name.

    Names are the files' own after `rename`; tensors that `rename` maps to None are known not to be weights.
    """

    files: Mapping[str, Path]
    names: Mapping[str, str]
    shapes: Mapping[str, Shape]
    dtypes: frozenset[str]

    @property
    def paths(self) -> list[Path]:
        """The files, each once, sorted."""
        return sorted(set(self.files.values()))

    def read(self, name: str, part: tuple[slice, ...] | None) -> np.ndarray:
        """One tensor, or a part of it; only these bytes are read."""
        with safe_open(self.files[name], "np") as file:
            stored = self.names[name]
            return file.get_tensor(stored) if part is None else file.get_slice(stored)[part]


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file; ConversionError if it is missing or broken."""
    try:
        return json.loads(path.read_text())
    except FileNotFoundError as error:
        raise ConversionError(f"{path} is missing; the source is not a complete checkpoint") from error
    except (OSError, ValueError) as error:
        raise ConversionError(f"cannot read {path}: {error}") from error


def open_files(paths: list[Path], rename: Callable[[str], str | None] = lambda name: name) -> Tensors:
    """Look into safetensors files; ConversionError for broken files and names that appear twice."""
    files, names, shapes, dtypes = {}, {}, {}, set()
    for path in paths:
        try:
            with safe_open(path, "np") as file:
                for stored in file.keys():
                    name = rename(stored)
                    if name is None:
                        continue
                    if name in files:
                        raise ConversionError(f"tensor {name} is in both {files[name]} and {path}")
                    piece = file.get_slice(stored)
                    files[name], names[name] = path, stored
                    shapes[name] = tuple(piece.get_shape())
                    dtypes.add(piece.get_dtype())
        except FileNotFoundError as error:
            raise ConversionError(f"{path} is missing") from error
        except (SafetensorError, OSError) as error:
            raise ConversionError(f"cannot read {path}: {error}; download it again") from error
    return Tensors(files, names, shapes, frozenset(dtypes))


def find_files(folder: Path) -> list[Path]:
    """The safetensors files of a network's folder: those its index names, or the only one."""
    if not folder.is_dir():
        raise ConversionError(f"{folder} is missing; the source is not a complete checkpoint")
    indices = sorted(folder.glob(f"*{INDEX_SUFFIX}"))
    if len(indices) > 1:
        raise ConversionError(f"{folder} has several variants ({', '.join(i.name for i in indices)}); keep one")
    if indices:
        weight_map = read_json(indices[0]).get("weight_map", {})
        paths = sorted({folder / name for name in weight_map.values()})
    else:
        paths = sorted(folder.glob("*.safetensors"))
    if not paths:
        raise ConversionError(f"{folder} has no .safetensors file; pickled weights (.bin, .pt) are never read")
    if not indices and len(paths) > 1:
        raise ConversionError(f"{folder} has several weight files and no index: {', '.join(p.name for p in paths)}")
    return paths


def digest(path: Path, progress: Callable[[int], None]) -> str:
    """sha256 of a file, reporting bytes as they are read."""
    total = hashlib.sha256()
    with path.open("rb") as file:
        while data := file.read(CHUNK):
            total.update(data)
            progress(len(data))
    return total.hexdigest()
