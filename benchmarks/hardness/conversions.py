"""What all conversions share: the steps, a case of a changed source, and tensors in files."""

import json
import struct
from collections.abc import Callable
from typing import Any

from safetensors.numpy import load_file, save_file

from hardness.cases import PAINT, Box, Case, Check, Step, same_picture, unchanged_picture

CONVERT: Step = ("sflow-convert", "source", "out")
PAINTED: Step = ("sflow", "generate", "-m", "out", *PAINT)
INFO: Step = ("sflow", "info", "out")
CONFIGS, WEIGHTS, LAYOUTS, TOKENIZERS, SCHEDULERS = (
    "source configs",
    "source weights",
    "source layouts",
    "source tokenizers",
    "source schedulers",
)

NETWORK_FILES = {
    "transformer": "source/transformer/diffusion_pytorch_model.safetensors",
    "vae": "source/vae/diffusion_pytorch_model.safetensors",
    "clip": "source/text_encoder/model.safetensors",
    "t5": "source/text_encoder_2/model-00002-of-00003.safetensors",
}


def source_case(
    category: str,
    name: str,
    expects: str,
    change: Callable[[Box], None],
    *,
    part: str = "source",
    source: str = "source",
    options: tuple[str, ...] = (),
    names: tuple[str, ...] = (),
    check: Check = unchanged_picture,
    paints: bool = True,
) -> Case:
    """Convert a changed copy of a part, and paint with it where it is accepted."""

    def prepare(box: Box) -> None:
        box.copy(part)
        change(box)

    # Single files do not say for which size they were made.
    single = part == "single"
    painted = (*PAINTED, "--height", "64", "--width", "64") if single else PAINTED
    right = "painted_wide" if single else "painted"
    if single and check is unchanged_picture:
        check = same_picture(right)
    return Case(
        name=f"{category.removeprefix('source ')}/{name}",
        category=category,
        steps=(("sflow-convert", source, "out", *options), painted if paints else INFO),
        expects=expects,
        prepare=prepare,
        names=names,
        needs=(part, right, "wide_source") if single else (part, right) if paints else (part,),
        check=check,
    )


def read_tensors(box: Box, name: str) -> dict[str, Any]:
    """A file's tensors as numpy has them."""
    return load_file(box.work / name)


def write_tensors(box: Box, name: str, tensors: dict[str, Any]) -> None:
    """A safetensors file."""
    save_file(tensors, box.work / name)


def raw_file(header: Any, data: bytes = b"", length: int | None = None) -> bytes:
    """A safetensors file by hand."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data
