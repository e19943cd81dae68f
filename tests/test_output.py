"""What commands say, and in which form: help in groups with numbers, -q, -v, --json."""

import json
import logging

import click
import numpy as np
import pytest
from commandline import run, run_convert

from sflow_jax.catalogue import find_info
from sflow_jax.commands.command import TITLES
from sflow_jax.commands.convert import command as convert
from sflow_jax.commands.main import COMMANDS, group
from sflow_jax.commands.output import answer
from sflow_jax.families.defaults import DEFAULTS
from sflow_jax.settings import PUBLISHED


def commands() -> list[click.Command]:
    context = click.Context(group)
    return [convert, *(group.get_command(context, name) for name in COMMANDS)]


def test_every_option_stands_in_a_group():
    names = {param.name for command in commands() for param in command.params if isinstance(param, click.Option)}
    assert names - {"quiet", "verbose"} == TITLES.keys()


def test_help_says_the_numbers_of_the_models():
    assert DEFAULTS.keys() == set(PUBLISHED)
    for name, defaults in DEFAULTS.items():
        assert find_info(name)[0].defaults == defaults
    helps = {
        (command.name, param.name): param.help
        for command in commands()
        for param in command.params
        if isinstance(param, click.Option)
    }
    assert "[default: 28; flux-schnell 4, sd35-medium 50, sd35-large 40]" in helps["generate", "steps"]
    assert "[default: 15; flux-schnell 4]" in helps["vital", "steps"]
    assert "reference: 15; flux-schnell 4" in helps["edit", "steps"]
    assert not [place for place, text in helps.items() if "{" in text or "the model's default" in text]


@pytest.mark.parametrize("arguments", [("-h",), ("info", "-h")])
def test_a_short_help_everywhere(arguments, capsys):
    assert run(*arguments) == 0 and run_convert("-h") == 0
    assert capsys.readouterr().out.count("Usage:") == 2


def test_a_command_says_as_much_as_is_asked_for(checkpoint, tmp_path, capsys):
    level = logging.getLogger("sflow_jax").level
    arguments = ("generate", "-m", checkpoint, "-p", "a cat", "--steps", 1, "-o", tmp_path / "out")
    assert run(*arguments, "-q") == 0
    assert capsys.readouterr() == ("", "")
    assert run(*arguments, "-v") == 0
    said = capsys.readouterr()
    assert said.out == f"1 pictures in {tmp_path / 'out'}\n"
    assert '"steps":1' in said.err and "loading: 4 of 4" in said.err and "generating: 1 of 1" in said.err
    assert logging.getLogger("sflow_jax").level == level
    assert run("generate", "-q", "-m", "nowhere", "-p", "a cat", "-o", tmp_path / "out") == 2
    assert capsys.readouterr().err.startswith("Error: no checkpoint at nowhere")
    assert run("info", tmp_path / "out" / "picture-1.png", "--json") == 0
    assert json.loads(capsys.readouterr().out)["prompts"] == ["a cat"]


def test_info_in_json(checkpoint, capsys):
    assert run("info", checkpoint, "--verify", "--json") == 0
    known = json.loads(capsys.readouterr().out)
    assert known["vital_layers"] == [0, 2, 3] and known["verified_files"] > 0
    assert run("info", "flux-dev", "--plan", "v6e-8", "--json") == 0
    plan = json.loads(capsys.readouterr().out)
    assert [work["mesh"] for work in plan["works"]][0] == {"data": 1, "tensor": 8} and plan["chips"] == 8


def test_json_has_no_numbers_that_json_does_not_know(capsys):
    with click.Context(group) as context:
        context.meta["sflow_jax.json"] = True
        answer({"mean": float("nan"), "most": np.float32(1.5), "of": np.arange(2)}, "text")
    assert json.loads(capsys.readouterr().out) == {"mean": None, "most": 1.5, "of": [0, 1]}
