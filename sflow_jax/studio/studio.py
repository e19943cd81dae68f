"""What all visitors of a studio share: the model, who paints when, files, inversions, the sweep that is open."""

import functools
from pathlib import Path

from sflow_jax.pipeline import StableFlow
from sflow_jax.results import Edit
from sflow_jax.studio.desk import Desk
from sflow_jax.studio.edits import Inversions
from sflow_jax.studio.layers import Bar, Opened, bars
from sflow_jax.studio.store import Store
from sflow_jax.toyworld.reader import AttributeReader

# Pixels a side; smaller pictures are shown with hard pixels.
SMALL = 256


class Studio:
    """flow: the model. folder: for photos, results and sweeps. reads_folders: whether visitors may name folders."""

    def __init__(self, flow: StableFlow, folder: Path, reads_folders: bool = True):
        self.flow, self.store, self.reads_folders = flow, Store(folder), reads_folders
        self.desk, self.inversions = Desk(), Inversions()
        self.opened: Opened | None = None

    @property
    def small(self) -> bool:
        """Whether the model's pictures are so small that their pixels are seen."""
        return self.flow.info.canvas().width < SMALL

    @functools.cached_property
    def reader(self) -> AttributeReader:
        """What sees attributes of the embedded world."""
        return AttributeReader()

    def bars(self) -> list[Bar]:
        """Of the layers, as the open sweep has them."""
        return bars(self.flow, self.opened)

    def save(self, edit: Edit) -> tuple[Edit, Path]:
        """An edit, and the folder that holds it now."""
        return edit, self.store.save(edit)
