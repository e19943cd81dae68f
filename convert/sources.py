"""Where weights come from: safetensors files of the published layouts. Pickle is never read."""

import dataclasses
import hashlib
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import ml_dtypes
import msgspec
import numpy as np
from safetensors import SafetensorError, safe_open
from sflow_convert.engine import ConversionError, Shape

from sflow_jax.storage.files import read_json
from sflow_jax.typed import Name

T = TypeVar("T")
CHUNK = 1 << 22
INCOMPLETE = "the source is not a complete checkpoint, or is damaged: download it again"
# safetensors' names of the numbers that weights may be stored in.
FLOATS = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "F8_E5M2": ml_dtypes.float8_e5m2,
}
EIGHT_BITS = ("F8_E4M3", "F8_E5M2")
# Names by which tools store the scale of an 8-bit weight, after its layer's name; those of the other side are left.
SCALES, UNUSED_SCALES = ("scale_weight", "weight_scale"), ("scale_input", "input_scale", "scaled_fp8")
# A part of a tensor's name, or what a file begins with → what it is, and what to do.
PLAIN = "take the model in bfloat16, and use --quantize int8 when it runs"
AS_LORA = "are a LoRA, not a model: convert the model it was made for, with this file in `lora`"
FOREIGN_NAMES = {
    r"(lora_(A|B|up|down|magnitude)|\.(alpha|hada_w1_a|lokr_w1)$|^lora_)": AS_LORA,
    r"(absmax|quant_map|quant_state|bitsandbytes)": f"are in 4 or 8 bits of bitsandbytes (nf4): {PLAIN}",
    r"(qweight|qzeros|\.wscales|\.proj_down)": f"are quantised (GPTQ, AWQ or SVDQuant): {PLAIN}",
}
FOREIGN_STARTS = {
    b"GGUF": "a GGUF file: take the safetensors of the model in bfloat16",
    b"PK": "a pickled file of torch, which is never read: take the safetensors",
    b"\x80": "a pickled file, which is never read: take the safetensors",
    b"version https://git-lfs": "only a pointer of git LFS: download the file itself (git lfs pull)",
    b"<": "a web page, not weights: download it again, with the licence accepted",
}


@dataclasses.dataclass(frozen=True)
class Tensors:
    """The tensors of one network: which file holds each, its shape and dtype name.

    Names are the files' own after a rename; `names` has those in the files. scales: name of an 8-bit weight → its
    scale's.
    """

    files: Mapping[str, Path]
    names: Mapping[str, str]
    shapes: Mapping[str, Shape]
    dtypes: Mapping[str, str]
    scales: Mapping[str, tuple[Path, str]] = dataclasses.field(default_factory=dict)

    @property
    def paths(self) -> list[Path]:
        """The files, each once, sorted."""
        return sorted(set(self.files.values()))

    def read(self, name: str, part: tuple[slice, ...] | None) -> np.ndarray:
        """One tensor, or a part of it; only these bytes are read, but of 8-bit ones all. ConversionError."""
        try:
            if self.dtypes[name] in EIGHT_BITS:
                weight = read_raw(self.files[name], self.names[name])
                if name in self.scales:
                    weight = weight.astype(np.float32) * read_raw(*self.scales[name]).astype(np.float32)
                return weight if part is None else weight[part]
            with safe_open(self.files[name], "np") as file:
                stored = self.names[name]
                return file.get_tensor(stored) if part is None else file.get_slice(stored)[part]
        except (SafetensorError, OSError) as error:
            raise ConversionError(f"cannot read {name} from {self.files[name]}: {first_line(error)}") from error

    def below(self, prefix: str) -> "Tensors":
        """Those whose names begin with a prefix, without it."""
        return self.only(lambda name: name.removeprefix(prefix) if name.startswith(prefix) else None)

    def only(self, rename: Callable[[str], str | None]) -> "Tensors":
        """Those that `rename` gives a name, under it."""
        renamed = {new: old for old in self.files if (new := rename(old)) is not None}
        fields = (self.files, self.names, self.shapes, self.dtypes, self.scales)
        return Tensors(*({new: field[old] for new, old in renamed.items() if old in field} for field in fields))


class _Entry(msgspec.Struct):
    dtype: str
    shape: tuple[int, ...]
    data_offsets: tuple[int, int]


def read_raw(path: Path, name: str) -> np.ndarray:
    """One tensor from the bytes of a safetensors file: safetensors itself gives numpy no 8-bit floats."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        entry = msgspec.convert(msgspec.json.decode(file.read(length))[name], _Entry)
        file.seek(8 + length + entry.data_offsets[0])
        data = file.read(entry.data_offsets[1] - entry.data_offsets[0])
    return np.frombuffer(data, FLOATS[entry.dtype]).reshape(entry.shape)


def first_line(error: BaseException) -> str:
    """Of an error's message, or its kind where it has none."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def read_config(path: Path, read: Callable[[dict[str, Any]], T]) -> T:
    """A config made from a JSON file; ConversionError, with the file's name, for what does not fit."""
    config = read_json(path, dict[str, Any], ConversionError, INCOMPLETE)
    try:
        return read(config)
    except ValueError as error:
        joint = " " if str(error).startswith("does not") else ": "
        raise ConversionError(f"{path}{joint}{error}") from error


