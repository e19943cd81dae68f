"""Numbers and names that would paint black pictures in silence, fill the memory or lose work are refused."""

import math

import jax.numpy as jnp
import numpy as np
import pytest
from commandline import run

from sflow_jax import StableFlow
from sflow_jax.painter import Painter
from sflow_jax.pictures.canvas import Canvas
from sflow_jax.pictures.latents import draw_noise
from sflow_jax.sampling.control import check_layers, parse_layers
from sflow_jax.settings import EditSettings, GenerationSettings, InversionSettings, SweepSettings
from sflow_jax.storage.folders import new_folder

NOT_NUMBERS = [math.nan, math.inf, -math.inf, 1e38]


@pytest.mark.parametrize("value", NOT_NUMBERS)
@pytest.mark.parametrize("settings", [GenerationSettings, EditSettings, InversionSettings, SweepSettings])
def test_guidance_beyond_numbers_is_refused_when_made(settings, value):
    with pytest.raises(ValueError, match="guidance must be between -1000 and 1000"):
        settings(guidance=value)


@pytest.mark.parametrize("value", [*NOT_NUMBERS, 0.0, -1.0])
def test_so_is_a_nudge(value):
    with pytest.raises(ValueError, match="nudge must be"):
        InversionSettings(nudge=value)


def test_a_list_of_guidance_is_looked_through(flow):
    with pytest.raises(ValueError, match="guidance must be between"):
        flow.generate(["a", "b"], guidance=[1.0, math.nan], steps=1, progress=False)


@pytest.mark.parametrize("seed", [-1, 2**64])
def test_seeds_have_sixty_four_bits(seed):
    with pytest.raises(ValueError, match="seed must be a whole number from 0 to 2"):
        GenerationSettings(seed=seed)


def test_every_bit_of_a_seed_counts():
    drawn = [draw_noise(seed, 16, 4) for seed in (42, 42 + 2**32, 42 + 2**63, 2**64 - 1)]
    for i, one in enumerate(drawn):
        assert np.isfinite(one).all() and all(not np.array_equal(one, other) for other in drawn[:i])


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_one_damaged_weight_paints_nothing_in_silence(bad, flow, photo):
    kernel = flow.transformer.image_in.kernel[...]
    damaged = Painter(flow.info, flow.transformer, flow.autoencoder, flow.prompts)
    broken = StableFlow(damaged)
    flow.transformer.image_in.kernel[...] = kernel.at[0, 0].set(jnp.float32(bad))
    try:
        with pytest.raises(ValueError, match="not finite"):
            broken.generate(["a cat"], steps=1, progress=False)
        with pytest.raises(ValueError, match="not finite"):
            broken.invert(photo, "a cat", steps=1, progress=False)
    finally:
        flow.transformer.image_in.kernel[...] = kernel


@pytest.mark.parametrize("text", ["", ",", "3-1", "1,,2", "1-", "-1", "0-9999999", "१", "all,1", "1 2"])
def test_unreadable_layers_are_refused(text):
    with pytest.raises(ValueError, match="cannot read layers"):
        parse_layers(text)


def test_messages_about_layers_stay_short():
    for call in (lambda: check_layers(range(9999), 5), lambda: parse_layers("x" * 10_000)):
        with pytest.raises(ValueError) as error:
            call()
        assert len(str(error.value)) < 200


@pytest.mark.parametrize("height, width", [(10**9, 64), (64, 16_400)])
def test_sizes_that_no_machine_holds_are_refused(height, width):
    with pytest.raises(ValueError, match="must be at most 16384"):
        Canvas.of(height, width, 16)


@pytest.mark.parametrize(
    "options, message",
    [
        (("--guidance", "nan"), "--guidance must be between"),
        (("--guidance", "1e38"), "--guidance must be between"),
        (("--seed", 2**64), "--seed must be"),
        (("--seed", -5), "--seed must be"),
        (("--bypass", "3-1"), "runs backwards"),
        (("--bypass", ","), "cannot read layers"),
        (("--steps", 10**9), "--steps must be at most 10,000"),
        (("--height", 10**9), "--height and --width must be at most"),
        (("--height", 0), "multiples of 16"),
    ],
)
def test_the_command_says_so_in_one_line(options, message, checkpoint, tmp_path, capsys):
    arguments = ("-m", checkpoint, "-p", "a cat", "-o", tmp_path / "out", *options)
    assert run("generate", *arguments) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and not list(tmp_path.iterdir())


def test_a_replaced_folder_is_never_lost(tmp_path):
    """Killed between moving the old one aside and the new one in: the next call finds it."""
    (tmp_path / ".made.replaced").mkdir()
    (tmp_path / ".made.replaced" / "weights").write_text("old")
    with pytest.raises(OSError), new_folder(tmp_path / "made", replace=True):
        assert (tmp_path / "made" / "weights").read_text() == "old"
        raise OSError("disk full")
    assert (tmp_path / "made" / "weights").read_text() == "old"
    with new_folder(tmp_path / "made", replace=True) as folder:
        (folder / "weights").write_text("new")
    assert (tmp_path / "made" / "weights").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["made"]


def test_a_folder_that_happens_to_be_called_partial_is_kept(tmp_path):
    (tmp_path / "made.partial").mkdir()
    (tmp_path / "made.partial" / "thesis").write_text("mine")
    with new_folder(tmp_path / "made"):
        pass
    assert (tmp_path / "made.partial" / "thesis").read_text() == "mine"
