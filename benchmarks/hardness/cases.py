"""What a case is: a folder prepared with a bad input, commands to run there, and what must become of it."""

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

REFUSE, ACCEPT, EITHER = "refuse", "accept", "either"
# A command is "sflow" or "sflow-convert" and its arguments; or "python" and a text that is executed.
Step = tuple[str, ...]


class Box:
    """The folder of one case. work: where it runs. world: what all cases share, only to be read.

    names: what a Python step left behind, by name.
    """

    def __init__(self, root: Path, world: Path):
        self.root, self.work, self.world = root, root / "work", world
        self.names: dict[str, Any] = {}

    def copy(self, part: str, name: str | None = None) -> Path:
        """A copy of a shared file or folder, to be changed."""
        source, target = self.world / part, self.work / (name or part)
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.is_dir():
            shutil.copytree(source, target, dirs_exist_ok=True)
        else:
            shutil.copyfile(source, target)
        return target

    def link(self, *parts: str) -> None:
        """Shared files or folders under their own names."""
        for part in parts:
            (self.work / part).symlink_to(self.world / part)

    def write(self, name: str, content: bytes | str) -> Path:
        """A file of this content; its folder is made, and what has its name goes."""
        path = self.work / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_symlink() or path.is_file():
            path.unlink()
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    def change_json(self, name: str, change: Callable[[Any], Any]) -> None:
        """A JSON file as `change` returns it, or leaves it where that returns None."""
        content = json.loads((self.work / name).read_text())
        changed = change(content)
        self.write(name, json.dumps(content if changed is None else changed))


Prepare = Callable[[Box], None]
Check = Callable[[Box], str | None]


@dataclasses.dataclass(frozen=True)
class Case:
    """One bad input (or an unusual good one).

    name: the same at every run with one seed. steps: the first is judged; the others must succeed where it did.
    expects: refuse, accept or either. prepare: writes the input. setup: Python executed before the clock starts.
    names: words of which the message of a refusal must have one (the setting or the file). needs: parts of the
    world. creates: names in the folder that an accepted command may leave. changes: names that it may change.
    keeps: names that even a refusal may leave (a sweep that goes on later). check: of an accepted case, what is
    wrong, or None. terminal: whether output goes to a terminal. seconds: that it may take.
    """

    name: str
    category: str
    steps: tuple[Step, ...]
    expects: str
    prepare: Prepare = lambda box: None
    setup: str = ""
    names: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()
    creates: tuple[str, ...] = ("out",)
    changes: tuple[str, ...] = ()
    keeps: tuple[str, ...] = ()
    check: Check = lambda box: None
    terminal: bool = False
    seconds: float = 20.0

    @property
    def command(self) -> str:
        """Its steps as one line."""
        return " && ".join(" ".join(map(shown, step)) for step in self.steps)


def shown(argument: str) -> str:
    """An argument as a reader can take it in: short, quoted where it must be."""
    text = argument if len(argument) <= 120 else f"{argument[:100]}… ({len(argument)} characters)"
    plain = text.isprintable() and text and not set(text) & set(" \"'\\;&|<>$*?()")
    return text if plain else ascii(text)


MODEL = ("-m", "converted")
PAINT = ("-p", "a cat", "--steps", "1", "--out", "painted")


def generate(*options: str, model: str = "converted") -> Step:
    """Paint one step of one picture with the small model."""
    return ("sflow", "generate", "-m", model, "-p", "a cat", "--steps", "1", "--out", "out", *options)


def alive(box: Box) -> str | None:
    """What is wrong with the picture in `painted` or `out`: not finite, or all one colour."""
    folder = next(box.work / name for name in ("painted", "out") if (box.work / name / "generate.json").exists())
    text = (folder / "generate.json").read_text()
    if "NaN" in text or "Infinity" in text:
        return "generate.json has numbers that are not finite"
    levels = np.asarray(Image.open(folder / "picture-1.png"))
    if levels.max() == levels.min():
        return f"the picture is all {levels.max()}"
    return None


def same_picture(part: str) -> Check:
    """A check that the picture in `painted` or `out` is that of a part of the world."""

    def check(box: Box) -> str | None:
        folder = next(box.work / x for x in ("painted", "out") if (box.work / x / "generate.json").exists())
        found, right = (np.asarray(Image.open(x / "picture-1.png"), int) for x in (folder, box.world / part))
        if found.shape != right.shape:
            return f"the picture is {found.shape}, not {right.shape}"
        distance = np.abs(found - right).max()
        return f"the picture differs by up to {distance} levels from the right one" if distance > 1 else None

    return check


# What an undamaged model paints.
unchanged_picture = same_picture("painted")
