"""Results in Python: shown, saved, loaded; one noise a picture; sizes of photos; a look at every step."""

import json

import numpy as np
import pytest
from commandline import run
from conftest import relative
from PIL import Image

from sflow_jax.errors import SettingError
from sflow_jax.pictures.canvas import sides_like
from sflow_jax.pictures.files import to_uint8
from sflow_jax.pipeline import StableFlow
from sflow_jax.results import Edit, Generation

FAST = {"steps": 2, "progress": False}


# ---- seeds


def test_each_seed_paints_what_it_paints_alone(flow):
    several = flow.generate(["a cat"], seed=[3, 4, 2**40], **FAST)
    for row, seed in enumerate((3, 4, 2**40)):
        assert relative(several.latents[row], flow.generate(["a cat"], seed=seed, **FAST).latents[0]) < 1e-5
    assert several.captions[1] == "a cat (seed 4)" and several.settings.seed == (3, 4, 2**40)


def test_seeds_and_prompts_pair_up(flow):
    paired = flow.generate(["a cat", "a dog"], seed=[3, 4], guidance=[2.0, 3.0], **FAST)
    alone = flow.generate(["a dog"], seed=4, guidance=3.0, **FAST)
    assert relative(paired.latents[1], alone.latents[0]) < 1e-5
    shared = flow.generate(["a cat", "a dog"], seed=[4], **FAST)
    np.testing.assert_array_equal(shared.latents, flow.generate(["a cat", "a dog"], seed=4, **FAST).latents)


@pytest.mark.parametrize(
    "prompts, seed, message",
    [
        (["a", "b"], [1, 2, 3], "3 numbers in seed do not go with 2 prompts"),
        (["a"], [], "seed must be a whole number"),
        (["a"], [1, -1], "seed must be a whole number from 0"),
        (["a"], [1.5], "seed must be a whole number"),
        (["a"], "1,2", "seed must be a whole number"),
    ],
)
def test_seeds_that_do_not_fit_are_named(prompts, seed, message, flow):
    # Past the tests' own check of types, which users do not have.
    with pytest.raises(SettingError, match=message):
        StableFlow.generate.__wrapped__(flow, prompts, seed=seed, **FAST)


# ---- sizes


@pytest.mark.parametrize(
    "height, width, expected",
    [(100, 100, (1024, 1024)), (2000, 3000, (832, 1248)), (3000, 2000, (1248, 832)), (1, 10**6, (16, 16384))],
)
def test_photos_keep_their_shape_at_the_models_number_of_pixels(height, width, expected):
    assert sides_like(height, width, 1024 * 1024, 16) == expected


def test_shapes_are_kept_closely_and_so_are_areas():
    for height, width in np.random.default_rng(0).integers(500, 2000, (200, 2)):
        rows, columns = sides_like(int(height), int(width), 1024 * 1024, 16)
        assert rows % 16 == columns % 16 == 0
        assert abs(np.log(rows / columns * width / height)) < 0.02 and abs(np.log2(rows * columns / 2**20)) < 0.1
        assert max(sides_like(int(height), int(width), 1024 * 1024, 16, most=64)) <= 1024


def test_sizes_of_photos(flow, photo):
    sizes = {
        "auto": (48, 64), "fit": (64, 64), "32x80": (32, 80), "32×80": (32, 80),
    }  # fmt: skip
    for size, expected in sizes.items():
        edit = flow.edit("a cat", ["a dog"], image=photo, method="sdedit", size=size, steps=4, progress=False)
        assert edit.images.shape[1:3] == expected and edit.settings.size == size
    inversion = flow.invert(photo, "a cat", **FAST)
    assert (inversion.settings["height"], inversion.settings["width"]) == (48, 64)
    assert flow.region(photo, "a cat", "a dog", progress=False).shape == (3, 4)
    # Sides win, and without a photo there is nothing to keep.
    assert flow.edit("a cat", ["a dog"], image=photo, height=32, **FAST).images.shape[1:3] == (32, 64)
    assert flow.edit("a cat", ["a dog"], **FAST).images.shape[1:3] == (64, 64)


@pytest.mark.parametrize(
    "size, message",
    [("huge", "size must be auto"), ("40x64", "multiples of 16"), ("0x64", "multiples of 16"), (64, "size")],
)
def test_sizes_that_do_not_fit_are_named(size, message, flow, photo):
    with pytest.raises(SettingError, match=message):
        StableFlow.edit.__wrapped__(flow, "a cat", ["a dog"], image=photo, size=size, **FAST)


# ---- results


@pytest.fixture(scope="module")
def edit(flow, photo):
    """Two edits of a photo by a method that finds a region."""
    return flow.edit("a cat", ["a dog", "snow"], image=photo, method="coupled", seed=3, steps=4, progress=False)


