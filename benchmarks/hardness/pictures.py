"""Pictures of many formats, modes, profiles and orientations with their right values; and files that are none."""

import io
import os
import random
import struct
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from PIL import Image, ImageCms

from hardness import profiles
from hardness.cases import ACCEPT, EITHER, REFUSE, Box, Case, Step

RIGHT, WRONG = "pictures that are fine", "pictures that are none"
# Levels by which a picture may differ: of lossless formats, of a colour profile, of lossy formats.
EXACT, COLOUR, LOSSY = 1, 4, 40
OPEN = (
    "import numpy as np\nfrom sflow_jax.pictures.files import open_picture\n"
    "values = np.asarray(open_picture({name!r}))"
)
Draw = Callable[[Any], tuple[bytes, Any]]


def invert(name: str) -> Step:
    """The command that takes a photo."""
    return ("sflow", "invert", "-m", "converted", "--image", name, "-p", "a cat", "--steps", "1", "--out", "out")


def cases(draw: random.Random) -> Iterator[Case]:
    """All of this file."""
    for name, (file, tolerance, made) in right_pictures(draw).items():
        yield right_case(name, file, tolerance, made)
    yield from wrong_cases(draw)
    yield from unusual_cases(draw)


def right_case(name: str, file: str, tolerance: int, made: Callable[[], tuple[bytes, Any]]) -> Case:
    """A file and its right values [y, x, 3]."""

    def prepare(box: Box) -> None:
        data, expected = made()
        box.write(file, data)
        np.save(box.root / "expected.npy", np.asarray(expected))

    def check(box: Box) -> str | None:
        expected, values = np.load(box.root / "expected.npy").astype(int), box.names["values"].astype(int)
        if expected.shape != values.shape:
            return f"the picture is {values.shape}, not {expected.shape}"
        distance = np.abs(expected - values)
        if tolerance == LOSSY:
            return f"off by {distance.mean():.1f} levels on average" if distance.mean() > 4 else None
        return f"off by up to {distance.max()} levels" if distance.max() > tolerance else None

    return Case(
        name=f"picture/{name}",
        category=RIGHT,
        steps=(("python", OPEN.format(name=file)),),
        expects=ACCEPT,
        prepare=prepare,
        names=(file,),
        check=check,
    )


