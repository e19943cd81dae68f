"""Folders that are there whole or not at all: a command's results, a checkpoint."""

import contextlib
import io
import os
import tempfile
import uuid
from collections.abc import Iterator
from typing import Any

import numpy as np
from etils import epath
from jaxtyping import Float
from PIL import Image

from sflow_jax.errors import SettingError
from sflow_jax.pictures.files import to_uint8
from sflow_jax.storage.files import to_json
from sflow_jax.storage.paths import absolute, is_remote


class Folder:
    """Files of one command, written elsewhere until they are complete."""

    def __init__(self, path: epath.Path):
        self.path = path

    def picture(self, name: str, image: Float[np.ndarray, "y x 3"]) -> None:
        """Save a float picture in 0..1 as PNG."""
        self.image(name, Image.fromarray(to_uint8(image)))

    def image(self, name: str, image: Image.Image) -> None:
        """Save a PIL image as PNG."""
        data = io.BytesIO()
        image.save(data, "PNG")
        (self.path / name).write_bytes(data.getvalue())

    def json(self, name: str, content: dict[str, Any]) -> None:
        """Save a dictionary as indented JSON."""
        (self.path / name).write_text(to_json(content))


@contextlib.contextmanager
def output_folder(destination: epath.PathLike | None) -> Iterator[Folder]:
    """A folder to write into; its files move to `destination` when the block ends well, else vanish.

    None: they vanish anyway (processes that do not report). Raises ValueError at once if the destination cannot be
    a folder.
    """
    if destination is None:
        with tempfile.TemporaryDirectory() as temporary:
            yield Folder(epath.Path(temporary))
        return
    # Resolved, since "." and ".." have no name to put a sibling beside.
    destination = absolute(destination)
    if destination.exists() and not destination.is_dir():
        raise SettingError(f"{destination} is a file; choose another folder for `out`")
    if is_remote(destination):
        # Object stores have no folders to rename, and each file appears there whole.
        with tempfile.TemporaryDirectory() as temporary:
            yield Folder(epath.Path(temporary))
            for file in sorted(epath.Path(temporary).iterdir()):
                (destination / file.name).write_bytes(file.read_bytes())
        return
    partial = destination.with_name(f".{destination.name}.partial")
    if partial.exists():
        partial.rmtree()
    created = [parent for parent in partial.parents if not parent.exists()]
    partial.mkdir(parents=True)
    try:
        yield Folder(partial)
        destination.mkdir(parents=True, exist_ok=True)
        for file in sorted(partial.iterdir()):
            file.replace(destination / file.name)
        partial.rmdir()
    except BaseException:
        partial.rmtree(missing_ok=True)
        for parent in created:
            parent.rmdir()
        raise


@contextlib.contextmanager
def new_folder(destination: epath.PathLike) -> Iterator[epath.Path]:
    """A folder to fill beside `destination`; takes its place at the end, or vanishes after an error.

    What was there is moved aside, and removed only when the new folder stands; killed in between, the old one is
    found again at the next call.
    """
    destination = epath.Path(destination)
    aside = destination.with_name(f".{destination.name}.replaced")
    if aside.exists() and not destination.exists():
        aside.rename(destination)
    partial = destination.with_name(f".{destination.name}.{os.getpid()}-{uuid.uuid4().hex[:8]}.partial")
    partial.mkdir(parents=True)
    try:
        yield partial
        aside.rmtree(missing_ok=True)
        if destination.exists():
            destination.rename(aside)
        partial.rename(destination)
        aside.rmtree(missing_ok=True)
    except BaseException:
        partial.rmtree(missing_ok=True)
        if aside.exists() and not destination.exists():
            aside.rename(destination)
        raise
