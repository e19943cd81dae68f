"""Weights in other numbers or other places: kernels of eight bits, kernels that wait in host memory."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import qwix
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding
from jax.typing import DTypeLike

from sflow_jax.errors import SettingError
from sflow_jax.families.family import NetworkSpec
from sflow_jax.machine.meshes import AnyMesh, copied, parameter_shardings
from sflow_jax.models.layers import FP8, Linear, parameters, with_parameters
from sflow_jax.settings import DTYPES, Placement

# Name → dtype of the kernels of all blocks; int8 changes weights only, fp8 the products' other side too.
EIGHT_BITS = {"int8": jnp.int8, "fp8": FP8}
HOST = "pinned_host"


def block_kernels(module: nnx.Module) -> dict[str, int]:
    """Path → how many axes of it are inputs, of the kernels of all blocks: nearly all of a network's weights."""
    return {
        ".".join((*map(str, path), "kernel")): layer.input_axes
        for path, layer in nnx.iter_graph(module)
        if isinstance(layer, Linear) and str(path[0]).endswith("blocks")
    }


@functools.partial(jax.jit, static_argnames=("quantisation", "input_axes"))
def quantise(kernel: jax.Array, quantisation: str, input_axes: int) -> qwix.QArray:
    """A stacked kernel [n, *inputs, *outputs] in eight bits, with a float32 scale for each block and output.

    In 8-bit floats it is stored [n, *outputs, *inputs], see `Linear`.
    """
    own_scale = (0, *range(1 + input_axes, kernel.ndim))
    numbers = qwix.quantize(kernel, EIGHT_BITS[quantisation], channelwise_axes=own_scale, scale_dtype=jnp.float32)
    if numbers.qtype != FP8:
        return numbers
    order = outputs_first(kernel.ndim, input_axes)
    return jax.tree.map(lambda leaf: leaf.transpose(order), numbers)


def outputs_first(axes: int, input_axes: int) -> tuple[int, ...]:
    """Order of a stacked kernel's axes [n, *inputs, *outputs] as [n, *outputs, *inputs]."""
    return (0, *range(1 + input_axes, axes), *range(1, 1 + input_axes))


def turned(place: Sharding, axes: int, input_axes: int) -> Sharding:
    """The place of a kernel whose outputs come first."""
    if isinstance(place, SingleDeviceSharding):
        return place
    spec = (*place.spec, *[None] * (axes - len(place.spec)))
    split = PartitionSpec(*(spec[axis] for axis in outputs_first(axes, input_axes)))
    return NamedSharding(place.mesh, split, memory_kind=place.memory_kind)


def scale_place(place: Sharding, array: jax.Array | jax.ShapeDtypeStruct) -> Sharding:
    """The place of a kernel's scales: split as the kernel is, but whole along axes of size 1."""
    if isinstance(place, SingleDeviceSharding):
        return place
    spec = (*place.spec, *[None] * (array.ndim - len(place.spec)))
    split = PartitionSpec(*(name if size > 1 else None for name, size in zip(spec, array.shape)))
    return NamedSharding(place.mesh, split, memory_kind=place.memory_kind)


def computed_dtype(dtype: DTypeLike | None) -> jnp.dtype:
    """Of weights and computation: by default float32 on CPUs, else bfloat16. SettingError for what is not one."""
    if dtype is None:
        return jnp.dtype(jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16)
    try:
        numbers = jnp.dtype(dtype)
    except TypeError as error:
        raise SettingError(f"unknown `dtype` {dtype!r:.80}; choose one of {', '.join(DTYPES)}") from error
    if not jnp.issubdtype(numbers, jnp.floating) or numbers.itemsize < 2:
        raise SettingError(f"`dtype` {numbers.name} cannot be computed in; choose one of {', '.join(DTYPES)}")
    return numbers


def placement_of(spec: NetworkSpec, placement: Placement) -> Placement:
    """What of a model's placement concerns one of its networks."""
    return dataclasses.replace(
        placement,
        dtype=computed_dtype(placement.dtype),
        quantisation=placement.quantisation if spec.large else None,
        offload=placement.offload and spec.streamed,
    )


def places_of(spec: NetworkSpec, name: str, network: nnx.Module, mesh: AnyMesh | None) -> dict[str, Sharding]:
    """Path → sharding of every parameter of a family's network, abstract or not; small networks are copied."""
    shapes = {path: leaf.shape for path, leaf in parameters(network).items()}
    return parameter_shardings(name, shapes, mesh) if spec.large else dict.fromkeys(shapes, copied(mesh))


def place_network(network: nnx.Module, places: Mapping[str, Sharding], placement: Placement) -> nnx.Module:
    """Bring a network's parameters to their places (path → sharding), one by one, letting go of each moved one.

    placement: quantisation of the kernels of blocks, and whether these wait in the memory of the host. A network of
    shapes becomes one of shapes with places.
    """
    kernels, leaves = block_kernels(network), parameters(network)
    shape, placed = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), network), {}
    del network
    abstract = all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in leaves.values())
    for path in list(leaves):
        leaf, place = leaves.pop(path), places[path]
        if path in kernels:
            place = place.with_memory_kind(HOST) if placement.offload else place
            if placement.quantisation is not None:
                # Modulation is a product of one vector a picture: nothing to gain from rounding that too.
                form = "int8" if "modulation" in path else placement.quantisation
                in_eight_bits = functools.partial(quantise, quantisation=form, input_axes=kernels[path])
                leaf = jax.eval_shape(in_eight_bits, leaf) if abstract else in_eight_bits(leaf)
                if leaf.qtype == FP8:
                    place = turned(place, leaf.qvalue.ndim, kernels[path])
        target = jax.tree.map(functools.partial(scale_place, place), leaf)
        placed[path] = jax.tree.map(_placed, leaf, target) if abstract else jax.device_put(leaf, target)
    return with_parameters(shape, placed)


def _placed(shape: jax.ShapeDtypeStruct, place: Sharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=place)


def in_host_memory(network: nnx.Module) -> nnx.Module:
    """A copy of a network that waits in the memory of the host."""
    return jax.device_put(network, jax.tree.map(lambda leaf: leaf.sharding.with_memory_kind(HOST), network))


def on_device(network: nnx.Module) -> nnx.Module:
    """A copy of a waiting network where it computes."""
    return jax.device_put(network, jax.tree.map(lambda leaf: leaf.sharding.with_memory_kind("device"), network))


def staging(places: Mapping[str, Any]) -> dict[str, Sharding]:
    """Where to read weights to before they are changed: on a mesh in place, else in the memory of the host.

    One device may not have room for weights as they are stored.
    """
    if all(isinstance(place, SingleDeviceSharding) for place in places.values()):
        return dict.fromkeys(places, SingleDeviceSharding(jax.local_devices(backend="cpu")[0]))
    return dict(places)
