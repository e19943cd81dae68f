"""How long work tells how far it is, and how it is stopped."""

from collections.abc import Callable

from tqdm.auto import tqdm

Progress = Callable[[int, int, str], None]
"""Called with (done, total, what): how many of `total` steps or pictures are done, and of what, such as
"editing". A note may follow after a colon. May raise `Stopped`, which ends the run."""


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
        if self._bar is None or (self._bar.desc, self._bar.total) != (what, total):
            self.close()
            # Work that goes on where an earlier run stopped does not count as this run's speed.
            self._bar = tqdm(total=total, desc=what, initial=done, dynamic_ncols=True)
        self._bar.set_postfix_str(note, refresh=False)
        self._bar.update(done - self._bar.n)
        if done >= total:
            self.close()

    def close(self) -> None:
        """End the bar that is shown."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None


def as_progress(progress: "bool | Progress") -> Progress:
    """True: a bar; False: nothing; a callable as it is."""
    if callable(progress):
        return progress
    return Bar() if progress else ignore
