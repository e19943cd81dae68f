"""The measures inside jitted functions, against formulas written out in float64."""

import jax
import numpy as np
import pytest
from numpy.lib.stride_tricks import sliding_window_view

from sflow_jax.measures.metrics import cosine_similarity, feature_cosine, picture_psnr, picture_ssim, psnr


@pytest.fixture(scope="module")
def pair() -> tuple[np.ndarray, np.ndarray]:
    """Smooth pictures, and the same with more and more noise."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[0:23, 0:29] / 29
    smooth = np.stack([128 + 90 * np.sin(7 * x + 3 * y * c) for c in range(3)], axis=-1)
    noise = rng.normal(size=(4, 23, 29, 3)) * np.array([0, 2, 20, 90]).reshape(4, 1, 1, 1)
    return np.uint8(np.clip(smooth + noise, 0, 255)), np.uint8(np.repeat(smooth[None], 4, axis=0))


def reference_ssim(first: np.ndarray, second: np.ndarray) -> float:
    """Wang et al. 2004, equation 13, with the Gaussian window of section III-B, of one channel."""
    distance = np.arange(11) - 5
    window = np.exp(-(distance[:, None] ** 2 + distance[None] ** 2) / (2 * 1.5**2))
    window /= window.sum()
    mean = lambda x: (sliding_window_view(x, (11, 11)) * window).sum(axis=(-1, -2))
    a, b = mean(first), mean(second)
    across, along, between = mean(first**2) - a**2, mean(second**2) - b**2, mean(first * second) - a * b
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    return float(np.mean((2 * a * b + c1) * (2 * between + c2) / ((a**2 + b**2 + c1) * (across + along + c2))))


def test_ssim_is_the_formula(pair):
    made = jax.jit(picture_ssim)(*pair)
    wide = [x.astype(np.float64) for x in pair]
    expected = [np.mean([reference_ssim(a[..., c], b[..., c]) for c in range(3)]) for a, b in zip(*wide)]
    assert expected[0] == 1 and expected[1] > 0.9 > 0.5 > expected[3]
    np.testing.assert_allclose(made, expected, atol=2e-5)
    np.testing.assert_allclose(picture_ssim(*(x.astype(np.float32) for x in pair)), made, atol=1e-6)


@pytest.mark.parametrize("size", [(10, 11), (11, 10)])
def test_ssim_refuses_pictures_smaller_than_its_window(size):
    picture = np.zeros((1, *size, 3), np.uint8)
    with pytest.raises(ValueError, match="at least 11×11, found"):
        picture_ssim(picture, picture)
    picture = np.zeros((1, 11, 11, 3), np.uint8)
    np.testing.assert_allclose(picture_ssim(picture, picture), 1, atol=1e-6)


def test_psnr_is_the_host_function_capped(pair):
    made = np.asarray(jax.jit(picture_psnr)(*pair))
    expected = [psnr(a / 255, b / 255) for a, b in zip(*pair)]
    assert expected[0] == np.inf and made[0] == 100
    np.testing.assert_allclose(made[1:], expected[1:], rtol=1e-5)
    one_level = np.full((1, 4, 4, 3), 7, np.uint8)
    np.testing.assert_allclose(picture_psnr(one_level, one_level + np.uint8(1)), 20 * np.log10(255), rtol=1e-6)


def test_cosines_agree():
    rng = np.random.default_rng(0)
    first, second = (rng.normal(size=(5, 17)).astype(np.float32) for _ in range(2))
    np.testing.assert_allclose(jax.jit(feature_cosine)(first, second), cosine_similarity(first, second), atol=1e-6)
    np.testing.assert_allclose(feature_cosine(first, -3 * first), -1, atol=1e-6)
