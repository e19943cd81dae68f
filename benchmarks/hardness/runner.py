"""Runs cases, each in a forked child of this process, in which everything is imported and no device is touched yet.

A child prepares its folder, says that it is ready (from there time and memory count), runs its commands, and leaves
an account of them. Children are watched from outside: what runs too long or grows too large is ended.
"""

import contextlib
import dataclasses
import hashlib
import importlib
import itertools
import json
import os
import resource
import shutil
import signal
import stat
import sys
import tempfile
import threading
import time
import traceback
import tty
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from hardness.cases import Box, Case, Step

# Seconds of preparing a folder, and bytes that a case may take once it is prepared.
PREPARING, GROWTH = 120.0, 1 << 30
ADDRESSES = 12 << 30
WATCH = 0.03
IMPORTED = (
    *(
        f"sflow_jax.commands.{x}"
        for x in ("main", "convert", "demo", "edit", "generate", "info", "invert", "vital")
    ),
    *(
        "sflow_jax.pipeline",
        "sflow_jax.vitality.report",
        "sflow_jax.vitality.comparison",
        "sflow_jax.vitality.find",
    ),
    *("sflow_jax.vitality.dry_run", "sflow_jax.planning.costs", "sflow_jax.planning.lowering"),
    *("sflow_convert.features", "sflow_convert.job", "sflow_convert.layouts", "sflow_jax.toyworld.reader"),
    *("transformers.models.auto.tokenization_auto", "transformers.models.clip.tokenization_clip"),
    *("matplotlib.pyplot", "PIL.Image", "PIL.ImageCms"),
)
Snapshot = dict[str, str]
NUMBERS = itertools.count()


@dataclasses.dataclass(frozen=True)
class Ended:
    """What became of a case. codes: exit codes of its steps, as far as they ran. fault: what its check objects to.

    stopped: "time", "memory", "signal N" or nothing. changed: paths that appeared, went or changed.
    """

    codes: tuple[int, ...]
    output: str
    errors: str
    fault: str | None
    stopped: str
    changed: tuple[str, ...]
    seconds: float
    growth: int


def warm_up(cache: Path) -> None:
    """Set the environment that all cases share, and import everything."""
    os.environ |= {
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": str(cache / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "XDG_CACHE_HOME": str(cache),
        "MPLCONFIGDIR": str(cache / "matplotlib"),
        "TF_CPP_MIN_LOG_LEVEL": "2",
        "COLUMNS": "116",
    }
    cache.mkdir(parents=True, exist_ok=True)
    for module in IMPORTED:
        importlib.import_module(module)


def run_cases(
    cases: Iterable[Case], world: Path, place: Path, jobs: int, report: Callable[[Case, Ended], None]
) -> None:
    """Run all, `jobs` at once, in folders of `place`; each is reported as it ends."""
    waiting, running = list(cases)[::-1], []
    while waiting or running:
        while waiting and len(running) < jobs:
            running.append(Child(waiting.pop(), world, place))
        time.sleep(WATCH)
        for child in list(running):
            if child.over():
                running.remove(child)
                report(child.case, child.ended())


def run_command(command: Step, folder: Path) -> None:
    """One command in a child of its own; RuntimeError with its errors where it fails."""
    case = Case("world", "world", (command,), "accept")
    with tempfile.TemporaryDirectory() as place:
        child = Child(case, folder, Path(place), work=folder)
        while not child.over():
            time.sleep(WATCH)
        ended = child.ended()
        if ended.codes != (0,):
            raise RuntimeError(f"{command}: {ended}")


