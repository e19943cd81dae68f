"""LoRA files → what they add to the parameters of a model, as it is converted.

A LoRA changes a layer's weight by up · down · scale · alpha / rank. Files name layers as diffusers does
(`transformer.….lora_A.weight`), as Black Forest Labs and Stability (`double_blocks.0.img_attn.qkv.lora_A.weight`),
or as kohya does, with underscores for dots (`lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight`). Whatever
names the model's own files have, a change goes through the table of the LoRA's names to the same parameters.
"""

import dataclasses
import functools
import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from sflow_convert import flux, sd3, text_encoders
from sflow_convert.engine import (
    ConversionError,
    Read,
    Shape,
    Table,
    check_finite,
    plan_reads,
    shortened,
    source_shapes,
)
from sflow_convert.parts import Network, Source
from sflow_convert.sources import Tensors, open_files

from sflow_jax.models.clip import ClipText
from sflow_jax.models.flux1 import Flux
from sflow_jax.models.sd3 import Sd3
from sflow_jax.models.t5 import T5Encoder
from sflow_jax.typed import parse_json

# Network → tables with the names that layers have in LoRA files.
TABLES: Mapping[type, tuple[Callable[[Any], Table], ...]] = {
    Flux: (flux.diffusers_table, flux.single_file_table),
    Sd3: (sd3.diffusers_table, sd3.single_file_table),
    ClipText: (text_encoders.clip_text_table,),
    T5Encoder: (text_encoders.t5_table,),
}
FACTOR = re.compile(r"(?P<layer>.+)\.(?P<kind>lora_A|lora_B|lora_down|lora_up|lora\.down|lora\.up)(\.\w+)?\.weight")
ALPHA = re.compile(r"(?P<layer>.+)\.alpha")
DOWN = ("lora_A", "lora_down", "lora.down")
# What stands before a layer's name: of the transformer, and of the n-th text encoder.
TRANSFORMER = re.compile(r"(base_model\.model\.)?(transformer\.|(model\.)?diffusion_model\.|unet\.)?")
FLAT_TRANSFORMER = re.compile(r"lora_(unet|transformer)_")
TEXT, FLAT_TEXT = re.compile(r"text_encoder(_(?P<number>\d))?\."), re.compile(r"lora_te(?P<number>\d)?_")
# Where diffusers and PEFT keep alpha and rank.
METADATA, PEFT_CONFIG = "lora_adapter_metadata", "adapter_config.json"
WEIGHT = ".weight"
MOST_SCALE = 100.0


@dataclasses.dataclass(frozen=True)
class Lora:
    """A LoRA file, and by how much its changes are multiplied."""

    path: Path
    scale: float = 1.0

    def __post_init__(self) -> None:
        if not self.path.is_file():
            what = "is no file" if self.path.exists() else "is missing"
            raise ConversionError(f"`lora` takes FILE or FILE:SCALE; {self.path} {what}")
        if not 0 < abs(self.scale) <= MOST_SCALE:
            raise ConversionError(f"scales of `lora` are from -{MOST_SCALE:g} to {MOST_SCALE:g} and not 0: {self}")

    def __str__(self) -> str:
        return f"{self.path.name}:{self.scale:g}"

    @classmethod
    def parse(cls, text: str) -> "Lora":
        """From FILE or FILE:SCALE; ConversionError."""
        file, _, scale = text.rpartition(":")
        if Path(text).exists() or not file:
            return cls(Path(text))
        try:
            return cls(Path(file), float(scale))
        except ValueError as error:
            if isinstance(error, ConversionError):
                raise
            return cls(Path(text))


@dataclasses.dataclass(frozen=True)
class Factors:
    """What one file does to one layer. down, up: names of its tensors. scale: of everything together."""

    tensors: Tensors
    down: str
    up: str
    scale: float

    @property
    def shape(self) -> Shape | None:
        """Of the layer's weight in a file, [out, in]; None where the two factors do not fit each other."""
        down, up = self.tensors.shapes[self.down], self.tensors.shapes[self.up]
        return (up[0], down[1]) if len(down) == len(up) == 2 and up[1] == down[0] else None

    def product(self, part: tuple[slice, ...] | None) -> Float[np.ndarray, "o i"]:
        """The change of a layer's weight, or of a part of it."""
        rows, columns = (slice(None), slice(None)) if part is None else part
        down, up = (self.tensors.read(name, None).astype(np.float32) for name in (self.down, self.up))
        change = (up[rows] @ down[:, columns]) * np.float32(self.scale)
        check_finite(change, f"{self.up} of {self.tensors.files[self.up]}")
        return change


