"""The converted checkpoint: one folder, local or remote, with `model.json`, networks and tokenizers.

model.json     what it is (`ModelInfo`)
scheduler/     the source's scheduler config
transformer/   one Orbax item per network, parameters by dotted path
autoencoder/   t5/   clip/
tokenizer/     CLIP's
tokenizer_2/   T5's
"""

import dataclasses
import json
import math
import textwrap
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from flax import nnx
from jax.sharding import Mesh, Sharding
from jax.typing import DTypeLike

from sflow_jax.models.autoencoder import Autoencoder, AutoencoderConfig
from sflow_jax.models.clip import ClipText, ClipTextConfig
from sflow_jax.models.flux import Flux, FluxConfig
from sflow_jax.models.layers import parameters, with_parameters
from sflow_jax.models.t5 import T5Config, T5Encoder
from sflow_jax.paths import absolute
from sflow_jax.placement import settle, staging
from sflow_jax.sharding import parameter_shardings

FORMAT = 1
INFO_FILE = "model.json"
SCHEDULER_FILE = "scheduler/scheduler_config.json"
# Bytes of a stored piece: what a device reads beside its own slices, and unpacks at once.
CHUNK = 32 << 20
NETWORKS: dict[str, tuple[type, type]] = {
    "transformer": (Flux, FluxConfig),
    "autoencoder": (Autoencoder, AutoencoderConfig),
    "t5": (T5Encoder, T5Config),
    "clip": (ClipText, ClipTextConfig),
}


class CheckpointError(ValueError):
    """The folder is not a converted checkpoint, or is broken; the message says what to do."""


@dataclasses.dataclass(frozen=True)
class ModelInfo:
    """What `model.json` holds.

    family: dev or schnell. picture_size: default height and width, pixels. dtype: of the stored weights.
    configs: network name → its config.
    scheduler: the source's scheduler config, in a file of its own. source_digests: file → sha256.
    vital_layers: global numbers or None, and where they come from.
    """

    family: str
    picture_size: int
    dtype: str
    configs: dict[str, Any]
    scheduler: dict[str, Any]
    source_digests: dict[str, str] = dataclasses.field(default_factory=dict)
    vital_layers: tuple[int, ...] | None = None
    vital_layers_origin: str = ""

    def to_json(self) -> str:
        """The text of `model.json`."""
        fields = dataclasses.asdict(self)
        del fields["scheduler"]
        return json.dumps({"format": FORMAT, **fields}, indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str, scheduler: dict[str, Any]) -> "ModelInfo":
        """Inverse of `to_json`, given the scheduler's config.

        CheckpointError for another format version, or fields that do not fit.
        """
        try:
            fields = json.loads(text)
            version = fields.pop("format")
            if version != FORMAT:
                raise CheckpointError(f"checkpoint format {version} is not {FORMAT}; convert the source again")
            fields["configs"] = {
                name: NETWORKS[name][1](**{k: tuple(v) if isinstance(v, list) else v for k, v in config.items()})
                for name, config in fields["configs"].items()
            }
            if fields["vital_layers"] is not None:
                fields["vital_layers"] = tuple(fields["vital_layers"])
            return cls(**fields, scheduler=scheduler)
        except CheckpointError:
            raise
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"cannot read {INFO_FILE} ({error!r}); convert the source again") from error


def abstract(build: type, config: Any) -> nnx.Module:
    """A network with shapes instead of arrays; nothing is allocated."""
    return nnx.eval_shape(lambda: build(config, rngs=nnx.Rngs(0)))


def abstract_network(name: str, config: Any) -> nnx.Module:
    """One of a checkpoint's networks with shapes instead of arrays."""
    return abstract(NETWORKS[name][0], config)


def save_info(folder: epath.PathLike, info: ModelInfo) -> None:
    """Write the scheduler's config, then `model.json` under a temporary name, which is renamed at last."""
    folder = epath.Path(folder)
    (folder / SCHEDULER_FILE).parent.mkdir(exist_ok=True)
    (folder / SCHEDULER_FILE).write_text(json.dumps(info.scheduler, indent=2) + "\n")
    temporary = folder / f"{INFO_FILE}.partial"
    temporary.write_text(info.to_json())
    temporary.replace(folder / INFO_FILE)


