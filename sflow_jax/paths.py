"""Paths, local and remote, and where things that can be made again are kept between runs."""

import os
from pathlib import Path

from etils import epath


def is_remote(path: epath.PathLike) -> bool:
    """Whether a path names another machine's storage, such as gs://bucket/folder."""
    return "://" in os.fspath(path)


def absolute(path: epath.PathLike) -> epath.Path:
    """The same place whatever the working directory; remote paths already are (and epath would break them)."""
    return epath.Path(path) if is_remote(path) else epath.Path(path).resolve()


def cache_folder() -> Path:
    """`$XDG_CACHE_HOME/sflow_jax`, by default `~/.cache/sflow_jax`; not created."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sflow_jax"
