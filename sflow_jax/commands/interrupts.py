"""Ctrl-C, SIGTERM and SIGHUP: what is half-done is undone, whatever the program is doing at that moment."""

import gc
import signal
from types import FrameType

# Signal → exit code, as a shell would say it.
SIGNALS = {getattr(signal, name): 128 + number for name, number in (("SIGINT", 2), ("SIGTERM", 15), ("SIGHUP", 1))
           if hasattr(signal, name)}  # fmt: skip
# Seconds until a signal is tried again that came where exceptions are swallowed.
AGAIN = 0.05


class Interrupted(BaseException):
    """The user, or the system, wants the program to stop. code: its exit code, None while nothing came."""

    code: int | None = None


def stop_on_signals() -> None:
    """Raise `Interrupted` in the main thread on the first signal; a second one ends the program at once."""
    for number in SIGNALS:
        signal.signal(number, _stop)


def _stop(number: int, frame: FrameType | None) -> None:
    Interrupted.code = SIGNALS[number]
    if _is_swallowed(frame) and hasattr(signal, "setitimer"):
        signal.signal(signal.SIGALRM, lambda _, where: _stop(number, where))
        signal.setitimer(signal.ITIMER_REAL, AGAIN)
        return
    signal.signal(number, signal.SIG_DFL)
    raise Interrupted


def _is_swallowed(frame: FrameType | None) -> bool:
    """Whether an exception raised here would be printed and forgotten: finalisers, garbage collection."""
    callbacks = {getattr(callback, "__code__", None) for callback in gc.callbacks}
    while frame is not None:
        if frame.f_code in callbacks or frame.f_code.co_name == "__del__":
            return True
        frame = frame.f_back
    return False
