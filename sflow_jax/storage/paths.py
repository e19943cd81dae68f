"""Paths, local and remote, and where things that can be made again are kept between runs."""

import contextlib
import os
from pathlib import Path

from etils import epath
from etils.epath.backend import fsspec_backend

from sflow_jax.errors import SettingError


def is_remote(path: epath.PathLike) -> bool:
    """Whether a path names another machine's storage, such as gs://bucket/folder."""
    return "://" in os.fspath(path)


def absolute(path: epath.PathLike) -> epath.Path:
    """The same place whatever the working directory; remote paths already are (and epath would break them)."""
    return epath.Path(path) if is_remote(path) else epath.Path(path).resolve()


def list_folder(path: epath.Path) -> list[epath.Path]:
    """What is in a folder now, by name; nothing if there is no such folder (a remote one without files is none)."""
    if is_remote(path):
        # fsspec remembers listings, and would never see what other machines write.
        with contextlib.suppress(ImportError):  # without it epath goes through tensorflow, which remembers nothing
            fsspec_backend.fs(path).invalidate_cache(os.fspath(path))
    try:
        return sorted(path.iterdir(), key=lambda file: file.name)
    except FileNotFoundError:
        return []


def cache_folder() -> Path:
    """`$XDG_CACHE_HOME/sflow_jax`, by default `~/.cache/sflow_jax`; not created. SettingError without a home."""
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sflow_jax"
    except RuntimeError as error:
        raise SettingError("this user has no home folder; set XDG_CACHE_HOME to a folder for the cache") from error
