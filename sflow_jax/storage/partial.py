"""Temporary names of one's own beside what is being written, and what to do with those of others.

`.NAME.PID-HOST-RANDOM.partial`: the process that writes is known by name, so that what a killed one left behind can
be told from what another is writing at this moment.
"""

import os
import re
import socket
import uuid

from etils import epath

from sflow_jax.storage.paths import is_remote, list_folder


def own_name(path: epath.PathLike) -> epath.Path:
    """A hidden name beside `path` that no other process uses."""
    path = epath.Path(path)
    return path.with_name(f".{path.name}.{os.getpid()}-{_host()}-{uuid.uuid4().hex[:8]}.partial")


def remove_abandoned(path: epath.PathLike) -> list[int]:
    """Remove what processes that are gone left beside `path`; the ids of others that are writing it now.

    Of remote places nothing is known: another machine may be writing.
    """
    path = epath.Path(path)
    return _remove(path.parent, re.escape(path.name))


def remove_all_abandoned(folder: epath.PathLike) -> list[int]:
    """The same of everything in a folder."""
    return _remove(epath.Path(folder), ".*")


def _remove(folder: epath.Path, names: str) -> list[int]:
    if is_remote(folder):
        return []
    name = re.compile(rf"\.{names}\.(\d+)-{re.escape(_host())}-[0-9a-f]{{8}}\.partial")
    writers = []
    for file in list_folder(folder):
        match = name.fullmatch(file.name)
        if match is None or int(match[1]) == os.getpid():
            continue
        if _is_alive(int(match[1])):
            writers.append(int(match[1]))
        elif file.is_dir():
            file.rmtree(missing_ok=True)
        else:
            file.unlink(missing_ok=True)
    return writers


def _host() -> str:
    """This machine's name, as it may stand in a file's."""
    return re.sub(r"\W", "_", socket.gethostname())


def _is_alive(process: int) -> bool:
    if os.name != "posix":  # elsewhere there is no such question
        return True
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:  # somebody else's
        return True
    return True
