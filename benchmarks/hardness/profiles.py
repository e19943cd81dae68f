"""Colour profiles by hand, and what their colours are in sRGB, computed without a colour library."""

import struct

import numpy as np

D50 = (0.9642, 1.0, 0.8249)
D65 = (0.95047, 1.0, 1.08883)
# Chromaticities of the primaries, and the gamma, of some spaces.
SPACES = {
    "Display P3": (((0.680, 0.320), (0.265, 0.690), (0.150, 0.060)), "srgb"),
    "Adobe RGB": (((0.64, 0.33), (0.21, 0.71), (0.15, 0.06)), 2.19921875),
    "gamma 1.0": (((0.64, 0.33), (0.30, 0.60), (0.15, 0.06)), 1.0),
    "wide": (((0.7347, 0.2653), (0.1152, 0.8264), (0.1566, 0.0177)), 2.2),
}
SRGB = ((0.64, 0.33), (0.30, 0.60), (0.15, 0.06))
BRADFORD = np.array([[0.8951, 0.2664, -0.1614], [-0.7502, 1.7135, 0.0367], [0.0389, -0.0685, 1.0296]])


def to_xyz(primaries: tuple) -> np.ndarray:
    """Linear RGB of white D65 → XYZ adapted to D50, [3, 3]."""
    columns = np.array([[x / y, 1.0, (1 - x - y) / y] for x, y in primaries]).T
    matrix = columns * np.linalg.solve(columns, np.array(D65))
    cones = (BRADFORD @ np.array(D50)) / (BRADFORD @ np.array(D65))
    return np.linalg.inv(BRADFORD) @ np.diag(cones) @ BRADFORD @ matrix


def decode(levels: np.ndarray, gamma: float | str) -> np.ndarray:
    """Encoded 0..1 → linear light."""
    if gamma == "srgb":
        return np.where(levels <= 0.04045, levels / 12.92, ((levels + 0.055) / 1.055) ** 2.4)
    return levels**gamma


def encode_srgb(light: np.ndarray) -> np.ndarray:
    """Linear light → sRGB levels 0..255, rounded."""
    light = np.clip(light, 0, 1)
    encoded = np.where(light <= 0.0031308, light * 12.92, 1.055 * light ** (1 / 2.4) - 0.055)
    return np.round(encoded * 255)


def as_srgb(levels: np.ndarray, space: str) -> np.ndarray:
    """Pictures [y, x, 3] of 0..255 in a space → sRGB levels."""
    primaries, gamma = SPACES[space]
    light = decode(levels / 255, gamma) @ to_xyz(primaries).T
    return encode_srgb(light @ np.linalg.inv(to_xyz(SRGB)).T)


def profile(space: str) -> bytes:
    """A profile of three primaries and curves, version 2."""
    primaries, gamma = SPACES[space]
    columns = to_xyz(primaries).T
    tags = {b"desc": _description(space), b"cprt": b"text\0\0\0\0none\0", b"wtpt": _xyz(D50)}
    tags |= {name: _xyz(column) for name, column in zip((b"rXYZ", b"gXYZ", b"bXYZ"), columns)}
    tags |= dict.fromkeys((b"rTRC", b"gTRC", b"bTRC"), _curve(gamma))
    return _file(b"RGB ", tags)


def grey_profile(gamma: float) -> bytes:
    """A profile of grey with a power law."""
    tags = {
        b"desc": _description("grey"),
        b"cprt": b"text\0\0\0\0none\0",
        b"wtpt": _xyz(D50),
        b"kTRC": _curve(gamma),
    }
    return _file(b"GRAY", tags)


def _fixed(value: float) -> bytes:
    return struct.pack(">i", round(value * 65536))


def _xyz(values) -> bytes:
    return b"XYZ \0\0\0\0" + b"".join(map(_fixed, values))


def _curve(gamma: float | str) -> bytes:
    if gamma == "srgb":
        table = np.round(decode(np.linspace(0, 1, 1024), gamma) * 65535).astype(">u2")
        return b"curv\0\0\0\0" + struct.pack(">I", len(table)) + table.tobytes()
    return b"curv\0\0\0\0" + struct.pack(">IH", 1, round(gamma * 256))


def _description(text: str) -> bytes:
    name = text.encode() + b"\0"
    return b"desc\0\0\0\0" + struct.pack(">I", len(name)) + name + bytes(4 + 4 + 2 + 1 + 67)


def _file(space: bytes, tags: dict[bytes, bytes]) -> bytes:
    """Header, table of tags, tags padded to four bytes."""
    position, table, data = 128 + 4 + 12 * len(tags), b"", b""
    for name, content in tags.items():
        table += name + struct.pack(">II", position + len(data), len(content))
        data += content + bytes(-len(content) % 4)
    header = struct.pack(">I4sI4s4s4s", position + len(data), b"lcms", 0x02400000, b"mntr", space, b"XYZ ")
    header += struct.pack(">6H", 2024, 1, 1, 0, 0, 0) + b"acsp" + bytes(28) + b"".join(map(_fixed, D50))
    return header + bytes(128 - len(header)) + struct.pack(">I", len(tags)) + table + data
