"""A run's folder, local or remote: a manifest and immutable part files, whatever happens to the process.

manifest.json                   what is being done; a folder made with other settings is refused
parts/NAME-DIGEST.npz           one finished batch each; the digest in the name is the content's

A part appears under its name only when it is complete. Resuming is listing what exists. Parts that do not match
their digest are removed and done again. Several workers may write the same folder: what two of them make twice is
kept once.
"""

import hashlib
import io
import json
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from etils import epath

from sflow_jax.errors import SettingError
from sflow_jax.storage.files import read_json, write_whole
from sflow_jax.storage.partial import remove_all_abandoned
from sflow_jax.storage.paths import absolute, is_remote, list_folder

MANIFEST = "manifest.json"
PARTS = "parts"
DIGEST_LENGTH = 16
# Characters of a setting in an error, and of the beginning of a long list.
LONGEST, BEGINNING = 60, 40


class RunFolder:
    """The files of one sweep."""

    def __init__(self, path: epath.PathLike, manifest: dict[str, Any], labels: Sequence[str] = ()):
        """Create the folder, or go on with one that was made with the same manifest.

        labels: settings that may differ, such as the name by which the same checkpoint was found.
        ValueError naming what differs for another manifest, or where the path is a file or some other folder.
        """
        self.path, self.manifest = absolute(path), manifest
        if self.path.exists() and not self.path.is_dir():
            raise SettingError(f"{self.path} is a file; choose another folder for `out`")
        if (self.path / MANIFEST).exists():
            check_same(self.path, read_manifest(self.path), self.manifest, labels)
        elif any(not file.name.startswith(".") for file in list_folder(self.path)):
            raise SettingError(f"{self.path} has files but no {MANIFEST}; choose a new folder for `out`")
        if not (self.path / MANIFEST).exists():
            # The first thing in the folder, so that a worker that starts beside this one finds it its own.
            self.path.mkdir(parents=True, exist_ok=True)
            write_whole(self.path / MANIFEST, (json.dumps(manifest, indent=1) + "\n").encode())
        (self.path / PARTS).mkdir(exist_ok=True)
        # Names of parts tell their content, so that nobody else would come upon what a killed worker left.
        for place in (self.path, *(place for place in list_folder(self.path) if place.is_dir())):
            remove_all_abandoned(place)

    def finished(self) -> dict[str, epath.Path]:
        """Name → file of every part that is there, not yet read."""
        files = list_folder(self.path / PARTS)
        return {
            file.stem.rpartition("-")[0]: file for file in files if file.suffix == ".npz" and file.name[0] != "."
        }

    def save(self, name: str, arrays: dict[str, np.ndarray]) -> None:
        """Write one part; OSError says what went wrong."""
        data = io.BytesIO()
        np.savez(data, **arrays)
        content = data.getvalue()
        write_whole(self.path / PARTS / f"{name}-{_digest(content)}.npz", content)

    def load(self, file: epath.Path) -> dict[str, np.ndarray] | None:
        """A part's arrays; None, and the file is removed, where the content is not what was written."""
        try:
            # A pipe would never end.
            content = file.read_bytes() if is_remote(file) or Path(file).is_file() else b""
        except FileNotFoundError:  # another worker found it damaged
            return None
        if _digest(content) == file.stem.rpartition("-")[2]:
            try:
                with np.load(io.BytesIO(content)) as arrays:
                    return dict(arrays)
            except (ValueError, zipfile.BadZipFile):
                pass
        file.unlink(missing_ok=True)
        return None


def check_same(
    path: epath.PathLike, stored: dict[str, Any], wanted: dict[str, Any], labels: Sequence[str] = ()
) -> None:
    """SettingError, naming what differs, unless a folder was made with the settings that are wanted now.

    labels: settings that may differ.
    """
    # Through JSON, so that tuples compare as the lists that they became.
    wanted = json.loads(json.dumps(wanted))
    differing = [key for key in {**stored, **wanted} if stored.get(key) != wanted.get(key) and key not in labels]
    if differing:
        key = differing[0]
        others = f", and so do {', '.join(differing[1:4])}" if differing[1:] else ""
        raise SettingError(
            f"{path} was begun with other settings: {key}: {_short(stored.get(key))} there, "
            f"{_short(wanted.get(key))} now{others}; choose another folder for `out`"
        )


def read_manifest(path: epath.PathLike) -> dict[str, Any]:
    """The settings of a run; SettingError where there is no run, or its manifest cannot be read."""
    file = absolute(path) / MANIFEST
    if not file.exists():
        raise SettingError(f"{path} is no sweep's folder (no {MANIFEST}); make one with: sflow vital --out")
    return read_json(file, dict[str, Any], SettingError, "choose another folder for `out`")


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:DIGEST_LENGTH]


def _short(value: Any) -> str:
    text = json.dumps(value)
    if len(text) <= LONGEST:
        return text
    return f"{text[:BEGINNING]}… ({len(value)} of them)" if isinstance(value, list) else text[:LONGEST]
