"""The converted checkpoint: one folder, local or remote, with `model.json`, networks and tokenizers.

model.json     what it is (`ModelInfo`)
checksums.json what every other file held when it was written
scheduler/     the source's scheduler config
transformer/   one Orbax item per network of the family, parameters by dotted path
autoencoder/   …
tokenizer/     the family's tokenizers
"""

import dataclasses
import json
import math
import textwrap
from collections.abc import Iterable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import msgspec
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from flax import nnx
from jax.sharding import Sharding
from jax.typing import DTypeLike

from sflow_jax.errors import SettingError
from sflow_jax.families.family import Defaults, Family, NetworkSpec
from sflow_jax.families.registry import FAMILIES, find_published
from sflow_jax.models.layers import parameters, with_parameters
from sflow_jax.pictures.canvas import Canvas, sides_like
from sflow_jax.sampling.control import check_layers, parse_layers
from sflow_jax.settings import (
    ATTENTIONS,
    MODEL_SHAPE,
    PaintingSettings,
    PhotoSettings,
    Placement,
    parse_size,
)
from sflow_jax.storage.checksums import read_checksums, signed, text_digest, unsigned, verify
from sflow_jax.storage.files import LONGEST_TEXT, read_bytes, read_json, to_json, write_whole
from sflow_jax.storage.paths import absolute
from sflow_jax.storage.placement import place_network, placement_of, places_of, staging
from sflow_jax.typed import Count, Name, Side, parse_json, typed, typed_whole

FORMAT = 2
# The first format knew FLUX.1 alone, and called its variant the family.
READABLE = (1, FORMAT)
INFO_FILE = "model.json"
SCHEDULER_FILE = "scheduler/scheduler_config.json"
# Bytes of a stored piece: what a device reads beside its own slices, and unpacks at once.
CHUNK = 32 << 20
# Of a JSON file, the checksum of all else in it.
# Bytes of a checkpoint that is compared with its checksums whenever it is loaded.
SMALL = 1 << 28


class CheckpointError(ValueError):
    """The folder is not a converted checkpoint, or is broken; the message says what to do."""