def test_results_show_themselves(flow, edit):
    assert repr(edit) == "<a source and 2 edits by coupled, 48×64, 4 steps, seed 3>"
    made = flow.generate(["a cat"], seed=[1, 2], **FAST)
    assert repr(made) == "<2 generated pictures, 64×64, 2 steps, seed (1, 2)>"
    np.testing.assert_array_equal(np.stack([np.asarray(picture) for picture in edit.pil()]), to_uint8(edit.images))
    assert edit.grid().width > 3 * 64 and edit._repr_png_().startswith(b"\x89PNG")
    assert repr(flow.invert(edit.pil()[0], "a cat", **FAST)) == "<inversion of 'a cat', 48×64, 2 steps>"


def test_edits_survive_the_disk(edit, tmp_path):
    folder = edit.save(tmp_path / "new" / "edit")
    names = {"source", "edit-1", "edit-2", "region-1", "region-2", "grid"}
    assert {path.stem for path in folder.glob("*.png")} == names
    again = Edit.load(folder)
    np.testing.assert_array_equal(to_uint8(again.images), to_uint8(edit.images))
    np.testing.assert_allclose(again.latents, edit.latents, rtol=1e-6)
    np.testing.assert_allclose(again.regions, edit.regions, atol=1 / 255)
    for name in ("layers", "steps", "guidance", "nudge", "seed", "height", "width", "method"):
        assert getattr(again.settings, name) == getattr(edit.settings, name)
    assert (again.evaluations, again.captions) == (edit.evaluations, edit.captions)
    # What was loaded is saved as it was.
    again.save(tmp_path / "again")
    assert json.loads((tmp_path / "again" / "edit.json").read_text())["method_settings"]["begin"] == 0.05


def test_generations_survive_the_disk_and_the_command_repeats_them(flow, tmp_path):
    made = flow.generate(["a cat"], seed=[1, 2], **FAST)
    made.save(tmp_path / "made")
    again = Generation.load(tmp_path / "made")
    np.testing.assert_array_equal(to_uint8(again.images), to_uint8(made.images))
    assert again.settings == made.settings and again.captions == made.captions
    assert run("generate", "--from", tmp_path / "made" / "picture-2.png", "-o", tmp_path / "painted") == 0
    files = [(tmp_path / name / "picture-2.png").read_bytes() for name in ("made", "painted")]
    assert files[0] == files[1]


def test_folders_of_other_results_are_refused(flow, edit, tmp_path):
    edit.save(tmp_path / "edit")
    with pytest.raises(ValueError, match=r"no record at .*generate\.json"):
        Generation.load(tmp_path / "edit")
    with pytest.raises(SettingError, match="another command's edit.json"):
        flow.generate(["a cat"], **FAST).save(tmp_path / "edit")
    Image.new("RGB", (16, 16)).save(tmp_path / "edit" / "edit-1.png")
    with pytest.raises(ValueError, match="not as its record says"):
        Edit.load(tmp_path / "edit")
    with pytest.raises(ValueError, match="without a record"):
        Edit(edit.images, edit.latents, edit.settings).save(tmp_path / "other")


def test_inversions_are_named_by_their_folder(flow, photo, tmp_path):
    inversion = flow.invert(photo, "a cat", **FAST)
    inversion.save(tmp_path / "new" / "inverted")
    by_name = flow.edit("a cat", ["a dog"], inversion=str(tmp_path / "new" / "inverted"), progress=False)
    direct = flow.edit("a cat", ["a dog"], inversion=inversion, progress=False)
    np.testing.assert_array_equal(by_name.latents, direct.latents)
    assert by_name.record["inversion_checksum"] and by_name.record["source"] == "inversion"
    with pytest.raises(ValueError, match="no inversion at"):
        flow.edit("a cat", ["a dog"], inversion=str(tmp_path / "nowhere"), progress=False)


# ---- the rest of Python


def test_layers_are_texts_everywhere(flow):
    by_text = flow.edit("a cat", ["a dog"], layers="0,2", skip_layers="1", skip_window=(0, 1), **FAST)
    by_number = flow.edit("a cat", ["a dog"], layers=(0, 2), skip_layers=(1,), skip_window=(0, 1), **FAST)
    np.testing.assert_array_equal(by_text.latents, by_number.latents)
    assert flow.generate(["a cat"], bypass="0,3-4", **FAST).settings.bypass == (0, 3, 4)


def test_every_step_can_be_seen(flow, photo):
    seen = []

    def look(step, latents):
        seen.append((step, latents))

    made = flow.generate(["a cat", "a dog"], on_step=look, **FAST)
    assert [step for step, _ in seen] == [1, 2]
    # They are the caller's: what comes later does not use them up.
    np.testing.assert_array_equal(seen[-1][1], made.latents)
    assert relative(seen[0][1], made.latents) > 1e-3
    seen.clear()
    inversion = flow.invert(photo, "a cat", on_step=look, **FAST)
    np.testing.assert_array_equal(np.stack([latents[0] for _, latents in seen]), inversion.trajectory[1:])
    seen.clear()
    flow.edit("a cat", ["a dog", "snow"], inversion=inversion, edits_at_once=1, on_step=look, progress=False)
    assert [(step, len(latents)) for step, latents in seen] == [(1, 2), (2, 2)] * 2
