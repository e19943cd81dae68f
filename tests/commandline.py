"""The commands in this process."""

import pytest

from sflow_jax.commands import console, convert, main


def run(*arguments) -> int:
    """Exit code of `sflow` (0 when it returns)."""
    return _run(main.main, arguments)


def run_convert(*arguments) -> int:
    """Exit code of `sflow-convert`."""
    return _run(convert.main, arguments)


def _run(entry, arguments) -> int:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["command", *map(str, arguments)])
        # Tests keep their own compilation cache.
        patch.setattr(console, "use_compilation_cache", lambda: None)
        # An interruption is pytest's.
        patch.setattr(console, "stop_on_signals", lambda: None)
        try:
            entry()
        except SystemExit as stop:
            return stop.code or 0
    return 0
