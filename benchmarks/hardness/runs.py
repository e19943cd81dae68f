"""Inversions, and the folders of sweeps: their files damaged, and resumed with other settings."""

import dataclasses
import hashlib
import io
import json
import os
import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from PIL import Image
from safetensors.numpy import load, save

from hardness.cases import ACCEPT, EITHER, REFUSE, Box, Case, Step
from hardness.conversions import raw_file
from hardness.documents import (
    COUNT,
    NUMBER,
    OPTIONAL,
    POSITIVE,
    SIZE,
    SIZES,
    TEXT,
    UNREAD,
    Document,
    value_cases,
    whole_cases,
)

INVERSIONS, SWEEPS, RESUMED = "inversions", "sweeps' files", "sweeps resumed"
FILE = "inversion/inversion.safetensors"
EDIT: Step = (
    *("sflow", "edit", "-m", "converted", "--inversion", "inversion", "-p", "a cat", "-e", "a dog"),
    *("--layers", "0-1", "--out", "out"),
)
COMPARE: Step = ("sflow", "vital", "--compare", "run", "run2")
SWEEP: Step = (
    *("sflow", "vital", "-m", "converted", "--features", "dino", "--limit", "2", "--steps", "1"),
    *("--layers", "0-2", "--batch", "4", "--prompts", "prompts.txt", "--out", "run"),
)


def cases(draw: random.Random) -> Iterator[Case]:
    """All of this file."""
    yield from inversion_cases(draw)
    yield from scores_cases(draw)
    yield from manifest_cases(draw)
    yield from part_cases(draw)
    yield from resumed_cases()


def read_inversion(box: Box) -> tuple[dict, dict]:
    """Tensors and settings."""
    data = (box.work / FILE).read_bytes()
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    return load(data), json.loads(header["__metadata__"]["settings"])


def write_inversion(box: Box, tensors: dict, settings: Any) -> None:
    """The same, changed; settings of None leave the metadata out."""
    text = settings if isinstance(settings, str) else json.dumps(settings)
    box.write(FILE, save(tensors, metadata=None if settings is None else {"settings": text}))


def _edited_alive(box: Box) -> str | None:
    for name in ("source.png", "edit-1.png"):
        levels = np.asarray(Image.open(box.work / "out" / name))
        if levels.max() == levels.min():
            return f"{name} is all {levels.max()}"
    text = (box.work / "out/edit.json").read_text()
    return "edit.json has numbers that are not finite" if "NaN" in text or "Infinity" in text else None


def _inversion(name: str, expects: str, change: Callable[[Box], None], *names: str, steps: Step = EDIT) -> Case:
    def prepare(box: Box) -> None:
        box.link("converted")
        box.copy("inversion")
        change(box)

    return Case(
        name=f"inversion/{name}",
        category=INVERSIONS,
        steps=(steps,),
        expects=expects,
        prepare=prepare,
        names=("inversion", *names),
        needs=("converted", "inversion"),
        check=_edited_alive,
    )


def inversion_cases(draw: random.Random) -> Iterator[Case]:
    """Tensors, settings, the file."""
    for name, change in _tensor_changes(draw).items():
        expects = EITHER if name.startswith(("as ", "3e38")) else REFUSE
        yield _inversion(name, expects, lambda box, change=change: write_inversion(box, *_changed(box, change)))
    for name, (expects, change) in _setting_changes(draw).items():

        def settle(box: Box, change: Any = change) -> None:
            tensors, settings = read_inversion(box)
            write_inversion(box, tensors, change(settings))

        yield _inversion(name, expects, settle)
    yield from _inversion_files(draw)


def _changed(box: Box, change: Callable[[dict], dict]) -> tuple[dict, dict]:
    tensors, settings = read_inversion(box)
    return change(tensors), settings


