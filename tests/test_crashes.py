"""Killed at any rename, removal or write: nothing is lost, and the same call completes, leaving nothing behind."""

import os
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from sflow_jax.catalogue import save_vital_layers
from sflow_jax.errors import SettingError
from sflow_jax.runs.folder import RunFolder
from sflow_jax.storage.checkpoint import load_info
from sflow_jax.storage.files import write_whole
from sflow_jax.storage.folders import new_folder, output_folder

# What changes a disk; epath's and pathlib's own calls end in these.
CALLS = ("rename", "replace", "unlink", "rmdir", "mkdir", "write")
KILLED = 9


def kill_at(moment: int, work: Callable[[], None]) -> bool:
    """Run in a child that dies just before its so-manieth change of the disk; whether it died."""
    with warnings.catch_warnings():
        # Only files are touched in the child, none of the parent's threads.
        warnings.simplefilter("ignore")
        child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == KILLED
    changes = 0

    def counted(change: Callable) -> Callable:
        def call(*arguments, **options):
            nonlocal changes
            changes += 1
            if changes == moment:
                os._exit(KILLED)
            return change(*arguments, **options)

        return call

    for name in CALLS:
        setattr(os, name, counted(getattr(os, name)))
    Path.write_bytes = counted(Path.write_bytes)
    Path.write_text = counted(Path.write_text)
    try:
        work()
    except BaseException:
        os._exit(1)
    os._exit(0)


def kills(work: Callable[[], None]):
    """The child dies at its first change, at its second, … until it ends by itself."""
    moment = 1
    while kill_at(moment, work):
        yield moment
        moment += 1
    assert moment > 1, "the work changed nothing"


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_a_replaced_folder(tmp_path):
    place = tmp_path / "made"

    def write(text: str) -> None:
        with new_folder(place, replace=True) as folder:
            (folder / "weights").write_text(text)
            (folder / "model.json").write_text(text)

    write("old")
    for _ in kills(lambda: write("new")):
        aside = tmp_path / ".made.replaced"
        stands = place if place.exists() else aside
        assert (stands / "weights").read_text() == (stands / "model.json").read_text() in ("old", "new")
        write("old")
        assert names(tmp_path) == {"made"} and (place / "weights").read_text() == "old"


def test_results_that_replace_earlier_ones(tmp_path):
    place = tmp_path / "out"

    def edit(count: int) -> None:
        with output_folder(place, "edit.json") as folder:
            for i in range(1, 1 + count):
                (folder.path / f"edit-{i}.png").write_text("picture")
            folder.json("edit.json", {"edits": count})

    edit(3)
    (place / "notes.txt").write_text("mine")
    for _ in kills(lambda: edit(1)):
        assert (place / "notes.txt").read_text() == "mine" and (place / "edit.json").exists()
        edit(1)
        assert names(place) == {"notes.txt", "edit.json", "edit-1.png"} and names(tmp_path) == {"out"}
        edit(3)


def test_first_results(tmp_path):
    def edit() -> None:
        with output_folder(tmp_path / "new" / "out", "edit.json") as folder:
            folder.json("edit.json", {})

    for _ in kills(edit):
        edit()
        assert names(tmp_path / "new") == {"out"} and names(tmp_path / "new" / "out") == {"edit.json"}
        (tmp_path / "new" / "out" / "edit.json").unlink()
        (tmp_path / "new" / "out").rmdir()


def test_whole_files(tmp_path):
    file = tmp_path / "model.json"
    file.write_text("old")
    for _ in kills(lambda: write_whole(file, "new")):
        assert file.read_text() in ("old", "new")
        write_whole(file, "old")
        assert names(tmp_path) == {"model.json"} and file.read_text() == "old"


def test_saved_vital_layers(checkpoint, tmp_path):
    copy = tmp_path / "copy"
    for name in ("model.json", "scheduler/scheduler_config.json"):
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        (copy / name).write_bytes((checkpoint / name).read_bytes())
    before = names(copy)
    for _ in kills(lambda: save_vital_layers(str(copy), (1,), "killed")):
        assert load_info(copy).vital_layers in ((0, 2, 3), (1,))
        save_vital_layers(str(copy), (0, 2, 3), "again")
        assert names(copy) == before and load_info(copy).vital_layers == (0, 2, 3)


def test_a_run_begins_again(tmp_path):
    manifest = {"steps": 4}
    for _ in kills(lambda: RunFolder(tmp_path / "run", manifest)):
        RunFolder(tmp_path / "run", manifest)
        assert names(tmp_path / "run") == {"manifest.json", "parts"}
        (tmp_path / "run" / "parts").rmdir()
        (tmp_path / "run" / "manifest.json").unlink()
        (tmp_path / "run").rmdir()


def test_what_a_killed_worker_left_among_the_parts_goes(tmp_path):
    """Though nobody writes a part of this name again: its seconds are in it."""
    manifest, part = {"steps": 4}, {"seconds": np.array(1.0)}
    for _ in kills(lambda: RunFolder(tmp_path / "run", manifest).save("all-000000", part)):
        RunFolder(tmp_path / "run", manifest)
        assert names(tmp_path / "run") == {"manifest.json", "parts"}
        assert not names(tmp_path / "run" / "parts")


def test_two_that_write_one_folder(tmp_path):
    """The second is refused at once, and the first completes."""
    with output_folder(tmp_path / "out", "edit.json") as first:
        parent = os.getpid()
        child = os.fork()
        if not child:
            try:
                with output_folder(tmp_path / "out", "edit.json"):
                    os._exit(0)
            except SettingError as error:
                os._exit(7 if f"process {parent} is writing" in str(error) else 8)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
        first.json("edit.json", {})
    assert names(tmp_path / "out") == {"edit.json"} and names(tmp_path) == {"out"}


def test_results_of_another_command_are_left_alone(tmp_path):
    with output_folder(tmp_path / "out", "inversion.json") as folder:
        folder.json("inversion.json", {})
    with pytest.raises(SettingError, match=r"holds another command's inversion.json"):
        with output_folder(tmp_path / "out", "edit.json"):
            pass
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "edit-1.png").write_text("a picture of mine")
    with pytest.raises(SettingError, match=r"has an? edit-1.png"):
        with output_folder(tmp_path / "mine", "edit.json"):
            pass
