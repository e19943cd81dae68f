"""Packing, sizes, and pictures from anywhere."""

import numpy as np
import pytest
import torch
from diffusers import FluxPipeline
from PIL import Image

from sflow_jax.models.flux1 import position_ids
from sflow_jax.pictures.canvas import Canvas
from sflow_jax.pictures.files import fit_picture, open_picture, to_network, to_uint8
from sflow_jax.pictures.latents import draw_noise, pack, unpack


def test_packing_agrees_with_diffusers_and_back():
    latents = np.random.default_rng(0).standard_normal((2, 6, 10, 3)).astype(np.float32)
    theirs = FluxPipeline._pack_latents(torch.tensor(latents).permute(0, 3, 1, 2), 2, 3, 6, 10)
    np.testing.assert_array_equal(pack(latents), theirs.numpy())
    np.testing.assert_array_equal(unpack(pack(latents), 3, 5), latents)


def test_position_ids_agree_with_diffusers():
    theirs = FluxPipeline._prepare_latent_image_ids(1, 3, 5, "cpu", torch.float32)
    np.testing.assert_array_equal(position_ids(Canvas.of(48, 80, 16)), theirs.numpy())


def test_noise_is_standard_normal_and_follows_the_seed():
    noise = draw_noise(7, 4096, 64)
    assert abs(noise.mean()) < 0.01 and abs(noise.std() - 1) < 0.01
    np.testing.assert_array_equal(noise, draw_noise(7, 4096, 64))
    assert not np.array_equal(noise, draw_noise(8, 4096, 64))


@pytest.mark.parametrize("height, width", [(0, 64), (64, 40), (15, 64), (-16, 16)])
def test_sizes_that_do_not_fit_are_refused_with_one_that_does(height, width):
    with pytest.raises(ValueError, match="multiples of 16, for example"):
        Canvas.of(height, width, 16)


def test_exif_orientation_is_honoured(tmp_path):
    pixels = np.zeros((4, 8, 3), np.uint8)
    pixels[:, :4] = 255
    exif = Image.Exif()
    exif[0x0112] = 6  # turn a quarter clockwise to see it upright
    Image.fromarray(pixels).save(tmp_path / "turned.png", exif=exif)
    upright = np.asarray(open_picture(tmp_path / "turned.png"))
    assert upright.shape == (8, 4, 3)
    assert upright[:4].min() == 255 and upright[4:].max() == 0


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparency_becomes_white(mode, tmp_path):
    picture = Image.new("RGBA", (4, 4), (255, 0, 0, 0)).convert(mode)
    if mode == "P":
        picture.info["transparency"] = picture.getpixel((0, 0))
    picture.save(tmp_path / "clear.png")
    assert np.asarray(open_picture(tmp_path / "clear.png")).min() == 255


@pytest.mark.parametrize("size", [(100, 40), (40, 100), (64, 64)])
def test_other_sizes_are_covered_and_cut_at_the_centre(size):
    width, height = size
    y, x = np.mgrid[0:height, 0:width]
    centred = np.exp(-((x - width / 2 + 0.5) ** 2 + (y - height / 2 + 0.5) ** 2) / 50)
    picture = Image.fromarray(np.uint8(255 * centred)).convert("RGB")
    cut = fit_picture(picture, 32, 48)[..., 0].astype(float)
    assert cut.shape == (32, 48)
    centre = [(np.arange(n) * cut.sum(1 - axis)).sum() / cut.sum() for axis, n in enumerate(cut.shape)]
    np.testing.assert_allclose(centre, [15.5, 23.5], atol=0.5)


def test_uint8_round_trip():
    pixels = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1).repeat(3, -1)
    np.testing.assert_array_equal(to_uint8(to_network(pixels) / 2 + 0.5), pixels)


def test_bad_pictures_are_named(tmp_path):
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nnot really")
    for bad, message in [
        (tmp_path / "missing.png", "no picture at"),
        (tmp_path / "broken.png", "cannot read picture"),
        (np.zeros((4, 4, 3)), "uint8"),
        (np.zeros((4, 4, 5), np.uint8), "uint8"),
        (17, "path, a PIL image"),
    ]:
        with pytest.raises(ValueError, match=message):
            open_picture(bad)
