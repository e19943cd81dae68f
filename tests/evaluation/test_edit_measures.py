"""The measures of edits against plain torch and numpy."""

import jax
import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from safetensors.numpy import save_file
from test_metrics import reference_ssim

from sflow_jax.catalogue import ASSETS, load_features
from sflow_jax.errors import SettingError
from sflow_jax.measures.lpips import load_lpips
from sflow_jax.measures.metrics import blacken, picture_mse, picture_psnr, picture_ssim
from sflow_jax.measures.structure import structure_distance

# Squeezed and expanded channels of SqueezeNet 1.1's fires, by their place.
FIRES = {
    3: (16, 64),
    4: (16, 64),
    6: (32, 128),
    7: (32, 128),
    9: (48, 192),
    10: (48, 192),
    11: (64, 256),
    12: (64, 256),
}
COMPARED = {0: 64, 4: 128, 7: 256, 9: 384, 10: 384, 11: 512, 12: 512}


def pair(height: int = 53, width: int = 46, count: int = 3) -> tuple[np.ndarray, np.ndarray]:
    """Random pictures, and the same with noise."""
    rng = np.random.default_rng(0)
    first = rng.integers(0, 256, (count, height, width, 3))
    return np.uint8(first), np.uint8(np.clip(first + rng.normal(scale=25, size=first.shape), 0, 255))


def random_weights() -> dict[str, np.ndarray]:
    """Of a SqueezeNet and its heads, in torch's layout."""
    rng = np.random.default_rng(1)

    def convolution(name: str, before: int, after: int, side: int) -> dict[str, np.ndarray]:
        weight = rng.normal(size=(after, before, side, side)) * (2 / (before * side**2)) ** 0.5
        return {f"{name}.weight": weight, f"{name}.bias": 0.1 * rng.normal(size=after)}

    tensors, channels = convolution("features.0", 3, 64, 3), 64
    for place, (squeezed, expanded) in FIRES.items():
        tensors |= convolution(f"features.{place}.squeeze", channels, squeezed, 1)
        tensors |= convolution(f"features.{place}.expand1x1", squeezed, expanded, 1)
        tensors |= convolution(f"features.{place}.expand3x3", squeezed, expanded, 3)
        channels = 2 * expanded
    for number, width in enumerate(COMPARED.values()):
        tensors[f"lin{number}.model.1.weight"] = rng.uniform(size=(1, width, 1, 1))
    return {name: tensor.astype(np.float32) for name, tensor in tensors.items()}


def torch_lpips(weights: dict[str, np.ndarray], pictures: np.ndarray, references: np.ndarray) -> np.ndarray:
    """LPIPS written out with torch's own layers."""
    w = {name: torch.tensor(value) for name, value in weights.items()}

    def layer(name: str, x: torch.Tensor, **options) -> torch.Tensor:
        return F.relu(F.conv2d(x, w[f"{name}.weight"], w[f"{name}.bias"], **options))

    def features(pixels: np.ndarray) -> list[torch.Tensor]:
        x = torch.tensor(pixels).permute(0, 3, 1, 2).float() / 255 * 2 - 1
        x = (x - torch.tensor([-0.030, -0.088, -0.188]).view(1, 3, 1, 1)) / torch.tensor(
            [0.458, 0.448, 0.450]
        ).view(1, 3, 1, 1)
        x = layer("features.0", x, stride=2)
        seen = [x]
        for place in FIRES:
            if place in (3, 6, 9):
                x = F.max_pool2d(x, 3, 2, ceil_mode=True)
            x = layer(f"features.{place}.squeeze", x)
            name = f"features.{place}.expand"
            x = torch.cat([layer(f"{name}1x1", x), layer(f"{name}3x3", x, padding=1)], dim=1)
            if place in COMPARED:
                seen.append(x)
        return seen

    total = 0
    for number, (one, other) in enumerate(zip(features(pictures), features(references))):
        one, other = (x / (x.pow(2).sum(1, keepdim=True).sqrt() + 1e-10) for x in (one, other))
        total = total + ((one - other) ** 2 * w[f"lin{number}.model.1.weight"]).sum(1).mean((1, 2))
    return total.numpy()


