"""What the pipeline promises beside parity: chunks, sizes, reuse, refusals."""

import numpy as np
import pytest
from conftest import relative

from sflow_jax.painter import Painter
from sflow_jax.pipeline import StableFlow
from sflow_jax.results import INVERSION_FILE, Inversion

FAST = {"steps": 2, "progress": False}


def test_edits_in_chunks_equal_edits_at_once(flow):
    edits = ["a dog", "a hat", "snow", "a beach", "a photo"]
    whole = flow.edit("a cat", edits, edits_at_once=5, **FAST)
    chunked = flow.edit("a cat", edits, edits_at_once=2, **FAST)
    assert whole.images.shape == (6, 64, 64, 3)
    assert relative(chunked.latents, whole.latents) < 1e-5


def test_chunks_of_a_photo_share_its_inversion(flow, photo):
    edits = ["a dog", "a hat", "snow"]
    inversion = flow.invert(photo, "a cat", **FAST)
    whole = flow.edit("a cat", edits, inversion=inversion, edits_at_once=3, progress=False)
    chunked = flow.edit("a cat", edits, inversion=inversion, edits_at_once=2, progress=False)
    assert relative(chunked.latents, whole.latents) < 1e-5
    # Replay is aligned: the source ends exactly where the inversion began.
    np.testing.assert_array_equal(whole.latents[0], inversion.trajectory[0])


@pytest.mark.quick
def test_image_and_its_inversion_give_the_same_edit(flow, photo):
    from_image = flow.edit("a cat", ["a dog"], image=photo, method="reference", **FAST)
    inversion = flow.invert(photo, "a cat", **FAST)
    np.testing.assert_array_equal(
        from_image.images, flow.edit("a cat", ["a dog"], inversion=inversion, progress=False).images
    )


@pytest.mark.parametrize("height, width", [(32, 80), (48, 16)])
def test_sizes_need_not_be_square(height, width, flow, photo):
    made = flow.edit("a cat", ["a dog"], image=photo, height=height, width=width, **FAST)
    assert made.images.shape == (2, height, width, 3)
    assert 0 <= made.images.min() and made.images.max() <= 1


def test_residual_replay_keeps_the_source_caption_on_the_photo(flow, photo):
    """Evaluated where inversion was, the source's own prompt comes back exactly (DirectEdit)."""
    inversion = flow.invert(photo, "a cat", steps=4, progress=False)
    errors = {}
    for replay in ("residual", "aligned"):
        made = flow.edit(
            "a cat", ["a cat"], inversion=inversion, layers="none", guidance=1.0, replay=replay, progress=False
        )
        errors[replay] = relative(made.latents[1], inversion.trajectory[0])
    assert errors["residual"] < 1e-4 and errors["aligned"] > 100 * errors["residual"]


def test_unnudge_divides_the_latents_before_decoding(flow, photo):
    inversion = flow.invert(photo, "a cat", nudge=1.2, size="fit", **FAST)
    made = flow.edit("a cat", ["a dog"], inversion=inversion, unnudge=True, progress=False)
    again = flow.decode(flow.encode_image(photo), height=64, width=64)
    np.testing.assert_allclose(made.images[0], again[0], atol=1e-4)


@pytest.mark.quick
def test_noise_replaces_the_seed(flow):
    noise = np.zeros((16, 16), np.float32)
    first, second = (flow.generate(["a cat"], noise=noise, seed=seed, **FAST).latents for seed in (0, 1))
    np.testing.assert_array_equal(first, second)


def test_layers_by_name(flow):
    assert flow.resolve_layers("vital") == (0, 2, 3)
    assert flow.resolve_layers("all") == (0, 1, 2, 3, 4)
    assert flow.resolve_layers("none") == ()
    assert flow.resolve_layers([4, 1, 4]) == (1, 4)


def test_inversions_survive_the_disk(flow, photo, tmp_path):
    inversion = flow.invert(photo, "a cat", **FAST)
    inversion.save(tmp_path)
    again = Inversion.load(tmp_path)
    np.testing.assert_array_equal(again.trajectory, inversion.trajectory)
    np.testing.assert_array_equal(again.sigmas, inversion.sigmas)
    assert again.settings == inversion.settings
    assert [path.name for path in tmp_path.iterdir()] == [INVERSION_FILE]


@pytest.mark.parametrize(
    "options, message",
    [
        ({"layers": "vitl"}, "vital, all, none"),
        ({"layers": [7]}, "no layer 7"),
        ({"steps": 0}, "steps must be at least 1"),
        ({"height": 40}, "multiples of 16"),
        ({"guidance": [1.0, 2.0, 3.0]}, "guidance must be one number or 2"),
        ({"noise": np.zeros((4, 4), np.float32)}, "noise must be packed latents"),
        ({"edits_at_once": 0}, "edits_at_once"),
        ({"image": "missing.png"}, "no picture at missing.png"),
        ({"replay": "lagging"}, "unknown replay"),
    ],
)
def test_bad_edit_options_are_named(options, message, flow):
    with pytest.raises(ValueError, match=message):
        flow.edit("a cat", ["a dog"], **{**FAST, **options})


def test_bad_uses_of_an_inversion_are_named(flow, photo, tmp_path):
    inversion = flow.invert(photo, "a cat", **FAST)
    for options, message in [
        ({"steps": 3}, "steps=2, not 3"),
        ({"height": 32}, "height=48, not 32"),
        ({"image": photo}, "either image or inversion"),
    ]:
        with pytest.raises(ValueError, match=message):
            flow.edit("a cat", ["a dog"], inversion=inversion, progress=False, **options)
    with pytest.raises(ValueError, match="nudge must be at least 0.01"):
        flow.invert(photo, "a cat", nudge=0.0, **FAST)
    (tmp_path / INVERSION_FILE).write_bytes(b"not safetensors")
    with pytest.raises(ValueError, match="not a readable inversion"):
        Inversion.load(tmp_path)
    with pytest.raises(ValueError, match="no inversion at"):
        Inversion.load(tmp_path / "elsewhere.safetensors")


def test_vital_without_known_layers_says_how_to_get_them(flow):
    import dataclasses

    info = dataclasses.replace(flow.info, vital_layers=None)
    bare = StableFlow(Painter(info, flow.transformer, flow.autoencoder, flow.prompts))
    with pytest.raises(ValueError, match="does not say which of its layers are vital"):
        bare.edit("a cat", ["a dog"], **FAST)


def test_long_prompts_warn_with_what_is_lost(flow, caplog):
    import logging

    logging.getLogger("sflow_jax").propagate = True
    prompt = "a cat on a red beach in snow and the dog lies on the wonderful hat"
    flow.encode_prompts([prompt])
    lost = [record.args for record in caplog.records if "ignored" in record.msg]
    assert {args[1] for args in lost} == {"CLIP (the pooled vector)", "T5"}
    assert all(prompt.endswith(args[2]) for args in lost)


@pytest.mark.parametrize("prompts", [[], "a cat"])
def test_prompts_must_be_a_list(prompts, flow):
    with pytest.raises(ValueError, match="list of at least one"):
        flow.generate(prompts, **FAST)
