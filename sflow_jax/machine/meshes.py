"""Meshes, and the one table that says where every parameter lives.

Mesh axes: `data` splits groups of the batch, `fsdp` splits weights (and groups where they divide evenly),
`tensor` splits attention heads and MLP columns.
"""

import math
import re
from collections.abc import Mapping, Sequence

import jax
import numpy as np
from jax.experimental import mesh_utils, multihost_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding

from sflow_jax.errors import SettingError

AnyMesh = Mesh | AbstractMesh
DATA, FSDP, TENSOR = AXES = ("data", "fsdp", "tensor")
# The largest TPU pods have fewer.
MOST_DEVICES = 10_000

# Parameter path (network.path) of large networks → how its axes are split; the first match wins and every path must
# match. Small networks are copied.
# n stacked blocks, d hidden size, 3 q k v, h heads, k head dimension, f MLP width.
RULES: tuple[tuple[str, PartitionSpec], ...] = (
    # [n, d, 3, h, k], [n, 3, h, k] and back [n, h, k, d]
    (r".*blocks\..*qkv\.kernel", PartitionSpec(None, FSDP, None, TENSOR, None)),
    (r".*blocks\..*qkv\.bias", PartitionSpec(None, None, TENSOR, None)),
    (r".*blocks\.(.*\.)?out\.kernel", PartitionSpec(None, TENSOR, None, FSDP)),
    # [n, d, f], [n, f] and back [n, f, d]; `gate` is T5's second way in
    (r".*blocks\.(.*\.)?(mlp_in|gate)\.kernel", PartitionSpec(None, FSDP, TENSOR)),
    (r".*blocks\.(.*\.)?mlp_in\.bias", PartitionSpec(None, TENSOR)),
    (r".*blocks\.(.*\.)?mlp_out\.kernel", PartitionSpec(None, TENSOR, FSDP)),
    # [n, d, 6·d]: a quarter of FLUX's weights, so worth splitting though its product is tiny
    (r".*blocks\.(.*\.)?modulation\.kernel", PartitionSpec(None, FSDP, TENSOR)),
    (r".*blocks\.(.*\.)?modulation\.bias", PartitionSpec(None, TENSOR)),
    (r".*blocks\..*(bias|scale)", PartitionSpec()),
    # [vocabulary, d] and the first and last layers [i, d]
    (r"t5\.embedding\.embedding", PartitionSpec(None, FSDP)),
    (
        r"transformer\.(text_in|pooled_in|timestep_in|guidance_in|modulation_out).*\.kernel",
        PartitionSpec(FSDP, None),
    ),
    (r"(transformer|t5)\..*", PartitionSpec()),
)