def _tensor_changes(draw: random.Random) -> dict[str, Callable[[dict], dict]]:
    """Name → a change of the tensors."""
    place = draw.random()

    def with_value(name: str, value: float) -> Callable[[dict], dict]:
        def change(tensors: dict) -> dict:
            tensor = tensors[name].copy()
            tensor.reshape(-1)[int(place * tensor.size)] = value
            return tensors | {name: tensor}

        return change

    return {
        "a NaN in the trajectory": with_value("trajectory", np.nan),
        "an infinity in the trajectory": with_value("trajectory", -np.inf),
        "3e38 in the trajectory": with_value("trajectory", 3e38),
        "a NaN in the sigmas": with_value("sigmas", np.nan),
        "a state less": lambda x: x | {"trajectory": x["trajectory"][:-1].copy()},
        "a token less": lambda x: x | {"trajectory": x["trajectory"][:, :-1].copy()},
        "a channel less": lambda x: x | {"trajectory": x["trajectory"][..., :-1].copy()},
        "a flat trajectory": lambda x: x | {"trajectory": x["trajectory"].reshape(-1)},
        "a number for a trajectory": lambda x: x | {"trajectory": np.ones((), np.float32)},
        "no trajectory": lambda x: {"sigmas": x["sigmas"]},
        "no sigmas": lambda x: {"trajectory": x["trajectory"]},
        "a sigma less": lambda x: x | {"sigmas": x["sigmas"][:-1].copy()},
        "sigmas that descend": lambda x: x | {"sigmas": x["sigmas"][::-1].copy()},
        "sigmas beyond 1": lambda x: x | {"sigmas": x["sigmas"] * 10},
        "sigmas of 0": lambda x: x | {"sigmas": np.zeros_like(x["sigmas"])},
        "points of another shape": lambda x: x | {"points": x["trajectory"][:, :3].copy()},
        "evaluated of another shape": lambda x: x | {"evaluated": np.zeros(7, np.float32)},
        "as float64": lambda x: {name: tensor.astype(np.float64) for name, tensor in x.items()},
        "as float16": lambda x: {name: tensor.astype(np.float16) for name, tensor in x.items()},
        "whole numbers": lambda x: {name: tensor.astype(np.int32) for name, tensor in x.items()},
        "truths": lambda x: {name: tensor.astype(bool) for name, tensor in x.items()},
    }


def _setting_changes(draw: random.Random) -> dict[str, tuple[str, Callable[[dict], Any]]]:
    """Name → what is expected, and a change of the settings."""
    wrong: dict[str, tuple[Any, ...]] = {
        "steps": ("2", 2.5, None, -2, 10**9, [2], True),
        "nudge": (0, float("nan"), float("inf"), -1.15, "1.15", None, 1e30),
        "height": (0, -64, 10**9, "64", 63, 64.5, None),
        "width": (128, [64], 10**30),
        "prompt": (None, 7, ["a cat"], {}),
        "guidance": (float("nan"), "1", [1.0], 1e38),
        "solver": (7, None, "no-such-solver"),
    }
    changes: dict[str, tuple[str, Callable[[dict], Any]]] = {}
    for key, values in wrong.items():
        for value in draw.sample(values, min(3, len(values))):
            label = f"{key} {value!r}"
            soft = key in ("solver", "guidance")
            changes[label] = (EITHER if soft else REFUSE, lambda d, key=key, value=value: d | {key: value})
        if key not in ("guidance", "solver"):
            changes[f"without {key}"] = (REFUSE, lambda d, key=key: {k: v for k, v in d.items() if k != key})
    changes["settings of null"] = (REFUSE, lambda d: "null")
    changes["settings as a list"] = (REFUSE, lambda d: "[]")
    changes["settings that are no JSON"] = (REFUSE, lambda d: "{'steps': 2}")
    changes["settings 100,000 deep"] = (REFUSE, lambda d: "[" * 100_000)
    changes["no settings"] = (REFUSE, lambda d: None)
    return changes


def _inversion_files(draw: random.Random) -> Iterator[Case]:
    def replaced(special: Callable) -> Callable[[Box], None]:
        def change(box: Box) -> None:
            (box.work / FILE).unlink()
            special(box.work / FILE)

        return change

    def flipped(seed: int) -> Callable[[Box], None]:
        def change(box: Box) -> None:
            inner, data = random.Random(seed), bytearray((box.work / FILE).read_bytes())
            start = 8 + int.from_bytes(data[:8], "little")
            data[inner.randrange(start, len(data))] ^= 1 << inner.randrange(8)
            box.write(FILE, bytes(data))

        return change

    yield _inversion("nothing changed", ACCEPT, lambda box: None)
    for name, change in {
        "empty": lambda box: box.write(FILE, b""),
        "cut short": lambda box: os.truncate(box.work / FILE, 700),
        "cut in its header": lambda box: os.truncate(box.work / FILE, 40),
        "a header of 2^62 bytes": lambda box: box.write(FILE, raw_file({}, length=2**62)),
        "no safetensors": lambda box: box.write(FILE, b"\x89PNG\r\n" + bytes(100)),
        "missing": replaced(lambda path: None),
        "a pipe": replaced(os.mkfifo),
        "endless": replaced(lambda path: path.symlink_to("/dev/zero")),
        "a folder": replaced(os.mkdir),
    }.items():
        yield _inversion(name, REFUSE, change)
    for number in range(4):
        yield _inversion(f"bit flipped {number + 1}", REFUSE, flipped(draw.getrandbits(32)))
    for name, path in {"/dev/zero itself": "/dev/zero", "/dev/null": "/dev/null", "a pipe itself": "pipe"}.items():
        step = tuple(path if x == "inversion" else x for x in EDIT)
        yield _inversion(name, REFUSE, lambda box: os.mkfifo(box.work / "pipe"), os.path.basename(path), steps=step)
    for options in (("--steps", "3"), ("--height", "128"), ("--width", "32")):
        yield _inversion(
            f"another {options[0].strip('-')}",
            REFUSE,
            lambda box: None,
            options[0].strip("-"),
            steps=(*EDIT, *options),
        )
    yield _inversion(
        "a photo beside it",
        REFUSE,
        lambda box: box.write("photo.png", (box.world / "photo.png").read_bytes()),
        "image",
        steps=(*EDIT, "--image", "photo.png"),
    )