def ramp(seed: int, size: tuple[int, int] = (24, 32)) -> Any:
    """A smooth colour picture [y, x, 3] uint8, of seeded directions."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0 : size[0], 0 : size[1]]
    waves = [np.sin(x * a + y * b + c) for a, b, c in rng.uniform(-0.2, 0.2, (3, 3)) + [0.0, 0.0, 1.0]]
    return np.round(127.5 + 120 * np.stack(waves, axis=-1)).astype(np.uint8)


def grey3(levels: Any) -> Any:
    """Grey levels as three channels."""
    return np.repeat(np.asarray(levels)[..., None], 3, axis=-1)


def encoded(picture: Any, kind: str, **options: Any) -> bytes:
    """A PIL picture as a file."""
    data = io.BytesIO()
    picture.save(data, kind, **options)
    return data.getvalue()


def right_pictures(draw: random.Random) -> dict[str, tuple[str, int, Callable[[], tuple[bytes, Any]]]]:
    """Name → file, tolerance, and what makes its bytes and its right values."""
    seed = draw.getrandbits(32)
    return {
        **_plain(seed),
        **_deep(seed),
        **_transparent(seed),
        **_turned(seed),
        **_coloured(seed),
    }


def _plain(seed: int) -> dict[str, tuple[str, int, Callable]]:
    def colour(kind: str, **options: Any) -> Callable:
        return lambda: (encoded(Image.fromarray(ramp(seed)), kind, **options), ramp(seed))

    def mode(kind: str, mode: str, **options: Any) -> Callable:
        def made() -> tuple[bytes, Any]:
            picture = Image.fromarray(ramp(seed)).convert(mode)
            return encoded(picture, kind, **options), np.asarray(picture.convert("RGB"))

        return made

    def grey(kind: str, **options: Any) -> Callable:
        return lambda: (encoded(Image.fromarray(ramp(seed)[..., 0]), kind, **options), grey3(ramp(seed)[..., 0]))

    def frames(kind: str) -> Callable:
        def made() -> tuple[bytes, Any]:
            first, second = Image.fromarray(ramp(seed)), Image.fromarray(255 - ramp(seed))
            return encoded(first, kind, save_all=True, append_images=[second], lossless=True), ramp(seed)

        return made

    lossless = {
        "PNG": ("png", {}),
        "TIFF": ("tif", {}),
        "BMP": ("bmp", {}),
        "PPM": ("ppm", {}),
        "TGA": ("tga", {}),
        "PCX": ("pcx", {}),
        "SGI": ("sgi", {}),
        "WEBP": ("webp", {"lossless": True}),
        "DIB": ("dib", {}),
        "JPEG2000": ("jp2", {}),
        "QOI": ("qoi", {}),
    }
    pictures = {f"{kind} colour": (f"x.{end}", EXACT, colour(kind, **o)) for kind, (end, o) in lossless.items()}
    for kind, end in {"PNG": "png", "TIFF": "tif", "BMP": "bmp", "TGA": "tga", "JPEG2000": "jp2"}.items():
        pictures[f"{kind} grey"] = (f"x.{end}", EXACT, grey(kind))
    for kind, end, name in (
        ("PNG", "png", "1"),
        ("PNG", "png", "P"),
        ("TIFF", "tif", "1"),
        ("BMP", "bmp", "1"),
        ("BMP", "bmp", "P"),
        ("GIF", "gif", "P"),
        ("TIFF", "tif", "P"),
        ("TIFF", "tif", "CMYK"),
    ):
        pictures[f"{kind} {name}"] = (f"x.{end}", EXACT, mode(kind, name))
    for compression in ("tiff_lzw", "tiff_adobe_deflate", "packbits"):
        pictures[f"TIFF {compression}"] = ("x.tif", EXACT, colour("TIFF", compression=compression))
    return pictures | {
        "JPEG": ("x.jpg", LOSSY, colour("JPEG", quality=95)),
        "JPEG progressive": ("x.jpg", LOSSY, colour("JPEG", quality=95, progressive=True)),
        "JPEG grey": ("x.jpg", LOSSY, grey("JPEG", quality=95)),
        "JPEG CMYK": ("x.jpg", LOSSY, mode("JPEG", "CMYK", quality=95)),
        "WEBP lossy": ("x.webp", LOSSY, colour("WEBP", quality=95)),
        "AVIF": ("x.avif", LOSSY, colour("AVIF", quality=95)),
        "GIF animated": ("x.gif", LOSSY, frames("GIF")),
        "WEBP animated": ("x.webp", EXACT, frames("WEBP")),
        "TIFF of two pages": ("x.tif", EXACT, frames("TIFF")),
        "JPEG named .png": ("x.png", LOSSY, colour("JPEG", quality=95)),
        "PNG named .jpg": ("x.jpg", EXACT, colour("PNG")),
        "PNG without an ending": ("x", EXACT, colour("PNG")),
        "PNG of one pixel": (
            "x.png",
            EXACT,
            lambda: (encoded(Image.fromarray(ramp(seed, (1, 1))), "PNG"), ramp(seed, (1, 1))),
        ),
        "PNG with something after it": ("x.png", EXACT, lambda: (colour("PNG")()[0] + b"more" * 99, ramp(seed))),
        "PNG under a name of control characters": ("x\x1b[31m.png", EXACT, colour("PNG")),
        "PNG under a name in Japanese": ("写真.png", EXACT, colour("PNG")),
    }


def png(width: int, height: int, depth: int, colour: int, rows: bytes, *chunks: tuple[bytes, bytes]) -> bytes:
    """A PNG by hand. rows: filter byte and samples, row after row."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    middle = b"".join(chunk(*piece) for piece in chunks)
    return b"\x89PNG\r\n\x1a\n" + header + middle + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def _deep(seed: int) -> dict[str, tuple[str, int, Callable]]:
    """16 and 32 bits, and floats."""

    def wide() -> Any:
        return ramp(seed)[..., 0].astype(np.uint16) * 257

    def sixteen(kind: str, **options: Any) -> Callable:
        return lambda: (encoded(Image.fromarray(wide()), kind, **options), grey3(ramp(seed)[..., 0]))

    def of_type(dtype: str, factor: float) -> Callable:
        def made() -> tuple[bytes, Any]:
            levels = (ramp(seed)[..., 0].astype(np.float64) * factor).astype(dtype)
            return encoded(Image.fromarray(levels), "TIFF"), grey3(ramp(seed)[..., 0])

        return made

    def by_hand(channels: int, colour: int) -> Callable:
        def made() -> tuple[bytes, Any]:
            levels = ramp(seed)[..., :channels].astype(">u2") * 257
            if channels == 4:
                levels = (
                    np.concatenate([ramp(seed), np.full((*ramp(seed).shape[:2], 1), 255)], -1).astype(">u2") * 257
                )
            rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in levels)
            expected = grey3(ramp(seed)[..., 0]) if channels == 1 else ramp(seed)
            return png(32, 24, 16, colour, rows), expected

        return made

    def maxval(most: int) -> Callable:
        def made() -> tuple[bytes, Any]:
            levels = np.round(ramp(seed)[..., 0] / 255 * most).astype(">u2")
            header = f"P5 32 24 {most}\n".encode()
            return header + levels.tobytes(), grey3(np.round(levels / most * 255))

        return made

    def tiff16() -> tuple[bytes, Any]:
        return tiff(ramp(seed).astype("<u2") * 257), ramp(seed)

    def signed() -> tuple[bytes, Any]:
        levels = (ramp(seed)[..., :1].astype(np.float64) * 32767 / 255).astype("<i2")
        return tiff(levels, sample_format=2), grey3(ramp(seed)[..., 0])

    return {
        "PNG 16-bit grey": ("x.png", EXACT, sixteen("PNG")),
        "TIFF 16-bit grey": ("x.tif", EXACT, sixteen("TIFF")),
        "JPEG2000 16-bit grey": ("x.jp2", EXACT, sixteen("JPEG2000")),
        "PPM 16-bit grey": ("x.pgm", EXACT, maxval(65535)),
        "PPM of 10 bits": ("x.pgm", EXACT, maxval(1023)),
        "PNG 16-bit colour": ("x.png", EXACT, by_hand(3, 2)),
        "PNG 16-bit colour with alpha": ("x.png", EXACT, by_hand(4, 6)),
        "PNG 16-bit grey by hand": ("x.png", EXACT, by_hand(1, 0)),
        "TIFF 16-bit colour": ("x.tif", EXACT, tiff16),
        "TIFF 32-bit whole": ("x.tif", EXACT, of_type("int32", (2**31 - 1) / 255)),
        "TIFF float 0..1": ("x.tif", EXACT, of_type("float32", 1 / 255)),
        "TIFF signed 16-bit": ("x.tif", EXACT, signed),
    }


