"""Several processes that know of each other (`jax.distributed`): TPU pods, SLURM, or named by hand."""

import importlib.metadata
import re
import socket

import jax

from sflow_jax.errors import SettingError
from sflow_jax.settings import AUTOMATIC

PACKAGES = ("sflow_jax", "jax", "flax")


def join(coordinator: str, process: tuple[int, int] | None) -> None:
    """Meet the other processes; must come before anything touches a device.

    coordinator: HOST:PORT of the first process, or "auto" where the cluster tells (TPU pods, SLURM, MPI).
    process: index from 0 and number of processes, needed beside HOST:PORT and only there.
    ValueError where they do not fit, or the others cannot be met.
    """
    if (coordinator == AUTOMATIC) != (process is None):
        raise SettingError("give `process` such as 1/4 beside `coordinator` HOST:PORT, and not beside auto")
    index, count = process or (None, None)
    if coordinator != AUTOMATIC:
        check_address(coordinator, own=index == 0)
    # jax would listen on every interface; whoever reaches the port can join.
    bind = coordinator if index == 0 else None
    try:
        jax.distributed.initialize(
            None if process is None else coordinator, count, index, coordinator_bind_address=bind
        )
    except (ValueError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise SettingError(
            f"cannot join the other processes ({coordinator}: {reason}); "
            "name them with `coordinator` HOST:PORT and `process` 1/4"
        ) from error


def check_address(coordinator: str, own: bool) -> None:
    """SettingError unless it is HOST:PORT, of this machine and free where it is the process's `own`.

    jax would end the whole process, without a word of why.
    """
    parts = re.fullmatch(r"(?P<host>[A-Za-z0-9._-]{1,253}|\[[0-9A-Fa-f:.]+\]):(?P<port>[0-9]{1,5})", coordinator)
    if not parts or not 0 < int(parts["port"]) < 2**16:
        raise SettingError(f"`coordinator` must be HOST:PORT or auto, found {coordinator[:80]!r}")
    host, port = parts["host"].strip("[]"), int(parts["port"])
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        if own:
            socket.create_server(address[:2], family=family).close()
    except (OSError, UnicodeError) as error:
        what = "cannot listen at" if own else "cannot find"
        raise SettingError(
            f"{what} `coordinator` {coordinator} ({getattr(error, 'strerror', None) or error}): name the first "
            "process's HOST:PORT"
        ) from error


def describe_devices() -> str:
    """How many devices of which kind all processes have together, as results tell it."""
    return f"{jax.device_count()} × {jax.devices()[0].device_kind}"


def package_versions() -> dict[str, str]:
    """Of what numbers depend on."""
    return {name: importlib.metadata.version(name) for name in PACKAGES}
