"""Packing, sizes, and pictures from anywhere."""

import io
import os

import numpy as np
import pytest
import torch
from diffusers import FluxPipeline
from PIL import Image, ImageCms, ImageOps

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


RAMP = np.arange(256, dtype=np.uint8).reshape(16, 16)


@pytest.mark.parametrize(
    "pixels, name",
    [
        (RAMP.astype(np.uint16) * 257, "grey.png"),
        (RAMP.astype(np.uint16) * 257, "grey.tiff"),
        (RAMP.astype(np.int32) * ((2**31 - 1) // 255), "grey32.tiff"),
        (RAMP.astype(np.float32) / 255, "float.tiff"),
    ],
)
def test_deep_greys_keep_their_levels(pixels, name, tmp_path):
    Image.fromarray(pixels).save(tmp_path / name)
    np.testing.assert_array_equal(np.asarray(open_picture(tmp_path / name))[..., 0], RAMP)


def test_numbers_that_are_not_finite_are_no_picture(tmp_path):
    Image.fromarray(np.full((4, 4), np.nan, np.float32)).save(tmp_path / "nan.tiff")
    with pytest.raises(ValueError, match="not finite"):
        open_picture(tmp_path / "nan.tiff")


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L"])
def test_an_embedded_profile_becomes_srgb(mode, tmp_path):
    """A profile whose white and tones differ; littlecms called directly says what is right."""
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB"))
    wide = ImageCms.ImageCmsProfile(io.BytesIO(linear_profile(profile.tobytes())))
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (8, 8, {"RGB": 3, "RGBA": 4, "L": 1}[mode]), np.uint8)
    if mode == "RGBA":
        pixels[..., 3] = 255
    picture = Image.fromarray(pixels.squeeze())
    picture.save(tmp_path / "profiled.png", icc_profile=wide.tobytes())
    made = np.asarray(open_picture(tmp_path / "profiled.png"), int)
    transform = ImageCms.buildTransform(wide, ImageCms.createProfile("sRGB"), "RGB", "RGB")
    plain = picture.convert("RGB")
    expected = np.asarray(ImageCms.applyTransform(plain, transform), int)
    assert np.abs(made - expected).max() <= 1
    assert np.abs(made - np.asarray(plain, int)).max() > 20


def linear_profile(srgb: bytes) -> bytes:
    """sRGB's colours with linear tones: its three curves replaced by the identity."""
    data, count = bytearray(srgb), int.from_bytes(srgb[128:132], "big")
    for i in range(count):
        tag = srgb[132 + 12 * i : 144 + 12 * i]
        if tag[:4] in (b"rTRC", b"gTRC", b"bTRC"):
            start = int.from_bytes(tag[4:8], "big")
            # "curv" without points is the identity.
            data[start : start + 12] = b"curv" + bytes(8)
    return bytes(data)


def test_a_broken_profile_or_exif_does_not_stop_a_photo(tmp_path, caplog):
    picture = Image.fromarray(np.stack([RAMP] * 3, axis=-1))
    picture.save(tmp_path / "profile.png", icc_profile=b"not a profile")
    picture.save(tmp_path / "exif.jpg", exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff broken")
    for name in ("profile.png", "exif.jpg"):
        assert open_picture(tmp_path / name).size == (16, 16)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation_agrees_with_pillow(orientation, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(np.stack([RAMP[:8]] * 3, axis=-1)).save(tmp_path / "turned.png", exif=exif)
    with Image.open(tmp_path / "turned.png") as opened:
        expected = np.asarray(ImageOps.exif_transpose(opened))
    np.testing.assert_array_equal(np.asarray(open_picture(tmp_path / "turned.png")), expected)


def test_what_is_no_file_is_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path, "/dev/zero"):
        with pytest.raises(ValueError, match="is not a picture file"):
            open_picture(path)


def test_decoders_complain_in_one_line(tmp_path):
    Image.fromarray(np.stack([RAMP] * 3, axis=-1)).save(tmp_path / "cut.jpg")
    content = (tmp_path / "cut.jpg").read_bytes()
    rng = np.random.default_rng(0)
    for length in rng.integers(4, len(content) - 20, 20):
        (tmp_path / "cut.jpg").write_bytes(content[:length])
        with pytest.raises(ValueError, match="cannot read picture") as error:
            open_picture(tmp_path / "cut.jpg")
        assert "\n" not in str(error.value)