@dataclasses.dataclass(frozen=True)
class ModelInfo:
    """What `model.json` holds.

    family, variant: such as FLUX.1 and "dev". picture_size: default height and width, pixels. dtype: of the stored
    weights. configs: network name → its config. scheduler: the source's scheduler config, in a file of its own.
    source_digests: file → sha256. vital_layers: global numbers or None, and where they come from. named: what it is
    called, where the family's own name for it does not fit.
    """

    family: Family
    variant: str
    picture_size: int
    dtype: str
    configs: dict[str, Any]
    scheduler: dict[str, Any]
    source_digests: dict[str, str] = dataclasses.field(default_factory=dict)
    vital_layers: tuple[int, ...] | None = None
    vital_layers_origin: str = ""
    named: str = ""

    @property
    def title(self) -> str:
        """What people call it, such as "FLUX.1 dev"."""
        return self.named or self.family.title(self.variant)

    @property
    def digest(self) -> str:
        """16 hex digits, equal only for equal weights, stored dtype, configs and schedule."""
        configs = {name: dataclasses.asdict(config) for name, config in self.configs.items()}
        parts = [self.family.name, self.variant, self.dtype, configs, self.scheduler, self.source_digests]
        return text_digest(json.dumps(parts, sort_keys=True, default=str))

    @property
    def defaults(self) -> Defaults:
        """Steps and guidance where the caller gives none."""
        return self.family.defaults(self.variant)

    @property
    def networks(self) -> dict[str, NetworkSpec]:
        """Those of the family's networks that the checkpoint has; CheckpointError where one is missing."""
        missing = [n for n, spec in self.family.networks.items() if n not in self.configs and not spec.optional]
        if missing:
            raise CheckpointError(f"{INFO_FILE} does not describe {', '.join(missing)}; convert the source again")
        return {name: spec for name, spec in self.family.networks.items() if name in self.configs}

    @property
    def tokenizers(self) -> dict[str, str]:
        """Network → folder of its tokenizer."""
        return {name: place for name, place in self.family.tokenizers.items() if name in self.configs}

    @property
    def layer_kinds(self) -> tuple[tuple[str, int], ...]:
        """Kinds of layers and their counts, in global order."""
        return self.family.layer_kinds(self.configs)

    @property
    def layers(self) -> int:
        """Number of layers of all kinds."""
        return self.family.layers(self.configs)

    @property
    def channels(self) -> int:
        """Channels of a packed token."""
        return self.family.channels(self.configs)

    def canvas(self, height: int | None = None, width: int | None = None) -> Canvas:
        """A size in pixels, the default for sides not given; SettingError if it does not fit."""
        sides = (self.picture_size if side is None else side for side in (height, width))
        canvas = Canvas.of(*sides, self.family.token_side(self.configs))
        most = self.family.most_tokens(self.configs)
        if most is not None and max(canvas.rows, canvas.columns) > most:
            largest = most * self.family.token_side(self.configs)
            raise SettingError(
                f"`height` and `width` of this model are at most {largest}, found {canvas.height}×{canvas.width}"
            )
        return canvas

    def canvas_of(self, settings: PhotoSettings, photo: tuple[int, int] | None = None) -> Canvas:
        """What settings ask for. photo: width and height of the photo, if there is one; "auto" keeps its shape."""
        size = parse_size(settings.size)
        if settings.height is not None or settings.width is not None:
            return self.canvas(settings.height, settings.width)
        if isinstance(size, tuple):
            return self.canvas(*size)
        if size == MODEL_SHAPE or photo is None:
            return self.canvas()
        square = self.canvas()
        return self.canvas(
            *sides_like(
                photo[1],
                photo[0],
                square.height * square.width,
                self.family.token_side(self.configs),
                self.family.most_tokens(self.configs),
            )
        )

    def resolve_layers(self, layers: str | Iterable[int]) -> tuple[int, ...]:
        """Global numbers of "vital", "all", "none", "late" (the last third), "0,1,17-18" or a sequence.

        SettingError if there are none.
        """
        chosen = parse_layers(layers) if isinstance(layers, str) else layers
        if chosen == "all":
            return tuple(range(self.layers))
        if chosen == "late":
            return tuple(range(2 * self.layers // 3, self.layers))
        if chosen == "none":
            return ()
        if chosen == "vital":
            if self.vital_layers is None:
                raise SettingError(
                    "this checkpoint does not say which of its layers are vital; give layer numbers, "
                    "or 'all', or convert with `vital_layers`"
                )
            chosen = self.vital_layers
        return check_layers(chosen, self.layers)

    def abstract_network(self, name: str) -> nnx.Module:
        """One of the networks with shapes instead of arrays."""
        return abstract(self.family.networks[name].build, self.configs[name])

    def check(self, settings: PaintingSettings) -> None:
        """SettingError where a size or a set of layers does not fit the model: known before its weights are."""
        if isinstance(settings, PhotoSettings):
            self.canvas_of(settings)
        else:
            self.canvas(settings.height, settings.width)
        for name in ("layers", "bypass", "skip_layers"):
            if (layers := getattr(settings, name, None)) is not None:
                self.resolve_layers(layers)
        self.check_branches(getattr(settings, "negative", None), getattr(settings, "attentions", ATTENTIONS[0]))

    def check_branches(self, negative: Any, attentions: str) -> None:
        """SettingError for a second branch, or a choice between two attentions, that the model does not have."""
        if negative is not None and self.family.guidance != "branches":
            raise SettingError(f"{self.title} takes no `negative` prompts")
        if attentions != ATTENTIONS[0] and not self.family.own_attentions(self.configs):
            raise SettingError(f"`attentions` must be {ATTENTIONS[0]}: layers of {self.title} have one attention")

    def to_json(self) -> str:
        """The text of `model.json`, with a checksum of itself."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        del fields["scheduler"]
        configs = {name: dataclasses.asdict(config) for name, config in self.configs.items()}
        return signed({"format": FORMAT, **fields, "family": self.family.name, "configs": configs})

    @classmethod
    def from_json(cls, text: str | bytes, scheduler: dict[str, Any]) -> "ModelInfo":
        """Inverse of `to_json`, given the scheduler's config.

        CheckpointError for another format version, or fields that do not fit.
        """
        try:
            content = parse_json(text, dict[str, Any])
            check_format(content, READABLE, "checkpoint")
            stored = typed(content, StoredInfo)
            return cls(**_fields(stored), scheduler=scheduler)
        except CheckpointError:
            raise
        except ValueError as error:
            raise CheckpointError(f"cannot read {INFO_FILE} ({error}); convert the source again") from error


class StoredInfo(msgspec.Struct):
    """What `model.json` must say."""

    format: int
    family: Name
    picture_size: Side
    dtype: Literal["float32", "float16", "bfloat16"]
    configs: dict[str, dict[str, Any]]
    variant: Name | None = None
    source_digests: dict[Name, Name] = {}
    vital_layers: tuple[Count, ...] | None = None
    vital_layers_origin: Name = ""
    named: Name = ""


def _fields(stored: StoredInfo) -> dict[str, Any]:
    """Fields of a `ModelInfo`; ValueError where they do not fit each other."""
    fields = msgspec.structs.asdict(stored)
    if fields.pop("format") == 1:
        fields |= {"family": "flux1", "variant": stored.family}
    if fields["variant"] is None:
        raise ValueError("variant is missing")
    if fields["family"] not in FAMILIES:
        known = ", ".join(FAMILIES)
        raise CheckpointError(f"unknown model family {fields['family']!r}; this version knows {known}")
    fields["family"] = family = FAMILIES[fields["family"]]
    if set(stored.configs) - set(family.networks) or not set(stored.configs) >= {"transformer", "autoencoder"}:
        raise ValueError(f"its networks are {', '.join(stored.configs)}, not {', '.join(family.networks)}")
    fields["configs"] = configs = {
        name: typed_whole(config, family.networks[name].config) for name, config in stored.configs.items()
    }
    variants = {model.variant for model in family.published.values()}
    if variants and fields["variant"] not in variants:
        raise ValueError(f"variant {fields['variant']!r} is none of {', '.join(sorted(variants))}")
    if stored.vital_layers is not None:
        check_layers(stored.vital_layers, family.layers(configs))
    return fields


def verify_signature(file: epath.Path) -> None:
    """CheckpointError where a signed file was changed since it was written (older ones have no checksum)."""
    content = read_json(file, dict[str, Any], CheckpointError, "convert the source again")
    try:
        unsigned(content)
    except ValueError as error:
        raise CheckpointError(f"{file} {error}") from error


def check_format(content: dict[str, Any], readable: tuple[int, ...], what: str) -> None:
    """CheckpointError for a file of another version."""
    if "format" in content and content["format"] not in readable:
        raise CheckpointError(f"{what} format {content['format']} is not {readable[-1]}; convert the source again")


def published_info(name: str) -> tuple[ModelInfo, int] | None:
    """A model that is known without files, by its name or its repository, and its text tokens; None for others."""
    published = find_published(name)
    if published is None:
        return None
    family, model = published
    info = ModelInfo(
        family, model.variant, model.picture_size, "bfloat16", model.configs, model.scheduler, named=model.title
    )
    known = family.known_vital_layers(model.configs)
    if known is not None:
        info = dataclasses.replace(info, vital_layers=known.layers, vital_layers_origin=known.origin)
    return info, model.words


def abstract(build: type, config: Any) -> nnx.Module:
    """A network with shapes instead of arrays; nothing is allocated."""
    return nnx.eval_shape(lambda: build(config, rngs=nnx.Rngs(0)))


def save_info(folder: epath.PathLike, info: ModelInfo) -> None:
    """Write `model.json`, and the scheduler's config where it is not there yet, each whole."""
    folder = epath.Path(folder)
    scheduler = folder / SCHEDULER_FILE
    if not scheduler.exists():
        scheduler.parent.mkdir(exist_ok=True)
        write_whole(scheduler, to_json(info.scheduler))
    write_whole(folder / INFO_FILE, info.to_json())


def load_info(folder: epath.PathLike) -> ModelInfo:
    """Read `model.json`; CheckpointError if the folder is no converted checkpoint, or its settings are broken."""
    folder = epath.Path(folder)
    if not folder.exists():
        raise CheckpointError(f"no checkpoint at {folder}; make one with: sflow-convert SOURCE {folder}")
    if not (folder / INFO_FILE).exists():
        raise CheckpointError(
            f"{folder} is no converted checkpoint (no {INFO_FILE}); make one with: sflow-convert {folder} DEST"
        )
    scheduler = read_json(folder / SCHEDULER_FILE, dict[str, Any], CheckpointError, "convert the source again")
    try:
        info = ModelInfo.from_json(read_bytes(folder / INFO_FILE, LONGEST_TEXT), scheduler)
        info.family.schedule(scheduler)
    except CheckpointError as error:
        raise CheckpointError(f"{folder}: {error}") from error
    except ValueError as error:
        raise CheckpointError(f"{folder}: {error}; convert the source again") from error
    verify_signature(folder / INFO_FILE)
    return info


def check_networks(folder: epath.PathLike, names: Iterable[str]) -> None:
    """CheckpointError if one of the networks is missing, before any is read."""
    for name in names:
        if not (absolute(folder) / name).exists():
            raise CheckpointError(f"{folder} has no {name}; convert the source again")


def verify_small(folder: epath.PathLike) -> None:
    """Compare a small checkpoint with what conversion wrote, where that is known; CheckpointError if damaged.

    Large ones are read twice for it, so that is done on request.
    """
    stored = read_checksums(folder, CheckpointError)
    if stored is not None and sum(file.bytes for file in stored.files.values()) <= SMALL:
        verify(folder, CheckpointError, lambda _: None)


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


def load_network(folder: epath.PathLike, info: ModelInfo, name: str, placement: Placement) -> nnx.Module:
    """Restore one network, each device reading only its own slices.

    Raises CheckpointError when the item is missing or does not fit the config.
    """
    spec, module = info.family.networks[name], info.abstract_network(name)
    mine, places = placement_of(spec, placement), places_of(spec, name, module, placement.mesh)
    if mine.quantisation is None and not mine.offload:
        return restore_network(folder, name, module, mine.dtype, places)
    return place_network(restore_network(folder, name, module, mine.dtype, staging(places)), places, mine)


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


def _check_shapes(stored: Any, wanted: Mapping[str, jax.ShapeDtypeStruct]) -> None:
    """ValueError where an item's arrays are not those of its config, before any is read."""
    for path, leaf in wanted.items():
        if path not in stored:
            raise ValueError(f"it has no {path}")
        if tuple(stored[path].shape) != leaf.shape:
            raise ValueError(f"{path} is {list(stored[path].shape)}, and {list(leaf.shape)} by its config")


def restore_network(
    folder: epath.PathLike, name: str, module: nnx.Module, dtype: DTypeLike, places: Mapping[str, Sharding]
) -> nnx.Module:
    """Fill an abstract network from an Orbax item, in `dtype`, every parameter at its place (path → sharding).

    Raises CheckpointError when the item is missing or does not fit the network.
    """
    check_networks(folder, [name])
    item = absolute(folder) / name
    wanted = {
        path: jax.ShapeDtypeStruct(leaf.shape, jnp.dtype(dtype), sharding=places[path])
        for path, leaf in parameters(module).items()
    }
    try:
        with ocp.StandardCheckpointer(
            multiprocessing_options=_processes(places), restore_concurrent_gb=_at_once(wanted)
        ) as checkpointer:
            _check_shapes(checkpointer.metadata(item).item_metadata, wanted)
            arrays = checkpointer.restore(item, wanted)
    except jax.errors.JaxRuntimeError:
        raise
    except Exception as error:  # Orbax raises bare Exceptions for damaged files.
        reason = textwrap.shorten(str(error.__cause__ or error), 200, placeholder=" …")
        raise CheckpointError(
            f"cannot restore {name} from {folder}; convert the source again ({reason})"
        ) from error
    return with_parameters(module, arrays)
