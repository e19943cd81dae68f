"""A default stands in one place: settings, Python's signatures, options of the command line, records of results."""

import dataclasses
import inspect
import json

import click
import jax
import numpy as np
import pytest
from commandline import run
from PIL import Image

from sflow_jax import StableFlow, Stopped
from sflow_jax.commands.edit import edit
from sflow_jax.commands.generate import generate
from sflow_jax.commands.invert import invert
from sflow_jax.commands.main import COMMANDS, group
from sflow_jax.commands.vital import vital
from sflow_jax.errors import SettingError
from sflow_jax.machine.compilation import naming_compilation
from sflow_jax.progress import Bar, Lines, as_progress
from sflow_jax.settings import (
    EditSettings,
    GenerationSettings,
    InversionSettings,
    Placement,
    SweepSettings,
)

COMMANDS_OF = [
    (generate, GenerationSettings, StableFlow.generate),
    (edit, EditSettings, StableFlow.edit),
    (invert, InversionSettings, StableFlow.invert),
    (vital, SweepSettings, None),
    (generate, Placement, StableFlow.load),
]
IDS = ["generate", "edit", "invert", "vital", "placement"]


@pytest.mark.parametrize("command, settings, method", COMMANDS_OF, ids=IDS)
def test_options_and_signatures_have_the_settings_defaults(command, settings, method):
    options = {option.name: option for option in command.params}
    for field in dataclasses.fields(settings):
        if field.metadata:
            option = options[field.name]
            assert option.default == field.default, field.name
            assert field.metadata["help"].rstrip(".") in option.help
        if method is not None:
            default = inspect.signature(method).parameters[field.name].default
            # "none" and () are the same choice of layers.
            assert default == field.default or (default, field.default) == ((), "none"), field.name


def test_the_commands_say_what_they_do_in_one_place_each():
    for name, line in COMMANDS.items():
        command = group.get_command(click.Context(group), name)
        assert command.name == name and line[0].isupper() and line.endswith(".")


def test_messages_name_settings_and_the_command_line_their_options(checkpoint, tmp_path, capsys):
    with pytest.raises(SettingError) as error:
        Placement(quantisation="int4")
    assert str(error.value) == "unknown quantisation 'int4'; choose one of int8, fp8"
    assert error.value.as_options({"quantisation": "--quantize"}).startswith("unknown --quantize 'int4'")
    arguments = ("-m", checkpoint, "-p", "a cat", "-e", "a dog", "--edits-at-once", 0, "-o", tmp_path / "out")
    assert run("edit", *arguments) == 2
    assert capsys.readouterr().err == "Error: --edits-at-once must be at least 1, found 0\n"


def test_results_tell_every_setting_and_where_they_ran(wide_checkpoint, tmp_path):
    placement = ("--mesh", "fsdp=2,tensor=4", "--quantize", "int8", "--text-encoder", "host", "--offload")
    painted = ("--prompt", "a cat", "--steps", 1, "--seed", 3, "--attention", "xla", "--dtype", "float32")
    assert run("generate", "-m", wide_checkpoint, *painted, *placement, "-o", tmp_path / "out") == 0
    record = json.loads((tmp_path / "out" / "generate.json").read_text())
    for settings in (GenerationSettings, Placement):
        assert {field.name for field in dataclasses.fields(settings)} <= record.keys()
    expected = {
        "mesh": "fsdp=2,tensor=4",
        "quantisation": "int8",
        "text_encoder": "host",
        "offload": True,
        "attention": "xla",
        "dtype": "float32",
        "seed": 3,
        "steps": 1,
        "height": 64,
        "guidance": 3.5,
        "bypass": [],
    }
    assert {name: record[name] for name in expected} == expected
    assert Image.open(tmp_path / "out" / "picture-1.png").size == (64, 64)


