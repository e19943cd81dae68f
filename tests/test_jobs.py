"""Many pictures from files: `sflow edit --jobs` and `sflow generate --prompt-file`."""

import json

import numpy as np
import pytest
from commandline import run
from PIL import Image

from sflow_jax.commands.options import Chosen

JOBS = """
common: {{steps: 2, layers: "0,2"}}
jobs:
  - prompt: [a cat, a cow]
    edits: a dog
  - name: photo
    image: {photo}
    prompt: a red cat
    edits: [a dog]
    steps: 1
"""


@pytest.fixture
def jobs(photo, tmp_path):
    """A file of three jobs."""
    photo.save(tmp_path / "photo.png")
    (tmp_path / "jobs.yaml").write_text(JOBS.format(photo=tmp_path / "photo.png"))
    return tmp_path / "jobs.yaml"


def refuse_to_load(*_, **__):
    raise AssertionError("the model was loaded")


def test_jobs_are_painted_once_and_go_on(checkpoint, jobs, tmp_path, capsys, monkeypatch, compilations):
    arguments = ("edit", "-m", checkpoint, "--jobs", jobs, "-o", tmp_path / "many")
    assert run(*arguments) == 0
    assert sorted(path.name for path in (tmp_path / "many").iterdir()) == ["job-1-1", "job-1-2", "photo"]
    compiled = compilations()
    alone = ("-p", "a cow", "-e", "a dog", "--steps", 2, "--layers", "0,2", "-o", tmp_path / "alone")
    assert run("edit", "-m", checkpoint, *alone) == 0
    pictures = [Image.open(tmp_path / name / "edit-1.png") for name in ("many/job-1-2", "alone")]
    np.testing.assert_array_equal(*pictures)
    # Nor does a job compile what another of its shape did.
    assert compilations() == compiled
    record = json.loads((tmp_path / "many" / "photo" / "edit.json").read_text())
    assert (record["steps"], record["image"]) == (1, str(tmp_path / "photo.png"))

    # What is finished is not done again, wherever its photo lies now.
    (tmp_path / "photo.png").rename(tmp_path / "moved.png")
    jobs.write_text(JOBS.format(photo=tmp_path / "moved.png"))
    load = Chosen.load
    monkeypatch.setattr(Chosen, "load", refuse_to_load)
    capsys.readouterr()
    assert run(*arguments) == 0
    assert "3 jobs in" in (said := capsys.readouterr().out) and "3 of them finished before" in said
    # One that is asked for otherwise is refused before anything is loaded.
    (tmp_path / "many" / "job-1-1" / "edit.json").unlink()
    jobs.write_text(JOBS.format(photo=tmp_path / "moved.png").replace("steps: 1", "steps: 3"))
    assert run(*arguments) == 2
    line = capsys.readouterr().err
    assert "job photo:" in line and "steps: 1 there, 3 now" in line and line.count("\n") == 1
    # What is missing is painted, and nothing else.
    monkeypatch.setattr(Chosen, "load", load)
    for file in (tmp_path / "many" / "job-1-1").iterdir():
        file.unlink()
    jobs.write_text(JOBS.format(photo=tmp_path / "moved.png"))
    assert run(*arguments) == 0
    assert "2 of them finished before" in capsys.readouterr().out
    assert (tmp_path / "many" / "job-1-1" / "edit.json").exists()


@pytest.mark.parametrize(
    "text, options, message",
    [
        ("jobs: [{prompt: a cat, edits: a dog, stepps: 3}]", (), "stepps"),
        ("jobs: []", (), "jobs"),
        ("jobs: [", (), "no YAML"),
        ("- a cat", (), "cannot read --jobs"),
        ("jobs: [{edits: a dog}]", (), "job job-1: --prompt is missing"),
        ("jobs: [{prompt: a cat, edits: a dog, guidance: high}]", (), "job job-1: --guidance must be a number"),
        ("jobs: [{prompt: a cat, edits: a dog, options: {beginning: 1}}]", (), "job job-1:"),
        ("jobs: [{prompt: a cat, edits: a dog, layers: '9'}]", (), "job job-1: no layer 9"),
        (
            "jobs: [{prompt: a cat, edits: a dog, nudge: 1.1}]",
            (),
            "job job-1: --nudge has no effect",
        ),
        ("jobs: [{prompt: a cat, edits: a dog, guidance: [1.0, 2.0, 3.0]}]", (), "job job-1: --guidance"),
        ("jobs: [{name: x, image: gone.png, prompt: a cat, edits: a dog}]", (), "job x: no picture at gone.png"),
        ("jobs: [{name: ../x, prompt: a cat, edits: a dog}]", (), "needs a name of its own"),
        ("jobs: [{name: x, prompt: a, edits: b}, {name: x, prompt: a, edits: b}]", (), "needs a name of its own"),
        ("jobs: [{prompt: a cat, edits: a dog}]", ("--edit", "a dog"), "--edit has no effect with --jobs"),
    ],
)
def test_bad_jobs_are_refused_before_anything_is_loaded(
    text, options, message, checkpoint, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(Chosen, "load", refuse_to_load)
    (tmp_path / "jobs.yaml").write_text(text)
    arguments = ("-m", checkpoint, "--jobs", tmp_path / "jobs.yaml", "-o", tmp_path / "out", *options)
    assert run("edit", *arguments) == 2
    line = capsys.readouterr().err
    assert message in line and line.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_prompts_of_a_file(checkpoint, tmp_path, capsys):
    (tmp_path / "prompts.txt").write_text("# two\na red cat\n\na dog\n")
    arguments = ("generate", "-m", checkpoint, "--steps", 1, "-o", tmp_path / "out")
    assert run(*arguments, "--prompt-file", tmp_path / "prompts.txt") == 0
    assert json.loads((tmp_path / "out" / "generate.json").read_text())["prompts"] == ["a red cat", "a dog"]
    assert run(*arguments, "--prompt-file", tmp_path / "prompts.txt", "-p", "a cow") == 2
    assert "give --prompt or --prompt-file, not both" in capsys.readouterr().err
    assert run(*arguments) == 2
    assert "--prompt is missing" in capsys.readouterr().err
