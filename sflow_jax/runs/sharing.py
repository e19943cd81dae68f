"""Batches of work that several processes share through a run folder, and that a stopped process finds again."""

import dataclasses
import time
from collections.abc import Callable, Mapping

import numpy as np

from sflow_jax.errors import SettingError
from sflow_jax.runs.folder import RunFolder
from sflow_jax.runs.worker import Worker

Part = dict[str, np.ndarray]
# Seconds without a new part after which a worker no longer waits for the others.
PATIENCE = 1800.0
POLL = 2.0


@dataclasses.dataclass(frozen=True)
class SharedWork:
    """Rounds of batches in a run folder.

    measure: does one batch (its units, an array) and returns the part to be kept; the units are kept with it.
    enter: takes a finished part, whoever did it. report: called with the number of units that were just finished,
    and a note. names: arrays that every part has; what lacks one is no part.
    """

    folder: RunFolder
    worker: Worker
    measure: Callable[[np.ndarray], Part]
    enter: Callable[[Part], None]
    report: Callable[[int, str], None]
    names: tuple[str, ...] = ()

    def do_share(self, name: str, batches: Mapping[int, np.ndarray]) -> dict[int, np.ndarray]:
        """Do this worker's share of a round's batches that are not there yet; those that are left to others."""
        missing, share = self.collect(name, batches), self.worker.share(len(batches))
        self.report(sum(map(len, batches.values())) - sum(map(len, missing.values())), "")
        for number in [number for number in missing if number in share]:
            part = {"units": missing[number], **self.measure(missing[number])}
            self.folder.save(f"{name}-{number:06d}", part)
            self.enter(part)
            self.report(len(missing.pop(number)), "")
        # Of workers that finish at about the same time, the last to save sees the others' parts.
        return self.collect(name, missing)

    def finish(self, name: str, batches: Mapping[int, np.ndarray]) -> None:
        """This worker's share, then the other workers'. SettingError if nothing comes for long."""
        missing = self.do_share(name, batches)
        deadline = time.monotonic() + PATIENCE
        while missing := self.collect(name, before := missing):
            if len(missing) < len(before):
                deadline = time.monotonic() + PATIENCE
            if time.monotonic() > deadline:
                raise SettingError(
                    f"other workers have delivered nothing for {PATIENCE / 60:.0f} minutes ({len(missing)} batches "
                    "are missing); start every worker again with the same command"
                )
            self.report(0, f"waiting for {len(missing)} batches of other workers")
            time.sleep(POLL)

    def collect(self, name: str, batches: Mapping[int, np.ndarray]) -> dict[int, np.ndarray]:
        """Take what the folder has of some batches; those that it lacks."""
        files, missing = self.folder.finished(), {}
        for number, units in batches.items():
            file = files.get(f"{name}-{number:06d}")
            part = None if file is None else self.folder.load(file)
            if part is None or not part.keys() >= {*self.names} or not np.array_equal(part.get("units"), units):
                missing[number] = units
            else:
                self.enter(part)
        return missing
