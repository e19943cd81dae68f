"""Weights to be converted: their numbers, types and names, their files and index."""

import os
import pickle
import random
from collections.abc import Callable, Iterator
from typing import Any

from hardness.cases import REFUSE, Box, Case
from hardness.conversions import NETWORK_FILES, WEIGHTS, raw_file, read_tensors, source_case, write_tensors
from hardness.sources import INDEX, described


def cases(draw: random.Random) -> Iterator[Case]:
    """All of this file."""
    yield from index_cases()
    yield from weight_cases(draw)


def index_cases() -> Iterator[Case]:
    """Index files that name what is not there, or lies elsewhere."""
    shard = "model-00001-of-00003.safetensors"

    def rename(to: Any) -> Callable[[Box], None]:
        def change(box: Box) -> None:
            weights = lambda d: {k: to if v == shard else v for k, v in d["weight_map"].items()}
            box.change_json(f"source/{INDEX}", lambda d: d | {"weight_map": weights(d)})

        return change

    def move(to: str) -> Callable[[Box], None]:
        def change(box: Box) -> None:
            rename(to)(box)
            (box.work / "source/text_encoder_2" / shard).rename(box.work / "source/text_encoder_2" / to)

        return change

    def absolute(box: Box) -> None:
        rename(str(box.work / "source/text_encoder_2" / shard))(box)

    def weight_map(value: Any) -> Callable[[Box], None]:
        return lambda box: box.change_json(f"source/{INDEX}", lambda d: d | {"weight_map": value})

    def without_weight_map(box: Box) -> None:
        box.change_json(f"source/{INDEX}", lambda d: {"metadata": d["metadata"]})

    named = ("index.json", "model-", "safetensors", "weight_map")
    for name, change in {
        "a shard in the folder above": move("../stolen.safetensors"),
        "a shard by its absolute path": absolute,
        "a missing shard": rename("model-00009-of-00003.safetensors"),
        "a shard named by a number": rename(7),
        "a shard named by null": rename(None),
        "a shard named by a list": rename([shard]),
        "a shard named by nothing": rename(""),
        "a shard named by a folder": rename("."),
        "a shard that is a pipe of the system": rename("../../../../../../../../dev/zero"),
        "a name of control characters": rename("\x1b[31m.safetensors"),
        "a name of 5,000 characters": rename("x" * 5000),
        "no weight map": without_weight_map,
        "a weight map that is a list": weight_map([shard]),
        "a weight map that is null": weight_map(None),
        "a weight map that is text": weight_map(shard),
        "an empty weight map": weight_map({}),
    }.items():
        yield source_case(WEIGHTS, f"index: {name}", REFUSE, change, names=named)


def weight_cases(draw: random.Random) -> Iterator[Case]:
    """Numbers, types, names and files of weights."""
    for network, file in NETWORK_FILES.items():
        yield from _value_cases(network, file, draw)
        yield from _file_cases(network, file)
    for network in ("transformer", "vae", "clip"):
        yield from _name_cases(network, NETWORK_FILES[network], draw)
    yield from _raw_cases()
    file = "dino_source/model.safetensors"
    for label, change in _damages("dino", file, draw).items():
        yield source_case(
            WEIGHTS,
            f"dino: {label}",
            REFUSE,
            change,
            part="dino_source",
            source="dino_source",
            names=("safetensors", "finite", "weight", "bias", "token"),
            check=described,
            paints=False,
        )


def _with_value(file: str, value: float, seed: int, dtype: str = "float32") -> Callable[[Box], None]:
    """One number of one tensor replaced."""

    def change(box: Box) -> None:
        draw, tensors = random.Random(seed), read_tensors(box, file)
        name = draw.choice(sorted(tensors))
        tensor = tensors[name].astype(dtype)
        tensor.reshape(-1)[draw.randrange(tensor.size)] = value
        write_tensors(box, file, tensors | {name: tensor})

    return change


