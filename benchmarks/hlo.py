"""Reading an optimised HLO module's text: computations, instructions, loops and sizes."""

import dataclasses
import math
import re

BYTES = {
    "pred": 1, "s8": 1, "u8": 1, "f8e4m3fn": 1, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4, "f64": 8,
}  # fmt: skip
COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%?([\w.\-]+) = (.*?) ([a-z][\w\-]*)\((.*)$")
LOOP = re.compile(r" while\(.*condition=%?([\w.\-]+), body=%?([\w.\-]+)")
COUNTED = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
CALL = re.compile(r"(?:calls|called_computations| call\(.*to_apply)=\{?%?([\w.\-]+)")
CONSTANT = re.compile(r" constant\((\d+)\)")
SHAPE = re.compile(r"(\w+)\[([\d,]*)\]")
Shape = tuple[str, tuple[int, ...]]


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line. shapes: of its results. operands: names. text: the whole line. root: whether it is the result."""

    name: str
    shapes: tuple[Shape, ...]
    opcode: str
    operands: tuple[str, ...]
    text: str
    root: bool

    @property
    def size(self) -> int:
        """Bytes of all results."""
        return sum(map(size_of, self.shapes))

    @property
    def called(self) -> str | None:
        """The computation that it calls."""
        call = CALL.search(self.text)
        return call[1] if call else None

    @property
    def index(self) -> int:
        """Of a tuple's element."""
        return int(re.search(r"index=(\d+)", self.text)[1])


def size_of(shape: Shape) -> int:
    """Bytes of an array."""
    dtype, dims = shape
    return BYTES.get(dtype, 0) * math.prod(dims)


def shapes_in(text: str) -> tuple[Shape, ...]:
    """(dtype, axes) of every array that a type names; layouts are left out."""
    found = SHAPE.findall(re.sub(r"\{.*?\}", "", text))
    return tuple((dtype, tuple(int(size) for size in dims.split(",") if size)) for dtype, dims in found)


def computations(hlo: str) -> tuple[dict[str, list[str]], str]:
    """Name → lines of every computation, and the entry's name."""
    parts: dict[str, list[str]] = {}
    entry, lines = "", []
    for line in hlo.splitlines():
        if heading := COMPUTATION.match(line):
            is_entry, name = heading.groups()
            lines = parts.setdefault(name, [])
            entry = name if is_entry else entry
        else:
            lines.append(line)
    return parts, entry


def trips(line: str, condition: list[str]) -> int:
    """How often a loop runs: what its line says, or the constant that its counter, from 0, must stay below.

    Raises ValueError where neither can be read.
    """
    if counted := COUNTED.search(line):
        return int(counted[1])
    constants = [int(constant[1]) for constant in map(CONSTANT.search, condition) if constant]
    if len(constants) != 1 or not any("direction=LT" in line for line in condition):
        raise ValueError("cannot read how often a loop runs:\n" + "\n".join(condition))
    return constants[0]


def instructions(lines: list[str]) -> list[Instruction]:
    """Of a computation, in order."""
    matches = ((line, INSTRUCTION.match(re.sub(r"/\*.*?\*/", "", line))) for line in lines)
    return [
        Instruction(
            match[1],
            shapes_in(match[2]),
            match[3],
            tuple(re.findall(r"%([\w.\-]+)", _arguments(match[4]))),
            line,
            line.lstrip().startswith("ROOT"),
        )
        for line, match in matches
        if match
    ]


def _arguments(text: str) -> str:
    """What stands before the closing bracket of an instruction's arguments."""
    depth = 1
    for position, letter in enumerate(text):
        depth += (letter == "(") - (letter == ")")
        if depth == 0:
            return text[:position]
    return text
