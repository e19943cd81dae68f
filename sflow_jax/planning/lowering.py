"""What a model needs on a mesh, from shapes alone: no weights are read and nothing is allocated."""

import functools
import math

import jax
import jax.numpy as jnp
from flax import nnx
from jax.stages import Lowered

from sflow_jax.machine.meshes import batch_sharding
from sflow_jax.models.interventions import Interventions, LayerInterventions
from sflow_jax.painter import decode_latents
from sflow_jax.pictures.canvas import Canvas
from sflow_jax.sampling.guidance import BRANCHES
from sflow_jax.sampling.solve import take_step
from sflow_jax.sampling.solvers import Evaluation
from sflow_jax.sampling.steps import OPTIONAL, State, Step
from sflow_jax.settings import Placement
from sflow_jax.storage.checkpoint import ModelInfo, abstract
from sflow_jax.storage.placement import HOST, place_network, placement_of, places_of

GIB = 2**30


# Made-up devices take memory and, more than linear, time.
MOST_PLANNED = 2048


def planned_devices(count: int) -> list[jax.Device]:
    """So many devices to plan for, made up on the CPU where nothing has touched a device yet.

    ValueError where there are fewer and it is too late to make some up.
    """
    if count > MOST_PLANNED:
        raise ValueError(f"a mesh of {count:,} devices is too large to plan here (at most {MOST_PLANNED:,})")
    try:
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", count)
    except RuntimeError:
        pass
    devices = jax.devices("cpu")
    if len(devices) < count:
        raise ValueError(f"a mesh of {count} devices cannot be planned after {len(devices)} are in use; start anew")
    return devices[:count]


def weight_bytes(info: ModelInfo, placement: Placement) -> dict[str, int]:
    """Network → bytes of its weights in the memory of every device; ValueError where the mesh cannot split one.

    The mesh may be abstract.
    """
    return {
        name: sum(
            math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
            for leaf in jax.tree.leaves(abstract_weights(info, name, placement))
            if leaf.sharding.memory_kind != HOST
        )
        for name in info.configs
    }


def abstract_weights(info: ModelInfo, name: str, placement: Placement) -> nnx.Module:
    """A network of shapes with the places that its parameters have on a mesh."""
    spec = info.family.networks[name]
    module = _shapes(spec.build, info.configs[name])
    mine, places = placement_of(spec, placement), places_of(spec, name, module, placement.mesh)
    stored = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, mine.dtype), module)
    return place_network(stored, places, mine)


# A plan asks for the same networks on many meshes, and tracing one takes a second.
_shapes = functools.cache(abstract)


def lower_decode(info: ModelInfo, placement: Placement, canvas: Canvas, pictures: int) -> Lowered:
    """Latents to pictures, lowered from abstract arguments."""
    shape = (pictures, canvas.tokens, info.channels)
    latents = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=batch_sharding(placement.mesh, pictures))
    weights = abstract_weights(info, "autoencoder", placement)
    return decode_latents.lower(weights, latents, family=info.family, canvas=canvas)


def lower_step(
    info: ModelInfo,
    placement: Placement,
    canvas: Canvas,
    *,
    groups: int,
    members: int,
    words: int,
    platforms: tuple[str, ...] | None = None,
) -> Lowered:
    """One denoising step of a full-size model, lowered from abstract arguments: `.compile()` tells its memory.

    groups × members: the batch; words: text tokens. platforms: lower for these ("cuda", "tpu") whatever the devices
    are; such a program cannot be compiled here.
    """
    mesh, batch = placement.mesh, groups * members
    rows, everywhere = batch_sharding(mesh, groups), batch_sharding(mesh, 1)
    dtype = placement_of(info.family.networks["transformer"], placement).dtype
    branches = info.family.guidance == "branches"

    def array(shape, dtype=jnp.float32, place=everywhere) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=place)

    def row(shape) -> jax.ShapeDtypeStruct:
        return array(((BRANCHES if branches else 1) * batch, *shape), dtype, rows)

    number, group = array(()), array((groups, canvas.tokens, info.channels))
    latents = array((batch, canvas.tokens, info.channels), place=rows)
    layers = LayerInterventions(gate=array((batch, info.layers)), inject=array((batch, info.layers, 2)))
    traced = take_step.trace(
        abstract_weights(info, "transformer", placement),
        info.family.abstract_conditioning(info.configs, words, row),
        array((batch,)),
        State(latents, latents, latents),
        Step(
            **dict.fromkeys((*Evaluation._fields, *OPTIONAL), number),
            offset=group,
            drift=group,
            weight=array((batch, canvas.tokens, 1)),
            source=group,
            replay=array((), bool),
            interventions=Interventions(layers),
        ),
        canvas=canvas,
        sharding=rows,
        kernel=placement.attention,
        branches=branches,
    )
    return traced.lower(lowering_platforms=platforms)