def _damages(network: str, file: str, draw: random.Random) -> dict[str, Callable[[Box], None]]:
    return {
        "a NaN": _with_value(file, float("nan"), draw.getrandbits(32)),
        "an infinity": _with_value(file, float("-inf"), draw.getrandbits(32)),
        "empty": lambda box: box.write(file, b""),
        "cut short": lambda box: os.truncate(box.work / file, (box.work / file).stat().st_size * 2 // 3),
        "cut in its header": lambda box: os.truncate(box.work / file, 60),
    }


def _value_cases(network: str, file: str, draw: random.Random) -> Iterator[Case]:
    about = ("safetensors", "finite", "weight", "bias", "scale")
    bad = {"a NaN": float("nan"), "an infinity": draw.choice([float("inf"), float("-inf")])}
    for label, value in bad.items():
        yield source_case(
            WEIGHTS, f"{network}: {label}", REFUSE, _with_value(file, value, draw.getrandbits(32)), names=about
        )
    yield source_case(
        WEIGHTS,
        f"{network}: 1e30 as float16",
        REFUSE,
        _with_value(file, 1e30, draw.getrandbits(32)),
        names=about,
        options=("--dtype", "float16"),
    )
    yield source_case(
        WEIGHTS,
        f"{network}: 1e39 in float64",
        REFUSE,
        _with_value(file, 1e39, draw.getrandbits(32), "float64"),
        names=(*about, "dtype", "float64"),
    )
    for dtype in ("int64", "int8", "bool"):
        yield source_case(
            WEIGHTS, f"{network}: {dtype} tensors", REFUSE, _retyped(file, dtype), names=("dtype", *about, dtype)
        )


def _retyped(file: str, dtype: str) -> Callable[[Box], None]:
    def change(box: Box) -> None:
        write_tensors(box, file, {name: x.astype(dtype) for name, x in read_tensors(box, file).items()})

    return change


def _file_cases(network: str, file: str) -> Iterator[Case]:
    def pickled(box: Box) -> None:
        box.write(file, pickle.dumps({"weight": [1.0, 2.0]}))

    def replaced(special: Callable) -> Callable[[Box], None]:
        def change(box: Box) -> None:
            (box.work / file).unlink()
            special(box.work / file)

        return change

    named = (os.path.basename(file), os.path.dirname(file).split("/")[-1])
    for label, change in {
        "an empty file": lambda box: box.write(file, b""),
        "cut short": lambda box: os.truncate(box.work / file, (box.work / file).stat().st_size * 2 // 3),
        "cut in its header": lambda box: os.truncate(box.work / file, 60),
        "longer than it says": lambda box: box.write(file, (box.work / file).read_bytes() + b"\0" * 64),
        "a pickle by its name": pickled,
        "a web page by its name": lambda box: box.write(file, "<html>404</html>"),
        "a pointer of git lfs": lambda box: box.write(file, "version https://git-lfs.github.com/spec/v1\n"),
        "a folder": replaced(os.mkdir),
        "a pipe": replaced(os.mkfifo),
        "endless": replaced(lambda path: path.symlink_to("/dev/zero")),
        "missing": replaced(lambda path: None),
    }.items():
        yield source_case(WEIGHTS, f"{network}: {label}", REFUSE, change, names=named)


def _name_cases(network: str, file: str, draw: random.Random) -> Iterator[Case]:
    seed = draw.getrandbits(32)

    def with_tensors(edit: Callable[[dict, str], dict]) -> Callable[[Box], None]:
        def change(box: Box) -> None:
            tensors = read_tensors(box, file)
            name = random.Random(seed).choice(sorted(n for n, x in tensors.items() if len({*x.shape[:2]}) == 2))
            write_tensors(box, file, edit(tensors, name))

        return change

    for label, edit in {
        "transposed": lambda tensors, name: tensors | {name: tensors[name].T.copy()},
        "one row less": lambda tensors, name: tensors | {name: tensors[name][:-1].copy()},
        "one axis more": lambda tensors, name: tensors | {name: tensors[name][None]},
        "no rows": lambda tensors, name: tensors | {name: tensors[name][:0].copy()},
        "one missing": lambda tensors, name: {n: x for n, x in tensors.items() if n != name},
        "one unknown": lambda tensors, name: tensors | {"lora_A.weight": tensors[name].copy()},
        "400 unknown": lambda tensors, name: tensors | {f"x.{i}": tensors[name][:1].copy() for i in range(400)},
        "all under other names": lambda tensors, name: {f"net.{n}": x for n, x in tensors.items()},
        "no tensors": lambda tensors, name: {},
        "a name of control characters": lambda tensors, name: tensors | {"\x1b]0;x\x07": tensors[name].copy()},
    }.items():  # fmt: skip
        yield source_case(
            WEIGHTS,
            f"{network}: {label}",
            REFUSE,
            with_tensors(edit),
            names=("missing", "unexpected", "shape", "tensor"),
        )


def _raw_cases() -> Iterator[Case]:
    file = NETWORK_FILES["transformer"]
    entry = {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}
    for label, content in {
        "a header of 2^63 bytes": raw_file({}, length=2**63),
        "a header that is no JSON": raw_file(b"x" * 100),
        "a header that is a list": raw_file([1, 2]),
        "a header 100,000 deep": raw_file(b"[" * 100_000),
        "offsets beyond the file": raw_file({"a": entry | {"data_offsets": [0, 10**12], "shape": [25 * 10**10]}}),
        "negative sizes": raw_file({"a": entry | {"shape": [-2, -2]}}, bytes(16)),
        "an unknown dtype": raw_file({"a": entry | {"dtype": "F12"}}, bytes(16)),
        "overlapping tensors": raw_file({"a": entry, "b": entry}, bytes(16)),
        "sizes of 10^18": raw_file({"a": entry | {"shape": [10**9, 10**9]}}, bytes(16)),
    }.items():
        yield source_case(
            WEIGHTS,
            f"by hand: {label}",
            REFUSE,
            lambda box, content=content: box.write(file, content),
            names=("diffusion_pytorch_model",),
        )
