"""A source's row, kept: what it lends to its edits, so that later batches of them need not compute it again.

The first batch paints the source beside its edits as ever and fills the bank; later ones leave the source out. Or
the picture's inversion fills it, see `editing.recording`: then no batch has the source.
Axes: p places, g branches, s image tokens, h heads, k head dimension, n layers, c channels.
"""

import dataclasses
import functools
import hashlib
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from sflow_jax.arrays import AnyArray
from sflow_jax.errors import SettingError
from sflow_jax.machine.meshes import least_of_processes, on_this_host
from sflow_jax.models.interventions import Interventions
from sflow_jax.models.lending import KINDS, LENT, Lent
from sflow_jax.painter import Painter
from sflow_jax.pictures.canvas import Canvas
from sflow_jax.sampling.control import LayerControl
from sflow_jax.sampling.solve import Reached
from sflow_jax.sampling.steps import Blank, Step
from sflow_jax.settings import AUTOMATIC, BANK_PLACES, Placement, check_bank
from sflow_jax.storage.checkpoint import ModelInfo
from sflow_jax.storage.placement import HOST, computed_dtype

logger = logging.getLogger(__name__)
GIB = 2**30
# Share of the free memory that a bank takes where nobody chose its place.
SURELY_FITS = 0.5
# Where nobody chose, a bank that the first batch fills is for at least so many: it compiles two more programs.
FEWEST_BATCHES = 3
Fetch = Callable[[], Float[Array, "p g s h k"]]
Watcher = Callable[[Reached], None]


