"""Weights in eight bits, in host memory or on disk, other kernels: the same pictures, or nearly."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import relative
from flax import nnx

from sflow_jax.machine.meshes import make_mesh
from sflow_jax.models.layers import Linear, is_quantised, of_every_block, stacked, without
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
@pytest.mark.parametrize("quantize, most", [("int8", 0.02), ("fp8", 0.1)])
def test_quantised_blocks_paint_nearly_the_same(mesh, quantize, most, wide_checkpoint, expected):
    flow = StableFlow.load(wide_checkpoint, mesh=mesh and make_mesh(mesh), quantize=quantize)
    kernels = [leaf for leaf in jax.tree.leaves(flow.transformer, is_leaf=is_quantised) if is_quantised(leaf)]
    assert kernels and all(kernel.qvalue.dtype.itemsize == 1 for kernel in kernels)
    made = flow.edit(*PROMPTS, **OPTIONS).latents
    assert 1e-6 < relative(made, expected) <= most


def test_quantised_blocks_can_wait_in_host_memory(wide_checkpoint):
    options = dict(quantisation="int8")
    plain, waiting = (StableFlow.load(wide_checkpoint, offload=offload, **options) for offload in (False, True))
    ours, theirs = (flow.edit(*PROMPTS, **OPTIONS).latents for flow in (waiting, plain))
    assert relative(ours, theirs) <= 1e-5


def test_a_stack_of_linear_layers_takes_one_input_as_each_would_alone():
    """In one product, or block by block where kernels wait in host memory."""
    stack = stacked(3, lambda rngs: Linear(5, 7, rngs=rngs), nnx.Rngs(0))
    stack.bias[...] = jnp.arange(21.0).reshape(3, 7)
    x = jnp.asarray(np.random.default_rng(0).standard_normal((2, 5)), jnp.float32)
    expected = [jax.tree.map(lambda leaf, i=i: leaf[i], stack)(x) for i in range(3)]
    waiting = jax.device_put(stack, jax.tree.map(lambda leaf: leaf.sharding.with_memory_kind("pinned_host"), stack))
    for module in (stack, waiting):
        assert relative(jax.jit(of_every_block)(module, x), jnp.stack(expected)) <= 1e-6
    loops = str(jax.make_jaxpr(of_every_block)(stack, x)), str(jax.make_jaxpr(of_every_block)(waiting, x))
    assert ["scan" in text for text in loops] == [False, True]


def test_outputs_apart_are_those_of_the_whole():
    layer = Linear(5, (3, 2, 4), rngs=nnx.Rngs(0))
    layer.bias[...] = jnp.arange(24.0).reshape(3, 2, 4)
    x = jnp.asarray(np.random.default_rng(0).standard_normal((2, 6, 5)), jnp.float32)
    parts = layer.split(x)
    assert len(parts) == 3 and np.array_equal(jnp.stack(parts, axis=2), layer(x))


def test_layers_without_a_part_have_no_parameters_of_it(flow):
    blocks = flow.transformer.double_blocks
    fewer, dropped = without(blocks, "modulation"), (blocks.image.modulation, blocks.text.modulation)
    assert len(jax.tree.leaves(blocks)) == len(jax.tree.leaves(fewer)) + len(jax.tree.leaves(dropped))
    assert not jax.tree.leaves(fewer.image.modulation) and fewer.image.mlp_in.kernel is not None


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
        ({"quantize": "int4"}, "choose one of int8, fp8"),
        ({"quantize": "int8", "quantisation": "int8"}, "give quantize alone"),
        ({"text_encoder": "cloud"}, "device, host, disk"),
    ],
)
def test_unknown_names_are_refused(options, message, wide_checkpoint):
    with pytest.raises(ValueError, match=message):
        StableFlow.load(wide_checkpoint, **options)