def scores_cases(draw: random.Random) -> Iterator[Case]:
    """`scores.json` of one of two compared sweeps."""
    document = Document(
        label="scores",
        category=SWEEPS,
        part="run",
        file="scores.json",
        keys={
            "settings": TEXT,
            "layers": TEXT,
            "choice": TEXT,
            "choice.layers": SIZES,
            "choice.confidence": NUMBER,
            "choice.boundary": NUMBER + OPTIONAL,
            "rank_correlations": TEXT,
            "settings.prompts": TEXT,
            "settings.steps": COUNT,
        },
        steps=(COMPARE,),
        accepted=lambda box: None,
        alive=lambda box: None,
        needs=("run",),
    )
    # Another object or list is of the right type; settings are only shown.
    right_types = (
        "settings/an object",
        "rank_correlations/an object",
        "settings.prompts/a list",
        "settings.prompts/missing",
        "settings.prompts/null",
        "settings.steps/missing",
        "settings.steps/null",
        "choice.layers/one less",
        "choice.boundary/immense",
    )
    for case in (*value_cases(document, draw, 0.25), *whole_cases(document, draw, 12)):
        yield _beside(case, EITHER if case.name.endswith(right_types) else case.expects)


def _beside(case: Case, expects: str) -> Case:
    """The same, with an undamaged sweep beside it."""

    def prepare(box: Box) -> None:
        case.prepare(box)
        box.copy("run", "run2")

    return dataclasses.replace(case, prepare=prepare, expects=expects)


def manifest_cases(draw: random.Random) -> Iterator[Case]:
    """`manifest.json` of a sweep that goes on."""
    document = Document(
        label="manifest",
        category=SWEEPS,
        part="run",
        file="manifest.json",
        keys={
            "steps": SIZE,
            "guidance": POSITIVE,
            "prompts": TEXT,
            "model": UNREAD,
            "batch": SIZE,
            "layers": SIZES,
        },
        steps=(SWEEP,),
        accepted=lambda box: None,
        alive=lambda box: None,
        links=("converted", "dino", "prompts.txt"),
        names=("run",),
    )
    for case in (*value_cases(document, draw, 0.12), *whole_cases(document, draw, 10)):
        expects = EITHER if case.name.endswith(("as a float", "as text")) else case.expects
        yield _resuming(case, expects)


def _resuming(case: Case, expects: str) -> Case:
    """The same, which may go on in the run's own folder."""
    return dataclasses.replace(case, expects=expects, changes=("run",))


