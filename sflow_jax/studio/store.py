"""The studio's folder: photos and masks by their checksums, results by number; the oldest results leave."""

import itertools
import shutil
from pathlib import Path

import numpy as np
from jaxtyping import Bool
from PIL import Image

from sflow_jax.pictures.files import png_bytes
from sflow_jax.results import Edit
from sflow_jax.storage.checksums import checksum
from sflow_jax.storage.files import write_whole

MOST_RESULTS = 50
NAMES = {"image": "photo", "region": "mask"}


class Store:
    """What visitors bring and what is painted, under one folder."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._numbers = itertools.count(1)

    def photo(self, path: str) -> str:
        """A copy of an uploaded file, named by its content, so that records of it stay true."""
        source = Path(path)
        return self._keep(source.read_bytes(), source.suffix.lower())

    def mask(self, brushed: Bool[np.ndarray, "y x"]) -> str:
        """A file whose white parts were brushed."""
        return self._keep(png_bytes(Image.fromarray(np.uint8(255) * brushed.astype(np.uint8))), ".png")

    def _keep(self, content: bytes, ending: str) -> str:
        path = self.folder / "brought" / f"{checksum(content)}{ending}"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(path, content)
        return str(path)

    def brought(self, checksum: str) -> str | None:
        """The file of such a content, if somebody brought it."""
        return next(map(str, (self.folder / "brought").glob(f"{checksum}.*")), None) if checksum.isalnum() else None

    def save(self, result: Edit) -> Path:
        """The folder that `sflow edit` would have written, with the photo and the mask that its record names."""
        folder = self.folder / "results" / f"{next(self._numbers):04d}"
        result.save(folder)
        for name in ("image", "region"):
            path = Path(result.record[name] or "")
            if path.parent == self.folder / "brought":
                shutil.copyfile(path, folder / f"{NAMES[name]}{path.suffix}")
        for old in sorted(folder.parent.iterdir())[:-MOST_RESULTS]:
            shutil.rmtree(old, ignore_errors=True)
        return folder

    def archive(self, folder: Path) -> str:
        """All files of a result in one ZIP."""
        archive = self.folder / "archives" / f"edit-{folder.name}"
        archive.parent.mkdir(parents=True, exist_ok=True)
        made = shutil.make_archive(str(archive), "zip", folder)
        for old in sorted(archive.parent.iterdir())[:-MOST_RESULTS]:
            old.unlink()
        return made