def load_info(folder: epath.PathLike) -> ModelInfo:
    """Read `model.json`; CheckpointError if the folder is not a converted checkpoint."""
    folder = epath.Path(folder)
    if not folder.exists():
        raise CheckpointError(f"no checkpoint at {folder}; make one with: sflow-convert SOURCE {folder}")
    if not (folder / INFO_FILE).exists():
        raise CheckpointError(
            f"{folder} is no converted checkpoint (no {INFO_FILE}); make one with: sflow-convert {folder} DEST"
        )
    try:
        scheduler = json.loads((folder / SCHEDULER_FILE).read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot read {folder / SCHEDULER_FILE}; convert the source again") from error
    return ModelInfo.from_json((folder / INFO_FILE).read_text(), scheduler)


def save_network(folder: epath.PathLike, name: str, arrays: Mapping[str, np.ndarray | jax.Array]) -> None:
    """Write one network's parameters (path → array) as an Orbax item of the checkpoint."""
    chunks = {path: ocp.SaveArgs(chunk_byte_size=CHUNK) for path in arrays}
    # Orbax copies numpy arrays, all at once; the CPU's arrays share their memory instead.
    cpu = jax.local_devices(backend="cpu")[0]
    shared = {
        path: jax.device_put(array, cpu, may_alias=True) if isinstance(array, np.ndarray) else array
        for path, array in arrays.items()
    }
    with ocp.StandardCheckpointer(save_concurrent_gb=_at_once(shared)) as checkpointer:
        checkpointer.save(absolute(folder) / name, shared, save_args=chunks)


def load_network(
    folder: epath.PathLike,
    name: str,
    config: Any,
    *,
    dtype: DTypeLike,
    mesh: Mesh | None = None,
    quantisation: str | None = None,
    offload: bool = False,
) -> nnx.Module:
    """Restore one network in `dtype`, each device reading only its own slices.

    quantisation, offload: of the kernels of its blocks, see `sflow_jax.placement`.
    Raises CheckpointError when the item is missing or does not fit the config.
    """
    module = abstract_network(name, config)
    shapes = {path: leaf.shape for path, leaf in parameters(module).items()}
    places = parameter_shardings(name, shapes, mesh)
    if quantisation is None and not offload:
        return restore_network(folder, name, module, dtype, places)
    network = restore_network(folder, name, module, dtype, staging(places))
    return settle(network, places, quantisation=quantisation, offload=offload)


def _at_once(arrays: Mapping[str, Any]) -> int:
    """Gigabytes that may be on their way between memory and disk: room for the largest array, and little more."""
    return 1 + math.ceil(max(math.prod(x.shape) * x.dtype.itemsize for x in arrays.values()) / 1e9)


def _processes(places: Mapping[str, Sharding]) -> ocp.options.MultiprocessingOptions:
    """All processes restore together, unless each has a copy of its own on its own devices."""
    alone = jax.process_count() > 1 and all(place.is_fully_addressable for place in places.values())
    if not alone:
        return ocp.options.MultiprocessingOptions()
    mine = jax.process_index()
    return ocp.options.MultiprocessingOptions(
        primary_host=mine, active_processes={mine}, barrier_sync_key_prefix=f"process{mine}"
    )


def restore_network(
    folder: epath.PathLike, name: str, module: nnx.Module, dtype: DTypeLike, places: Mapping[str, Sharding]
) -> nnx.Module:
    """Fill an abstract network from an Orbax item, in `dtype`, every parameter at its place (path → sharding).

    Raises CheckpointError when the item is missing or does not fit the network.
    """
    item = absolute(folder) / name
    if not item.exists():
        raise CheckpointError(f"{folder} has no {name}; convert the source again")
    wanted = {
        path: jax.ShapeDtypeStruct(leaf.shape, jnp.dtype(dtype), sharding=places[path])
        for path, leaf in parameters(module).items()
    }
    try:
        with ocp.StandardCheckpointer(
            multiprocessing_options=_processes(places), restore_concurrent_gb=_at_once(wanted)
        ) as checkpointer:
            arrays = checkpointer.restore(item, wanted)
    except jax.errors.JaxRuntimeError:
        raise
    except Exception as error:  # Orbax raises bare Exceptions for damaged files.
        reason = textwrap.shorten(str(error.__cause__ or error), 200, placeholder=" …")
        raise CheckpointError(
            f"cannot restore {name} from {folder}; convert the source again ({reason})"
        ) from error
    return with_parameters(module, arrays)
