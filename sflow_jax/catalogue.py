"""A name → a checkpoint or a feature network: a folder, a repository of the Hub, or what ships with the package.

Embedded models and repositories are converted once to the cache, and then checkpoints like any other.
"""

import dataclasses
import time
from pathlib import Path
from urllib.parse import quote

import jax
import jax.numpy as jnp
from etils import epath
from jax.sharding import Mesh
from jax.typing import DTypeLike
from sflow_convert.features import convert_features, import_features, open_features
from sflow_convert.hub import Repository, fetch, parse_repository
from sflow_convert.job import convert
from sflow_convert.layouts import open_source

from sflow_jax.embedded import ASSETS, POLL, embedded_checkpoint, save_layers, saved_layers
from sflow_jax.errors import SettingError
from sflow_jax.families.registry import find_published
from sflow_jax.machine.meshes import copied
from sflow_jax.measures.features import INFO_FILE as FEATURES_FILE
from sflow_jax.measures.features import Features, restore_features
from sflow_jax.sampling.control import check_layers
from sflow_jax.settings import EMBEDDED_MODELS, PUBLISHED, check_path
from sflow_jax.storage.checkpoint import (
    INFO_FILE,
    CheckpointError,
    ModelInfo,
    load_info,
    published_info,
    save_info,
)
from sflow_jax.storage.folders import Busy
from sflow_jax.storage.paths import cache_folder
from sflow_jax.storage.tokenizers import text_tokens

# Names that stand for the feature networks that ship with the package → their published folders.
EMBEDDED_FEATURES = {"toyworld": ASSETS / "dinov2", "toyworld-clip": ASSETS / "clip"}


def find_checkpoint(name: epath.PathLike) -> epath.Path:
    """A converted checkpoint's folder, which may not exist.

    The names of `embedded.MODELS` stand for those that ship; `org/name` or `org/name@revision`, where
    no such path can be, for a repository of the Hub, whose folder is in the cache.
    """
    check_path("checkpoint", name)
    if str(name) in EMBEDDED_MODELS:
        return embedded_checkpoint(str(name))
    repository = parse_repository(name)
    return epath.Path(name) if repository is None else repository_folder(repository)


def repository_folder(repository: Repository) -> epath.Path:
    """Where a repository of the Hub is kept once it is converted."""
    # A branch may have slashes in its name.
    revision = quote(repository.revision or "main", safe="")
    return epath.Path(cache_folder() / "hub" / f"{repository.id.replace('/', '--')}@{revision}")


def repository_title(repository: Repository) -> str:
    """What people call a known repository's model, where that is not its family's name for it."""
    published = find_published(repository.id)
    return "" if published is None else published[1].title


def find_model(name: epath.PathLike) -> tuple[epath.Path, ModelInfo]:
    """A converted checkpoint's folder and what it is, with the vital layers that were saved for an embedded model.

    A repository of the Hub is downloaded and converted first; once it is, nothing is asked of the Hub any more.
    Raises CheckpointError, and ConversionError for what cannot be fetched or converted.
    """
    folder, repository = find_checkpoint(name), parse_repository(name)
    if repository is not None:
        _convert_once(repository, folder, INFO_FILE, features=False)
    _check_there(name, folder)
    info = load_info(folder)
    saved = saved_layers(str(name)) if str(name) in EMBEDDED_MODELS else None
    if saved is not None:
        layers = check_layers(saved.layers, info.layers)
        info = dataclasses.replace(info, vital_layers=layers, vital_layers_origin=saved.origin)
    return folder, info


def find_info(name: str) -> tuple[ModelInfo, int]:
    """What a checkpoint is, and its number of text tokens: a converted folder's, or a published model's by name.

    Raises CheckpointError for anything else; nothing is fetched.
    """
    published, folder = published_info(name), find_checkpoint(name)
    if published is not None and not folder.exists():
        return published
    _check_there(name, folder)
    folder, info = find_model(name)
    try:
        lengths = {key: text_tokens(folder / place) for key, place in info.tokenizers.items()}
    except ValueError as error:
        raise CheckpointError(str(error)) from error
    return info, info.family.words(lengths)


def _check_there(name: epath.PathLike, folder: epath.Path) -> None:
    """CheckpointError where there is no folder; says how to come by one."""
    if folder.exists():
        return
    published = find_published(str(name))
    repository = published[1].repository if published else parse_repository(name)
    if repository is not None:
        raise CheckpointError(f"no weights of {name} are here; fetch and convert them: sflow-convert {repository}")
    raise CheckpointError(
        f"no checkpoint at {folder}; make one with: sflow-convert SOURCE {folder}, or give the Hub's ORG/NAME "
        f"or {' or '.join(EMBEDDED_MODELS)}; known without files are {', '.join(PUBLISHED)}"
    )


def save_vital_layers(name: str, layers: tuple[int, ...], origin: str) -> epath.Path:
    """Record layers as a checkpoint's vital ones; the file that holds them.

    An embedded model is shared by all that use it, so its set goes into a file of the user's own.
    """
    if name in EMBEDDED_MODELS:
        return save_layers(name, layers, origin)
    folder, info = find_model(name)
    save_info(folder, dataclasses.replace(info, vital_layers=layers, vital_layers_origin=origin))
    return folder / INFO_FILE


def load_features(name: epath.PathLike, *, dtype: DTypeLike | None = None, mesh: Mesh | None = None) -> Features:
    """The network of a features folder, of a repository of the Hub (`find_features`), or one that ships: `toyworld`
    (DINOv2), `toyworld-clip`.

    dtype: of weights and arithmetic (norms, softmax and preprocessing are float32 always), by default the
    stored one; float32 for those that ship. mesh: every device gets a copy; without, the first device.
    Raises CheckpointError for folders that are not features, or are damaged.
    """
    if str(name) not in EMBEDDED_FEATURES:
        return restore_features(find_features(name), dtype=dtype, mesh=mesh)
    return open_published_features(EMBEDDED_FEATURES[str(name)], dtype=dtype, mesh=mesh)


def find_features(name: epath.PathLike) -> epath.Path:
    """A converted features folder, which may not exist; a repository of the Hub is fetched and converted first.

    Raises ConversionError for what cannot be fetched or converted.
    """
    check_path("features", name)
    repository = parse_repository(name)
    if repository is None:
        return epath.Path(name)
    folder = repository_folder(repository)
    _convert_once(repository, folder, FEATURES_FILE, features=True)
    return folder


def open_published_features(folder: Path, *, dtype: DTypeLike | None = None, mesh: Mesh | None = None) -> Features:
    """A published DINOv2 or CLIP folder straight into memory, by default in float32."""
    info, network = import_features(folder, "float32" if dtype is None else jnp.dtype(dtype).name)
    return Features.of(info, jax.device_put(network, copied(mesh)))


def _convert_once(repository: Repository, folder: epath.Path, file: str, *, features: bool) -> None:
    """Fetch and convert a repository, unless its file is there; waits for another process that does so just now."""
    while not (folder / file).exists():
        try:
            source = fetch(repository, folder, features=features)
            if features:
                convert_features(open_features(source), folder)
            else:
                convert(open_source(source), folder, title=repository_title(repository))
        except Busy:
            time.sleep(POLL)
        except SettingError:
            # Another process may have been faster.
            if not (folder / file).exists():
                raise
