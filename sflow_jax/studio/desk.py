"""One model and many visitors: who paints, who waits, and who wants to stop."""

import queue
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jaxtyping import Float

from sflow_jax.painter import OnStep, Painter
from sflow_jax.pictures.canvas import Canvas
from sflow_jax.progress import Stopped

# Seconds between previews, which cost a decoding each.
PREVIEW_SECONDS = 0.7


@dataclass(frozen=True)
class Moment:
    """How far the work is. pictures: what the step's latents decode to, now and then."""

    done: int
    total: int
    what: str
    pictures: Float[np.ndarray, "b y x 3"] | None = None


@dataclass(frozen=True)
class Done:
    """The work's result."""

    result: Any


@dataclass
class Watch:
    """Where work tells its progress and learns that it is to stop."""

    moments: queue.SimpleQueue
    stop: threading.Event
    now: Moment = Moment(0, 0, "waiting")
    previewed: float = field(default_factory=time.monotonic)

    def progress(self, done: int, total: int, what: str) -> None:
        """As `sflow_jax.progress` has it; raises Stopped."""
        if self.stop.is_set():
            raise Stopped
        self.now = Moment(done, total, what)
        self.moments.put(self.now)

    def preview(self, painter: Painter, canvas: Canvas) -> OnStep:
        """What shows a step's latents, but not more often than every `PREVIEW_SECONDS`."""

        def on_step(step: int, latents: Any) -> None:
            if time.monotonic() - self.previewed < PREVIEW_SECONDS:
                return
            pictures = painter.decode(latents, canvas)
            self.moments.put(Moment(self.now.done, self.now.total, self.now.what, pictures))
            self.previewed = time.monotonic()

        return on_step


class Desk:
    """Lets one visitor's work run at a time. A visitor is any name, such as a browser tab's."""

    def __init__(self) -> None:
        self._busy = threading.Lock()
        self._wishes: dict[str, threading.Event] = {}

    def ask(self, visitor: str) -> None:
        """Before the visitor's work waits for its turn: from now on it can be stopped."""
        self.stop(visitor)
        self._wishes[visitor] = threading.Event()

    def stop(self, visitor: str) -> bool:
        """End the visitor's work, waiting or running, at its next step; whether there was any."""
        wish = self._wishes.get(visitor)
        if wish is not None:
            wish.set()
        return wish is not None

    def run(self, visitor: str, work: Callable[[Watch], Any]) -> Iterator[Moment | Done]:
        """Moments of the work as they come, the late ones only, then `Done`; raises what the work raises.

        `Stopped` where the visitor stopped it. Whoever leaves off listening stops it too.
        """
        if visitor not in self._wishes:
            self.ask(visitor)
        wish = self._wishes[visitor]
        watch = Watch(queue.SimpleQueue(), wish)
        threading.Thread(target=self._work, args=(work, watch), daemon=True).start()
        try:
            yield from _moments(watch.moments)
        finally:
            wish.set()
            if self._wishes.get(visitor) is wish:
                del self._wishes[visitor]

    def _work(self, work: Callable[[Watch], Any], watch: Watch) -> None:
        with self._busy:
            try:
                watch.progress(0, 0, "begins")
                watch.moments.put(Done(work(watch)))
            except BaseException as error:  # handed to the listener, who raises it
                watch.moments.put(error)


def _moments(moments: queue.SimpleQueue) -> Iterator[Moment | Done]:
    """The newest moment whenever somebody listens, previews before plain ones; ends with Done or an error."""
    while True:
        waiting = [moments.get()]
        while not moments.empty():
            waiting.append(moments.get())
        if isinstance(waiting[-1], BaseException):
            raise waiting[-1]
        if isinstance(waiting[-1], Done):
            yield waiting[-1]
            return
        seen = [moment for moment in waiting if moment.pictures is not None]
        newest = waiting[-1]
        yield Moment(newest.done, newest.total, newest.what, seen[-1].pictures if seen else None)
