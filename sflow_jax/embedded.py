"""The model that ships with the package: converted once to the cache, then a checkpoint like any other."""

import hashlib
import json
import os
import shutil
from pathlib import Path

from etils import epath

from sflow_jax.checkpoint import INFO_FILE
from sflow_jax.paths import cache_folder

NAME = "toyworld"
ASSETS = Path(__file__).parent / "toyworld" / "assets"
VITAL_LAYERS_FILE = "vital_layers.json"


def resolve(checkpoint: epath.PathLike) -> epath.Path:
    """A checkpoint's folder; the name `toyworld` stands for the embedded model."""
    return _converted() if str(checkpoint) == NAME else epath.Path(checkpoint)


def _digest() -> str:
    """Of everything that a conversion of the embedded model depends on."""
    total = hashlib.sha256()
    for path in sorted(path for path in ASSETS.rglob("*") if path.is_file()):
        total.update(str(path.relative_to(ASSETS)).encode())
        total.update(path.read_bytes())
    return total.hexdigest()[:16]


def _converted() -> epath.Path:
    """The embedded model's converted folder in the cache, made at the first call."""
    # The converter imports the checkpoint layout from this package, so it cannot be imported above.
    from sflow_convert.job import convert
    from sflow_convert.layouts import open_source

    folder = cache_folder() / f"{NAME}-{_digest()}"
    if not (folder / INFO_FILE).exists():
        known = (ASSETS / VITAL_LAYERS_FILE).exists()
        vital = json.loads((ASSETS / VITAL_LAYERS_FILE).read_text()) if known else {"layers": None, "origin": ""}
        # Of two processes that convert at once, the first to finish wins.
        mine = folder.with_name(f"{folder.name}-{os.getpid()}")
        convert(
            open_source(ASSETS), mine, vital_layers=vital["layers"], vital_origin=vital["origin"], progress=False
        )
        try:
            mine.rename(folder)
        except OSError:
            shutil.rmtree(mine)
    return epath.Path(folder)