class Child:
    """One running case."""

    def __init__(self, case: Case, world: Path, place: Path, work: Path | None = None):
        self.case, self.root = case, place / f"case{next(NUMBERS)}"
        self.box = Box(self.root, world)
        if work is not None:
            self.box.work = work
        for folder in (self.root, self.box.work, self.root / "tmp", self.root / "home"):
            folder.mkdir(parents=True, exist_ok=True)
        self.start, self.stopped, self.largest, self.status = time.monotonic(), "", 0, None
        self.watched = work is None
        # The terminal's two ends, where the case wants one.
        self.ends = os.openpty() if case.terminal else None
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.process = os.fork()
        if self.process == 0:
            _child(case, self.box, self.ends, self.watched)
        self.reader = None if self.ends is None else _read_terminal(self.ends, self.root / "err")

    @property
    def ready(self) -> dict | None:
        """Since when its commands run, and what it held then; None while it prepares."""
        with contextlib.suppress(FileNotFoundError, ValueError):
            return json.loads((self.root / "ready").read_text())
        return None

    def over(self) -> bool:
        """Whether it has ended; ends it where it takes too much."""
        process, status = os.waitpid(self.process, os.WNOHANG)
        if process:
            self.status = status
            return True
        ready, now = self.ready, time.monotonic()
        if ready is None:
            if now - self.start > PREPARING:
                self._stop("time to prepare")
            return False
        self.start = ready["time"]
        self.largest = max(self.largest, _resident(self.process) - ready["resident"])
        if self.largest > GROWTH:
            self._stop("memory")
        elif now - self.start > self.case.seconds and self.watched:
            self._stop("time")
        return False

    def _stop(self, reason: str) -> None:
        self.stopped = self.stopped or reason
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process, signal.SIGKILL)

    def ended(self) -> Ended:
        """What became of it; its folder is removed."""
        seconds = time.monotonic() - self.start
        if self.reader is not None:
            self.reader.join(5)
        account = _account(self.root / "result.json")
        if self.ready is None and not self.stopped:
            self.stopped = "preparation"
        if os.WIFSIGNALED(self.status) and not self.stopped:
            self.stopped = f"signal {os.WTERMSIG(self.status)}"
        code = os.WEXITSTATUS(self.status) if os.WIFEXITED(self.status) else -1
        changed = account.get("changed")
        if changed is None and self.watched and (self.root / "before.json").exists():
            changed = list(differences(json.loads((self.root / "before.json").read_text()), snapshot(self.root)))
        ended = Ended(
            codes=tuple(account.get("codes", [code])),
            output=_text(self.root / "out"),
            errors=_text(self.root / "err"),
            fault=account.get("fault"),
            stopped=self.stopped,
            changed=tuple(changed or ()),
            seconds=seconds,
            growth=self.largest,
        )
        if self.watched:
            shutil.rmtree(self.root, onerror=_force)
        return ended


def _child(case: Case, box: Box, ends: tuple[int, int] | None, watched: bool) -> None:
    """All that happens in the forked process; never returns."""
    code = 70
    try:
        os.setsid()
        _redirect(box.root, ends)
        os.environ |= {"HOME": str(box.root / "home"), "TMPDIR": str(box.root / "tmp")}
        tempfile.tempdir = None
        os.chdir(box.work)
        case.prepare(box)
        _execute(case.setup, box.names)
        if watched:
            (box.root / "before.json").write_text(json.dumps(snapshot(box.root)))
        ready = json.dumps({"time": time.monotonic(), "resident": _resident(os.getpid())})
        (box.root / "ready.new").write_text(ready)
        (box.root / "ready.new").rename(box.root / "ready")
        resource.setrlimit(resource.RLIMIT_AS, (_addresses() + ADDRESSES,) * 2)
        result = _run_steps(case, box)
        if watched:
            before = json.loads((box.root / "before.json").read_text())
            result["changed"] = list(differences(before, snapshot(box.root)))
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.getrlimit(resource.RLIMIT_FSIZE)[1],) * 2)
        (box.root / "result.json").write_text(json.dumps(result))
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(Exception):
                stream.flush()
        os._exit(code)


def _run_steps(case: Case, box: Box) -> dict:
    """Exit codes until one fails, and what the check says after the last."""
    codes: list[int] = []
    for step in case.steps:
        codes.append(run_step(step, box.names))
        if codes[-1]:
            break
    fault = None
    if codes == [0] * len(case.steps):
        try:
            fault = case.check(box)
        except Exception as error:
            fault = f"the check cannot be made: {error!r}"
    return {"codes": codes, "fault": fault}


def run_step(step: Step, names: dict[str, Any]) -> int:
    """One command in this process, as its script would run it; its exit code."""
    program, *arguments = step
    if program == "python":
        return _python(arguments[0], names)
    entry = importlib.import_module(f"sflow_jax.commands.{'main' if program == 'sflow' else 'convert'}").main
    sys.argv = [program, *arguments]
    try:
        entry()
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else 0 if stop.code is None else 1
    except BaseException:
        traceback.print_exc()
        return 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
    return 0


