"""Folders that are there whole or not at all: a command's results, a checkpoint."""

import contextlib
import os
import re
import tempfile
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from etils import epath
from jaxtyping import Float
from PIL import Image

from sflow_jax.errors import SettingError
from sflow_jax.pictures.files import png_bytes, to_uint8
from sflow_jax.storage.files import to_compact_json, to_json
from sflow_jax.storage.partial import own_name, remove_abandoned
from sflow_jax.storage.paths import absolute, is_remote, list_folder


class Busy(SettingError):
    """Another process is writing the same folder."""


class Folder:
    """Files of one command, written elsewhere until they are complete."""

    def __init__(self, path: epath.Path):
        self.path = path

    def picture(
        self, name: str, image: Float[np.ndarray, "y x 3"], record: Mapping[str, Any] | None = None
    ) -> None:
        """Save a float picture in 0..1 as PNG, with a record of how it was painted."""
        self.image(name, Image.fromarray(to_uint8(image)), record)

    def image(self, name: str, image: Image.Image, record: Mapping[str, Any] | None = None) -> None:
        """Save a PIL image as PNG, with a record of how it was painted."""
        (self.path / name).write_bytes(png_bytes(image, None if record is None else to_compact_json(record)))

    def text(self, name: str, content: str) -> None:
        """Save a text in UTF-8."""
        (self.path / name).write_text(content)

    def json(self, name: str, content: dict[str, Any]) -> None:
        """Save a dictionary as indented JSON."""
        (self.path / name).write_text(to_json(content))


# What commands write: their records, and the files that these speak of.
RECORDS = ("atlas.json", "edit.json", "generate.json", "inversion.json", "demo.json")
RESULTS = re.compile(
    r"(grid|candidates|reconstruction|((painted|drawn|reference)-)?(source|(region|edit|picture)-\d+)"
    r"|attention-\d+(-step-\d+)?)\.png|(inversion|latents)\.safetensors|atlas\.html|job\.json"
)
# Stands in a folder while a result moves in.
MOVING = ".result-moving-in"


@contextlib.contextmanager
def output_folder(destination: epath.PathLike | None, record: str | None = None) -> Iterator[Folder]:
    """A folder to write into; its files move to `destination` when the block ends well, else vanish.

    record: the JSON file that the command writes. An earlier result of the same command is replaced whole; other
    files stay. None: all vanish anyway (processes that do not report). Raises SettingError at once if the
    destination cannot be a folder, holds another command's result, or is being written by another process.
    """
    if destination is None:
        with tempfile.TemporaryDirectory() as temporary:
            yield Folder(epath.Path(temporary))
        return
    if not os.fspath(destination):
        raise SettingError("`out` is empty; name a folder")
    # Resolved, since "." and ".." have no name to put a sibling beside.
    destination = absolute(destination)
    check_output(destination, record)
    # Object stores have no folders to rename, and each file appears there whole.
    writing = tempfile.TemporaryDirectory() if is_remote(destination) else _partial_folder(destination)
    with writing as partial:
        yield Folder(epath.Path(partial))
        if destination.exists() or is_remote(destination):
            _move_in(epath.Path(partial), destination, record)
        else:
            partial.rename(destination)


def check_output(destination: epath.Path, record: str | None) -> None:
    """SettingError if a command with this record must not write its results there."""
    if destination.exists() and not destination.is_dir():
        raise SettingError(f"{destination} is a file; choose another folder for `out`")
    if record is None:
        return
    names = {file.name for file in list_folder(destination)}
    others = [name for name in RECORDS if name in names and name != record]
    if others:
        raise SettingError(f"{destination} holds another command's {others[0]}; choose another folder for `out`")
    strangers = sorted(name for name in names if RESULTS.fullmatch(name))
    if strangers and not names & {record, MOVING}:
        raise SettingError(
            f"{destination} has a {strangers[0]} of no result (no {record}); choose another folder for `out`"
        )


def _move_in(partial: epath.Path, destination: epath.Path, record: str | None) -> None:
    """Replace an earlier result; the record last, so that what a kill leaves behind is known for a result."""
    (destination / MOVING).write_text("")
    files = {file.name: file for file in list_folder(partial)}
    for name in sorted(files, key=lambda name: name == record):
        if name == record:
            for old in list_folder(destination):
                if RESULTS.fullmatch(old.name) and old.name not in files:
                    old.unlink()
        if is_remote(destination):
            (destination / name).write_bytes(files[name].read_bytes())
        else:
            files[name].replace(destination / name)
    (destination / MOVING).unlink()


@contextlib.contextmanager
def _partial_folder(destination: epath.Path) -> Iterator[epath.Path]:
    """An empty folder beside `destination` that vanishes, with parents made for it, unless it was renamed.

    SettingError if another process is writing there.
    """
    partial = own_name(destination)
    created = [parent for parent in partial.parents if not parent.exists()]
    partial.mkdir(parents=True)
    renamed = False
    try:
        writers = remove_abandoned(destination)
        if writers:
            raise Busy(
                f"process {writers[0]} is writing {destination}; wait for it, choose another place, or, if it does "
                f"something else, remove the {partial.parent}/.{destination.name}.{writers[0]}-….partial"
            )
        yield partial
        renamed = not partial.exists()
    finally:
        partial.rmtree(missing_ok=True)
        if not renamed and not destination.exists():
            for parent in created:
                with contextlib.suppress(OSError):  # somebody else's files by now
                    parent.rmdir()


@contextlib.contextmanager
def new_folder(destination: epath.PathLike, *, replace: bool = False) -> Iterator[epath.Path]:
    """A folder to fill beside `destination`; takes its place at the end, or vanishes after an error.

    replace: what was there is moved aside, and removed only when the new folder stands; killed in between, the old
    one is found again at the next call. Without it, SettingError if something stands there by then.
    """
    destination = absolute(destination)
    recover(destination)
    aside = _aside(destination)
    with _partial_folder(destination) as partial:
        yield partial
        if destination.exists():
            if not replace:
                raise SettingError(f"{destination} has appeared meanwhile; choose another place or say `overwrite`")
            destination.rename(aside)
        try:
            partial.rename(destination)
        except BaseException:
            recover(destination)
            raise
        aside.rmtree(missing_ok=True)


def recover(destination: epath.PathLike) -> None:
    """Finish what a killed `new_folder` began: the old folder comes back, or, where the new one stands, goes."""
    destination = absolute(destination)
    aside = _aside(destination)
    if not aside.exists():
        return
    if destination.exists():
        aside.rmtree(missing_ok=True)
    else:
        aside.rename(destination)


def _aside(destination: epath.Path) -> epath.Path:
    return destination.with_name(f".{destination.name}.replaced")
