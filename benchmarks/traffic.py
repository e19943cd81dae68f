"""Where a compiled GPU program's bytes and time go, kernel by kernel, read off its HLO.

A kernel is an instruction of the entry or of a loop's body: a fusion, a library call or a copy; what is sent
between chips is `collectives.sent`. It reads its operands, or the slices that it takes of them, and writes its
results; caches are left out of account.
"""

import dataclasses
import math
import re
from collections import Counter
from collections.abc import Iterator

from collectives import KINDS as COLLECTIVES
from hlo import LOOP, Instruction, computations, instructions, size_of, trips

# What a kernel's bytes are counted as.
COPIED, WEIGHTS, STREAMS = "weights copied", "weights read once", "products' streams"
ELEMENTWISE, ATTENTION, CONCATENATION = "elementwise", "attention", "concatenation"
BYTE_KINDS = (COPIED, WEIGHTS, STREAMS, ELEMENTWISE, ATTENTION, CONCATENATION)
PRODUCTS = "products"
TIME_KINDS = (COPIED, PRODUCTS, ELEMENTWISE, ATTENTION, CONCATENATION)
# Values that are another's bytes under another name, and instructions that move none.
VIEWS = ("bitcast", "get-tuple-element", "opt-barrier")
FREE = (*VIEWS, "parameter", "constant", "tuple", "while", "after-all", "partition-id")
# A TPU's products are written as convolutions.
DOTS = ("dot", "convolution")
# Arguments of the step that are the transformer's weights.
NETWORK = re.compile(r"^\s*%?transformer[_.]|op_name=\"transformer[.\[]")
# Smaller copies of weights are biases and scales of norms.
LEAST_COPY = 2**20


@dataclasses.dataclass(frozen=True)
class Kernel:
    """One kernel. kind: of `TIME_KINDS`. weights, others: bytes moved. flops: of products. times: runs a step."""

    name: str
    kind: str
    weights: int
    others: int
    flops: float
    eight_bits: bool
    times: int

    def seconds(self, flops: float, bandwidth: float, speedup: float) -> float:
        """At least, all its runs, by peaks. speedup: of products in 8-bit floats."""
        peak = flops * (speedup if self.eight_bits else 1)
        return self.times * max(self.flops / peak, (self.weights + self.others) / bandwidth)


def kernels(hlo: str) -> list[Kernel]:
    """Of a whole step."""
    parts, entry = computations(hlo)
    return list(_Module({name: instructions(lines) for name, lines in parts.items()}, parts).walk(entry, 1, {}))


class _Module:
    """All computations, and what is known of their values."""

    def __init__(self, parsed: dict[str, list[Instruction]], lines: dict[str, list[str]]):
        self.parsed, self.lines = parsed, lines

    def walk(self, name: str, times: int, carried: dict[int, bool]) -> Iterator[Kernel]:
        """Kernels of a computation. carried: which elements of a loop's tuple are weights."""
        weights: dict[str, bool] = {}
        known = {one.name: one for one in self.parsed[name]}
        for one in known.values():
            weights[one.name] = self._is_weight(one, known, weights, carried)
            if one.opcode == "while":
                condition, body = LOOP.search(one.text).groups()
                inside = self._carried(known[one.operands[0]], weights)
                yield from self.walk(body, times * trips(one.text, self.lines[condition]), inside)
            elif one.opcode in ("call", "async-start") and one.called in self.parsed:
                yield from self.walk(one.called, times, carried)
            elif one.opcode not in FREE and not one.opcode.endswith(("-done", "-update")) and not _is_sent(one):
                kernel = self._kernel(one, known, weights, times)
                weights[one.name] |= kernel.kind == COPIED
                yield kernel

    def _carried(self, start: Instruction, weights: dict[str, bool]) -> dict[int, bool]:
        return {index: weights.get(name, False) for index, name in enumerate(start.operands)}

    def _is_weight(self, one: Instruction, known, weights, carried) -> bool:
        if one.opcode == "parameter":
            return bool(NETWORK.search(one.text))
        if one.opcode == "get-tuple-element" and known[one.operands[0]].opcode == "parameter":
            return carried.get(one.index, False)
        return one.opcode in VIEWS and weights.get(one.operands[0], False)

    def _kernel(self, one: Instruction, known, weights, times: int) -> Kernel:
        inner = self.parsed.get(one.called, []) if one.opcode == "fusion" else []
        read = self._reads(one, inner, known)
        of_weights = sum(size for name, size in read if weights.get(name))
        others = sum(size for _, size in read) - of_weights
        kind = self._kind(one, inner, of_weights, others)
        flops = _attention_flops(one, known) if kind == ATTENTION else self._product_flops(one, inner, known)
        # A library's workspace is no result.
        results = one.shapes[:1] if one.opcode == "custom-call" else one.shapes
        written = self._written(one, inner, sum(map(size_of, results)))
        eight = any(known[name].shapes and known[name].shapes[0][0].startswith("f8") for name in one.operands)
        if kind == COPIED:
            of_weights += written
            written = 0
        return Kernel(one.name, kind, of_weights, others + written, flops, eight and kind == PRODUCTS, times)

    def _reads(self, one: Instruction, inner: list[Instruction], known) -> list[tuple[str, int]]:
        """(operand, bytes read of it)."""
        sizes = [(name, known[name].size) for name in one.operands]
        if not inner:
            return sizes
        places = {
            int(part.text.split("parameter(")[1].split(")")[0]): part
            for part in inner
            if part.opcode == "parameter"
        }
        return [(name, min(size, _read_inside(places[i], inner))) for i, (name, size) in enumerate(sizes)]

    def _written(self, one: Instruction, inner: list[Instruction], size: int) -> int:
        """A fusion that updates a slice in place writes that slice."""
        root = next((part for part in inner if part.root), None)
        if root is not None and root.opcode == "dynamic-update-slice":
            return next(part.size for part in inner if part.name == root.operands[1])
        return size

    def _kind(self, one: Instruction, inner: list[Instruction], of_weights: int, others: int) -> str:
        if "fmha" in one.text:
            return ATTENTION
        if _is_product(one) or any(part.opcode in DOTS for part in inner) or "triton_nested_gemm" in one.text:
            return PRODUCTS
        # What weights are multiplied with is small for one vector a picture: such a reduction is a product too.
        if any(part.opcode == "reduce" for part in inner) and of_weights > max(others, LEAST_COPY):
            return PRODUCTS
        if of_weights >= max(others, LEAST_COPY):
            return COPIED
        names = {part.opcode for part in inner} | {one.opcode}
        return CONCATENATION if "concatenate" in names else ELEMENTWISE

    def _product_flops(self, one: Instruction, inner: list[Instruction], known) -> float:
        if _is_product(one):
            left, right = (math.prod(known[name].shapes[0][1]) for name in one.operands[:2])
            result = math.prod(one.shapes[0][1])
            # Of b products m × k by k × n, sizes multiply to b³ (m k n)².
            return 2 * math.sqrt(left * right * result / _batch(one, known[one.operands[0]]))
        within = {part.name: part for part in inner}
        return float(sum(_dot_flops(part, within) for part in inner if part.opcode == "dot"))


