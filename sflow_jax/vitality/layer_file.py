"""The layer file: what a sweep found, for other programs to read.

kind, format   what the file is
model          title, the name it was loaded by, digest of its source's weights and the dtype, dtype
sweep          steps, guidance, height, width, number of prompts, how pictures were compared, how the set was
               chosen; by: "edits" where layers were scored by edits, with the method
layers         one entry a layer: its number, kind, place in diffusers, vitality (by edits: its worth, dB), 95 %
               interval over prompts
sets           name → layers: `vital`, and as many of the least vital as `least`
diffusers_layer_skip   the vital set as diffusers' LayerSkipConfig takes it
"""

from collections.abc import Iterable, Sequence
from typing import Any, Literal

import msgspec
import numpy as np
from etils import epath

from sflow_jax.errors import SettingError
from sflow_jax.families.registry import FAMILIES
from sflow_jax.storage.files import read_json, to_json, write_whole
from sflow_jax.storage.paths import is_remote
from sflow_jax.typed import Count, Name
from sflow_jax.vitality.summary import Summary

KIND, FORMAT = "vital layers of a diffusion transformer", 1
# What a sweep's settings say of how pictures were made, and of how edits were.
SWEEP = ("steps", "guidance", "height", "width", "seeds", "features", "sweep")
SWEEP_BY_EDITS = ("by", "benchmark", "method", "sources")


class LayerSkip(msgspec.Struct):
    """Fields of diffusers' `LayerSkipConfig`, for one stack of blocks: `LayerSkipConfig(**fields)`."""

    fqn: str
    indices: tuple[Count, ...]
    skip_attention: bool = True
    skip_ff: bool = True


class LayerEntry(msgspec.Struct):
    """One layer. stack, index: which block of diffusers' model it is. low, high: of vitality's 95 % interval.

    Numbers are None where an adaptive sweep did not look.
    """

    layer: Count
    kind: str
    stack: str
    index: Count
    vital: bool
    vitality: float | None
    low: float | None
    high: float | None
    prompts: Count


class ModelEntry(msgspec.Struct):
    """Which model was looked at. digest: of its source's weights and the dtype, as in the sweep's manifest."""

    title: Name
    name: Name
    digest: str
    dtype: str


class LayerFile(msgspec.Struct):
    """What the file holds; see the top of this module."""

    kind: Literal["vital layers of a diffusion transformer"]
    format: Literal[1]
    model: ModelEntry
    sweep: dict[str, Any]
    layers: tuple[LayerEntry, ...]
    sets: dict[str, tuple[Count, ...]]
    diffusers_layer_skip: tuple[LayerSkip, ...]


def place_in_diffusers(layer: int, layer_kinds: Sequence[Sequence[Any]]) -> tuple[str, int]:
    """(name of the stack of blocks, index in it) of a layer's global number.

    layer_kinds: kinds of layers and their counts in global order, such as (("double", 19), ("single", 38)).
    SettingError for a number that the model does not have.
    """
    stacks = {kind: stack for family in FAMILIES.values() for kind, stack in family.diffusers_stacks.items()}
    before: dict[str, int] = {}
    for kind, count in layer_kinds:
        # A kind that no family has is a stack of its own.
        stack = stacks.get(kind, kind)
        if 0 <= layer < count:
            return stack, before.get(stack, 0) + layer
        before[stack] = before.get(stack, 0) + count
        layer -= count
    raise SettingError(f"no such layer: the model has {sum(before.values())} layers")


def diffusers_layer_skip(layers: Iterable[int], layer_kinds: Sequence[Sequence[Any]]) -> tuple[LayerSkip, ...]:
    """A set of layers as diffusers' `LayerSkipConfig` takes it, one for each stack of blocks that has any of them.

    Whole blocks are skipped, as bypass does here. The hook of diffusers 0.42 for that gives the two streams of
    FLUX.1's and SD3's blocks back in the wrong order, and its models stop with an error; names and numbers of the
    blocks are right.
    """
    indices: dict[str, list[int]] = {}
    for layer in sorted(set(layers)):
        stack, index = place_in_diffusers(layer, layer_kinds)
        indices.setdefault(stack, []).append(index)
    return tuple(LayerSkip(stack, tuple(numbers)) for stack, numbers in indices.items())


def layer_file(summary: Summary) -> LayerFile:
    """A sweep's findings as others read them."""
    settings, vital = summary.settings, summary.choice.layers
    kinds = settings.get("layer_kinds", ())
    seen = sorted((s for s in summary.layers if np.isfinite(s.vitality)), key=lambda score: score.vitality)
    layers = []
    for score in summary.layers:
        number = score.layers[0]
        stack, index = place_in_diffusers(number, kinds)
        numbers = (x if np.isfinite(x) else None for x in (score.vitality, score.low, score.high))
        kind = summary.kind_of(number)
        layers.append(LayerEntry(number, kind, stack, index, number in vital, *numbers, score.prompts))
    name = settings.get("model", "")
    return LayerFile(
        KIND,
        FORMAT,
        # Older sweeps have no title.
        ModelEntry(settings.get("title", name), name, settings.get("checkpoint", ""), settings.get("dtype", "")),
        {key: settings[key] for key in (*SWEEP, *SWEEP_BY_EDITS) if key in settings}
        | {
            "prompts": len(settings["prompts"]),
            "rule": summary.choice.rule,
            "confidence": summary.choice.confidence,
        },
        tuple(layers),
        {"vital": vital, "least": tuple(sorted(score.layers[0] for score in seen[: len(vital)]))},
        diffusers_layer_skip(vital, kinds),
    )


def check_layer_file(path: epath.PathLike) -> None:
    """SettingError where a layer file cannot be written: no folder, or something else stands there."""
    path = epath.Path(path)
    if not is_remote(path) and not path.parent.is_dir():
        raise SettingError(f"`export` is to be written into {path.parent}, which is no folder; make it first")
    if path.exists():
        read_json(path, LayerFile, SettingError, "it is no layer file, so `export` does not replace it")


def write_layer_file(path: epath.PathLike, summary: Summary) -> epath.Path:
    """Write a sweep's layer file, whole or not at all; SettingError if something else stands there."""
    check_layer_file(path)
    return write_whole(path, to_json(msgspec.to_builtins(layer_file(summary))))


def read_layer_file(path: epath.PathLike) -> LayerFile:
    """Read a layer file; SettingError for anything else."""
    return read_json(path, LayerFile, SettingError, "write one with: sflow vital --export")
