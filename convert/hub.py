"""Repositories of the Hugging Face Hub, by huggingface_hub: downloaded into its own cache, only what is converted.

The environment is its own too: HF_TOKEN (or `hf auth login`), HF_HOME, HF_ENDPOINT, HF_HUB_OFFLINE.
"""

import contextlib
import dataclasses
import errno
import math
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np
from etils import epath
from huggingface_hub import HfApi, constants, is_offline_mode, snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import SafetensorsFileMetadata
from sflow_convert.engine import ConversionError
from sflow_convert.features import check_features, is_feature_folder
from sflow_convert.job import DTYPES, STORED
from sflow_convert.layouts import check_configs
from sflow_convert.parts import HERE, Places
from sflow_convert.repository import choose_files, is_weights
from tqdm.auto import tqdm

from sflow_jax.storage.paths import absolute, is_remote

NAME = re.compile(r"(?P<id>\w[\w.-]*/\w[\w.-]*)(@(?P<revision>\w[\w./-]*))?", re.ASCII)
LOG_IN = "log in with hf auth login, or set HF_TOKEN"
AGAIN = "run the same again, files that are complete are not fetched twice"
GB = 1e9


@dataclasses.dataclass(frozen=True)
class Repository:
    """A model's repository. revision: a branch, tag or commit; None is its main branch."""

    id: str
    revision: str | None = None

    def __str__(self) -> str:
        return self.id if self.revision is None else f"{self.id}@{self.revision}"

    @property
    def url(self) -> str:
        """Its page."""
        return f"{constants.ENDPOINT}/{self.id}"


def parse_repository(name: epath.PathLike) -> Repository | None:
    """The text `org/name` or `org/name@revision`; None for all that is a path.

    A path is whatever exists, or lies in a folder that exists (a slip in it must not ask another machine), and
    every path object.
    """
    match = NAME.fullmatch(name) if isinstance(name, str) else None
    if match is None or "--" in match["id"] or ".." in name:
        return None
    if os.path.lexists(name) or os.path.lexists(name.split("/")[0]):
        return None
    return Repository(match["id"], match["revision"])


def _to_stderr(text: str) -> None:
    tqdm.write(text, file=sys.stderr)


@dataclasses.dataclass(frozen=True)
class Listing:
    """What is fetched of a repository at one commit. sizes: path → bytes. cached: those that are here already."""

    repository: Repository
    commit: str
    sizes: Mapping[str, int]
    cached: frozenset[str]

    @property
    def missing(self) -> int:
        """Bytes to download."""
        return sum(size for name, size in self.sizes.items() if name not in self.cached)


def fetch(
    repository: Repository,
    destination: epath.PathLike,
    *,
    places: Places = HERE,
    dtype: str | None = None,
    features: bool | None = None,
    announce: Callable[[str], None] = _to_stderr,
) -> Path:
    """The folder of a repository's files in the Hub's cache, after downloading what is not there yet.

    Configs come before weights, and are refused before them. features: whether it must be a network that compares
    pictures, or must not be; None: either will do. destination, dtype: where and how the files will be
    converted, which needs room too. places: what is not taken from the repository. announce: gets a line with the
    sizes before anything is downloaded. ConversionError, in one line, for repositories and revisions that there are
    not, that are gated, or not supported; for disks too small; and where the Hub cannot be reached and files are
    missing here.
    """
    if is_offline_mode():
        return _find_local(repository, places, "HF_HUB_OFFLINE is set; without it the rest would be fetched")
    with _one_line(repository):
        try:
            listing = _list_files(repository, places)
        except HTTPError as error:
            if isinstance(error, HfHubHTTPError):
                raise
            advice = f"{constants.ENDPOINT} cannot be reached ({_reason(error)}); connect, and {AGAIN}"
            return _find_local(repository, places, advice)
        if listing.missing:
            _check_room(listing, destination, dtype)
            announce(_described(listing))
        folder = _download(listing, listing.commit, lambda name: not is_weights(name))
        _check_kind(repository, folder, features)
        # By its own name: so the cache notes what the branch is, for when there is no connection.
        complete = _download(listing, repository.revision, lambda name: True)
        if complete != folder:
            raise ConversionError(f"{repository} has changed while it was downloaded; {AGAIN}")
        return complete


def _list_files(repository: Repository, places: Places) -> Listing:
    api = HfApi()
    commit = str(api.model_info(repository.id, revision=repository.revision).sha)
    tree = api.list_repo_tree(repository.id, recursive=True, revision=commit)
    sizes = {entry.path: entry.size for entry in tree if hasattr(entry, "size")}
    chosen = choose_files(sorted(sizes), str(repository), places)
    cached = frozenset(
        name for name in chosen if isinstance(try_to_load_from_cache(repository.id, name, revision=commit), str)
    )
    return Listing(repository, commit, {name: sizes[name] for name in chosen}, cached)


def _described(listing: Listing) -> str:
    total = sum(listing.sizes.values())
    here = f", {(total - listing.missing) / GB:.2f} GB of them are here" if listing.cached else ""
    name = f"{listing.repository} (commit {listing.commit[:10]})"
    return (
        f"{name}: {len(listing.sizes)} files, {total / GB:.2f} GB{here}; downloading {listing.missing / GB:.2f} GB "
        f"from {constants.ENDPOINT} to {constants.HF_HUB_CACHE}"
    )


