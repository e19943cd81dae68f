"""Preprocessing on the device against Pillow and transformers, level for level."""

import jax
import numpy as np
import pytest
import torch
from PIL import Image
from transformers import BitImageProcessorPil, CLIPImageProcessorPil

from sflow_jax.measures.preprocessing import Preprocessing

PROCESSORS = {
    "dinov2": BitImageProcessorPil(size={"shortest_edge": 256}),
    "clip": CLIPImageProcessorPil(),
    "bilinear": CLIPImageProcessorPil(resample=2),
    "exact": BitImageProcessorPil(size={"height": 90, "width": 71}, crop_size={"height": 64, "width": 59}),
    "uncropped": BitImageProcessorPil(size={"shortest_edge": 40}, do_center_crop=False, do_normalize=False),
    "unresized": BitImageProcessorPil(do_resize=False, crop_size={"height": 24, "width": 21}),
}
# The published file of CLIP, which is older than most of its keys.
OLD_CLIP = {
    "crop_size": 224,
    "do_center_crop": True,
    "do_normalize": True,
    "do_resize": True,
    "feature_extractor_type": "CLIPFeatureExtractor",
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
    "resample": 3,
    "size": 224,
}


def pictures(height: int, width: int) -> np.ndarray:
    """One of noise, the hardest to resize, and a smooth one."""
    rng = np.random.default_rng(height * width)
    rough, seed = (rng.integers(0, 256, (*shape, 3), dtype=np.uint8) for shape in ((height, width), (7, 9)))
    smooth = Image.fromarray(seed).resize((width, height), Image.Resampling.BICUBIC)
    return np.stack([rough, np.asarray(smooth)])


@pytest.mark.parametrize("name", PROCESSORS)
@pytest.mark.parametrize("size", [(32, 32), (97, 131), (224, 224), (512, 512), (300, 211), (33, 500), (720, 405)])
def test_as_transformers_with_pillow(name, size):
    processor, given = PROCESSORS[name], pictures(*size)
    expected = processor(list(given), return_tensors="np")["pixel_values"].transpose(0, 2, 3, 1)
    made = jax.jit(Preprocessing.from_hf(processor.to_dict()))(given)
    np.testing.assert_allclose(made, expected, atol=1e-6)


def levels(made: jax.Array) -> np.ndarray:
    """What was normalised only by `scale` = 1/255."""
    return np.round(np.asarray(made) * 255).astype(int)


@pytest.mark.parametrize("resample", [2, 3])
def test_tall_pictures_go_along_rows_first(resample):
    """Every version of Pillow does, told to in two calls; version 13 decides otherwise by itself."""
    given, made = pictures(400, 61), Preprocessing(shortest_edge=50, resample=resample)
    assert made.resized(400, 61) == (327, 50)
    for picture, ours in zip(given, levels(made(given))):
        across = Image.fromarray(picture).resize((50, 400), resample)
        np.testing.assert_array_equal(ours, across.resize((50, 327), resample))


@pytest.mark.parametrize("size", [(64, 64), (97, 131), (513, 300), (257, 1000)])
@pytest.mark.parametrize("resample, mode", [(2, "bilinear"), (3, "bicubic")])
def test_close_to_the_torchvision_processors(resample, mode, size):
    """They resize with torch's 8-bit kernel, whose weights have fewer bits."""
    given, made = pictures(*size), Preprocessing(shortest_edge=256, resample=resample)
    channels_first = torch.tensor(given).permute(0, 3, 1, 2)
    theirs = torch.nn.functional.interpolate(channels_first, made.resized(*size), mode=mode, antialias=True)
    difference = np.abs(levels(made(given)) - theirs.permute(0, 2, 3, 1).numpy())
    assert difference.max() <= 2 and (difference > 0).mean() < 0.015


def test_floats_are_rounded_to_levels_and_clipped():
    given = pictures(31, 45)
    made = Preprocessing(shortest_edge=20)
    rough = given + np.random.default_rng(0).uniform(-0.49, 0.49, given.shape).astype(np.float32)
    np.testing.assert_array_equal(made(rough), made(given))
    np.testing.assert_array_equal(made(given * np.float32(9)), made(np.minimum(given.astype(int) * 9, 255)))


def test_the_published_file_of_clip_is_understood():
    assert Preprocessing.from_hf(OLD_CLIP) == Preprocessing.from_hf(PROCESSORS["clip"].to_dict())


@pytest.mark.parametrize(
    "change, message",
    [
        ({"feature_extractor_type": "ViTFeatureExtractor"}, "ViTFeatureExtractor is not supported"),
        ({"feature_extractor_type": None}, "image processor none"),
        ({"resample": 1}, "resample 1 is not supported"),
        ({"size": {"longest_edge": 224}}, "size .* needs shortest_edge"),
        ({"size": {"shortest_edge": 0}}, "size .* needs shortest_edge"),
        ({"crop_size": {"shortest_edge": 224}}, "crop_size .* needs height and width"),
        ({"image_mean": 0.5}, "image_mean 0.5 .* three numbers"),
        ({"image_std": []}, "does not say image_std"),
        ({"size": None, "crop_size": None}, "does not say size, crop_size"),
        ({"do_pad": True}, "do_pad are not supported"),
    ],
)
def test_what_is_not_supported_is_named(change, message):
    with pytest.raises(ValueError, match=message):
        Preprocessing.from_hf(OLD_CLIP | change)


def test_pictures_too_small_for_the_crop_are_refused():
    with pytest.raises(ValueError, match="too small for a crop of 30"):
        Preprocessing(crop=(30, 30))(pictures(31, 29))
