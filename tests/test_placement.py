"""Weights in eight bits, in host memory or on disk, other kernels: the same pictures, or nearly."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import relative

from sflow_jax.machine.meshes import make_mesh
from sflow_jax.models.layers import is_quantised
from sflow_jax.pipeline import StableFlow

OPTIONS = dict(layers=[0, 3], steps=2, progress=False)
PROMPTS = "a cat", ["a dog"]


@pytest.fixture(scope="module")
def expected(wide_checkpoint):
    """Latents of an edit with nothing special."""
    return StableFlow.load(wide_checkpoint).edit(*PROMPTS, **OPTIONS).latents


MESHES = pytest.mark.parametrize("mesh", [None, {"fsdp": 2, "tensor": 4}], ids=["one device", "mesh"])


@MESHES
def test_blocks_in_host_memory_give_the_same_latents(mesh, wide_checkpoint, expected):
    flow = StableFlow.load(wide_checkpoint, mesh=mesh and make_mesh(mesh), offload=True)
    kernel = flow.transformer.single_blocks.mlp_in.kernel.get_value()
    assert kernel.sharding.memory_kind == "pinned_host"
    assert flow.transformer.image_in.kernel.get_value().sharding.memory_kind == "device"
    assert relative(flow.edit(*PROMPTS, **OPTIONS).latents, expected) <= 1e-5


@MESHES
def test_splash_attention_gives_the_same_latents(mesh, wide_checkpoint, expected):
    flow = StableFlow.load(wide_checkpoint, mesh=mesh and make_mesh(mesh), attention="splash")
    assert relative(flow.edit(*PROMPTS, **OPTIONS).latents, expected) <= 1e-5


@MESHES
@pytest.mark.parametrize("quantisation, most", [("int8", 0.02), ("fp8", 0.1)])
def test_quantised_blocks_paint_nearly_the_same(mesh, quantisation, most, wide_checkpoint, expected):
    flow = StableFlow.load(wide_checkpoint, mesh=mesh and make_mesh(mesh), quantisation=quantisation)
    kernels = [leaf for leaf in jax.tree.leaves(flow.transformer, is_leaf=is_quantised) if is_quantised(leaf)]
    assert kernels and all(kernel.qvalue.dtype.itemsize == 1 for kernel in kernels)
    made = flow.edit(*PROMPTS, **OPTIONS).latents
    assert 1e-6 < relative(made, expected) <= most


def test_quantised_blocks_can_wait_in_host_memory(wide_checkpoint):
    options = dict(quantisation="int8")
    plain, waiting = (StableFlow.load(wide_checkpoint, offload=offload, **options) for offload in (False, True))
    ours, theirs = (flow.edit(*PROMPTS, **OPTIONS).latents for flow in (waiting, plain))
    assert relative(ours, theirs) <= 1e-5


@MESHES
@pytest.mark.parametrize("place", ["host", "disk"])
def test_the_text_encoder_may_wait_elsewhere(place, mesh, wide_checkpoint, expected):
    flow = StableFlow.load(wide_checkpoint, mesh=mesh and make_mesh(mesh), text_encoder=place)
    assert relative(flow.edit(*PROMPTS, **OPTIONS).latents, expected) <= 1e-5


def test_everything_in_sixteen_bits_is_near(wide_checkpoint, expected):
    made = StableFlow.load(wide_checkpoint, dtype=jnp.bfloat16).edit(*PROMPTS, **OPTIONS).latents
    assert relative(np.asarray(made, np.float32), expected) <= 0.02


@pytest.mark.parametrize(
    "options, message",
    [
        ({"quantisation": "int4"}, "choose one of int8, fp8"),
        ({"text_encoder": "cloud"}, "device, host, disk"),
    ],
)
def test_unknown_names_are_refused(options, message, wide_checkpoint):
    with pytest.raises(ValueError, match=message):
        StableFlow.load(wide_checkpoint, **options)
