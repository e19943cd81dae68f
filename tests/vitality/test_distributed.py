"""Two real processes under `jax.distributed` on this machine share one sweep."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import pytest
from conftest import CACHE
from test_cli import run

from sflow_jax import cli

PATIENCE = 240


def start(*arguments) -> subprocess.Popen:
    """`sflow` in a process of its own, with one CPU device."""
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    environment |= {"JAX_COMPILATION_CACHE_DIR": str(CACHE), "JAX_PLATFORMS": "cpu"}
    command = [Path(sys.executable).with_name("sflow"), *arguments]
    return subprocess.Popen(
        list(map(str, command)), env=environment, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


@pytest.fixture(scope="module")
def arguments(checkpoint, tmp_path_factory):
    prompts = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    prompts.write_text("a red cat\na dog\nthe sea\n")
    plan = ("--steps", 2, "--batch", 2, "--height", 64, "--width", 64, "--prompts", prompts)
    return ("vital", "--model", checkpoint, "--features", "toyworld", "--top", 2, *plan)


def test_two_processes_give_the_scores_of_one(arguments, tmp_path):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        coordinator = f"localhost:{free.getsockname()[1]}"
    together = [
        start(*arguments, "--out", tmp_path / "two", "--coordinator", coordinator, "--process", f"{i}/2")
        for i in (1, 2)
    ]
    alone = start(*arguments, "--out", tmp_path / "one")
    told = [process.communicate(timeout=PATIENCE) for process in (*together, alone)]
    assert [process.returncode for process in (*together, alone)] == [0, 0, 0], told
    assert (tmp_path / "two" / "scores.json").read_text() == (tmp_path / "one" / "scores.json").read_text()
    # Only the first process reports.
    assert "vital layers" in told[0][0] and not told[1][0]


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
    assert run(cli, *arguments, "--out", tmp_path / "run", *options) == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error
    assert jax.process_count() == 1