def test_progress_is_told_and_may_stop_a_run(flow, photo):
    events = []
    flow.edit("a cat", ["a dog", "snow"], steps=2, edits_at_once=1, progress=lambda *event: events.append(event))
    assert (1, 1, "encoding") in events
    # Whether a step is compiled now depends on what ran before.
    events = [event for event in events if event[2] == "editing"]
    assert events == [(0, 4, "editing"), (1, 4, "editing"), (2, 4, "editing")] + [
        (2, 4, "editing"), (3, 4, "editing"), (4, 4, "editing"),
    ]  # fmt: skip

    def stop(done: int, total: int, what: str) -> None:
        if done == 1:
            raise Stopped

    for run_it in (
        lambda: flow.generate(["a cat"], steps=3, progress=stop),
        lambda: flow.invert(photo, "a cat", steps=3, progress=stop),
    ):
        with pytest.raises(Stopped):
            run_it()


def test_a_stopped_sweep_goes_on(flow, tmp_path):
    (tmp_path / "prompts.txt").write_text("a red cat\na dog\n")
    settings = SweepSettings(
        prompts=str(tmp_path / "prompts.txt"), steps=2, batch=4, height=64, width=64, features="toyworld", top=2
    )

    def stop(done: int, total: int, what: str) -> None:
        if done:
            raise Stopped

    with pytest.raises(Stopped):
        flow.find_vital_layers(tmp_path / "run", settings, progress=stop)
    events = []
    summary = flow.find_vital_layers(tmp_path / "run", settings, progress=lambda *event: events.append(event))
    # What the first run finished counts at once.
    assert events[0][:2] == (4, 10) and events[-1][:2] == (10, 10)
    assert len(summary.choice.layers) == 2 and (tmp_path / "run" / "report.html").exists()


def test_a_bar_follows_its_work(capsys):
    bar = Bar()
    # There is less to do than it seemed at first.
    for done, total in ((0, 5), (1, 5), (2, 2)):
        bar(done, total, "painting: top 1, 2")
    assert "painting" in (shown := capsys.readouterr().err) and "2/2" in shown and "top 1, 2" in shown
    # One bar, drawn over and over, ends one line.
    assert shown.count("\n") == 1


def test_a_log_has_a_line_now_and_then(capsys, monkeypatch):
    lines = as_progress(True)
    assert isinstance(lines, Lines)
    clock = iter(range(0, 10_000, 3))
    monkeypatch.setattr("time.monotonic", lambda: float(next(clock)))
    for done in range(101):
        lines(done, 100, "painting: top 1")
    shown = capsys.readouterr().err.splitlines()
    assert shown[0] == "painting: 1 of 100, 3 s (top 1)" and shown[-1] == "painting: 100 of 100, 300 s (top 1)"
    assert len(shown) == 11
    # Slow work is not silent for long, and quick work says only that it is done.
    for done in range(30):
        lines(done, 10_000, "waiting")
    assert len(capsys.readouterr().err.splitlines()) == 3
    monkeypatch.setattr("time.monotonic", lambda: 0.0)
    for done in range(101):
        lines(done, 100, "encoding")
    assert capsys.readouterr().err == "encoding: 100 of 100, 0 s\n"


def test_a_step_that_is_being_compiled_is_named():
    def made_up_step(x):
        return x + 1

    events = []
    with naming_compilation(lambda *event: events.append(event), "made_up_step") as progress:
        progress(0, 2, "painting: well")
        jax.jit(made_up_step)(np.float32(1))
        progress(1, 2, "painting")
        jax.jit(lambda x: x + 2)(np.float32(1))
    assert events == [(0, 2, "painting: well"), (0, 2, "painting: compiling"), (1, 2, "painting")]


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"top": 1, "threshold": 0.5}, "give top or threshold, not both"),
        ({"adaptive": True, "windows": 2}, "leave out windows and pairs"),
        ({"error": 2.0}, "error must be between 0 and 1"),
        ({"limit": 0}, "limit must be at least 1"),
        ({"steps": 0}, "steps must be at least 1"),
        ({"keep_images": "some"}, "unknown keep_images 'some'"),
    ],
)
def test_sweep_settings_that_do_not_fit_are_refused_when_made(settings, message):
    with pytest.raises(ValueError, match=message):
        SweepSettings(**settings)
