"""A name → a checkpoint or a feature network: a folder, or what ships with the package.

The embedded model is converted once to the cache, and then a checkpoint like any other. The only part of the
package that calls the converter.
"""

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from etils import epath
from jax.sharding import Mesh
from jax.typing import DTypeLike
from sflow_convert.features import import_features
from sflow_convert.job import convert
from sflow_convert.layouts import open_source

from sflow_jax.machine.meshes import copied
from sflow_jax.measures.features import Features, restore_features
from sflow_jax.settings import EMBEDDED
from sflow_jax.storage.checkpoint import FORMAT, INFO_FILE, CheckpointError, ModelInfo, load_info, published_info
from sflow_jax.storage.paths import cache_folder
from sflow_jax.storage.tokenizers import text_tokens

ASSETS = Path(__file__).parent / "toyworld" / "assets"
VITAL_LAYERS_FILE = "vital_layers.json"
EMBEDDED_TITLE = "the embedded FLUX of the toy world"
# Names that stand for the feature networks that ship with the package → their published folders.
EMBEDDED_FEATURES = {"toyworld": ASSETS / "dinov2", "toyworld-clip": ASSETS / "clip"}


def find_checkpoint(name: epath.PathLike) -> epath.Path:
    """A converted checkpoint's folder; the name `toyworld` stands for the embedded model."""
    return _embedded_checkpoint() if str(name) == EMBEDDED else epath.Path(name)


def find_info(name: str) -> tuple[ModelInfo, int]:
    """What a checkpoint is, and its number of text tokens: a converted folder's, or a published model's by name.

    Raises CheckpointError for anything else.
    """
    folder, published = find_checkpoint(name), published_info(name)
    if published is not None and not folder.exists():
        return published
    info = load_info(folder)
    try:
        lengths = {key: text_tokens(folder / place) for key, place in info.family.tokenizers.items()}
    except ValueError as error:
        raise CheckpointError(str(error)) from error
    return info, info.family.words(lengths)


def load_features(name: epath.PathLike, *, dtype: DTypeLike | None = None, mesh: Mesh | None = None) -> Features:
    """The network of a converted features folder, or one that ships: `toyworld` (DINOv2), `toyworld-clip`.

    dtype: of weights and arithmetic (norms, softmax and preprocessing are float32 always), by default the
    stored one; float32 for those that ship. mesh: every device gets a copy; without, the first device.
    Raises CheckpointError for folders that are not features, or are damaged.
    """
    if str(name) not in EMBEDDED_FEATURES:
        return restore_features(name, dtype=dtype, mesh=mesh)
    return open_published_features(EMBEDDED_FEATURES[str(name)], dtype=dtype, mesh=mesh)


def open_published_features(folder: Path, *, dtype: DTypeLike | None = None, mesh: Mesh | None = None) -> Features:
    """A published DINOv2 or CLIP folder straight into memory, by default in float32."""
    info, network = import_features(folder, "float32" if dtype is None else jnp.dtype(dtype).name)
    return Features.of(info, jax.device_put(network, copied(mesh)))


def _digest() -> str:
    """Of everything that a conversion of the embedded model depends on."""
    total = hashlib.sha256(str(FORMAT).encode())
    for path in sorted(path for path in ASSETS.rglob("*") if path.is_file()):
        total.update(str(path.relative_to(ASSETS)).encode())
        total.update(path.read_bytes())
    return total.hexdigest()[:16]


def _embedded_vital_layers() -> dict[str, Any]:
    file = ASSETS / VITAL_LAYERS_FILE
    return json.loads(file.read_text()) if file.exists() else {"layers": None, "origin": ""}


def _embedded_checkpoint() -> epath.Path:
    """The embedded model's converted folder in the cache, made at the first call."""
    folder = cache_folder() / f"{EMBEDDED}-{_digest()}"
    if not (folder / INFO_FILE).exists():
        vital = _embedded_vital_layers()
        # Of two processes that convert at once, the first to finish wins.
        mine = folder.with_name(f"{folder.name}-{os.getpid()}")
        convert(
            open_source(ASSETS),
            mine,
            vital_layers=vital["layers"],
            vital_origin=vital["origin"],
            title=EMBEDDED_TITLE,
            progress=False,
        )
        try:
            mine.rename(folder)
        except OSError:
            shutil.rmtree(mine)
    return epath.Path(folder)