def tiff(levels: Any, sample_format: int = 1) -> bytes:
    """An uncompressed little-endian TIFF of 16-bit samples [y, x, 3 or 1]. sample_format: 1 unsigned, 2 signed."""
    height, width, channels = levels.shape
    data = levels.tobytes()
    bits = struct.pack("<3H", 16, 16, 16)
    depth = (3, 8 + len(data)) if channels == 3 else (1, 16)
    entries = [
        (256, 3, 1, width),
        (257, 3, 1, height),
        (258, 3, *depth),
        (259, 3, 1, 1),
        (262, 3, 1, min(2, channels)),
        (273, 4, 1, 8),
        (277, 3, 1, channels),
        (278, 3, 1, height),
        (279, 4, 1, len(data)),
        (284, 3, 1, 1),
        (339, 3, 1, sample_format),
    ]
    table = struct.pack("<H", len(entries)) + b"".join(struct.pack("<HHII", *entry) for entry in entries)
    return struct.pack("<2sHI", b"II", 42, 8 + len(data) + len(bits)) + data + bits + table + bytes(4)


def _transparent(seed: int) -> dict[str, tuple[str, int, Callable]]:
    """On white."""

    def rgba(kind: str, **options: Any) -> Callable:
        def made() -> tuple[bytes, Any]:
            colours, alpha = ramp(seed), ramp(seed + 1)[..., :1]
            picture = Image.fromarray(np.concatenate([colours, alpha], axis=-1))
            share = alpha / 255
            return encoded(picture, kind, **options), np.round(colours * share + 255 * (1 - share))

        return made

    def grey_alpha() -> tuple[bytes, Any]:
        levels, alpha = ramp(seed)[..., 0], ramp(seed + 1)[..., 0]
        picture = Image.merge("LA", [Image.fromarray(levels), Image.fromarray(alpha)])
        share = alpha / 255
        return encoded(picture, "PNG"), grey3(np.round(levels * share + 255 * (1 - share)))

    def palette() -> tuple[bytes, Any]:
        picture = Image.fromarray((np.arange(24 * 32).reshape(24, 32) % 4).astype(np.uint8), "P")
        picture.putpalette([10, 20, 30, 200, 0, 0, 0, 200, 0, 0, 0, 200])
        colours = np.array([[255, 255, 255], [200, 0, 0], [0, 200, 0], [0, 0, 200]])
        return encoded(picture, "PNG", transparency=0), colours[np.arange(24 * 32).reshape(24, 32) % 4]

    def keyed() -> tuple[bytes, Any]:
        colours = ramp(seed)
        colours[:5] = (7, 8, 9)
        expected = colours.copy()
        expected[(colours == (7, 8, 9)).all(-1)] = 255
        return encoded(Image.fromarray(colours), "PNG", transparency=(7, 8, 9)), expected

    return {
        "PNG with alpha": ("x.png", EXACT, rgba("PNG")),
        "WEBP with alpha": ("x.webp", EXACT, rgba("WEBP", lossless=True, exact=True)),
        "TIFF with alpha": ("x.tif", EXACT, rgba("TIFF")),
        "TGA with alpha": ("x.tga", EXACT, rgba("TGA")),
        "PNG grey with alpha": ("x.png", EXACT, grey_alpha),
        "PNG palette with alpha": ("x.png", EXACT, palette),
        "PNG with a transparent colour": ("x.png", EXACT, keyed),
    }


