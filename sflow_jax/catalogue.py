"""A name → a checkpoint or a feature network: a folder, a repository of the Hub, or what ships with the package.

The embedded model and repositories are converted once to the cache, and then checkpoints like any other. The only
part of the package that calls the converter.
"""

import dataclasses
import hashlib
import time
from pathlib import Path
from urllib.parse import quote

import jax
import jax.numpy as jnp
import msgspec
from etils import epath
from jax.sharding import Mesh
from jax.typing import DTypeLike
from sflow_convert.features import import_features
from sflow_convert.hub import Repository, fetch, parse_repository
from sflow_convert.job import convert
from sflow_convert.layouts import open_source

from sflow_jax.errors import SettingError
from sflow_jax.families.registry import find_published
from sflow_jax.machine.meshes import copied
from sflow_jax.measures.features import Features, restore_features
from sflow_jax.sampling.control import check_layers
from sflow_jax.settings import EMBEDDED, PUBLISHED, check_path
from sflow_jax.storage.checkpoint import (
    FORMAT,
    INFO_FILE,
    CheckpointError,
    ModelInfo,
    load_info,
    published_info,
    save_info,
)
from sflow_jax.storage.checksums import verify
from sflow_jax.storage.files import read_json, to_json, write_whole
from sflow_jax.storage.folders import Busy
from sflow_jax.storage.paths import cache_folder
from sflow_jax.storage.tokenizers import text_tokens
from sflow_jax.typed import Count, Name

ASSETS = Path(__file__).parent / "toyworld" / "assets"
VITAL_LAYERS_FILE = "vital_layers.json"
# Seconds to wait for another process that converts the embedded model.
PATIENCE, POLL = 120.0, 0.3
EMBEDDED_TITLE = "the embedded FLUX of the toy world"
# Names that stand for the feature networks that ship with the package → their published folders.
EMBEDDED_FEATURES = {"toyworld": ASSETS / "dinov2", "toyworld-clip": ASSETS / "clip"}


def find_checkpoint(name: epath.PathLike) -> epath.Path:
    """A converted checkpoint's folder, which may not exist.

    The name `toyworld` stands for the embedded model; `org/name` or `org/name@revision`, where no such path can be,
    for a repository of the Hub, whose folder is in the cache.
    """
    check_path("checkpoint", name)
    if str(name) == EMBEDDED:
        return _embedded_checkpoint()
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
    """A converted checkpoint's folder and what it is, with the vital layers that were saved for the embedded model.

    A repository of the Hub is downloaded and converted first; once it is, nothing is asked of the Hub any more.
    Raises CheckpointError, and ConversionError for what cannot be fetched or converted.
    """
    folder, repository = find_checkpoint(name), parse_repository(name)
    if repository is not None:
        _convert_repository(repository, folder)
    _check_there(name, folder)
    info = load_info(folder)
    saved = saved_vital_layers() if str(name) == EMBEDDED else None
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
        f"or {EMBEDDED}; known without files are {', '.join(PUBLISHED)}"
    )


def save_vital_layers(name: str, layers: tuple[int, ...], origin: str) -> epath.Path:
    """Record layers as a checkpoint's vital ones; the file that holds them.

    The embedded model is shared by all that use it, so its set goes into a file of the user's own.
    """
    if name == EMBEDDED:
        file = _saved_file()
        file.parent.mkdir(parents=True, exist_ok=True)
        return write_whole(file, to_json({"layers": layers, "origin": origin}))
    folder, info = find_model(name)
    save_info(folder, dataclasses.replace(info, vital_layers=layers, vital_layers_origin=origin))
    return folder / INFO_FILE


def forget_vital_layers() -> bool:
    """Take the embedded model's own vital layers again; whether others had been saved."""
    saved = _saved_file().exists()
    _saved_file().unlink(missing_ok=True)
    return saved


class SavedLayers(msgspec.Struct):
    """A vital set in a file of its own."""

    layers: tuple[Count, ...] | None
    origin: Name


def saved_vital_layers() -> SavedLayers | None:
    """What the user saved for the embedded model, if anything; CheckpointError if it cannot be read."""
    file = _saved_file()
    return read_json(file, SavedLayers, CheckpointError, f"remove {file}") if file.exists() else None


def _saved_file() -> epath.Path:
    return epath.Path(cache_folder() / f"{EMBEDDED}-{_digest()}-{VITAL_LAYERS_FILE}")


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


def _embedded_vital_layers() -> SavedLayers:
    return read_json(ASSETS / VITAL_LAYERS_FILE, SavedLayers, CheckpointError, "install the package again")


def _embedded_checkpoint() -> epath.Path:
    """The embedded model's converted folder in the cache, made at the first call, and again where it is damaged."""
    folder = epath.Path(cache_folder() / f"{EMBEDDED}-{_digest()}")
    deadline = time.monotonic() + PATIENCE
    try:
        while not _is_good(folder):
            try:
                folder.rmtree(missing_ok=True)
                _convert_embedded(folder)
            except Busy:  # another process converts it just now
                if time.monotonic() > deadline:
                    raise
                time.sleep(POLL)
    except OSError as error:
        raise SettingError(
            f"cannot keep the embedded model in {folder.parent} ({error.strerror or error}); set XDG_CACHE_HOME "
            "to a folder with room that you can write to"
        ) from error
    return folder


def _convert_embedded(destination: epath.Path) -> None:
    vital = _embedded_vital_layers()
    convert(
        open_source(ASSETS),
        destination,
        vital_layers=vital.layers,
        vital_origin=vital.origin,
        title=EMBEDDED_TITLE,
        progress=False,
    )


def _convert_repository(repository: Repository, folder: epath.Path) -> None:
    """Fetch and convert a repository, unless it is converted; waits for another process that does so just now."""
    while not (folder / INFO_FILE).exists():
        try:
            source = open_source(fetch(repository, folder))
            convert(source, folder, title=repository_title(repository))
        except Busy:
            time.sleep(POLL)
        except SettingError:
            # Another process may have been faster.
            if not (folder / INFO_FILE).exists():
                raise


def _is_good(folder: epath.Path) -> bool:
    try:
        load_info(folder)
        verify(folder, CheckpointError, lambda _: None)
    except (CheckpointError, OSError):
        return False
    return True