def lent_places(control: LayerControl, own_attentions: int) -> Int[np.ndarray, "p 2"]:
    """(layer, number in `KINDS`) of what edits take from the source in any step, as `Lent.places` has it.

    own_attentions: so many layers, the first ones, have one of the image alone.
    """
    strengths = [np.float32(1) if scale is None else scale for scale in (control.keys, control.values)]
    taken = np.zeros((control.inject.shape[2], len(KINDS)), bool)
    for kind in range(len(KINDS)):
        share = control.inject * strengths[kind % 2]
        if control.attentions is not None:
            share = share * control.attentions[..., kind // 2]
        if control.extend is not None:
            share = np.maximum(share, control.extend)
        taken[:, kind] = (share > 0).any(axis=(0, 1))
    taken[own_attentions:, 2:] = False
    return np.int32(np.argwhere(taken))


def takes_anything(interventions: Interventions) -> bool:
    """Whether any layer takes what the source lends in a step."""
    layers = interventions.layers
    return any(x is not None and bool(np.any(x)) for x in (layers.inject, layers.own_inject, layers.extend))


def keeps_its_path(step: Step) -> bool:
    """Whether the source's row is the same beside whatever edits: no region of theirs, and no third branch."""
    pinned = bool(step.replay) or float(step.coupling) == 1
    return (pinned or bool(np.all(step.weight[0] == 1))) and step.interventions.skip is None


def digest(steps: Iterable[Step], others: Any) -> str:
    """Of all that a source's row is computed from; others: any tree of arrays and numbers."""
    seen = hashlib.sha256()
    rows = [step._replace(weight=0, interventions=takes_anything(step.interventions)) for step in steps]
    # A source that is put where its inversion was has no drift.
    rows = [row._replace(drift=0) if row.replay else row for row in rows]
    for leaf in jax.tree.leaves((rows, others)):
        seen.update(np.asarray(on_this_host(leaf) if isinstance(leaf, jax.Array) else leaf).tobytes())
    return seen.hexdigest()


def needed_bytes(
    painter: Painter, canvas: Canvas, places: Int[np.ndarray, "p 2"], steps: int, branches: int = 1
) -> int:
    """Of all that is lent in so many steps."""
    dtype = computed_dtype(painter.placement.dtype)
    return steps * len(places) * tensor_bytes(painter.info, canvas.tokens, branches, dtype)


def tensor_bytes(info: ModelInfo, tokens: int, branches: int, dtype: Any) -> int:
    """Of one layer's keys, or values, in one step."""
    config = info.configs["transformer"]
    return branches * tokens * config.heads * config.head_dim * jnp.dtype(dtype).itemsize


def free_bytes(place: str) -> int:
    """Free memory of this process's first device, of the host, or of the folder for temporary files."""
    if place == "disk":
        return shutil.disk_usage(tempfile.gettempdir()).free
    statistics = jax.local_devices()[0].memory_stats() if place == "device" else None
    if statistics and "bytes_limit" in statistics:
        return statistics["bytes_limit"] - statistics["bytes_in_use"]
    # A CPU's memory is the host's.
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def choose_place(asked: str, needed: int, mesh: Mesh | None = None) -> str | None:
    """Where so many bytes go; None where "auto" knows no place that surely fits. SettingError for one too small.

    Processes that share a mesh choose alike.
    """

    def free(place: str) -> int:
        return least_of_processes(free_bytes(place), mesh)

    if asked == AUTOMATIC:
        fitting = (place for place in ("device", "host") if needed <= SURELY_FITS * free(place))
        return next(fitting, None)
    if needed > (left := free(asked)):
        raise SettingError(
            f"`kv_cache` {asked} needs {needed / GIB:.1f} GiB and {left / GIB:.1f} are free there: "
            "choose another place, fewer `layers` or `steps`, or off"
        )
    return asked


@dataclasses.dataclass(frozen=True)
class Entry:
    """Of one evaluation: the source's velocity, its latents behind the step, and how to get what its layers lend.

    fetch: None where nobody takes anything.
    """

    velocity: Float[AnyArray, "1 s c"]
    latents: Float[AnyArray, "1 s c"]
    fetch: Fetch | None


class SourceBank:
    """Keys, values and velocities of one source's row, kept for other edits of it.

    place: "device", "host", "disk" (a temporary folder that goes away with the bank), or "auto": device or host,
    where it takes at most half of what is free. Give one to several edits of a source: all but the first need no
    row of the source as long as only their prompts, guidance and regions differ; anything else fills it anew.
    """

    def __init__(self, place: str = AUTOMATIC):
        if place not in BANK_PLACES[1:]:
            raise SettingError(f"unknown `kv_cache` {place!r}; choose one of {', '.join(BANK_PLACES)}")
        self.asked = place
        self.clear()

    def clear(self) -> None:
        """Forget everything."""
        self.key, self.complete, self.chosen, self.folder = None, False, None, None
        self.entries: list[Entry] = []
        self.places = np.zeros((0, 2), np.int32)

    @property
    def source(self) -> Float[AnyArray, "1 s c"]:
        """The source's latents at the end."""
        return on_this_host(self.entries[-1].latents)

    def holds(self, key: Any) -> bool:
        """Whether it is this source's."""
        return self.complete and self.key == key

    def begin(self, key: Any, places: Int[np.ndarray, "p 2"], needed: int, mesh: Mesh | None = None) -> bool:
        """Whether there is room for so many bytes of a source; another one than before is forgotten.

        key: what the source's row is computed from; None where an inversion, which is yet to come, says it. mesh:
        where the model is.
        """
        if self.holds(key):
            return True
        self.clear()
        self.key, self.places, self.chosen = key, places, choose_place(self.asked, needed, mesh)
        where = f"on the {self.chosen}" if self.chosen else "fit nowhere: every batch has a row for it"
        logger.info("keys and values of the source, %.2f GiB, %s", needed / GIB, where)
        return self.chosen is not None

    def around(
        self, path: Callable[[Blank], Iterator[list[Step]]], watch: Watcher | None
    ) -> tuple[Callable[[Blank], Iterator[list[Step]]], Watcher | None, Watcher | None]:
        """For one batch: its path, what sees its intervals, and what sees its steps.

        The source is in the batch where it is not yet known: then it is recorded.
        """
        done, steps = 0, []

        def lending(blank: Blank) -> Iterator[list[Step]]:
            nonlocal done
            for interval in path(blank):
                done += len(interval)
                yield [self._lending(i, step) for i, step in enumerate(interval, done - len(interval))]

        def recording(blank: Blank) -> Iterator[list[Step]]:
            for interval in path(blank):
                steps.extend(interval)
                yield [step._replace(lent=Lent(self.places) if len(self.places) else None) for step in interval]

        def record(reached: Reached) -> None:
            self.add(reached, takes_anything(steps[len(self.entries)].interventions))

        def beside_source(reached: Reached) -> None:
            source = self.entries[done - 1].latents
            watch(reached._replace(latents=jnp.concatenate([source, reached.latents])))

        if self.complete:
            return lending, beside_source if watch else None, None
        return recording, watch, record

    def add(self, reached: Reached, taken: bool) -> None:
        """The next evaluation's. taken: whether edits take what its layers lend."""
        fetch = self._kept(reached.captured[LENT]) if taken else None
        self.entries.append(Entry(jnp.copy(reached.velocity[:1]), jnp.copy(reached.latents[:1]), fetch))

    def reverse(self, trajectory: Float[np.ndarray, "t_plus_1 s c"], intervals: int, key: Any) -> None:
        """From what a picture's way to noise evaluated to what so many intervals of the way back do."""
        states = trajectory[:intervals, None]
        backwards = zip(reversed(self.entries[:intervals]), reversed(states))
        self.entries = [dataclasses.replace(entry, latents=state) for entry, state in backwards]
        self.key, self.complete = key, True

    def _lending(self, number: int, step: Step) -> Step:
        """A step of edits alone, the evaluation of this number."""
        entry, lent = self.entries[number], None
        if len(self.places):
            # Where nobody takes anything, what another step lends stands in, so that nothing compiles anew.
            fetch = entry.fetch or next(other.fetch for other in self.entries if other.fetch)
            lent = Lent(self.places, fetch())
        return step._replace(lent=lent, source_velocity=entry.velocity)

    def _kept(self, tensors: Float[Array, "p g s h k"]) -> Fetch:
        """Where it is kept, and how it comes back from there."""
        if self.chosen == "device":
            return lambda: tensors
        if self.chosen == "host":
            waiting = jax.device_put(tensors, tensors.sharding.with_memory_kind(HOST))
            return functools.partial(jax.device_put, waiting, tensors.sharding)
        self.folder = self.folder or tempfile.TemporaryDirectory(prefix="sflow-kv-")
        path = Path(self.folder.name) / f"{len(self.entries)}.bin"
        np.asarray(on_this_host(tensors)).tofile(path)
        return functools.partial(_read, path, tensors.shape, tensors.dtype, tensors.sharding)


def _read(path: Path, shape: tuple[int, ...], dtype: Any, sharding: Any) -> Float[Array, "p g s h k"]:
    return jax.device_put(np.fromfile(path, dtype).reshape(shape), sharding)


def bank_at(place: Any, placement: Placement) -> SourceBank | None:
    """A bank that is given, or a new one at a place of `BANK_PLACES`; None for "off". SettingError for others."""
    if not isinstance(place, str | SourceBank):
        raise SettingError(
            f"`kv_cache` must be one of {', '.join(BANK_PLACES)} or a SourceBank, found {place!r:.80}"
        )
    check_bank(place, placement)
    if isinstance(place, SourceBank):
        return place
    unwanted = place == BANK_PLACES[0] or placement.step_cache
    return None if unwanted else SourceBank(place)
