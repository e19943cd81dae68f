"""Files that are there whole or not at all."""

import json
import os
import uuid
from typing import Any

from etils import epath


def write_whole(path: epath.PathLike, content: bytes | str) -> epath.Path:
    """Write under a hidden temporary name of one's own, then rename; OSError leaves nothing behind."""
    path = epath.Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{uuid.uuid4().hex[:8]}.partial")
    try:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)
        return temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def to_json(content: Any) -> str:
    """Indented JSON; numpy's numbers and arrays as numbers and lists, anything else as its text."""
    return json.dumps(content, indent=2, ensure_ascii=False, default=_plain) + "\n"


def _plain(value: Any) -> Any:
    return value.tolist() if hasattr(value, "tolist") else str(value)
