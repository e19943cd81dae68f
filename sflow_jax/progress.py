"""How long work tells how far it is, and how it is stopped."""

import contextlib
import sys
import time
from collections.abc import Callable, Iterator

from tqdm.auto import tqdm

Progress = Callable[[int, int, str], None]
"""Called with (done, total, what): how many of `total` steps or pictures are done, and of what, such as
"editing". A note may follow after a colon: "editing: compiling". May raise `Stopped`, which ends the run."""

# Seconds before the first line of a log, between two others at least, and after which one comes in any case.
AT_FIRST, SOON, LATE = 1.0, 5.0, 30.0
# From so many on, such as bytes, a bar counts in thousands, millions and so on.
MANY = 100_000


class Stopped(Exception):
    """Raised by a progress callable to end a run; what a run folder holds by then stays."""


def ignore(done: int, total: int, what: str) -> None:
    """No progress is shown."""


class Bar:
    """Progress as one bar after another on the terminal (standard error)."""

    def __init__(self) -> None:
        self._bar: tqdm | None = None

    def __call__(self, done: int, total: int, what: str) -> None:
        what, _, note = what.partition(": ")
        if self._bar is None or self._bar.desc != what:
            self.close()
            # Work that goes on where an earlier run stopped does not count as this run's speed.
            scaled = total >= MANY
            self._bar = tqdm(total=total, desc=what, initial=done, dynamic_ncols=True, unit_scale=scaled)
        self._bar.total = total
        # A note is worth drawing at once: what it names may take long.
        self._bar.set_postfix_str(note, refresh=bool(note) and done == self._bar.n)
        self._bar.update(done - self._bar.n)
        if done >= total:
            self.close()

    def close(self) -> None:
        """End the bar that is shown."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None


class Lines:
    """Progress in a log file: a plain line when it goes on, at every tenth or half minute, and at the end."""

    def __init__(self) -> None:
        self._what, self._done, self._start, self._shown = "", 0, 0.0, 0.0

    def __call__(self, done: int, total: int, what: str) -> None:
        what, _, note = what.partition(": ")
        now = time.monotonic()
        if what != self._what:
            self._what, self._done, self._start, self._shown = what, done, now, now
        further, since = 10 * (done - self._done) >= total, now - self._shown
        begun = self._shown == self._start and done > self._done
        if done >= total or (begun and since >= AT_FIRST) or (further and since >= SOON) or since >= LATE:
            notes = f" ({note})" if note else ""
            print(f"{what}: {done:,} of {total:,}, {now - self._start:.0f} s{notes}", file=sys.stderr, flush=True)
            self._done, self._shown = done, now
        if done >= total:
            self._what = ""


def on_terminal() -> "Bar | Lines":
    """A bar where one can be drawn over and over: on a terminal, or in a notebook."""
    return Bar() if sys.stderr.isatty() or "ipykernel" in sys.modules else Lines()


def as_progress(progress: "bool | Progress") -> Progress:
    """True: a bar, or lines of a log; False: nothing; a callable as it is."""
    if callable(progress):
        return progress
    return on_terminal() if progress else ignore


@contextlib.contextmanager
def counted(total: int, what: str, progress: "bool | Progress") -> Iterator[Callable[[int], None]]:
    """Work in parts of any size, such as bytes: what is yielded takes the size of every part that is done."""
    shown, done = as_progress(progress), 0

    def add(part: int) -> None:
        nonlocal done
        done += part
        shown(min(done, total - 1), total, what)

    yield add
    shown(total, total, what)
