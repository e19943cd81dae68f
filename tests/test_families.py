"""A new family is its own files and one line of the registry: everything else works with it as it is."""

import dataclasses

import jax.numpy as jnp
import pytest
from commandline import run
from conftest import relative
from flax import nnx
from made_up import WORDS, MadeUp, PixelsConfig, TinyConfig, WordsConfig

from sflow_jax import Placement, StableFlow, SweepSettings
from sflow_jax.errors import SettingError
from sflow_jax.families.registry import FAMILIES
from sflow_jax.models.layers import parameters
from sflow_jax.models.layout import Layout
from sflow_jax.planning.lowering import lower_step, weight_bytes
from sflow_jax.sampling.control import LayerControl
from sflow_jax.storage.checkpoint import ModelInfo, load_info, save_info, save_network

SIZE = {"height": 16, "width": 24}
QUIET = {"progress": False}


@pytest.fixture(scope="module", autouse=True)
def registered():
    """The one line of the registry."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(FAMILIES, "made-up", MadeUp())
        yield


@pytest.fixture(scope="module")
def made_up(registered, tmp_path_factory):
    """A checkpoint of the made-up family, random weights."""
    folder = tmp_path_factory.mktemp("made-up")
    configs = {"transformer": TinyConfig(), "autoencoder": PixelsConfig(), "vocabulary": WordsConfig()}
    family = FAMILIES["made-up"]
    for seed, (name, config) in enumerate(configs.items()):
        network = family.networks[name].build(config, rngs=nnx.Rngs(seed))
        save_network(folder, name, parameters(network))
    save_info(folder, ModelInfo(family, "small", 16, "float32", configs, {}, vital_layers=(0, 2)))
    return folder


@pytest.fixture(scope="module")
def flow(made_up) -> StableFlow:
    return StableFlow.load(made_up)


def plain(flow, prompts, noise, guidance, *, layers=()):
    """Generation written out: one evaluation a branch, guidance, Euler; element 0 lends where layers inject."""
    canvas, steps = flow.info.canvas(**SIZE), 3
    encode, batch = flow.encode_prompts, len(prompts)
    sigmas = flow.painter.schedule.sigmas(steps, canvas.tokens)
    control = LayerControl.none(steps, batch, flow.layers).injecting(layers)
    latents = jnp.repeat(noise[None], batch, axis=0)
    layout = Layout(members=batch)
    for i, (sigma, following) in enumerate(zip(sigmas, sigmas[1:])):
        prompted, negative = (
            flow.transformer(
                latents, texts, sigma=jnp.full(batch, sigma), guidance=None, canvas=canvas,
                interventions=control.interventions(i), layout=layout,
            ).velocity
            for texts in (encode(prompts), encode([""] * batch))
        )  # fmt: skip
        latents = latents + (following - sigma) * (negative + guidance * (prompted - negative))
    return latents


@pytest.fixture(scope="module")
def noise(flow):
    return flow.painter.noise(flow.info.canvas(**SIZE), 7)


def test_it_is_known_by_its_checkpoint(flow, made_up):
    assert load_info(made_up) == flow.info and flow.info.title == "Made-up small"
    assert flow.info.layer_kinds == (("joint", 3),) and flow.layers == 3


@pytest.mark.parametrize("guidance", [1.0, 2.5])
def test_it_generates_with_two_branches_or_one(guidance, flow, noise):
    made = flow.generate(["a cat", "dog"], noise=noise, guidance=guidance, **SIZE, **QUIET)
    assert made.images.shape == (2, 16, 24, 3)
    assert relative(made.latents, plain(flow, ["a cat", "dog"], noise, guidance)) <= 1e-5


def test_guidance_of_one_runs_no_second_branch(flow, noise, monkeypatch):
    batches, call = [], type(flow.transformer).__call__

    def seen(self, latents, *conditioning, **options):
        batches.append(len(latents))
        return call(self, latents, *conditioning, **options)

    monkeypatch.setattr(type(flow.transformer), "__call__", seen)
    # Three prompts, which no other test has, so that both are traced.
    for guidance in (1.0, 2.0):
        flow.generate(["a cat", "dog", "sea"], noise=noise, guidance=guidance, **SIZE, **QUIET)
    assert batches == [3, 6]


@pytest.mark.parametrize("layer", range(3))
def test_it_bypasses_every_layer(layer, flow, noise):
    whole, without = (
        flow.generate(["a cat"], noise=noise, bypass=chosen, **SIZE, **QUIET).latents for chosen in ((), [layer])
    )
    assert relative(without, whole) > 1e-3


@pytest.mark.parametrize("layers", [(), (0, 2)])
def test_edits_take_from_the_source_of_their_own_branch(layers, flow, noise):
    """The prompted branch of an edit takes from the prompted source, the other from the other."""
    edit = flow.edit("a cat", ["dog", "sea"], layers=layers, noise=noise, steps=3, guidance=2.5, **SIZE, **QUIET)
    expected = plain(flow, ["a cat", "dog", "sea"], noise, 2.5, layers=layers)
    assert relative(edit.latents, expected) <= 1e-5


@pytest.mark.parametrize("solver", ["reference", "uni-inv", "midpoint"])
def test_a_photo_inverts_and_comes_back(solver, flow, photo):
    inversion = flow.invert(photo, "a ramp", solver=solver, **SIZE, **QUIET)
    replayed = flow.edit(
        "a ramp", ["a ramp"], inversion=inversion, layers="none", guidance=1.0, replay="residual", **QUIET
    )
    assert relative(replayed.latents[1], inversion.trajectory[0]) <= 1e-5


def test_groups_may_be_split_over_a_mesh(flow, made_up, noise):
    prompts = ["a cat", "dog", "sea", "sun"]
    placed = StableFlow.load(made_up, mesh="data=4,fsdp=2")
    ours, expected = (f.generate(prompts, noise=noise, **SIZE, **QUIET).latents for f in (placed, flow))
    assert relative(ours, expected) <= 1e-5


def test_sweeps_measure_it(flow, tmp_path):
    (tmp_path / "prompts.txt").write_text("a cat\ndog\n")
    settings = SweepSettings(prompts=str(tmp_path / "prompts.txt"), features="toyworld", batch=4, top=1)
    summary = flow.find_vital_layers(tmp_path / "run", settings, progress=False)
    assert len(summary.choice.layers) == 1 and [s.layers for s in summary.layers] == [(0,), (1,), (2,)]
    assert summary.kind_of(2) == "joint" and summary.settings["steps"] == 2
    assert "joint" in (tmp_path / "run" / "report.html").read_text()


def test_its_step_lowers_and_its_weights_are_counted(flow):
    info, canvas = flow.info, flow.info.canvas(**SIZE)
    lowered = lower_step(info, Placement(), canvas, groups=2, members=2, words=WORDS)
    state, *_ = lowered.out_info
    assert state.latents.shape == (4, canvas.tokens, info.channels)
    assert weight_bytes(info, Placement(dtype="float32"))["vocabulary"] == 128 * 24 * 4


def test_every_command_takes_it(made_up, tmp_path, capsys):
    size = ("--height", 16, "--width", 24)
    assert run("info", made_up) == 0
    assert "Made-up small" in (said := capsys.readouterr().out) and "3 joint blocks" in said
    assert run("generate", "-m", made_up, "-p", "a cat", *size, "-o", tmp_path / "generated") == 0
    assert run("edit", "-m", made_up, "-p", "a cat", "-e", "dog", *size, "-o", tmp_path / "edited") == 0


def test_step_caching_is_refused_where_the_family_has_none(made_up, monkeypatch, capsys):
    """By what the family says, before any network is read."""
    monkeypatch.setattr("sflow_jax.painter.load_network", lambda *_: pytest.fail("a network was read"))
    with pytest.raises(SettingError, match="Made-up small has no step_cache"):
        StableFlow.load(made_up, step_cache=0.1)
    assert run("generate", "-m", made_up, "-p", "a cat", "--step-cache", 0.1, "-o", made_up / "no") == 2
    assert "Made-up small has no --step-cache" in capsys.readouterr().err


def test_an_unknown_family_is_named(made_up, tmp_path):
    info = load_info(made_up)
    other = dataclasses.replace(info, family=type("Other", (MadeUp,), {"name": "other"})())
    save_info(tmp_path, other)
    with pytest.raises(ValueError, match="unknown model family 'other'; this version knows flux1"):
        load_info(tmp_path)