def make_mesh(sizes: Mapping[str, int], devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh with axes data, fsdp, tensor; axes not named have size 1.

    Smaller than all devices it takes the first of them, where one process has all. Raises ValueError for an unknown
    axis, and for more devices than there are.
    """
    if not isinstance(sizes, Mapping):
        raise SettingError(f"`mesh` must map axes to sizes, such as {{'data': 2}}, found {sizes!r:.80}")
    unknown = set(sizes) - set(AXES)
    if unknown:
        raise ValueError(f"unknown mesh axis {', '.join(sorted(unknown))}; the axes are {', '.join(AXES)}")
    devices = jax.devices() if devices is None else devices
    shape = tuple(sizes.get(axis, 1) for axis in AXES)
    count, together = shape[0] * shape[1] * shape[2], len({device.process_index for device in devices}) > 1
    if count not in range(len(devices) if together else 1, len(devices) + 1):
        asked = ", ".join(f"{axis}={size}" for axis, size in zip(AXES, shape))
        others = ", and every process needs its own in it" if together else ""
        raise ValueError(f"mesh {asked} needs {count} devices, but there are {len(devices)}{others}")
    devices = list(devices)[:count]
    # On a pod an axis may be shorter than a side of the torus, which `jax.make_mesh` refuses.
    placed = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    return Mesh(placed, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def parse_mesh(text: str) -> dict[str, int]:
    """`data=4,tensor=2` → axis sizes; ValueError for anything else."""
    sizes = {}
    for part in text.split(","):
        axis, _, size = part.strip().partition("=")
        if axis not in AXES or not re.fullmatch(r"[1-9][0-9]{0,5}", size) or axis in sizes:
            raise ValueError(
                f"cannot read mesh {text[:80]!r}: write sizes of {', '.join(AXES)}, such as data=4,tensor=2"
            )
        sizes[axis] = int(size)
    if math.prod(sizes.values()) > MOST_DEVICES:
        raise ValueError(f"mesh {text[:80]} has more devices than any machine ({MOST_DEVICES:,})")
    return sizes


def as_mesh(mesh: Mesh | str | None) -> Mesh | None:
    """A mesh as it is, or from its axes as text over all devices; ValueError for anything else."""
    if not isinstance(mesh, Mesh | str | None):
        raise SettingError(f"`mesh` must be a jax.sharding.Mesh or its axes such as data=2, found {mesh!r:.80}")
    return make_mesh(parse_mesh(mesh)) if isinstance(mesh, str) else mesh


def partition_spec(path: str, shape: tuple[int, ...], mesh: AnyMesh) -> PartitionSpec:
    """The rule for one parameter (`network.path`); ValueError if none matches or an axis does not divide."""
    matching = ((pattern, spec) for pattern, spec in RULES if re.fullmatch(pattern, path))
    pattern, spec = next(matching, ("", None))
    if spec is None:
        raise ValueError(
            f"no sharding rule matches parameter {path} {shape}; add one to sflow_jax.machine.meshes.RULES"
        )
    if len(spec) > len(shape):
        raise ValueError(f"sharding rule {pattern} has {len(spec)} axes, but {path} is {shape}")
    for axis, name in enumerate(spec):
        if name is not None and shape[axis] % mesh.shape[name]:
            raise ValueError(
                f"{path} {shape}: axis {axis}, size {shape[axis]}, cannot be split over {name}={mesh.shape[name]}; "
                f"choose a size of {name} that divides it"
            )
    return spec


def parameter_shardings(
    network: str, shapes: Mapping[str, tuple[int, ...]], mesh: AnyMesh | None
) -> dict[str, Sharding]:
    """Path → sharding of every parameter of a network; without a mesh, all on this process's first device."""
    if mesh is None:
        return dict.fromkeys(shapes, copied(None))
    return {
        path: NamedSharding(mesh, partition_spec(f"{network}.{path}", shape, mesh))
        for path, shape in shapes.items()
    }


def copied(mesh: AnyMesh | None) -> Sharding:
    """Every device of a mesh has a copy; without a mesh, this process's first device."""
    return SingleDeviceSharding(jax.local_devices()[0]) if mesh is None else NamedSharding(mesh, PartitionSpec())


def platform(sharding: Sharding | None) -> str:
    """`cpu`, `gpu` or `tpu`: where a sharding's devices are, or by default this process's."""
    return jax.default_backend() if sharding is None else next(iter(sharding.device_set)).platform


def on_this_host(array: jax.Array | np.ndarray) -> jax.Array | np.ndarray:
    """The array itself, or a copy of the whole where processes hold parts of it; all of them must call this."""
    if isinstance(array, jax.Array) and not array.is_fully_addressable:
        return multihost_utils.process_allgather(array, tiled=True)
    return array


def least_of_processes(number: int, mesh: Mesh | None) -> int:
    """The least over a mesh's processes, all of which must call this; rounded to float32 where there are others."""
    if mesh is None or len({device.process_index for device in mesh.devices.flat}) == 1:
        return number
    spread = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
    each = jax.make_array_from_callback((mesh.size,), spread, lambda _: np.full(1, number, np.float32))
    return int(on_this_host(each).min())


def batch_sharding(mesh: Mesh | None, groups: int) -> Sharding:
    """How arrays with a leading batch axis are placed: groups over data and fsdp where they divide evenly.

    Whole groups stay together, so taking the source's keys and values never crosses devices.
    """
    if mesh is None:
        return SingleDeviceSharding(jax.local_devices()[0])
    for axes in ((DATA, FSDP), (DATA,), (FSDP,)):
        size = 1
        for axis in axes:
            size *= mesh.shape[axis]
        if size > 1 and groups % size == 0:
            return NamedSharding(mesh, PartitionSpec(axes))
    return NamedSharding(mesh, PartitionSpec())