def part_cases(draw: random.Random) -> Iterator[Case]:
    """Parts and reports of a sweep damaged: done again, and the scores are the same."""
    seed = draw.getrandbits(32)

    def parts(box: Box) -> list:
        return sorted((box.work / "run/parts").glob("*.npz"))

    def one(change: Callable) -> Callable[[Box], None]:
        return lambda box: change(random.Random(seed).choice(parts(box)))

    def flip(path) -> None:
        data = bytearray(path.read_bytes())
        data[random.Random(seed).randrange(len(data))] ^= 4
        path.write_bytes(data)

    def renamed(path) -> None:
        path.rename(path.with_name(path.name.replace("-", "_")))

    def pipe(path) -> None:
        path.unlink()
        os.mkfifo(path)

    def foreign(box: Box) -> None:
        box.write("run/parts/all-000000-0123456789abcdef.npz", b"not a part")
        box.write("run/parts/notes.txt", "mine")
        box.write("run/parts/x.npz", b"")

    def wrong_arrays(box: Box) -> None:
        """A part whose digest is right, and whose arrays are not."""
        (old,) = list((box.work / "run/parts").glob("all-000000-*.npz"))
        data = io.BytesIO()
        np.savez(data, units=np.zeros((2, 2), int))
        digest = hashlib.sha256(data.getvalue()).hexdigest()[:16]
        old.unlink()
        box.write(f"run/parts/all-000000-{digest}.npz", data.getvalue())

    def right_scores(box: Box) -> str | None:
        scores = [json.loads((place / "run/scores.json").read_text()) for place in (box.work, box.world)]
        same = [json.dumps([score[x] for x in ("layers", "choice")]) for score in scores]
        return None if same[0] == same[1] else "the scores differ from the undamaged run's"

    for name, change in {
        "nothing changed": lambda box: None,
        "a part cut short": one(lambda path: os.truncate(path, 100)),
        "an empty part": one(lambda path: os.truncate(path, 0)),
        "a bit of a part flipped": one(flip),
        "a part missing": one(os.unlink),
        "a part under another name": one(renamed),
        "a part that is a pipe": one(pipe),
        "all parts missing": lambda box: [path.unlink() for path in parts(box)],
        "strangers among the parts": foreign,
        "a part of other arrays": wrong_arrays,
        "scores.json cut short": lambda box: os.truncate(box.work / "run/scores.json", 50),
        "no report": lambda box: (box.work / "run/report.html").unlink(),
    }.items():

        def prepare(box: Box, change: Callable = change) -> None:
            box.copy("run")
            box.link("converted", "dino", "prompts.txt")
            change(box)

        yield Case(
            name=f"parts/{name}",
            category=SWEEPS,
            steps=(SWEEP,),
            expects=ACCEPT,
            prepare=prepare,
            needs=("run", "converted", "dino", "prompts.txt"),
            changes=("run",),
            check=right_scores,
        )


def resumed_cases() -> Iterator[Case]:
    """A finished sweep begun again with other settings: which one differs, in one short line."""

    def resumed(name: str, change: dict[str, str], *names: str, expects: str = REFUSE, **options: Any) -> Case:
        step = list(SWEEP)
        for option, value in change.items():
            if option in step:
                step[step.index(option) + 1] = value
            else:
                step += [option, value] if value else [option]

        def prepare(box: Box) -> None:
            box.copy("run")
            box.copy("dino", "dino2")
            box.link("converted", "dino", "prompts.txt")
            box.write("other.txt", "\n".join(f"a {x} cat" for x in "abcdefghijklmnopq"))
            options.get("also", lambda box: None)(box)

        return Case(
            name=f"resumed/{name}",
            category=RESUMED,
            steps=(tuple(step),),
            expects=expects,
            prepare=prepare,
            names=names,
            needs=("run", "converted", "dino", "prompts.txt"),
            changes=("run",) if expects == ACCEPT else (),
        )

    yield resumed("other steps", {"--steps": "2"}, "steps")
    yield resumed("other guidance", {"--guidance": "2"}, "guidance")
    yield resumed("more seeds", {"--seeds": "2"}, "seeds")
    yield resumed("fewer prompts", {"--limit": "1"}, "limit", "prompts")
    yield resumed("other prompts", {"--prompts": "other.txt"}, "prompts")
    yield resumed("other layers", {"--layers": "0-4"}, "layers")
    yield resumed("another batch", {"--batch": "2"}, "batch")
    yield resumed("another size", {"--height": "32"}, "height")
    yield resumed("pairs", {"--pairs": "0-2"}, "pairs")
    yield resumed("adaptive", {"--adaptive": ""}, "adaptive", "sweep")
    yield resumed(
        "everything else",
        {
            "--steps": "2",
            "--guidance": "2",
            "--seeds": "3",
            "--prompts": "other.txt",
            "--limit": "17",
            "--layers": "0,3",
            "--batch": "1",
            "--height": "32",
            "--width": "48",
            "--pairs": "0,3",
            "--dtype": "bfloat16",
        },
        "steps",
        "guidance",
    )
    yield resumed("the same features elsewhere", {"--features": "dino2"}, expects=ACCEPT)
    yield resumed(
        "the same model elsewhere",
        {"-m": "elsewhere/converted"},
        expects=ACCEPT,
        also=lambda box: box.copy("converted", "elsewhere/converted"),
    )
    yield resumed("the same model by its absolute path", {"-m": "./converted"}, expects=ACCEPT)
    yield resumed("another rule", {"--top": "1"}, expects=ACCEPT)
