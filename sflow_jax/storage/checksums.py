"""Checksums of a checkpoint's files as they were written, so that a damaged one is known from a good one."""

import hashlib
from collections.abc import Callable, Iterator
from typing import Annotated, Any

import msgspec
import xxhash
from etils import epath

from sflow_jax.storage.files import read_json, to_json, write_whole
from sflow_jax.storage.paths import list_folder
from sflow_jax.typed import parse_json

CHECKSUMS_FILE = "checksums.json"
ALGORITHM = "xxh3_128"
BLOCK = 1 << 24
# What a short file calls the checksum of everything else in it.
SIGNATURE = "checksum"


class Written(msgspec.Struct):
    """A file as it was written."""

    bytes: Annotated[int, msgspec.Meta(ge=0)]
    checksum: str


class Checksums(msgspec.Struct):
    """What `checksums.json` holds. files: path below the folder → the file."""

    files: dict[str, Written]
    algorithm: str = ALGORITHM


def checksum(data: bytes | memoryview) -> str:
    """Of bytes in memory, 32 hex digits."""
    return xxhash.xxh3_128(data).hexdigest()


def file_checksum(path: epath.Path, progress: Callable[[int], object]) -> Written:
    """Of a file, reporting bytes as they are read."""
    total, size = xxhash.xxh3_128(), 0
    with path.open("rb") as file:
        while data := file.read(BLOCK):
            total.update(data)
            size += len(data)
            progress(len(data))
    return Written(size, total.hexdigest())


def all_files(folder: epath.Path, below: str = "") -> Iterator[tuple[str, epath.Path]]:
    """(path below the folder, file) of everything in it, in order."""
    for path in list_folder(folder):
        name = f"{below}{path.name}"
        if path.is_dir():
            yield from all_files(path, f"{name}/")
        else:
            yield name, path


def write_checksums(folder: epath.PathLike, *, leave: tuple[str, ...], progress: Callable[[int], object]) -> None:
    """Read all files of a folder but some, and write down what they hold."""
    folder = epath.Path(folder)
    files = {name: file_checksum(path, progress) for name, path in all_files(folder) if name not in leave}
    write_whole(folder / CHECKSUMS_FILE, to_json(msgspec.to_builtins(Checksums(files))))


def read_checksums(folder: epath.PathLike, error: type[ValueError]) -> Checksums | None:
    """What was written down of a folder; None where nothing was (older conversions)."""
    file = epath.Path(folder) / CHECKSUMS_FILE
    if not file.exists():
        return None
    return read_json(file, Checksums, error, "convert the source again")


def verify(folder: epath.PathLike, error: type[ValueError], progress: Callable[[int], object]) -> int | None:
    """Compare all files with what was written; their number, or None where nothing was written down.

    Raises `error` for the first that is missing, too short or changed.
    """
    stored = read_checksums(folder, error)
    if stored is None:
        return None
    if stored.algorithm != ALGORITHM:
        raise error(
            f"{epath.Path(folder) / CHECKSUMS_FILE} has {stored.algorithm} checksums; convert the source again"
        )
    for name, written in stored.files.items():
        path = epath.Path(folder) / name
        if not path.exists():
            raise error(f"{path} is missing; convert the source again")
        if file_checksum(path, progress) != written:
            raise error(f"{path} is damaged: its content is not what was written; convert the source again")
    return len(stored.files)


def text_digest(text: str) -> str:
    """sha256 of a text, 16 hex digits: for short files that hold their own checksum."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def signed(content: dict[str, Any]) -> str:
    """JSON text with a checksum of everything else in it."""
    # Through text, so that tuples and arrays are what they will be when read.
    plain = parse_json(to_json(content), dict[str, Any])
    return to_json({**plain, SIGNATURE: text_digest(to_json(plain))})


def unsigned(content: dict[str, Any]) -> dict[str, Any]:
    """The content without its checksum, where it has one; ValueError where it was changed since."""
    plain = {name: value for name, value in content.items() if name != SIGNATURE}
    if content.get(SIGNATURE, expected := text_digest(to_json(plain))) != expected:
        raise ValueError(f"was changed since it was written; if on purpose, remove its {SIGNATURE!r}")
    return plain
