"""Commands killed at one of their changes of the disk: the same command then completes, as if undisturbed.

A change is a rename, a removal, a new folder, or a file opened for writing: there the command dies before it, or
with the file still empty. What compiled libraries write by themselves is not seen, and lies between those.
"""

import json
import os
import random
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from hardness.cases import ACCEPT, PAINT, Box, Case, Step, generate, unchanged_picture
from hardness.runner import run_step
from hardness.settings import COMPILED, EDIT, INVERT, VITAL
from sflow_jax.storage.checksums import verify

KILLED = "killed commands"
# Moments of each command: its first and last changes, and some between.
DRAWN = 5
# Audit events beside "open".
CHANGES = ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.link", "os.symlink")
SAVE = ("--top", "1", "--save", "--force")
# Command → its steps, and the part of the world that it made undisturbed; of conversions, what the result paints.
COMMANDS: dict[str, tuple[Step, str]] = {
    "generate": (generate(), "painted"),
    "edit": (EDIT, "edited"),
    "invert": (INVERT, "inverted"),
    "vital": (VITAL, "swept"),
    "vital --save": ((*VITAL, *SAVE), "swept"),
    "convert": (("sflow-convert", "source", "out"), "painted"),
    "convert --overwrite": (("sflow-convert", "source", "out", "--overwrite"), "painted"),
}


def cases(draw: random.Random) -> Iterator[Case]:
    """All of this file."""
    for name in COMMANDS:
        yield from killed(name, (0.0, *sorted(round(draw.random(), 2) for _ in range(DRAWN)), 1.0))


def evenly(moments: int) -> Iterator[Case]:
    """Every command killed at so many of its changes, evenly chosen: at all, where it has no more."""
    for name in COMMANDS:
        yield from killed(name, (i / (moments - 1) for i in range(moments)))


def killed(name: str, shares: Iterable[float]) -> Iterator[Case]:
    """A command killed at these shares of its changes, and run again."""
    (step, part), converts = COMMANDS[name], name.startswith("convert")
    painting = (("sflow", "generate", "-m", "out", *PAINT),) if converts else ()
    for share in shares:
        yield Case(
            name=f"killed/{name} at {100 * share:.3g} % of its changes",
            category=KILLED,
            steps=(("python", f"from hardness.kills import kill; kill({step!r}, {share})"), step, *painting),
            expects=ACCEPT,
            prepare=_prepared(name),
            needs=("converted", "source", "dino", "photo.png", "prompts.txt", part, *COMPILED),
            changes=("out", "converted") if name == "vital --save" else ("out",),
            check=_whole_checkpoint if converts else _as_undisturbed(part),
            seconds=120.0,
        )


def _prepared(name: str) -> Callable[[Box], None]:
    def prepare(box: Box) -> None:
        box.link("source", "dino", "photo.png", "prompts.txt")
        if name == "vital --save":
            box.copy("converted")
        else:
            box.link("converted")
        if name == "convert --overwrite":
            box.copy("converted", "out")

    return prepare


def kill(step: Step, share: float) -> None:
    """Run a command up to a share of its changes, and end it there; ValueError where it does not get so far."""
    with tempfile.TemporaryDirectory() as scratch:
        place, account = Path(scratch) / "work", Path(scratch) / "changes"
        shutil.copytree(Path.cwd(), place, symlinks=True)
        _run_until(step, place, None, account)
        last = int(account.read_text())
        account.unlink()
        _run_until(step, Path.cwd(), round(share * (last - 1)), account)
        if account.exists():
            raise ValueError(f"not killed: {account.read_text()} of {last} changes")


def _run_until(step: Step, folder: Path, end: int | None, account: Path) -> None:
    """Run a command in a child, which dies at the change of this number, or accounts for their number."""
    child = os.fork()
    if child:
        os.waitpid(child, 0)
        return
    os.chdir(folder)
    changes = 0

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal changes
        emptied = event == "open" and bool(arguments[2] & (os.O_CREAT | os.O_TRUNC))
        if not (emptied or event in CHANGES) or not _below(folder, event, arguments):
            return
        for empty in (False, True)[: 1 + emptied]:
            if changes == end:
                if empty:
                    Path(os.fsdecode(arguments[0])).write_bytes(b"")
                os._exit(9)
            changes += 1

    sys.addaudithook(watch)
    run_step(step, {})
    total, end = changes, None
    account.write_text(str(total))
    os._exit(0)


def _below(folder: Path, event: str, arguments: tuple[Any, ...]) -> bool:
    """Whether the first argument is a path in a folder."""
    path, last = arguments[0], arguments[-1]
    if not isinstance(path, str | bytes | os.PathLike):
        return False
    # Some are relative to an open folder, whose number is the last argument.
    base = f"/proc/self/fd/{last}" if event != "open" and isinstance(last, int) and last >= 0 else "."
    parent, _ = os.path.split(os.path.join(os.path.realpath(base), os.fsdecode(path)))
    return f"{os.path.realpath(parent)}/".startswith(f"{os.path.realpath(folder)}/")


def _whole_checkpoint(box: Box) -> str | None:
    verify(box.work / "out", ValueError, lambda _: None)
    return unchanged_picture(box)


def _as_undisturbed(part: str) -> Callable[[Box], str | None]:
    """A check that `out` is what the same command wrote into a part of the world."""

    def check(box: Box) -> str | None:
        places = [box.work / "out", box.world / part]
        if part == "swept":
            scores = [json.loads((place / "scores.json").read_text())["layers"] for place in places]
            return None if scores[0] == scores[1] else "the scores differ"
        names = [sorted(str(x.relative_to(place)) for x in place.rglob("*")) for place in places]
        if names[0] != names[1]:
            return f"other files: {sorted({*names[0]} ^ {*names[1]})[:5]}"
        for picture in places[1].glob("*.png"):
            if not np.array_equal(*(np.asarray(Image.open(place / picture.name)) for place in places)):
                return f"{picture.name} differs"
        return None

    return check