def _turned(seed: int) -> dict[str, tuple[str, int, Callable]]:
    """EXIF: every orientation, and broken ones."""
    turns: dict[int, Callable[[Any], Any]] = {
        1: lambda x: x,
        2: np.fliplr,
        3: lambda x: np.rot90(x, 2),
        4: np.flipud,
        5: lambda x: x.swapaxes(0, 1),
        6: lambda x: np.rot90(x, -1),
        7: lambda x: np.rot90(x, 2).swapaxes(0, 1),
        8: lambda x: np.rot90(x, 1),
        0: lambda x: x,
        9: lambda x: x,
        65535: lambda x: x,
    }

    def turned(kind: str, number: int) -> Callable:
        def made() -> tuple[bytes, Any]:
            exif = Image.Exif()
            exif[0x0112] = number
            return encoded(Image.fromarray(ramp(seed)), kind, exif=exif), turns[number](ramp(seed))

        return made

    def broken(exif: bytes, kind: str = "PNG") -> Callable:
        return lambda: (encoded(Image.fromarray(ramp(seed)), kind, exif=exif), ramp(seed))

    def jpeg_broken(data: bytes) -> Callable:
        def made() -> tuple[bytes, Any]:
            picture = encoded(Image.fromarray(ramp(seed)), "JPEG", quality=95)
            segment = b"Exif\0\0" + data
            return picture[:2] + b"\xff\xe1" + struct.pack(">H", len(segment) + 2) + segment + picture[2:], ramp(
                seed
            )

        return made

    table = struct.pack("<2sHI", b"II", 42, 8)
    entries = {
        "that is cut short": table[:5],
        "of no TIFF": b"nonsense" * 4,
        "that points beyond itself": struct.pack("<2sHI", b"II", 42, 99999),
        "with an entry cut short": table + struct.pack("<H", 9) + b"\x12\x01",
        "with an unknown type": table + struct.pack("<HHHII", 1, 0x0112, 99, 1, 6) + bytes(4),
        "with a text for an orientation": table + struct.pack("<HHHI4s", 1, 0x0112, 2, 4, b"six\0") + bytes(4),
        "with a division by zero": table + struct.pack("<HHHII", 1, 0x011A, 5, 1, 26) + bytes(12),
        "with an immense count": table + struct.pack("<HHHII", 1, 0x0112, 3, 2**32 - 1, 6) + bytes(4),
        "that is empty": b"",
    }
    pictures = {f"PNG turned {number}": ("x.png", EXACT, turned("PNG", number)) for number in turns}
    pictures |= {f"JPEG turned {number}": ("x.jpg", LOSSY, turned("JPEG", number)) for number in (3, 6)}
    pictures |= {f"WEBP turned {number}": ("x.webp", LOSSY, turned("WEBP", number)) for number in (5, 8)}
    pictures |= {f"TIFF turned {number}": ("x.tif", EXACT, turned("TIFF", number)) for number in (6,)}
    pictures |= {f"JPEG with EXIF {name}": ("x.jpg", LOSSY, jpeg_broken(data)) for name, data in entries.items()}
    for name in ("of no TIFF", "that points beyond itself", "with an unknown type"):
        pictures[f"PNG with EXIF {name}"] = ("x.png", EXACT, broken(entries[name]))
    return pictures


