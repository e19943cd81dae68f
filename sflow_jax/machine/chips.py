"""Accelerators and their published figures, by which memory and time are planned."""

import contextlib
import dataclasses
import math
import os
import re
from typing import Any

from sflow_jax.errors import SettingError

GIGA, TERA = 1e9, 1e12


@dataclasses.dataclass(frozen=True)
class Chip:
    """One accelerator, as its maker describes it.

    memory: bytes. flops: bfloat16 multiply-adds counted twice, a second, dense. bandwidth: bytes a second, of its
    memory. network: bytes a second that one chip sends along one axis of the mesh: half of the two-way figure,
    times the share of its links that one ring uses (2 of 4 in a 2D torus, 2 of 6 in a 3D one; all of NVLink).
    kinds: what `jax.Device.device_kind` begins with. cores: that a slice's name counts for each chip.
    source: where the figures come from. fp8_speedup: of products in 8-bit floats, over bfloat16.
    """

    name: str
    memory: float
    flops: float
    bandwidth: float
    network: float
    kinds: tuple[str, ...]
    source: str
    cores: int = 1
    fp8_speedup: int = 1


CHIPS: dict[str, Chip] = {
    chip.name: chip
    for chip in (
        Chip(
            "v5e", 16 * GIGA, 197 * TERA, 819 * GIGA, 100 * GIGA, ("TPU v5 lite", "TPU v5e"),
            "https://cloud.google.com/tpu/docs/v5e",
        ),
        Chip(
            "v6e", 32 * GIGA, 918 * TERA, 1638 * GIGA, 200 * GIGA, ("TPU v6 lite", "TPU v6e"),
            "https://cloud.google.com/tpu/docs/v6e",
        ),
        Chip(
            "v5p", 95 * GIGA, 459 * TERA, 2765 * GIGA, 200 * GIGA, ("TPU v5p", "TPU v5"),
            "https://cloud.google.com/tpu/docs/v5p", cores=2,
        ),
        Chip(
            "h100", 80 * GIGA, 989 * TERA, 3350 * GIGA, 450 * GIGA, ("NVIDIA H100",),
            "https://www.nvidia.com/en-us/data-center/h100/", fp8_speedup=2,
        ),
        Chip(
            "h200", 141 * GIGA, 989 * TERA, 4800 * GIGA, 450 * GIGA, ("NVIDIA H200",),
            "https://www.nvidia.com/en-us/data-center/h200/", fp8_speedup=2,
        ),
        Chip(
            "a100", 80 * GIGA, 312 * TERA, 2039 * GIGA, 300 * GIGA, ("NVIDIA A100",),
            "https://www.nvidia.com/en-us/data-center/a100/",
        ),
        Chip(
            "b200", 180 * GIGA, 2250 * TERA, 8000 * GIGA, 900 * GIGA, ("NVIDIA B200",),
            "https://www.nvidia.com/en-us/data-center/hgx/", fp8_speedup=2,
        ),
    )
}  # fmt: skip


def find_chip(device_kind: str) -> Chip:
    """The chip that a `device_kind` names; ValueError for one without figures."""
    for chip in CHIPS.values():
        if device_kind.startswith(chip.kinds):
            return chip
    raise ValueError(f"no figures for {device_kind!r}; known are {', '.join(CHIPS)}: name the mesh yourself")


def chip_of(device: Any, neighbours: int) -> Chip:
    """The chip of a `jax.Device`; of one without published figures its memory alone, as it reports it.

    neighbours: devices of its host, which share the host's memory where they are CPUs. SettingError where nobody
    says how much there is.
    """
    with contextlib.suppress(ValueError):
        return find_chip(device.device_kind)
    memory = (device.memory_stats() or {}).get("bytes_limit")
    if memory is None and device.platform == "cpu" and "SC_PHYS_PAGES" in os.sysconf_names:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / neighbours
    if memory is None:
        raise SettingError(f"{device.device_kind} does not say how much memory it has; name the `mesh` yourself")
    kind, unknown = device.device_kind, math.nan
    return Chip(kind, float(memory), unknown, unknown, unknown, (kind,), "what the device reports")


def parse_machine(text: str) -> tuple[Chip, int]:
    """`v6e-8` or `h100x1` → the chip and how many; v5p counts cores, two a chip. ValueError for anything else."""
    parts = re.fullmatch(r"([a-z0-9]+?)(?:-|x)([1-9]\d*)", text.lower())
    if not parts or parts[1] not in CHIPS:
        raise ValueError(
            f"cannot read machine {text!r}: write one of {', '.join(CHIPS)} and how many, such as v6e-8"
        )
    if len(parts[2]) > 6:
        raise ValueError(f"no machine has as many chips as {text[:40]!r} says")
    chip, count = CHIPS[parts[1]], int(parts[2])
    if count % chip.cores:
        raise ValueError(f"machine {text} is not one: {chip.name} counts cores, {chip.cores} a chip")
    return chip, count // chip.cores