def _is_sent(one: Instruction) -> bool:
    return one.opcode.removesuffix("-start") in COLLECTIVES


def _is_product(one: Instruction) -> bool:
    return one.opcode == "custom-call" and "__cublas" in one.text


def _batch(one: Instruction, left: Instruction) -> int:
    axes = re.search(r'"lhs_batch_dimensions":\[(.*?)\]', one.text)
    numbers = re.findall(r"\d+", axes[1]) if axes else []
    return math.prod(left.shapes[0][1][int(axis)] for axis in numbers)


def _dot_flops(dot: Instruction, within: dict[str, Instruction]) -> int:
    axes = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", dot.text)[1]
    left = within[dot.operands[0]].shapes[0][1]
    return 2 * math.prod(dot.shapes[0][1]) * math.prod(left[int(axis)] for axis in axes.split(","))


def _attention_flops(one: Instruction, known) -> float:
    """Two products of q [b, l, h, k] with [b, m, h, k]."""
    query, key = (known[name].shapes[0][1] for name in one.operands[:2])
    return 4.0 * math.prod(query) * key[1]


def _read_inside(parameter: Instruction, inner: list[Instruction]) -> int:
    """Bytes that a fusion reads of a parameter: where it only takes slices, those."""
    names, sizes = {parameter.name}, []
    for part in inner:
        if not names & set(part.operands):
            continue
        if part.opcode in ("bitcast", "copy", "reshape"):
            names.add(part.name)
        elif part.opcode in ("dynamic-slice", "slice"):
            sizes.append(part.size)
        elif part.opcode == "dynamic-update-slice" and part.operands[0] in names:
            continue
        else:
            return parameter.size
    return sum(sizes)


def bytes_by_kind(found: list[Kernel]) -> dict[str, int]:
    """Kind → bytes of a step."""
    totals = Counter(dict.fromkeys(BYTE_KINDS, 0))
    for kernel in found:
        if kernel.kind == PRODUCTS:
            totals[WEIGHTS] += kernel.times * kernel.weights
            totals[STREAMS] += kernel.times * kernel.others
        else:
            totals[kernel.kind] += kernel.times * (kernel.weights + kernel.others)
    return dict(totals)


def copied_in_loops(found: list[Kernel]) -> int:
    """Bytes of weights that loops copy before their products, what is copied asynchronously among them."""
    return sum(kernel.times * kernel.weights for kernel in found if kernel.kind == COPIED and kernel.times > 1)


def seconds_by_kind(found: list[Kernel], flops: float, bandwidth: float, speedup: float) -> dict[str, float]:
    """Kind → the least seconds of a step, kernels one after the other, by published peaks."""
    totals = Counter(dict.fromkeys(TIME_KINDS, 0.0))
    for kernel in found:
        totals[kernel.kind] += kernel.seconds(flops, bandwidth, speedup)
    return dict(totals)