def _coloured(seed: int) -> dict[str, tuple[str, int, Callable]]:
    """Embedded colour profiles."""

    # Inside every space's colours, so that none is cut at the edge of sRGB's.
    def muted() -> Any:
        return np.round(96 + ramp(seed) / 4).astype(np.uint8)

    def in_space(space: str, kind: str, **options: Any) -> Callable:
        def made() -> tuple[bytes, Any]:
            data = encoded(Image.fromarray(muted()), kind, icc_profile=profiles.profile(space), **options)
            return data, profiles.as_srgb(muted(), space)

        return made

    def with_alpha() -> tuple[bytes, Any]:
        picture = Image.fromarray(np.concatenate([muted(), np.full((24, 32, 1), 255, np.uint8)], axis=-1))
        data = encoded(picture, "PNG", icc_profile=profiles.profile("Display P3"))
        return data, profiles.as_srgb(muted(), "Display P3")

    def grey(gamma: float) -> Callable:
        def made() -> tuple[bytes, Any]:
            levels = muted()[..., 0]
            data = encoded(Image.fromarray(levels), "PNG", icc_profile=profiles.grey_profile(gamma))
            return data, grey3(profiles.encode_srgb((levels / 255) ** gamma))

        return made

    def unusable(profile: bytes, mode: str = "RGB") -> Callable:
        def made() -> tuple[bytes, Any]:
            picture = Image.fromarray(muted()).convert(mode)
            return encoded(picture, "PNG", icc_profile=profile), np.asarray(picture.convert("RGB"))

        return made

    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    p3 = profiles.profile("Display P3")
    return {
        **{f"PNG in {space}": ("x.png", COLOUR, in_space(space, "PNG")) for space in profiles.SPACES},
        **{f"TIFF in {space}": ("x.tif", COLOUR, in_space(space, "TIFF")) for space in ("Display P3", "Adobe RGB")},
        "WEBP in Display P3": ("x.webp", COLOUR, in_space("Display P3", "WEBP", lossless=True)),
        "JPEG in Display P3": ("x.jpg", LOSSY, in_space("Display P3", "JPEG", quality=97)),
        "PNG in Display P3 with alpha": ("x.png", COLOUR, with_alpha),
        "PNG grey of gamma 1": ("x.png", COLOUR, grey(1.0)),
        "PNG grey of gamma 3": ("x.png", COLOUR, grey(3.0)),
        "PNG in sRGB": ("x.png", COLOUR, unusable(srgb)),
        "PNG grey with a profile of colours": ("x.png", COLOUR, unusable(srgb, "L")),
        "PNG palette with a profile": ("x.png", COLOUR, unusable(srgb, "P")),
        "PNG with a profile cut short": ("x.png", COLOUR, unusable(p3[:200])),
        "PNG with a profile of nonsense": ("x.png", COLOUR, unusable(b"not a profile" * 20)),
        "PNG with an empty tag table": ("x.png", COLOUR, unusable(p3[:128] + bytes(4))),
        "PNG with a grey profile on colours": ("x.png", LOSSY, unusable(profiles.grey_profile(2.2))),
    }


