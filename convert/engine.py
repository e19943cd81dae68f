"""The strict engine behind every conversion table.

A table maps each of our parameters to the pieces of source tensors that fill it. The engine plans all
reads, checks them against what the source has (every element exactly once), and only then reads.
"""

import dataclasses
import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping

import ml_dtypes
import numpy as np
from jax.typing import DTypeLike

from sflow_jax.errors import SettingError

Shape = tuple[int, ...]
BLOCK = "{block}"
# Tensors at fault that an error names.
SHOWN = 4


class ConversionError(SettingError):
    """The source does not fit the table; the message lists every tensor at fault."""


@dataclasses.dataclass(frozen=True)
class Transform:
    """How a source tensor becomes (a piece of) our parameter, and back."""

    source_shape: Callable[[Shape], Shape]
    to_ours: Callable[[np.ndarray, Shape], np.ndarray]
    to_source: Callable[[np.ndarray], np.ndarray]


def _rotary_to_ours(x: np.ndarray) -> np.ndarray:
    """Rotary pairs (2i, 2i + 1) → (i, i + k/2) along the last axis: 0 1 2 3 → 0 2 1 3."""
    return x.reshape(*x.shape[:-1], -1, 2).swapaxes(-1, -2).reshape(x.shape)


def _rotary_to_source(x: np.ndarray) -> np.ndarray:
    return x.reshape(*x.shape[:-1], 2, -1).swapaxes(-1, -2).reshape(x.shape)


def _vector(rotary: bool = False) -> Transform:
    """A bias, scale or table: the same numbers in the same order, reshaped; `rotary` reorders heads."""
    return Transform(
        source_shape=lambda shape: (math.prod(shape),),
        to_ours=lambda x, shape: _rotary_to_ours(x.reshape(shape)) if rotary else x.reshape(shape),
        to_source=lambda x: (_rotary_to_source(x) if rotary else x).reshape(-1),
    )


def _dense(inputs: int = 1, rotary: bool = False) -> Transform:
    """A torch linear weight [out, in] → kernel [in…, out…], whose first `inputs` axes are inputs."""

    def sizes(shape: Shape) -> Shape:
        return math.prod(shape[inputs:]), math.prod(shape[:inputs])

    def to_ours(x: np.ndarray, shape: Shape) -> np.ndarray:
        kernel = x.T.reshape(shape)
        return _rotary_to_ours(kernel) if rotary else kernel

    def to_source(x: np.ndarray) -> np.ndarray:
        kernel = _rotary_to_source(x) if rotary else x
        return kernel.reshape(sizes(kernel.shape)[::-1]).T

    return Transform(sizes, to_ours, to_source)


SAME = Transform(lambda shape: shape, lambda x, shape: x, lambda x: x)
VECTOR, ROTARY_VECTOR = _vector(), _vector(rotary=True)
DENSE, ROTARY_DENSE = _dense(), _dense(rotary=True)
DENSE_FROM_HEADS = _dense(inputs=2)
CONVOLUTION = Transform(
    source_shape=lambda shape: (shape[3], shape[2], shape[0], shape[1]),
    to_ours=lambda x, shape: x.transpose(2, 3, 1, 0),
    to_source=lambda x: x.transpose(3, 2, 0, 1),
)
# A 1×1 convolution in the source, a linear layer here.
POINTWISE = Transform(
    source_shape=lambda shape: (shape[1], shape[0], 1, 1),
    to_ours=lambda x, shape: x.reshape(x.shape[:2]).T,
    to_source=lambda x: x.T[:, :, None, None],
)


@dataclasses.dataclass(frozen=True)
class Piece:
    """One source tensor (or `part` of it) that fills `index` of one parameter.

    source: its name, with {block} where the parameter's leading axis counts blocks.
    part: which elements of the source, None for all. index: which of the parameter's, after the block axis.
    first: the source's number of the parameter's first block.
    """

    source: str
    transform: Transform
    part: tuple[slice, ...] | None = None
    index: tuple[int | slice, ...] = ()
    first: int = 0


Table = Mapping[str, tuple[Piece, ...]]


@dataclasses.dataclass(frozen=True)
class Read:
    """One planned read: `source[part]`, transformed, fills `target[index]`, which has shape `shape`."""

    source: str
    part: tuple[slice, ...] | None
    target: str
    index: tuple[int | slice, ...]
    shape: Shape
    transform: Transform


def _indexed_shape(shape: Shape, index: tuple[int | slice, ...]) -> Shape:
    return np.broadcast_to(np.empty(()), shape)[index].shape


def plan_reads(table: Table, targets: Mapping[str, Shape]) -> list[Read]:
    """All reads that fill `targets` (path → shape); ValueError where table and model disagree."""
    if set(table) != set(targets):
        raise ValueError(
            f"table and model disagree: only in the table {sorted(set(table) - set(targets))}, "
            f"only in the model {sorted(set(targets) - set(table))}"
        )
    reads = []
    for target, pieces in table.items():
        for piece in pieces:
            blocks = range(targets[target][0]) if BLOCK in piece.source else [None]
            for block in blocks:
                index = piece.index if block is None else (block, *piece.index)
                reads.append(
                    Read(
                        source=piece.source.replace(BLOCK, str(piece.first + (block or 0))),
                        part=piece.part,
                        target=target,
                        index=index,
                        shape=_indexed_shape(targets[target], index),
                        transform=piece.transform,
                    )
                )
    return reads