@dataclasses.dataclass(frozen=True)
class Change:
    """One layer's factors, and one of the reads by which its weight becomes (a piece of) a parameter."""

    read: Read
    factors: Factors

    def array(self) -> Float[np.ndarray, "..."]:
        """What is added to that piece of the parameter."""
        return self.read.transform.to_ours(self.factors.product(self.read.part), self.read.shape)


class Changes:
    """All that is added to the parameters of one network. targets: parameter → shape."""

    def __init__(self, targets: Mapping[str, Shape], changes: Iterable[Change]):
        self.targets = targets
        self.changes: dict[str, list[Change]] = defaultdict(list)
        for change in changes:
            self.changes[change.read.target].append(change)

    def of(self, read: Read) -> Float[np.ndarray, "..."] | None:
        """float32, to be added to the piece of a parameter that `read` fills; None where nothing is."""
        meeting = [c for c in self.changes.get(read.target, ()) if not _apart(c.read.index, read.index)]
        if not meeting:
            return None
        if all(change.read.index == read.index for change in meeting):
            return functools.reduce(np.add, (change.array() for change in meeting))
        # Files and LoRA cut this parameter differently: all of it is made, of one block where it has blocks.
        block = [read.index[0]] if read.index and isinstance(read.index[0], int) else []
        whole = np.zeros(self.targets[read.target][len(block) :], np.float32)
        for change in meeting:
            whole[change.read.index[len(block) :]] += change.array()
        return whole[read.index[len(block) :]]


def _apart(first: tuple[int | slice, ...], second: tuple[int | slice, ...]) -> bool:
    """Whether two indices surely have no element in common."""
    return any(isinstance(a, int) and isinstance(b, int) and a != b for a, b in zip(first, second))


class Layers:
    """The layers of a network by the names that LoRA files use for them, and how each becomes our parameters."""

    def __init__(self, network: Network, targets: Mapping[str, Shape]):
        self.reads: dict[str, list[Read]] = {}
        self.shapes: dict[str, Shape] = {}
        for table in TABLES.get(network.build, ()):
            reads = plan_reads(table(network.config), targets)
            shapes = source_shapes(reads)
            # Names that both tables have mean the same.
            new = [name for name in shapes if name.endswith(WEIGHT) and name.removesuffix(WEIGHT) not in self.reads]
            by_source = defaultdict(list)
            for read in reads:
                by_source[read.source].append(read)
            for name in new:
                layer = name.removesuffix(WEIGHT)
                self.reads[layer], self.shapes[layer] = by_source[name], shapes[name]
        self.flat = {layer.replace(".", "_"): layer for layer in self.reads}


def plan_changes(
    source: Source, targets: Mapping[str, Mapping[str, Shape]], loras: Sequence[Lora]
) -> dict[str, Changes]:
    """Network → what LoRA files add to it; ConversionError names tensors that change no layer of the model.

    targets: network → its parameters' shapes.
    """
    if not loras:
        return {}
    layers = {name: Layers(network, targets[name]) for name, network in source.networks.items()}
    encoders = [name for name in source.family.tokenizers if name in source.networks]
    changes: dict[str, list[Change]] = defaultdict(list)
    for lora in loras:
        for network, layer, factors in _open(lora, layers, encoders):
            changes[network] += [Change(read, factors) for read in layers[network].reads[layer]]
    return {network: Changes(targets[network], found) for network, found in changes.items()}