def wrong_cases(draw: random.Random) -> Iterator[Case]:
    """Files that are no pictures, or only the beginning of one: one line, before a model is loaded."""

    def wrong(name: str, file: str, write: Callable[[Box], None], *names: str, expects: str = REFUSE) -> Case:
        def prepare(box: Box) -> None:
            box.link("converted")
            write(box)

        return Case(
            name=f"no picture/{name}",
            category=WRONG,
            steps=(invert(file),),
            expects=expects,
            prepare=prepare,
            names=names or (os.path.basename(file.rstrip("/")),),
            needs=("converted",),
        )

    seed, share = draw.getrandbits(32), draw.uniform(0.3, 0.8)

    def cut(kind: str, end: str, share: float = share, **options: Any) -> Case:
        def write(box: Box) -> None:
            data = encoded(Image.fromarray(ramp(seed, (96, 96))), kind, **options)
            box.write(f"x.{end}", data[: max(12, int(len(data) * share))])

        return wrong(f"{kind} cut to {share:.0%}", f"x.{end}", write)

    for kind, end in (
        ("PNG", "png"),
        ("JPEG", "jpg"),
        ("WEBP", "webp"),
        ("GIF", "gif"),
        ("TIFF", "tif"),
        ("BMP", "bmp"),
        ("JPEG2000", "jp2"),
        ("AVIF", "avif"),
        ("TGA", "tga"),
        ("PPM", "ppm"),
    ):
        yield cut(kind, end)
    for kind, end in (("PNG", "png"), ("JPEG", "jpg"), ("TIFF", "tif")):
        yield cut(kind, end, 0.02)
    damaged = bytearray(png(4, 4, 8, 2, bytes(4 * 13)))
    damaged[45] ^= 255
    nothing = png(1, 1, 8, 0, b"\0\0")
    files: dict[str, tuple[str, bytes]] = {
        "an empty file": ("x.png", b""),
        "text": ("x.png", b"not a picture\n"),
        "a web page": ("x.jpg", b"<html><body>404 Not Found</body></html>"),
        "SVG": ("x.svg", b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>'),
        "a PDF": ("x.pdf", b"%PDF-1.4\n%%EOF"),
        "PostScript": ("x.eps", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 99 99\n%%EndComments\nshowpage\n"),
        "a numpy array": ("x.npy", b"\x93NUMPY\x01\0" + bytes(120)),
        "only a signature": ("x.png", b"\x89PNG\r\n\x1a\n"),
        "only zeros": ("x.png", bytes(5000)),
        "a damaged chunk": ("x.png", bytes(damaged)),
        "2^31 pixels a side": ("x.png", nothing[:16] + struct.pack(">II", 2**31 - 1, 2**31 - 1) + nothing[24:]),
        "no pixels": ("x.png", nothing[:16] + struct.pack(">II", 0, 0) + nothing[24:]),
        "a BMP of -2^31 rows": (
            "x.bmp",
            b"BM"
            + struct.pack("<IHHI", 99, 0, 0, 54)
            + struct.pack("<IiiHHIIiiII", 40, 9, -(2**31), 1, 24, 0, 0, 0, 0, 0, 0),
        ),
        "a PPM of 10^9 pixels a side": ("x.ppm", b"P6 1000000000 1000000000 255\n"),
        "a MP4": ("x.mp4", b"\0\0\0\x18ftypmp42" + bytes(200)),
        "a HEIC": ("x.heic", b"\0\0\0\x18ftypheic" + bytes(200)),
        "a raw photo": ("x.cr2", b"II*\0\x10\0\0\0CR\x02\0" + bytes(100)),
    }
    for name, (file, data) in files.items():
        yield wrong(name, file, lambda box, file=file, data=data: box.write(file, data))
    yield wrong("a bomb of 400 megapixels", "x.png", lambda box: box.write("x.png", _bomb(20_000)))
    yield wrong("a bomb of 3,600 megapixels", "x.png", lambda box: box.write("x.png", _bomb(60_000)))
    yield wrong("a bomb of text", "x.png", lambda box: box.write("x.png", _text_bomb()), expects=EITHER)
    yield wrong("NaN in a float TIFF", "x.tif", _float_tiff(float("nan")))
    yield wrong("infinity in a float TIFF", "x.tif", _float_tiff(float("inf")))
    yield wrong("no file", "nowhere.png", lambda box: None)
    yield wrong("a folder", "folder", lambda box: (box.work / "folder").mkdir())
    yield wrong("a pipe", "pipe.png", lambda box: os.mkfifo(box.work / "pipe.png"))
    yield wrong("/dev/zero", "/dev/zero", lambda box: None, "zero")
    yield wrong("/dev/null", "/dev/null", lambda box: None, "null")
    yield wrong("a link to itself", "x.png", lambda box: (box.work / "x.png").symlink_to("x.png"))
    yield wrong("no name", "", lambda box: None, "image")
    yield wrong("a name of 5,000 characters", "x" * 5000, lambda box: None, "image", "xxx", "long")
    yield wrong("an address of the web", "https://example.invalid/x.png", lambda box: None, "https:", "image")
    yield wrong("an address of a file", "file:///etc/hostname", lambda box: None, "hostname", "image")


def _bomb(side: int) -> bytes:
    """A grey PNG of so many pixels a side, all black."""
    packer, row = zlib.compressobj(9), bytes(1 + side)
    data = b"".join([*(packer.compress(row) for _ in range(side)), packer.flush()])
    blank = png(side, side, 8, 0, b"")
    start = blank.index(b"IDAT") - 4
    end = blank.index(b"IEND") - 4
    chunk = struct.pack(">I", len(data)) + b"IDAT" + data + struct.pack(">I", zlib.crc32(b"IDAT" + data))
    return blank[:start] + chunk + blank[end:]


def _text_bomb() -> bytes:
    """A small picture with a compressed text of 500 MB."""
    packer = zlib.compressobj(9)
    data = b"".join([*(packer.compress(bytes(1 << 20)) for _ in range(500)), packer.flush()])
    return png(4, 4, 8, 0, bytes(4 * 5), (b"zTXt", b"Comment\0\0" + data))


def _float_tiff(value: float) -> Callable[[Box], None]:
    def write(box: Box) -> None:
        levels = np.full((8, 8), 0.5, np.float32)
        levels[3, 3] = value
        Image.fromarray(levels).save(box.work / "x.tif")

    return write


def unusual_cases(draw: random.Random) -> Iterator[Case]:
    """Photos through the whole command: what an odd shape or mode becomes must be a picture."""

    def photo(name: str, write: Callable[[Box], None], expects: str = ACCEPT) -> Case:
        def prepare(box: Box) -> None:
            box.link("converted")
            write(box)

        return Case(
            name=f"photo/{name}",
            category=RIGHT,
            steps=(invert("x.png"),),
            expects=expects,
            prepare=prepare,
            names=("x.png",),
            needs=("converted",),
            check=_reconstructed,
        )

    def of_size(height: int, width: int) -> Callable[[Box], None]:
        def write(box: Box) -> None:
            Image.fromarray(ramp(1, (height, width))).save(box.work / "x.png")

        return write

    def black(box: Box) -> None:
        Image.new("RGB", (64, 64)).save(box.work / "x.png")

    yield photo("one pixel", of_size(1, 1))
    yield photo("1 × 4,000", of_size(1, 4000))
    yield photo("4,000 × 1", of_size(4000, 1))
    yield photo("all black", black)
    yield photo("100 megapixels", lambda box: box.write("x.png", _bomb(10_000)), EITHER)


def _reconstructed(box: Box) -> str | None:
    import json

    text = (box.work / "out/inversion.json").read_text()
    json.loads(text)
    return "inversion.json has numbers that are not finite" if "NaN" in text or "Infinity" in text else None
