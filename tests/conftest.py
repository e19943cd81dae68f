"""Eight fake CPU devices, a compilation cache, and the small checkpoint that most tests share."""

import os
import tempfile
from pathlib import Path

# Before jax is imported: sharding tests need several devices.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
# No test asks the Hub anything but a server of its own.
os.environ["HF_HUB_OFFLINE"] = "1"

import jax
import numpy as np
import published
import pytest
import torch
from PIL import Image
from sflow_convert.job import convert
from sflow_convert.layouts import open_source

from sflow_jax.pipeline import StableFlow

CACHE = Path(os.environ.get("SFLOW_TEST_CACHE", Path(tempfile.gettempdir()) / "sflow_jax-test-cache"))

jax.config.update("jax_compilation_cache_dir", str(CACHE))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
jax.config.update("jax_numpy_rank_promotion", "raise")
torch.set_num_threads(1)


def relative(ours, theirs) -> float:
    """Relative L2 distance of our array to the oracle's."""
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    assert ours.shape == theirs.shape
    return float(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs))


@pytest.fixture(scope="session")
def source_folder(tmp_path_factory) -> Path:
    """A small random FLUX in the diffusers layout."""
    return published.write_diffusers(tmp_path_factory.mktemp("published") / "tiny-dev")


@pytest.fixture(scope="session")
def checkpoint(source_folder, tmp_path_factory) -> Path:
    """The same, converted; layers 0, 2 and 3 are declared vital."""
    destination = tmp_path_factory.mktemp("converted") / "tiny-dev"
    convert(open_source(source_folder), destination, vital_layers=(0, 2, 3), progress=False)
    return destination


@pytest.fixture(scope="session")
def flow(checkpoint) -> StableFlow:
    """The converted checkpoint, loaded on one device."""
    return StableFlow.load(checkpoint)


@pytest.fixture(scope="session")
def wide_checkpoint(tmp_path_factory) -> Path:
    """A model with eight heads everywhere, so that eight devices can split it."""
    folder = tmp_path_factory.mktemp("wide")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(published.FLUX, "num_attention_heads", 8)
        patch.setitem(published.FLUX, "pooled_projection_dim", 24)
        patch.setitem(published.CLIP, "hidden_size", 24)
        patch.setitem(published.T5, "num_heads", 8)
        patch.setitem(published.T5, "d_ff", 48)
        published.write_diffusers(folder / "source")
    convert(open_source(folder / "source"), folder / "made", progress=False)
    return folder / "made"


@pytest.fixture(scope="session")
def photo() -> Image.Image:
    """A smooth picture with structure, 64×48."""
    y, x = np.mgrid[0:48, 0:64] / 48
    channels = [np.sin(3 * x + y) / 2 + 0.5, np.cos(4 * y) / 2 + 0.5, x * y / 1.4]
    return Image.fromarray(np.uint8(255 * np.stack(channels, -1)))


@pytest.fixture
def compilations():
    """The number of programs compiled or fetched from the compilation cache since the test began."""
    seen = []

    def listen(event: str, duration: float, **_) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            seen.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield lambda: len(seen)
    jax.monitoring.unregister_event_duration_listener(listen)