def _python(text: str, names: dict[str, Any]) -> int:
    """A call of the library: errors of a user's making are ValueError, or TypeError for another type."""
    try:
        _execute(text, names)
    except (ValueError, TypeError) as error:
        frames = traceback.extract_tb(error.__traceback__)
        by_hand = isinstance(error, ValueError) or "raise " in (frames[-1].line or "")
        if by_hand:
            print(f"Error: {error}", file=sys.stderr)
            return 2
        traceback.print_exc()
        return 1
    except AssertionError as error:
        names["fault"] = str(error)
        print(f"wrong result: {error}", file=sys.stderr)
        return 3
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def _execute(text: str, names: dict[str, Any]) -> None:
    if text:
        exec(compile(text, "case", "exec"), names)


def _redirect(root: Path, ends: tuple[int, int] | None) -> None:
    """Output into files, or into a terminal; nothing to read from."""
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for number, name in ((1, "out"), (2, "err")):
        place = ends[1] if ends else os.open(root / name, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        os.dup2(place, number)
    if ends:
        tty.setraw(2)
    sys.stdin = open(0, closefd=False)
    sys.stdout = sys.__stdout__ = open(1, "w", closefd=False, encoding="utf-8", errors="surrogateescape")
    sys.stderr = sys.__stderr__ = open(
        2, "w", closefd=False, encoding="utf-8", errors="backslashreplace", buffering=1
    )


def _read_terminal(ends: tuple[int, int], file: Path) -> threading.Thread:
    """Keep what a terminal shows in a file, until the child closes it."""
    os.close(ends[1])

    def read() -> None:
        with open(file, "wb") as output, contextlib.suppress(OSError):
            while data := os.read(ends[0], 65536):
                output.write(data)
        os.close(ends[0])

    thread = threading.Thread(target=read)
    thread.start()
    return thread


def snapshot(root: Path) -> Snapshot:
    """Path → kind, rights and content of all below `work` and `tmp`; links are not followed."""
    return {str(path.relative_to(root)): _kind(path) for top in ("work", "tmp") for path in _walk(root / top)}


def _walk(folder: Path) -> Iterator[Path]:
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        yield Path(entry.path)
        if entry.is_dir(follow_symlinks=False):
            yield from _walk(Path(entry.path))


def _kind(path: Path) -> str:
    state = path.lstat()
    if stat.S_ISLNK(state.st_mode):
        return f"link to {os.readlink(path)}"
    if not stat.S_ISREG(state.st_mode):
        return f"{stat.filemode(state.st_mode)}"
    digest = hashlib.sha1()
    with path.open("rb") as file:
        while data := file.read(1 << 22):
            digest.update(data)
    return f"{stat.filemode(state.st_mode)} {state.st_size} {digest.hexdigest()}"


def differences(before: Snapshot, after: Snapshot) -> Iterator[str]:
    """`+ path`, `- path` and `~ path` of what appeared, went and changed."""
    for path in sorted(before.keys() | after.keys()):
        if path not in before:
            yield f"+ {path}"
        elif path not in after:
            yield f"- {path}"
        elif before[path] != after[path]:
            yield f"~ {path}"


def _resident(process: int) -> int:
    """Bytes in memory; 0 where it has ended."""
    with contextlib.suppress(OSError, IndexError):
        return int(Path(f"/proc/{process}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return 0


def _addresses() -> int:
    return int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")


def _text(file: Path) -> str:
    with contextlib.suppress(FileNotFoundError), file.open("rb") as opened:
        return opened.read(1 << 20).decode(errors="replace")
    return ""


def _account(file: Path) -> dict:
    with contextlib.suppress(FileNotFoundError, ValueError):
        return json.loads(file.read_text())
    return {}


def _force(function: Callable, path: str, error: object) -> None:
    """Make writable what a case made read-only, and try again."""
    os.chmod(Path(path).parent, 0o700)
    with contextlib.suppress(OSError):
        os.chmod(path, 0o700)
        function(path)
