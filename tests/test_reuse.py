"""Step caching: while the first layer's output hardly changes, what the others added is used again."""

import logging
import re

import jax.numpy as jnp
import numpy as np
import pytest
from commandline import run
from conftest import relative
from conftest import with_step_cache as cached

from sflow_jax.editing.bank import SourceBank
from sflow_jax.errors import SettingError
from sflow_jax.models.layout import Layout
from sflow_jax.models.modulation import modulate
from sflow_jax.pipeline import StableFlow
from sflow_jax.sampling.control import LayerControl
from sflow_jax.settings import Placement
from sflow_jax.vitality.find import model_record

STEPS, PROMPTS = 4, ["a red cat", "a blue dog on a beach"]
PAINTING = {"steps": STEPS, "height": 32, "width": 32, "seed": 3, "progress": False}


def counted(caplog) -> list[tuple[int, int]]:
    """(evaluations that left layers out, evaluations) of every path since the test began."""
    lines = re.findall(r"(\d+) of (\d+) evaluations left layers out", caplog.text)
    return [(int(some), int(all_)) for some, all_ in lines]


@pytest.fixture(autouse=True)
def heard(caplog):
    caplog.set_level(logging.INFO, logger="sflow_jax")


def test_without_any_change_allowed_the_pictures_are_the_same(flow, caplog):
    plain, strict = flow.generate(PROMPTS, **PAINTING), cached(flow, 1e-6).generate(PROMPTS, **PAINTING)
    np.testing.assert_allclose(strict.latents, plain.latents, rtol=0, atol=1e-5)
    assert counted(caplog) == [(0, STEPS)]


def test_what_layers_added_is_added_again(flow, caplog):
    """The first step whole; the second from the first layer's output and what the others added before."""
    painter = cached(flow, 0.99).painter
    canvas, scale = painter.info.canvas(32, 32), np.full(2, 2.0, np.float32)
    noise, conditioning = np.stack([painter.noise(canvas, i) for i in range(2)]), painter.encode_prompts(PROMPTS)
    control = LayerControl.none(2, 2, painter.layers)
    ours = painter.denoise(noise, conditioning, control, canvas, guidance=scale, groups=2)
    assert counted(caplog) == [(1, 2)]
    guidance = jnp.asarray(scale)
    model, sigmas = painter.transformer, painter.schedule.sigmas(2, canvas.tokens)

    def whole(latents, sigma):
        return model(
            jnp.asarray(latents), conditioning, sigma=jnp.full(2, sigma), guidance=guidance, canvas=canvas,
            layout=Layout(capture=("image",)),
        )  # fmt: skip

    first = whole(noise, sigmas[0])
    latents = noise + (sigmas[1] - sigmas[0]) * first.velocity
    images = whole(latents, sigmas[1]).captured["image"]
    added = first.captured["image"][-1] - first.captured["image"][0]
    vector = model.embed(jnp.full(2, sigmas[1]), guidance, conditioning.pooled)
    shift, scale = jnp.split(model.modulation_out(vector), 2, axis=-1)
    velocity = model.image_out(modulate(images[0] + added, shift, scale, model.config.epsilon))
    assert relative(ours, latents + (sigmas[2] - sigmas[1]) * velocity) < 1e-5


def test_nothing_is_used_again_where_other_things_are_done_to_layers(flow, caplog):
    """Bypassed from the third step on: there the layers are evaluated anew."""
    painter = cached(flow, 0.99).painter
    canvas, control = painter.info.canvas(32, 32), LayerControl.none(STEPS, 1, painter.layers)
    control = control.bypassing([1], steps=slice(2, None))
    painter.denoise(
        painter.noise(canvas, 0)[None], painter.encode_prompts(PROMPTS[:1]), control, canvas,
        guidance=np.full(1, 2.0, np.float32),
    )  # fmt: skip
    assert counted(caplog) == [(2, STEPS)]


def test_any_threshold_is_one_program_and_edits_have_it_too(flow, compilations, caplog):
    options = {**PAINTING, "layers": "vital"}
    cached(flow, 0.5).edit(PROMPTS[0], PROMPTS[1:], **options)
    before = compilations()
    edit = cached(flow, 0.25).edit(PROMPTS[0], PROMPTS[1:], **options)
    assert compilations() == before and np.isfinite(edit.latents).all()
    assert len(counted(caplog)) == 2


def test_meshes_agree(checkpoint, flow, caplog):
    split = StableFlow.load(checkpoint, mesh="data=2", step_cache=0.6).generate(PROMPTS, **PAINTING)
    together = cached(flow, 0.6).generate(PROMPTS, **PAINTING)
    assert relative(split.latents, together.latents) < 1e-5
    one, other = counted(caplog)
    assert one == other and 0 < one[0] < STEPS


def test_results_say_it_and_sweeps_keep_it_apart(flow, checkpoint, capsys):
    assert cached(flow, 0.1).generate(PROMPTS[:1], **PAINTING).record["step_cache"] == 0.1
    assert model_record(flow.painter)["checkpoint"] != model_record(cached(flow, 0.1).painter)["checkpoint"]
    for wrong in ("1", "-0.1", "nan"):
        assert run("generate", "-m", checkpoint, "-p", "a", "--step-cache", wrong, "--out", "no") == 2
        assert "--step-cache must be" in capsys.readouterr().err
    with pytest.raises(SettingError, match="step_cache must be at least 0 and less than 1"):
        Placement(step_cache=2.0)


def test_layers_that_are_left_out_lend_nothing_to_a_bank(flow, checkpoint, tmp_path, capsys):
    asked = {"steps": STEPS, "edits_at_once": 1, "height": 32, "width": 32, "progress": False}
    shortened = cached(flow, 0.99)
    edit = shortened.edit("a cat", ["a dog", "a hat", "snow"], **asked)
    # Every batch has the source's row.
    assert (edit.settings.kv_cache, edit.evaluations) == ("off", 6 * STEPS)
    with pytest.raises(SettingError, match="step_cache"):
        shortened.edit("a cat", ["a dog"], **asked, kv_cache=SourceBank("host"))
    options = ("-p", "a cat", "-e", "a dog", "--step-cache", 0.1, "--kv-cache", "host", "-o", tmp_path / "out")
    assert run("edit", "-m", checkpoint, *options) == 2
    assert "--step-cache" in capsys.readouterr().err and not (tmp_path / "out").exists()