@pytest.mark.parametrize("names", ["torchvision", "authors"])
@pytest.mark.parametrize("size", [(53, 46), (64, 64)])
def test_lpips_is_that_of_torch(names, size, tmp_path):
    weights, pictures = random_weights(), pair(*size)
    stored = weights
    if names == "authors":
        stored = {
            name.replace("features.", "net.slice2.").replace("lin3", "lins.3"): x for name, x in weights.items()
        } | {"scaling_layer.shift": np.zeros(3, np.float32)}
    save_file(stored, tmp_path / "lpips.safetensors")
    network = load_lpips(tmp_path / "lpips.safetensors")
    distances = jax.jit(lambda n, a, b: n(a, b))(network, *pictures)
    expected = torch_lpips(weights, *pictures)
    assert expected.min() > 0.01
    np.testing.assert_allclose(distances, expected, atol=1e-5, rtol=1e-4)
    np.testing.assert_array_equal(network(pictures[0], pictures[0]), 0)


def test_files_that_are_no_lpips_are_named(tmp_path):
    with pytest.raises(SettingError, match="no file at"):
        load_lpips(tmp_path / "nowhere")
    (tmp_path / "text").write_text("no tensors")
    with pytest.raises(SettingError, match="cannot read .*text"):
        load_lpips(tmp_path / "text")
    weights = random_weights()
    weights["extra"] = weights.pop("features.0.bias")
    weights["lin0.model.1.weight"] = weights["lin0.model.1.weight"][:, :3]
    save_file(weights, tmp_path / "other")
    with pytest.raises(SettingError) as error:
        load_lpips(tmp_path / "other")
    for part in ("lin0.model.1.weight is [1, 3, 1, 1]", "missing features.0.bias", "unexpected extra"):
        assert part in str(error.value)


@torch.no_grad()
def torch_structure_distance(pictures: np.ndarray, references: np.ndarray) -> np.ndarray:
    """By the keys of transformers' own network, with the cosine written out."""
    processor = transformers.AutoImageProcessor.from_pretrained(ASSETS / "dinov2", backend="pil")
    model = transformers.AutoModel.from_pretrained(ASSETS / "dinov2", dtype=torch.float32).eval()
    caught = []
    (*_, last) = (module for name, module in model.named_modules() if name.endswith("attention.k_proj"))
    last.register_forward_hook(lambda _, __, out: caught.append(out))

    def similarity(pixels: np.ndarray) -> torch.Tensor:
        model(**processor(list(pixels), return_tensors="pt"))
        keys = caught.pop()
        return F.cosine_similarity(keys[:, :, None], keys[:, None], dim=-1)

    return ((similarity(pictures) - similarity(references)) ** 2).mean((1, 2)).numpy()


def test_structure_distance_is_that_of_transformers_keys():
    features, pictures = load_features("toyworld"), pair(64, 64)
    distances = jax.jit(structure_distance)(features, *pictures)
    expected = torch_structure_distance(*pictures)
    assert expected.min() > 1e-3
    np.testing.assert_allclose(distances, expected, atol=1e-5, rtol=1e-4)
    np.testing.assert_allclose(structure_distance(features, pictures[0], pictures[0]), 0, atol=1e-9)
    with pytest.raises(ValueError, match="needs a dinov2, found a clip"):
        structure_distance(load_features("toyworld-clip"), *pictures)


def test_masked_measures_count_black_pixels():
    first, second = pair()
    kept = np.zeros(first.shape[:3], bool)
    kept[0, :30, 10:], kept[1] = True, True
    masked = [np.asarray(blacken(x, kept)) for x in (first, second)]
    wide = [x.astype(np.float64) * kept[..., None] for x in (first, second)]
    error = [np.mean((a - b) ** 2) / 255**2 for a, b in zip(*wide)]
    np.testing.assert_allclose(picture_mse(*masked), error, atol=1e-7)
    np.testing.assert_allclose(picture_psnr(*masked)[:2], -10 * np.log10(error[:2]), atol=1e-4)
    expected = [np.mean([reference_ssim(a[..., c], b[..., c]) for c in range(3)]) for a, b in zip(*wide)]
    np.testing.assert_allclose(picture_ssim(*masked), expected, atol=1e-4)
    assert expected[2] == 1 and error[2] == 0 and expected[1] < expected[0] < 1