def _open(lora: Lora, layers: Mapping[str, Layers], encoders: Sequence[str]) -> list[tuple[str, str, Factors]]:
    """(network, layer, factors) of everything in a file; ConversionError lists what has no place."""
    tensors, alphas = open_files([lora.path]), _Alphas(lora.path)
    pairs: dict[str, dict[bool, str]] = defaultdict(dict)
    problems, found = [], []
    for name in tensors.files:
        if match := FACTOR.fullmatch(name):
            pairs[match["layer"]][match["kind"] in DOWN] = name
        elif ALPHA.fullmatch(name) is None:
            problems.append(f"unknown: {name}")
    if not pairs:
        raise ConversionError(f"{lora.path} holds no LoRA: none of its tensors is a lora_A or a lora_down")
    for layer in {ALPHA.fullmatch(name)["layer"] for name in tensors.files if ALPHA.fullmatch(name)} - pairs.keys():
        problems.append(f"unknown: {layer}.alpha")
    for layer, pair in pairs.items():
        place = _find(layer, layers, encoders)
        if len(pair) < 2:
            problems.append(f"half: {next(iter(pair.values()))}, without its other factor")
        elif place is None:
            problems.append(f"unknown: {layer}, no layer of this model")
        else:
            factors = Factors(tensors, pair[True], pair[False], 1.0)
            expected = layers[place[0]].shapes[place[1]]
            if factors.shape != expected:
                shapes = " and ".join(str(tensors.shapes[name]) for name in (pair[True], pair[False]))
                problems.append(f"wrong shape: {layer} has factors {shapes}, for a weight {expected}")
                continue
            scale = lora.scale * alphas.factor(layer, place[1], tensors, pair[True])
            found.append((*place, dataclasses.replace(factors, scale=scale)))
    if problems:
        raise ConversionError(
            f"`lora` {lora.path}: {len(problems)} tensors do not fit (plain LoRA of this model's linear layers is "
            f"merged): {shortened(problems)}"
        )
    return found


def _find(layer: str, layers: Mapping[str, Layers], encoders: Sequence[str]) -> tuple[str, str] | None:
    """Network and layer's name in its tables of a name in a LoRA file; None where there is none."""
    if match := TEXT.match(layer) or FLAT_TEXT.match(layer):
        # The last is T5, which some count third even where there are two.
        network = encoders[min(int(match["number"] or 1), len(encoders)) - 1]
    else:
        match, network = FLAT_TRANSFORMER.match(layer) or TRANSFORMER.match(layer), "transformer"
    name, known = layer[match.end() :], layers[network]
    for written in (name, f"text_model.{name}"):
        if written in known.reads:
            return network, written
    return (network, known.flat[name]) if name in known.flat else None


class _Alphas:
    """What a file's metadata, or PEFT's config beside it, says of alpha; tensors named alpha go before it."""

    def __init__(self, path: Path):
        beside = path.with_name(PEFT_CONFIG)
        try:
            with safe_open(path, "np") as file:
                text = (file.metadata() or {}).get(METADATA)
            if text is None and path.stem == "adapter_model" and beside.is_file():
                text = beside.read_text()
            config = {} if text is None else parse_json(text, dict[str, Any])
        except (SafetensorError, OSError, ValueError) as error:
            raise ConversionError(f"cannot read what {path} says of itself: {error}") from error
        self.path, self.config = path, config

    def factor(self, layer: str, name: str, tensors: Tensors, down: str) -> float:
        """alpha / rank of a layer, 1 where nothing says what alpha is. ConversionError for what is no number."""
        rank = tensors.shapes[down][0]
        if f"{layer}.alpha" in tensors.files:
            stored = tensors.read(f"{layer}.alpha", None)
            if stored.size != 1 or not np.isfinite(stored.astype(np.float32)).all():
                raise ConversionError(f"{layer}.alpha of {self.path} is no finite number")
            return float(stored.astype(np.float32).reshape(())) / rank
        prefix = next(
            (p for p in ("text_encoder_3.", "text_encoder_2.", "text_encoder.") if layer.startswith(p)), ""
        )
        config = self._of_network(prefix or "transformer.")
        if config.get("use_dora"):
            raise ConversionError(f"{self.path} is a DoRA, which is not merged: plain LoRA alone is")
        patterns = config.get("alpha_pattern") or {}
        # As PEFT does: a pattern is the end of a layer's name.
        matching = (value for key, value in patterns.items() if re.fullmatch(rf"(.*\.)?({key})", name))
        alpha = next(matching, config.get("lora_alpha", rank))
        if not isinstance(alpha, int | float) or not math.isfinite(alpha):
            raise ConversionError(f"the alpha of {layer} in {self.path} is {alpha!r}, no finite number")
        return float(alpha) / (math.sqrt(rank) if config.get("use_rslora") else rank)

    def _of_network(self, prefix: str) -> dict[str, Any]:
        """The config of one network: under its prefix, or all of it where nothing has one."""
        mine = {key.removeprefix(prefix): value for key, value in self.config.items() if key.startswith(prefix)}
        return mine or (self.config if "lora_alpha" in self.config and prefix == "transformer." else {})
