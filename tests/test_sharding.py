"""Placement on eight fake devices: the table covers every parameter, and the mesh changes no result."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import relative
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from sflow_jax.catalogue import find_info
from sflow_jax.families.flux1 import FLUX1
from sflow_jax.machine.meshes import batch_sharding, make_mesh, parse_mesh, partition_spec
from sflow_jax.models.clip import ClipTextConfig
from sflow_jax.models.flux1 import FluxConfig
from sflow_jax.models.layers import Linear, of_every_block, parameters, stacked, with_parameters
from sflow_jax.models.layout import Layout
from sflow_jax.models.t5 import T5Config
from sflow_jax.pipeline import StableFlow
from sflow_jax.planning.lowering import lower_step
from sflow_jax.settings import Placement
from sflow_jax.storage.checkpoint import abstract
from sflow_jax.storage.placement import places_of

MESHES = [{"data": 8}, {"fsdp": 8}, {"tensor": 8}, {"data": 2, "fsdp": 2, "tensor": 2}]


def mesh_name(sizes):
    return "-".join(f"{axis}{size}" for axis, size in sizes.items())


@pytest.mark.parametrize("sizes", MESHES, ids=mesh_name)
@pytest.mark.parametrize(
    "network, config",
    [("transformer", FluxConfig.dev()), ("t5", T5Config.xxl()), ("clip", ClipTextConfig.large())],
    ids=["transformer", "t5", "clip"],
)
def test_every_parameter_has_a_place(network, config, sizes):
    spec = FLUX1.networks[network]
    module = abstract(spec.build, config)
    shapes = {path: leaf.shape for path, leaf in parameters(module).items()}
    places = places_of(spec, network, module, make_mesh(sizes))
    if network == "transformer":
        # What one device holds of the big matrices: an eighth, whichever way they are split.
        held = sum(np.prod(places[p].shard_shape(s)) for p, s in shapes.items() if "blocks" in p and "kernel" in p)
        whole = sum(np.prod(s) for p, s in shapes.items() if "blocks" in p and "kernel" in p)
        split = sizes.get("fsdp", 1) * sizes.get("tensor", 1)
        assert held == whole // split


@pytest.mark.parametrize("sizes", MESHES, ids=mesh_name)
def test_the_full_size_step_lowers_on_every_mesh(sizes):
    """FLUX.1-dev, two groups of source and edit at 1024², from abstract weights; nothing is allocated."""
    info, words = find_info("flux-dev")
    canvas = info.canvas(1024, 1024)
    placement = Placement(dtype="bfloat16", mesh=make_mesh(sizes))
    lowered = lower_step(info, placement, canvas, groups=8, members=2, words=words)
    state, *_ = lowered.out_info
    assert state.latents.shape == (16, canvas.tokens, 64)
    text = lowered.as_text()
    # Layers are scanned, not unrolled: 57 copies would make the program ten times as long.
    assert text.count("stablehlo.while") >= 2 and len(text) < 400_000


@pytest.mark.parametrize("sizes", [*MESHES[:-1], pytest.param(MESHES[-1], marks=pytest.mark.quick)], ids=mesh_name)
def test_the_mesh_does_not_change_latents(sizes, wide_checkpoint):
    """A model with eight heads of everything: generation of eight pictures, and an edit."""
    plain = StableFlow.load(wide_checkpoint)
    placed = StableFlow.load(wide_checkpoint, mesh=make_mesh(sizes))
    prompts = ["a red cat", "a dog", "a hat", "snow", "a blue dog", "a beach", "a photo", "a cat sits"]
    options = dict(steps=2, progress=False)
    ours, expected = (f.generate(prompts, **options).latents for f in (placed, plain))
    assert relative(ours, expected) <= 1e-5
    ours, expected = (f.edit("a cat", ["a dog"], layers=[0, 3], **options).latents for f in (placed, plain))
    assert relative(ours, expected) <= 1e-5


def test_groups_are_split_only_where_they_divide():
    mesh = make_mesh({"data": 4, "fsdp": 2})
    assert batch_sharding(mesh, 16).spec == PartitionSpec(("data", "fsdp"))
    assert batch_sharding(mesh, 4).spec == PartitionSpec(("data",))
    assert batch_sharding(mesh, 3).spec == PartitionSpec()


@pytest.mark.parametrize(
    "sizes, message", [({"data": 9}, "needs 9 devices, but there are 8"), ({"model": 8}, "unknown mesh axis")]
)
def test_impossible_meshes_are_refused(sizes, message):
    with pytest.raises(ValueError, match=message):
        make_mesh(sizes)


def test_a_mesh_may_be_smaller_than_all_devices():
    mesh = make_mesh({"data": 3})
    assert mesh.devices.ravel().tolist() == jax.devices()[:3]


@pytest.mark.parametrize("text", ["", "data", "data=", "data=0", "rows=2", "data=2,data=4"])
def test_unreadable_meshes_are_refused(text):
    with pytest.raises(ValueError, match="cannot read mesh"):
        parse_mesh(text)


def test_unmatched_and_undivided_parameters_are_named():
    mesh = make_mesh({"tensor": 8})
    with pytest.raises(ValueError, match="no sharding rule matches.*mystery.weight"):
        partition_spec("mystery.weight", (4, 4), mesh)
    with pytest.raises(ValueError, match="size 12, cannot be split over tensor=8"):
        partition_spec("transformer.single_blocks.attention.qkv.kernel", (2, 24, 3, 12, 8), mesh)


@pytest.mark.parametrize("sizes", [{"fsdp": 4}, {"data": 2, "fsdp": 2}, {"fsdp": 2, "tensor": 2}], ids=str)
def test_modulation_of_all_blocks_gathers_no_kernels(sizes):
    """Devices add up products with their own rows of all kernels, and results are those of one device."""
    mesh = make_mesh(sizes)
    layout = Layout(sharding=batch_sharding(mesh, 4))
    stack = stacked(3, lambda rngs: Linear(8, 12, rngs=rngs), nnx.Rngs(0))
    stack.bias[...] = jnp.arange(36.0).reshape(3, 12)
    x = jnp.asarray(np.random.default_rng(0).standard_normal((4, 8)), jnp.float32)
    shapes = {path: leaf.shape for path, leaf in parameters(stack).items()}
    places = {
        path: NamedSharding(mesh, partition_spec(f"transformer.blocks.modulation.{path}", shape, mesh))
        for path, shape in shapes.items()
    }
    split = with_parameters(stack, {path: jax.device_put(x, places[path]) for path, x in parameters(stack).items()})

    @jax.jit
    def modulations(stack, x):
        return layout.products_of_vectors(functools.partial(of_every_block, stack), x)

    rows = jax.device_put(x, layout.sharding)
    assert relative(modulations(split, rows), of_every_block(stack, x)) <= 1e-6
    gathered = re.findall(r"f32\[([\d,]+)\]\S* all-gather", modulations.lower(split, rows).compile().as_text())
    # Results are [3, 4, 12], kernels [3, 8, 12].
    assert not [shape for shape in gathered if shape.startswith("3,8,")]
