"""Real processes under `jax.distributed` on this machine: one mesh over all of them, and shares of a sweep."""

import re
import socket
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from commandline import run
from conftest import relative
from PIL import Image
from processes import PATIENCE, Command, finish, start

from sflow_jax import read_record
from sflow_jax.results import Inversion


@pytest.fixture(scope="module")
def arguments(checkpoint, tmp_path_factory):
    prompts = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    prompts.write_text("a red cat\na dog\nthe sea\n")
    plan = ("--steps", 2, "--batch", 2, "--height", 64, "--width", 64, "--prompts", prompts)
    return ("vital", "--model", checkpoint, "--features", "toyworld", "--top", 2, *plan)


def start_together(*arguments, count: int, devices: int = 1) -> list[Command]:
    """The same command in several processes that know each other."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        coordinator = f"localhost:{free.getsockname()[1]}"
    places = [("--coordinator", coordinator, "--process", f"{i}/{count}") for i in range(1, count + 1)]
    return [start(*arguments, *place, devices=devices) for place in places]


@pytest.fixture(scope="module")
def edit(wide_checkpoint) -> tuple:
    """Edits of a generated picture, in batches enough for a bank of the source's keys and values."""
    edits = [part for edit in ("a dog", "a hat", "snow") for part in ("-e", edit)]
    settings = ("--layers", "0,3", "--steps", 2, "--edits-at-once", 1)
    return ("edit", "-m", wide_checkpoint, "-p", "a red cat", *edits, *settings)


@pytest.fixture(scope="module")
def alone(edit, tmp_path_factory) -> Path:
    """What one process paints."""
    folder = tmp_path_factory.mktemp("alone") / "out"
    finish([start(*edit, "--out", folder)])
    return folder


def test_two_processes_paint_together_what_one_paints(edit, alone, tmp_path):
    """Tensors are split over two devices a process, data over processes."""
    together = start_together(*edit, "--mesh", "fsdp=2,tensor=2", "--out", tmp_path / "out", count=2, devices=2)
    assert ["source and 3 edits" in said for said in finish(together)] == [True, False]
    assert read_record(tmp_path / "out" / "edit.json")["kv_cache"] == "device"
    for name in ("source.png", "edit-1.png", "edit-3.png"):
        ours, expected = (np.asarray(Image.open(folder / name), float) for folder in (tmp_path / "out", alone))
        # Rounding to levels may fall either way.
        assert np.abs(ours - expected).max() <= 1 and np.ptp(expected) > 10


def test_two_processes_generate_what_one_generates(wide_checkpoint, tmp_path):
    """Four pictures, two to each process."""
    prompts = [part for prompt in ("a cat", "a dog", "snow", "a hat") for part in ("-p", prompt)]
    generate = ("generate", "-m", wide_checkpoint, *prompts, "--bypass", "1", "--steps", 2)
    together = start_together(
        *generate, "--mesh", "data=2,tensor=2", "--out", tmp_path / "together", count=2, devices=2
    )
    finish([*together, start(*generate, "--out", tmp_path / "alone")])
    for i in range(1, 5):
        ours, expected = (
            np.asarray(Image.open(tmp_path / run / f"picture-{i}.png"), float) for run in ("together", "alone")
        )
        assert np.abs(ours - expected).max() <= 1 and np.ptp(expected) > 10


def test_two_processes_invert_together(wide_checkpoint, photo, tmp_path):
    photo.save(tmp_path / "photo.png")
    invert = ("invert", "-m", wide_checkpoint, "-p", "a ramp", "--image", tmp_path / "photo.png", "--steps", 2)
    together = start_together(*invert, "--mesh", "tensor=2", "--out", tmp_path / "together", count=2)
    finish([*together, start(*invert, "--out", tmp_path / "alone")])
    ours, expected = (Inversion.load(tmp_path / run).trajectory for run in ("together", "alone"))
    assert relative(ours, expected) <= 1e-5


@pytest.mark.parametrize("lost", [0, 1])
def test_a_process_that_dies_ends_the_other(lost, wide_checkpoint, tmp_path):
    edit = ("edit", "-m", wide_checkpoint, "-p", "a cat", "-e", "a dog", "--layers", "0", "--steps", 9000)
    both = start_together(*edit, "--mesh", "tensor=2", "--out", tmp_path / "out", count=2)
    deadline = time.monotonic() + PATIENCE
    while not re.search(r"editing: [1-9][\d,]* of 9,000", both[0].errors):
        assert time.monotonic() < deadline and both[0].process.is_alive(), both[0].errors
        time.sleep(0.02)
    both[lost].kill()
    assert both[1 - lost].wait() != 0 and not (tmp_path / "out").exists()
    error = both[1 - lost].errors
    # Without the first process, jax may end the others before they can speak.
    clear = "another process was lost" in error and "Traceback" not in error
    assert clear or (lost == 0 and "JAX distributed service detected fatal errors" in error), error


def test_two_processes_give_the_scores_of_one(arguments, tmp_path):
    together = start_together(*arguments, "--out", tmp_path / "two", count=2)
    told = finish([*together, start(*arguments, "--out", tmp_path / "one")])
    assert (tmp_path / "two" / "scores.json").read_text() == (tmp_path / "one" / "scores.json").read_text()
    # Only the first process reports.
    assert "vital layers" in told[0] and not told[1]


@pytest.mark.parametrize(
    "options, message",
    [
        (("--process", "1/2"), "--process needs --coordinator"),
        (("--coordinator", "localhost:1"), "give --process"),
        (("--coordinator", "auto", "--process", "1/2"), "not beside auto"),
        (("--coordinator", "auto", "--worker", "1/2"), "not both"),
        (("--coordinator", "localhost:1", "--process", "3/2"), "--process must be"),
    ],
)
def test_bad_input(arguments, tmp_path, options, message, capsys):
    assert run(*arguments, "--out", tmp_path / "run", *options) == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error
    assert jax.process_count() == 1
