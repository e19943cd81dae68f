"""`sflow studio` before anything is loaded: what it refuses, and what it needs."""

import importlib.util
import socket

import pytest
from commandline import run

from sflow_jax.commands.studio import is_loopback
from sflow_jax.settings import EMBEDDED
from sflow_jax.studio.layers import EMBEDDED_LAYERS
from sflow_jax.vitality.layer_file import read_layer_file


@pytest.fixture
def gradio(monkeypatch):
    """gradio as if it were installed, or (called with False) as if it were not."""
    find = importlib.util.find_spec

    def installed(there: bool) -> None:
        answer = find("json") if there else None
        monkeypatch.setattr(
            importlib.util, "find_spec", lambda name, *more: answer if name == "gradio" else find(name, *more)
        )

    installed(True)
    return installed


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("--port", 99999), "--port"),
        (("--host", "203.0.113.1"), "cannot serve at --host 203.0.113.1"),
        (("--coordinator", "auto"), "--coordinator has no effect here"),
        (("--model", "nowhere"), "no checkpoint at nowhere"),
    ],
)
def test_mistakes_end_with_one_line_before_a_model_is_loaded(arguments, message, gradio, capsys):
    assert run("studio", "--no-open", *arguments) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("Error: ") and message in error


def test_a_port_in_use_is_said(gradio, capsys):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        assert run("studio", "--no-open", "--port", taken.getsockname()[1]) == 2
    assert "in use" in capsys.readouterr().err


def test_without_gradio_it_says_how_to_install_it(gradio, capsys):
    gradio(False)
    assert run("studio", "--no-open") == 2
    assert 'pip install "sflow_jax[studio]"' in capsys.readouterr().err


def test_only_this_machines_addresses_are_loopback():
    assert all(map(is_loopback, ("127.0.0.1", "::1", "localhost")))
    assert not any(map(is_loopback, ("0.0.0.0", "192.168.1.4", "example.org")))


def test_the_embedded_models_bars_are_of_the_embedded_model():
    file = read_layer_file(EMBEDDED_LAYERS)
    assert file.model.name == EMBEDDED and len(file.layers) == 12 and file.sets["vital"] == (0, 1, 2)
