"""Saying that a step is being compiled, which may take a minute."""

import contextlib
from collections.abc import Iterator
from typing import Any

import jax

from sflow_jax.progress import Progress

# What jax calls the compilation of a program.
COMPILING = "/jax/core/compile/backend_compile_duration"


@contextlib.contextmanager
def naming_compilation(progress: Progress, program: str) -> Iterator[Progress]:
    """The same progress, which also hears, as a note to its last event, when `program` begins to be compiled."""
    last = 0, 1, program

    def heard(done: int, total: int, what: str) -> None:
        nonlocal last
        last = done, total, what.partition(": ")[0]
        progress(done, total, what)

    def begins(event: str, value: float, **about: Any) -> None:
        if event == COMPILING and program in str(about.get("fun_name")):
            done, total, what = last
            progress(done, total, f"{what}: compiling")

    jax.monitoring.register_scalar_listener(begins)
    try:
        yield heard
    finally:
        jax.monitoring.unregister_scalar_listener(begins)