def open_files(paths: list[Path], rename: Callable[[str], str | None] = lambda name: name) -> Tensors:
    """Look into safetensors files; ConversionError for broken and foreign files, and names that appear twice."""
    files, names, shapes, dtypes = {}, {}, {}, {}
    for path in paths:
        for stored, shape, dtype in _entries(path):
            name = rename(stored)
            if name is None:
                continue
            if name in files:
                raise ConversionError(f"tensor {name} is in both {files[name]} and {path}")
            files[name], names[name], shapes[name], dtypes[name] = path, stored, shape, dtype
    return _scaled(Tensors(files, names, shapes, dtypes))


def _entries(path: Path) -> list[tuple[str, Shape, str]]:
    """(name, shape, dtype) of every tensor of a file; ConversionError says what is wrong with it."""
    if not path.is_file():
        raise ConversionError(f"{path} is no file; {INCOMPLETE}" if path.exists() else f"{path} is missing")
    try:
        with path.open("rb") as file:
            start = file.read(32)
        for mark, kind in FOREIGN_STARTS.items():
            # A safetensors file begins with a length, whose first byte may be anything.
            if start.startswith(mark) and start[8:9] != b"{":
                raise ConversionError(f"{path} is {kind}")
        with safe_open(path, "np") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}
            return [(name, tuple(piece.get_shape()), piece.get_dtype()) for name, piece in slices.items()]
    except (SafetensorError, OSError, ValueError) as error:
        if isinstance(error, ConversionError):
            raise
        raise ConversionError(f"cannot read {path}: {first_line(error)}; download it again") from error


def _scaled(tensors: Tensors) -> Tensors:
    """Scales of 8-bit weights beside their weights; what belongs to activations is left out."""
    if not set(tensors.dtypes.values()) & set(EIGHT_BITS):
        return tensors
    scales, leave = {}, set()
    for name in tensors.files:
        layer, _, kind = name.rpartition(".")
        if kind in SCALES:
            scales[f"{layer}.weight"] = (tensors.files[name], tensors.names[name])
        if kind in (*SCALES, *UNUSED_SCALES):
            leave.add(name)
    kept = tensors.only(lambda name: None if name in leave else name)
    return dataclasses.replace(kept, scales=scales)


def check_kind(tensors: Tensors) -> None:
    """ConversionError for weights that are no model's (a LoRA, 4 bits), and for tensors of whole numbers."""
    where = tensors.paths[0] if tensors.paths else "the source"
    for pattern, kind in FOREIGN_NAMES.items():
        if any(re.search(pattern, name) for name in tensors.names.values()):
            raise ConversionError(f"the weights in {where} {kind}")
    whole = [name for name, dtype in tensors.dtypes.items() if dtype not in FLOATS]
    if whole:
        raise ConversionError(
            f"{whole[0]} in {tensors.files[whole[0]]} is stored as {tensors.dtypes[whole[0]]}; weights are floats"
        )


class _Index(msgspec.Struct):
    weight_map: dict[Name, Name]


VARIANT = re.compile(
    r"(?P<stem>[^.]+?)(\.(?P<variant>[\w-]+?))?(-\d{5}-of-\d{5})?(\.(?P<late>[\w-]+))?\.safetensors"
    r"(?P<index>\.index(\.(?P<latest>[\w-]+))?\.json)?"
)


def find_files(folder: Path) -> list[Path]:
    """The safetensors files of a network's folder: those that its index names, or the only one.

    A folder may hold several variants (`.fp16` in the names): the plain one is taken, or the only one.
    """
    if not folder.is_dir():
        raise ConversionError(f"{folder} is missing; the source is not a complete checkpoint")
    files, index = choose_weights(sorted(path.name for path in folder.iterdir()), str(folder))
    return [folder / name for name in files] if index is None else _indexed_files(folder / index)


def choose_weights(names: Iterable[str], folder: str) -> tuple[list[str], str | None]:
    """Of the files in a folder those of one variant, and their index; without an index it is one file.

    ConversionError, with the name of the `folder`, where there is none, or it is not clear which.
    """
    variants: dict[str, tuple[list[str], list[str]]] = {}
    for name in names:
        if match := VARIANT.fullmatch(name):
            variant = match["variant"] or match["late"] or match["latest"] or ""
            variants.setdefault(variant, ([], []))[bool(match["index"])].append(name)
    if not variants:
        raise ConversionError(f"{folder} has no .safetensors file; pickled weights (.bin, .pt) are never read")
    if "" not in variants and len(variants) > 1:
        raise ConversionError(f"{folder} has several variants ({', '.join(sorted(variants))}); keep one")
    files, indices = variants.get("") or next(iter(variants.values()))
    if len(indices) > 1:
        raise ConversionError(f"{folder} has several indices ({', '.join(indices)}); keep one")
    if not indices and len(files) > 1:
        raise ConversionError(f"{folder} has several weight files and no index: {', '.join(files[:5])}")
    return files, indices[0] if indices else None


def _indexed_files(index: Path) -> list[Path]:
    """The files that an index names, which must lie beside it."""
    weight_map = read_json(index, _Index, ConversionError, INCOMPLETE).weight_map
    names = sorted(set(weight_map.values()))
    outside = [name for name in names if Path(name).name != name or not name.endswith(".safetensors")]
    if outside or not names:
        what = f"names {outside[0]!r}, which is no .safetensors file beside it" if outside else "names no files"
        raise ConversionError(f"{index} {what}; {INCOMPLETE}")
    return [index.parent / name for name in names]


def digest(path: Path, progress: Callable[[int], None]) -> str:
    """sha256 of a file, reporting bytes as they are read."""
    total = hashlib.sha256()
    with path.open("rb") as file:
        while data := file.read(CHUNK):
            total.update(data)
            progress(len(data))
    return total.hexdigest()
