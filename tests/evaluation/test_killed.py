"""A process that is killed, and one that goes on."""

import csv
import time
from pathlib import Path

import jax
from commandline import run
from processes import PATIENCE, start


def scores(folder: Path) -> list[dict[str, str]]:
    """Lines of a run's table, without seconds."""
    with (folder / "scores.csv").open() as file:
        return [{name: value for name, value in row.items() if name != "seconds"} for row in csv.DictReader(file)]


def test_a_killed_run_goes_on_with_equal_numbers(checkpoint, tmp_path):
    arguments = ("evaluate", "-m", checkpoint, "--known-answers", "--scenes", 5, "--steps", 2, "--methods", "none")
    # As many devices as here: how a CPU adds may depend on them.
    killed = start(*arguments, "--out", tmp_path / "killed", devices=jax.device_count())
    deadline = time.monotonic() + PATIENCE
    while not (parts := list(tmp_path.glob("killed/parts/*.npz"))) and time.monotonic() < deadline:
        time.sleep(0.01)
    killed.kill()
    assert 0 < len(parts) < 10 and not (tmp_path / "killed" / "scores.csv").exists()
    for name in ("killed", "whole"):
        assert run(*arguments, "--out", tmp_path / name) == 0
    assert len(scores(tmp_path / "whole")) == 5 * 6 * 2
    assert scores(tmp_path / "killed") == scores(tmp_path / "whole")
    assert all(path.exists() for path in parts)
