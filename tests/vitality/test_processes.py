"""Real processes on one run folder: killed at any moment and started again, or several at once."""

import signal
import time
from pathlib import Path

import numpy as np
import pytest
from processes import PATIENCE, finish, start

from sflow_jax.runs.folder import RunFolder, read_manifest

KILLS = 10


@pytest.fixture(scope="module")
def arguments(checkpoint, tmp_path_factory) -> list[str]:
    prompts = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    prompts.write_text("a red cat\na dog in snow\na tree\na box at night\n")
    plan = ("--steps", 2, "--batch", 2, "--height", 64, "--width", 64, "--prompts", prompts, "--top", 2)
    return ["vital", "--model", str(checkpoint), "--features", "toyworld", *map(str, plan)]


@pytest.fixture(scope="module")
def whole(arguments, tmp_path_factory) -> Path:
    """The folder of a process that nothing disturbed."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    finish([start(*arguments, "--out", folder)])
    return folder


def parts(folder: Path) -> list[str]:
    """Names of the finished parts, without digests."""
    return sorted(file.stem.rpartition("-")[0] for file in (folder / "parts").glob("[!.]*.npz"))


def test_killed_at_any_moment_a_sweep_ends_with_the_same_scores(arguments, whole, tmp_path):
    folder, rng = tmp_path / "run", np.random.default_rng(0)
    # One while starting up, one while the report is written, the others while pictures are painted.
    moments = [0, *np.sort(rng.integers(0, len(parts(whole)), KILLS - 2)).tolist(), len(parts(whole))]
    for moment in moments:
        command = start(*arguments, "--out", folder)
        deadline = time.monotonic() + PATIENCE
        while len(parts(folder)) < moment and time.monotonic() < deadline:
            time.sleep(0.002)
        time.sleep(rng.uniform(0, 0.15))
        command.kill()
        assert command.wait() == -signal.SIGKILL, f"it ended before {moment} parts were there"
    assert not (folder / "scores.json").exists()
    # As a process leaves it that is killed while it writes.
    half = next((folder / "parts").glob("all-*.npz"))
    (folder / "parts" / f".{half.name}.1-00000000.partial").write_bytes(half.read_bytes()[:100])
    half.unlink()
    finish([start(*arguments, "--out", folder)])
    assert (folder / "scores.json").read_bytes() == (whole / "scores.json").read_bytes()
    assert sorted(RunFolder(folder, read_manifest(folder)).finished()) == parts(folder) == parts(whole)


def test_four_processes_at_once_give_the_scores_of_one(arguments, whole, tmp_path):
    said = finish([start(*arguments, "--out", tmp_path / "run", "--worker", f"{i}/4") for i in (1, 2, 3, 4)])
    assert any("vital layers: " in text for text in said)
    assert (tmp_path / "run" / "scores.json").read_bytes() == (whole / "scores.json").read_bytes()
    assert set(parts(tmp_path / "run")) == set(parts(whole))
    assert not list((tmp_path / "run").rglob("*.partial"))