def source_shapes(reads: list[Read]) -> dict[str, Shape]:
    """Name → shape of every source tensor that the reads expect."""
    shapes: dict[str, Shape] = {}
    for read in reads:
        shape = read.transform.source_shape(read.shape)
        if read.part is not None:
            # Parts tile the source, so its size is the largest stop along each axis.
            stops = tuple(
                size if piece.stop is None else piece.stop for piece, size in zip(read.part, shape, strict=True)
            )
            shape = tuple(map(max, stops, shapes.get(read.source, stops)))
        shapes[read.source] = shape
    return shapes


def check(reads: list[Read], available: Mapping[str, Shape], targets: Mapping[str, Shape]) -> None:
    """Raise ConversionError naming every missing, unexpected, wrongly shaped or partly used tensor."""
    expected = source_shapes(reads)
    problems = [f"missing: {name} {expected[name]}" for name in sorted(expected.keys() - available.keys())]
    problems += [f"unexpected: {name} {available[name]}" for name in sorted(available.keys() - expected.keys())]
    problems += [
        f"wrong shape: {name} is {available[name]}, expected {expected[name]}"
        for name in sorted(expected.keys() & available.keys())
        if available[name] != expected[name]
    ]
    taken, filled = defaultdict(int), defaultdict(int)
    for read in reads:
        taken[read.source] += math.prod(read.shape)
        filled[read.target] += math.prod(read.shape)
    problems += [
        f"used {taken[name]} of {math.prod(shape)} numbers: {name}"
        for name, shape in expected.items()
        if taken[name] != math.prod(shape)
    ]
    problems += [
        f"filled {filled[path]} of {math.prod(shape)} numbers: {path}"
        for path, shape in targets.items()
        if filled[path] != math.prod(shape)
    ]
    if problems:
        raise ConversionError(f"{len(problems)} tensors do not fit: {shortened(problems)}")


def shortened(problems: list[str]) -> str:
    """Problems in one line, all kinds of them, and the count of those left out."""
    kinds = list(dict.fromkeys(problem.split(":")[0].split(" ")[0] for problem in problems))
    shown = [[p for p in problems if p.startswith(kind)][: max(1, SHOWN // len(kinds))] for kind in kinds]
    lines = [problem for group in shown for problem in group]
    left = len(problems) - len(lines)
    return "; ".join(lines) + (f"; and {left} more" if left else "")


def check_finite(part: np.ndarray, source: str) -> None:
    """ConversionError for numbers that no network can compute with."""
    # Narrow floats have no quick test of their own.
    if not np.isfinite(part.astype(np.float32) if part.itemsize < 4 else part).all():
        raise ConversionError(f"{source} has numbers that are not finite: the file is damaged, download it again")


def converted(part: np.ndarray, dtype: DTypeLike, source: str) -> np.ndarray:
    """The same numbers in another dtype; ConversionError for those that are not finite there."""
    if part.dtype == dtype:
        return part
    with np.errstate(over="ignore"):
        narrow = part.astype(dtype)
    if np.dtype(dtype).itemsize < part.itemsize or np.dtype(dtype) == np.float16:
        largest = float(np.max(np.abs(part), initial=0))
        if largest > float(ml_dtypes.finfo(dtype).max):
            raise ConversionError(
                f"{source} holds {largest:.3g}, beyond {np.dtype(dtype)}; choose another `dtype`, such as float32"
            )
    return narrow


def assemble(
    reads: list[Read],
    targets: Mapping[str, Shape],
    read_part: Callable[[str, tuple[slice, ...] | None], np.ndarray],
    dtype: DTypeLike,
    allocate: Callable[[str, Shape, DTypeLike], np.ndarray] = lambda path, shape, dtype: np.empty(shape, dtype),
    change: Callable[[Read], np.ndarray | None] = lambda read: None,
) -> Iterator[tuple[str, np.ndarray]]:
    """Yield (path, array) parameter by parameter, holding one source tensor at a time beside it.

    ConversionError for numbers that are not finite, or not in `dtype`.

    `allocate` makes the array to fill: the converter gives one backed by a file, so that memory stays free.
    `change` gives what is added to the piece that a read fills, in float32 and before the dtype changes.
    """
    by_target = defaultdict(list)
    for read in reads:
        by_target[read.target].append(read)
    for target, group in by_target.items():
        array = allocate(target, targets[target], dtype)
        for read in group:
            part = read_part(read.source, read.part)
            check_finite(part, read.source)
            if (added := change(read)) is None:
                array[read.index] = read.transform.to_ours(converted(part, dtype, read.source), read.shape)
            else:
                changed = read.transform.to_ours(part.astype(np.float32), read.shape) + added
                array[read.index] = converted(changed, dtype, read.source)
        yield target, array


def export(reads: list[Read], params: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The inverse of `assemble`: our parameters → source tensors under their published names."""
    tensors = {}
    for name, shape in source_shapes(reads).items():
        tensors[name] = np.empty(shape, next(iter(params.values())).dtype)
    for read in reads:
        piece = read.transform.to_source(np.asarray(params[read.target])[read.index])
        tensors[read.source][read.part if read.part is not None else ...] = piece
    return tensors
