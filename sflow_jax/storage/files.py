"""Files that are there whole or not at all, and readers that an endless or strange file cannot stop."""

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from etils import epath

from sflow_jax.storage.partial import own_name, remove_abandoned
from sflow_jax.storage.paths import is_remote
from sflow_jax.typed import parse_json

# Of configs, prompts and other text: a tokenizer's file has 10 MB.
LONGEST_TEXT = 64 << 20
MARKS = {b"\xff\xfe": "utf-16", b"\xfe\xff": "utf-16", b"\xef\xbb\xbf": "utf-8-sig"}


def write_whole(path: epath.PathLike, content: bytes | str) -> epath.Path:
    """Write under a hidden temporary name of one's own, then rename; OSError leaves nothing behind."""
    path = epath.Path(path)
    remove_abandoned(path)
    temporary = own_name(path)
    try:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)
        return temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def read_bytes(path: epath.PathLike, most: int | None = None) -> bytes:
    """A file's content; OSError where there is none.

    most: bytes. ValueError for longer files, and for folders, pipes and devices, which may have no end.
    """
    path = epath.Path(path)
    if not is_remote(path):
        if path.exists() and not Path(path).is_file():
            raise ValueError(f"{path} is no ordinary file")
        if most is not None and os.stat(path).st_size > most:
            raise ValueError(f"{path} is longer than {most >> 20} MiB")
    return path.read_bytes()


def read_text(path: epath.PathLike) -> str:
    """A text file in UTF-8, or in UTF-16 with a byte order mark; its mark is left out. ValueError for others."""
    data = read_bytes(path, LONGEST_TEXT)
    encoding = next((name for mark, name in MARKS.items() if data.startswith(mark)), "utf-8")
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not text in UTF-8 (byte {error.start}); save it in that encoding") from error
    if "\0" in text:
        raise ValueError(f"{path} is not text: it has bytes of value 0")
    return text


def read_json(path: epath.PathLike, kind: Any, error: type[ValueError], advice: str) -> Any:
    """A JSON file as `kind` (a dataclass, a msgspec structure, any type).

    Raises `error` with one line that names the file, what is wrong with it, and the advice.
    """
    try:
        return parse_json(read_bytes(path, LONGEST_TEXT), kind)
    except FileNotFoundError as missing:
        raise error(f"{path} is missing; {advice}") from missing
    except (OSError, ValueError) as reason:
        raise error(f"cannot read {path}: {str(reason).removeprefix(f'{path} ')}; {advice}") from reason


def to_json(content: Any) -> str:
    """Indented JSON; numpy's numbers and arrays as numbers and lists, anything else as its text."""
    return json.dumps(content, indent=2, ensure_ascii=False, default=_plain) + "\n"


def to_compact_json(content: Any) -> str:
    """The same in one line of ASCII, for places that hold no other text."""
    return json.dumps(content, separators=(",", ":"), default=_plain)


def without_nan(value: Any) -> Any:
    """Mappings and lists with NaN and infinity as None, which JSON can say."""
    if isinstance(value, Mapping):
        return {key: without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _plain(value: Any) -> Any:
    return value.tolist() if hasattr(value, "tolist") else str(value)