def _download(listing: Listing, revision: str | None, wanted: Callable[[str], bool]) -> Path:
    """The snapshot's folder with these files in it."""
    # Patterns: a name with brackets stands for itself.
    names = [re.sub(r"([\[*?])", r"[\1]", name) for name in listing.sizes if wanted(name)]
    return Path(snapshot_download(listing.repository.id, revision=revision, allow_patterns=names))


def _check_kind(repository: Repository, folder: Path, features: bool | None) -> None:
    """ConversionError for a model that is not supported or wanted, seen in its configs."""
    if features is not None and features != is_feature_folder(folder):
        found, wanted = "a model that paints", "a DINOv2 or CLIP"
        found, wanted = (found, wanted) if features else ("a network that compares pictures", "FLUX.1 or SD3")
        raise ConversionError(f"{repository} is {found}, where {wanted} is needed: name another one")
    if is_feature_folder(folder):
        check_features(folder)
    else:
        check_configs(folder)


def _find_local(repository: Repository, places: Places, advice: str) -> Path:
    """The snapshot that an earlier download left; ConversionError if there is none, or not all of it."""
    try:
        folder = Path(
            snapshot_download(repository.id, revision=repository.revision, allow_patterns=[], local_files_only=True)
        )
    except LocalEntryNotFoundError as error:
        raise ConversionError(f"{repository} is not on this machine: {advice}") from error
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    try:
        choose_files(names, str(repository), places)
    except ConversionError as error:
        raise ConversionError(f"{repository} is only partly on this machine ({error}): {advice}") from error
    return folder


def _check_room(listing: Listing, destination: epath.PathLike, dtype: str | None) -> None:
    """ConversionError where the disks have no room for the download and the conversion after it."""
    needs = [(_existing(constants.HF_HUB_CACHE), listing.missing, "downloaded", "HF_HOME")]
    if not is_remote(destination):
        written = _converted_bytes(listing, dtype)
        needs.append((_existing(destination), written, "converted", "DESTINATION"))
    for place, _, _, name in needs:
        together = [need for need in needs if os.stat(need[0]).st_dev == os.stat(place).st_dev]
        free, needed = shutil.disk_usage(place).free, sum(need[1] for need in together)
        if needed > free:
            parts = " and ".join(f"{size / GB:.2f} GB to be {what}" for _, size, what, _ in together)
            raise ConversionError(
                f"{listing.repository} needs {parts}; {place} has {free / GB:.2f} GB free: make room, or choose "
                f"another disk by {name}"
            )


def _converted_bytes(listing: Listing, dtype: str | None) -> int:
    """What conversion will write, with its scratch files: exact, from the heads of the weight files."""
    numbers: dict[str, int] = {}
    stored = set()
    for name in filter(is_weights, listing.sizes):
        head = _read_head(listing, name)
        network = name.rpartition("/")[0]
        numbers[network] = numbers.get(network, 0) + sum(math.prod(t.shape) for t in head.tensors.values())
        if network in ("", "transformer"):
            stored |= {tensor.dtype for tensor in head.tensors.values()}
    # Mixed dtypes are refused later, unless a dtype is asked for.
    kind = DTYPES[dtype] if dtype else DTYPES[STORED.get(min(stored), "bfloat16")]
    return (sum(numbers.values()) + max(numbers.values())) * np.dtype(kind).itemsize


def _read_head(listing: Listing, name: str) -> SafetensorsFileMetadata:
    return HfApi().parse_safetensors_file_metadata(listing.repository.id, name, revision=listing.commit)


def _existing(place: epath.PathLike) -> Path:
    """The nearest folder above a path, or itself, that exists."""
    path = Path(absolute(place))
    return next(parent for parent in (path, *path.parents) if parent.exists())


def _reason(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


@contextlib.contextmanager
def _one_line(repository: Repository) -> Iterator[None]:
    """The client's errors as ConversionErrors that say what to do."""
    try:
        yield
    except GatedRepoError as error:
        raise ConversionError(
            f"{repository} is gated: accept its licence at {repository.url}, and {LOG_IN} of an account that has"
        ) from error
    except RevisionNotFoundError as error:
        raise ConversionError(
            f"{repository.id} has no revision {repository.revision}; see {repository.url}/commits"
        ) from error
    except RepositoryNotFoundError as error:
        raise ConversionError(
            f"there is no {repository.id} here, nor a model of this name at {constants.ENDPOINT} (if it is "
            f"private: {LOG_IN})"
        ) from error
    except HfHubHTTPError as error:
        raise ConversionError(f"{repository}: {_http_advice(error.response.status_code)}") from error
    except (HTTPError, OSError) as error:
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            raise ConversionError(f"{repository}: the disk of {constants.HF_HUB_CACHE} is full") from error
        raise ConversionError(f"{repository}: the download stopped ({_reason(error)}); {AGAIN}") from error


def _http_advice(status: int) -> str:
    if status == 401:
        return f"{constants.ENDPOINT} refuses the token: {LOG_IN}"
    if status == 403:
        return f"{constants.ENDPOINT} lets this token read no weights of it: accept its licence, or {LOG_IN}"
    return f"{constants.ENDPOINT} answers with an error ({status}); wait, and {AGAIN}"
