"""Eight fake CPU devices, a compilation cache, and the small checkpoint that most tests share."""

import copy
import dataclasses
import importlib.util
import os
import re
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
import pytest
from PIL import Image
from sflow_convert.job import convert
from sflow_convert.layouts import open_source

from sflow_jax.pipeline import StableFlow

CACHE = Path(os.environ.get("SFLOW_TEST_CACHE", Path(tempfile.gettempdir()) / "sflow_jax-test-cache"))

jax.config.update("jax_compilation_cache_dir", str(CACHE))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
jax.config.update("jax_numpy_rank_promotion", "raise")

# Oracles: without them, tests run that need none, on models and answers that were written elsewhere.
ORACLES = importlib.util.find_spec("torch") is not None
ORACLE_IMPORT = re.compile(
    r"^(?:import|from) (?:torch|diffusers|published|published_sd3|reference)\b", re.MULTILINE
)
PUBLISHED = os.environ.get("SFLOW_TEST_PUBLISHED")

if ORACLES:
    import torch

    torch.set_num_threads(1)


def pytest_ignore_collect(collection_path: Path) -> bool | None:
    """Leave out files that need oracles where there are none."""
    if not ORACLES and collection_path.suffix == ".py" and ORACLE_IMPORT.search(collection_path.read_text()):
        return True
    return None


def relative(ours, theirs) -> float:
    """Relative L2 distance of our array to the oracle's."""
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    assert ours.shape == theirs.shape
    return float(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs))


def embedded_flow(name: str, cache: Path) -> StableFlow:
    """An embedded model, converted into a cache of this test run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(cache))
        return StableFlow.load(name)


def with_step_cache(flow: StableFlow, share: float) -> StableFlow:
    """The same model with step caching."""
    painter = copy.copy(flow.painter)
    painter.placement = dataclasses.replace(painter.placement, step_cache=share)
    return StableFlow(painter)


@pytest.fixture(scope="session")
def published_folder(tmp_path_factory) -> Path:
    """Small random models in the diffusers layout, and what diffusers computes with them: see answers.py."""
    if PUBLISHED is not None:
        return Path(PUBLISHED)
    import answers

    return answers.write(tmp_path_factory.mktemp("published"))


@pytest.fixture(scope="session")
def source_folder(published_folder) -> Path:
    """A small random FLUX in the diffusers layout."""
    return published_folder / "tiny-dev"


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
def wide_checkpoint(published_folder, tmp_path_factory) -> Path:
    """A model with eight heads everywhere, so that eight devices can split it."""
    folder = tmp_path_factory.mktemp("wide") / "made"
    convert(open_source(published_folder / "wide"), folder, progress=False)
    return folder


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
