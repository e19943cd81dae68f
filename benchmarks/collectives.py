"""What a compiled program sends between chips: bytes by kind of collective, read off its HLO."""

import math
import re
from collections import Counter

from hlo import BYTES, CALL, LOOP, SHAPE, computations, trips

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
# A TPU's compiler may spread one collective over the kernels that run meanwhile: a part of it stands in each.
STARTED, CHANNEL = 'custom_call_target="AsyncCollectiveStart"', re.compile(r"channel_id=(\d+)")
COLLECTIVE = re.compile(rf" = (.*?) ({'|'.join(KINDS)})(-start)?\(")


def sent(hlo: str) -> dict[str, float]:
    """Kind → bytes that one chip sends in one run of an optimised HLO module, loops counted as often as they run.

    Of n chips in a ring, gathering or scattering a result of s bytes sends s (n − 1)/n, reducing it twice that,
    and a permutation s. What is spread over several kernels is sent once, where it starts.
    """
    parts, entry = computations(hlo)
    totals: Counter[str] = Counter()
    starts = {name for name, lines in parts.items() if any(STARTED in line for line in lines)}
    spread = {channel[1] for name in starts for channel in map(CHANNEL.search, parts[name]) if channel}

    def walk(name: str, times: int) -> None:
        for line in parts[name]:
            if loop := LOOP.search(line):
                condition, body = loop.groups()
                walk(body, times * trips(line, parts[condition]))
            elif call := CALL.search(line):
                walk(call[1], times)
            channel = CHANNEL.search(line)
            if channel and channel[1] in spread and name not in starts:
                continue
            if collective := COLLECTIVE.search(line):
                shapes, kind, started = collective.groups()
                totals[kind] += times * _bytes(shapes, kind, started is not None, _members(line))

    walk(entry, 1)
    return dict(totals)


def _members(line: str) -> int:
    """Chips that take part in a collective, in any of the ways that HLO writes groups."""
    if counted := re.search(r"replica_groups=\[\d+,(\d+)\]", line):
        return int(counted[1])
    if listed := re.search(r"replica_groups=\{\{([\d,]+)\}", line):
        return len(listed[1].split(","))
    if mesh := re.search(r"replica_groups=mesh\[(.*?)\] \{(.*?)\}", line):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", mesh[1]))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"'(\w+)'", mesh[2]))
    return 2


def _bytes(shapes: str, kind: str, started: bool, members: int) -> float:
    """Bytes sent for one collective with these result shapes."""
    sizes = [
        BYTES[dtype] * math.prod(int(size) for size in dims.split(",") if size)
        for dtype, dims in SHAPE.findall(re.sub(r"\{.*?\}", "", shapes))
        if dtype in BYTES
    ]
    if kind == "collective-permute":
        return sizes[0]
    # A started gather names its operand, then its result; a started reduction both alike.
    whole = max(sizes) if started else sum(sizes)
    share = (members - 1) / members
    if kind == "reduce-scatter":
        whole *= members
    return whole * share * (2 if kind == "all-reduce" else 1)
