"""`sflow` in processes of its own, each forked from one that has imported everything: importing takes longest."""

import atexit
import dataclasses
import multiprocessing
import os
import sys
import tempfile
from multiprocessing.context import ForkServerProcess
from pathlib import Path

PATIENCE = 240.0
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(
    ["pytest", "sflow_jax.commands.vital", "sflow_jax.pipeline", "sflow_jax.vitality.report"]
)


@dataclasses.dataclass(frozen=True)
class Command:
    """A running `sflow`, and the folder of what it says."""

    process: ForkServerProcess
    folder: Path

    @property
    def said(self) -> str:
        """Standard output so far."""
        return (self.folder / "1").read_text()

    @property
    def errors(self) -> str:
        """Standard error so far, progress bars too."""
        return (self.folder / "2").read_text()

    def wait(self) -> int:
        """Exit code, minus the signal's number where it was killed."""
        self.process.join(PATIENCE)
        assert self.process.exitcode is not None, "still running: " + self.errors
        return self.process.exitcode

    def kill(self) -> None:
        """End it at once."""
        self.process.kill()
        self.wait()


def start(*arguments, devices: int = 1) -> Command:
    """`sflow` with these arguments, so many fake CPU devices and the tests' compilation cache."""
    import jax

    folder = Path(tempfile.mkdtemp())
    for stream in ("1", "2"):
        (folder / stream).touch()
    cache = jax.config.jax_compilation_cache_dir
    process = FORKS.Process(target=_run, args=([*map(str, arguments)], devices, cache, folder), daemon=True)
    process.start()
    return Command(process, folder)


def finish(commands: list[Command]) -> list[str]:
    """What each said; all must succeed."""
    codes = [command.wait() for command in commands]
    assert codes == [0] * len(codes), [command.errors for command in commands]
    return [command.said for command in commands]


def _run(arguments: list[str], devices: int, cache: str, folder: Path) -> None:
    import jax

    from sflow_jax.commands.main import main

    for stream in (1, 2):
        os.dup2(os.open(folder / str(stream), os.O_WRONLY), stream)
    os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={devices}"
    os.environ["JAX_COMPILATION_CACHE_DIR"] = cache
    jax.config.update("jax_compilation_cache_dir", cache)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
    sys.argv = ["sflow", *arguments]
    try:
        main()
    finally:
        # A forked process ends without them, and jax leaves the others in one.
        atexit._run_exitfuncs()
