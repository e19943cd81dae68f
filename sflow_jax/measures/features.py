"""Networks that describe pictures by vectors, and the converted folder that holds one, local or remote.

features.json   what it is (`FeaturesInfo`)
network/        one Orbax item, parameters by dotted path

Axes: b batch, y rows, x columns, d features.
"""

import dataclasses
import functools
import hashlib
import json
from typing import Any, Literal

import jax
import jax.numpy as jnp
import msgspec
from etils import epath
from flax import nnx
from jax.sharding import Mesh
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Real

from sflow_jax.arrays import AnyArray
from sflow_jax.machine.meshes import copied
from sflow_jax.measures.preprocessing import Preprocessing
from sflow_jax.models.clip_vision import Clip, ClipConfig
from sflow_jax.models.dinov2 import Dinov2, Dinov2Config
from sflow_jax.models.layers import parameter_dtype, parameters
from sflow_jax.storage.checkpoint import (
    CheckpointError,
    abstract,
    check_format,
    check_networks,
    restore_network,
    verify_signature,
    verify_small,
)
from sflow_jax.storage.checksums import signed
from sflow_jax.storage.files import LONGEST_TEXT, read_bytes
from sflow_jax.typed import Name, parse_json, typed, typed_whole

FORMAT = 1
INFO_FILE = "features.json"
ITEM = "network"
NETWORKS: dict[str, type] = {"dinov2": Dinov2, "clip": Clip}


CONFIGS: dict[str, type] = {"dinov2": Dinov2Config, "clip": ClipConfig}


class StoredFeatures(msgspec.Struct):
    """What `features.json` must say."""

    format: int
    kind: Literal["dinov2", "clip"]
    config: dict[str, Any]
    preprocessing: dict[str, Any]
    dtype: Literal["float32", "float16", "bfloat16"]
    source_digests: dict[Name, Name] = {}


@dataclasses.dataclass(frozen=True)
class FeaturesInfo:
    """What `features.json` holds.

    kind: dinov2 or clip. dtype: of the stored weights. source_digests: file → sha256.
    Raises ValueError for a CLIP whose preprocessing makes pictures of another size than it was made for.
    """

    kind: str
    config: Dinov2Config | ClipConfig
    preprocessing: Preprocessing
    dtype: str
    source_digests: dict[str, str] = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        # CLIP's position embedding has one size; DINOv2's is resized to the picture.
        if self.kind == "clip":
            side = self.config.vision.picture_size
            if (self.preprocessing.crop or self.preprocessing.size) != (side, side):
                raise ValueError(
                    f"this CLIP sees pictures of {side}×{side}; its preprocessing config must crop to that size"
                )

    @property
    def name(self) -> str:
        """Kind, width and layers of the network that sees, such as `dinov2 384×12`."""
        seeing = self.config.vision if self.kind == "clip" else self.config
        registers = getattr(seeing, "registers", 0)
        return f"{self.kind} {seeing.width}×{seeing.layers}" + (f" with {registers} registers" if registers else "")

    def digest(self, dtype: DTypeLike) -> str:
        """16 hex digits that tell features apart: of the weights' files, the configs, and the dtype computed in.

        The names of files and folders do not matter.
        """
        configs = dataclasses.asdict(self.config), dataclasses.asdict(self.preprocessing)
        identity = [self.kind, *configs, sorted(self.source_digests.values()), jnp.dtype(dtype).name]
        return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]

    def to_json(self) -> str:
        """The text of `features.json`, with a checksum of itself."""
        return signed({"format": FORMAT, **dataclasses.asdict(self)})

    @classmethod
    def from_json(cls, text: str | bytes) -> "FeaturesInfo":
        """Inverse of `to_json`; CheckpointError for another format version, or fields that do not fit."""
        try:
            content = parse_json(text, dict[str, Any])
            check_format(content, (FORMAT,), "features")
            stored = typed(content, StoredFeatures)
            config = typed_whole(stored.config, CONFIGS[stored.kind])
            preprocessing = typed_whole(stored.preprocessing, Preprocessing)
            return cls(stored.kind, config, preprocessing, stored.dtype, stored.source_digests)
        except CheckpointError:
            raise
        except ValueError as error:
            raise CheckpointError(f"cannot read {INFO_FILE} ({error}); convert the source again") from error


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["network"],
    meta_fields=["name", "kind", "digest", "preprocessing"],
)
@dataclasses.dataclass(frozen=True)
class Features:
    """A network and its preprocessing; a pytree, so an argument of jitted functions.

    network: `Dinov2` or `Clip`. name: such as `dinov2 384×12`. kind: dinov2 or clip.
    digest: 16 hex digits, equal only for equal weights, configs and dtype.
    """

    network: nnx.Module
    name: str
    kind: str
    digest: str
    preprocessing: Preprocessing

    @classmethod
    def of(cls, info: FeaturesInfo, network: nnx.Module) -> "Features":
        """From what a folder says and its network."""
        return cls(network, info.name, info.kind, info.digest(parameter_dtype(network)), info.preprocessing)

    def __call__(self, pictures: Real[AnyArray, "b y x 3"]) -> Float[Array, "b d"]:
        """Pictures of levels 0..255 (uint8, or float, rounded to whole levels) → features, float32; jit-compatible.

        DINOv2: the class token after the last norm, the paper's global feature.
        CLIP: the projected picture embedding, of length one.
        """
        seen = self.preprocessing(pictures)
        if self.kind == "clip":
            return self.network.picture_features(seen)
        return self.network(seen)[:, 0].astype(jnp.float32)


def load_info(folder: epath.PathLike) -> FeaturesInfo:
    """Read `features.json`; CheckpointError if the folder is not a converted features folder."""
    folder = epath.Path(folder)
    if not folder.exists():
        raise CheckpointError(f"no features at {folder}; make them with: sflow-convert SOURCE {folder}")
    if not (folder / INFO_FILE).exists():
        raise CheckpointError(
            f"{folder} is no converted features folder (no {INFO_FILE}); convert a published DINOv2 or CLIP folder "
            "with: sflow-convert SOURCE DEST"
        )
    try:
        info = FeaturesInfo.from_json(read_bytes(folder / INFO_FILE, LONGEST_TEXT))
    except ValueError as error:
        raise CheckpointError(f"{folder}: {error}") from error
    verify_signature(folder / INFO_FILE)
    return info


def is_features_folder(folder: epath.PathLike) -> bool:
    """Whether a folder says that it is one."""
    return (epath.Path(folder) / INFO_FILE).exists()


def abstract_features(info: FeaturesInfo) -> nnx.Module:
    """The network of a features folder with shapes instead of arrays."""
    return abstract(NETWORKS[info.kind], info.config)


def restore_features(
    folder: epath.PathLike, *, dtype: DTypeLike | None = None, mesh: Mesh | None = None
) -> Features:
    """The network of a converted features folder, by default in its stored dtype (on CPUs float16 as float32).

    Raises CheckpointError for folders that are not features, or are damaged.
    """
    info = load_info(folder)
    check_networks(folder, [ITEM])
    verify_small(folder)
    module = abstract_features(info)
    places = dict.fromkeys(parameters(module), copied(mesh))
    # XLA has no products of float16 for CPUs.
    stored = "float32" if info.dtype == "float16" and jax.default_backend() == "cpu" else info.dtype
    return Features.of(info, restore_network(folder, ITEM, module, stored if dtype is None else dtype, places))
