"""`sflow` in processes of its own."""

import os
import subprocess
import sys

from conftest import CACHE

PATIENCE = 240.0
PROGRAM = "from sflow_jax.commands.main import main; main()"


def environment(devices: int = 1) -> dict[str, str]:
    """This one's, with so many fake CPU devices and the tests' compilation cache."""
    return os.environ | {
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": str(CACHE),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.2",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
    }


def start(*arguments, devices: int = 1) -> subprocess.Popen:
    """`sflow` with these arguments."""
    command = [sys.executable, "-c", PROGRAM, *map(str, arguments)]
    return subprocess.Popen(
        command, env=environment(devices), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def finish(processes: list[subprocess.Popen]) -> list[str]:
    """What each said; all must succeed."""
    told = [process.communicate(timeout=PATIENCE) for process in processes]
    assert [process.returncode for process in processes] == [0] * len(processes), told
    return [said for said, _ in told]
