"""Converted checkpoints and features: their JSON, missing parts, flipped bits."""

import json
import random
import shutil
from collections.abc import Callable, Iterator

from hardness.cases import ACCEPT, EITHER, REFUSE, Box, Case, alive, generate, unchanged_picture
from hardness.documents import (
    CHOICE,
    COUNT,
    EPSILON,
    FLAG,
    NUMBER,
    NUMBERS,
    OPTIONAL,
    POSITIVE,
    SIZE,
    SIZES,
    TEXT,
    Document,
    value_cases,
    whole_cases,
)
from hardness.sources import SCHEDULER_KEYS

JSON, FILES, BITS = "converted JSON", "converted files", "flipped bits"
FLIPS = 18
TRANSFORMER, AUTOENCODER, CLIP, T5 = (f"configs.{x}" for x in ("transformer", "autoencoder", "clip", "t5"))
MODEL_KEYS = {
    "format": SIZE,
    "family": CHOICE,
    "variant": CHOICE,
    "picture_size": SIZE,
    "dtype": CHOICE,
    "vital_layers": SIZES + OPTIONAL,
    "vital_layers_origin": TEXT + OPTIONAL,
    "named": TEXT + OPTIONAL,
    f"{TRANSFORMER}.in_channels": SIZE,
    f"{TRANSFORMER}.double_blocks": SIZE,
    f"{TRANSFORMER}.heads": SIZE,
    f"{TRANSFORMER}.head_dim": SIZE,
    f"{TRANSFORMER}.guidance": FLAG,
    f"{TRANSFORMER}.rotary_axes": SIZES,
    f"{TRANSFORMER}.rotary_theta": POSITIVE,
    f"{TRANSFORMER}.mlp_ratio": SIZE,
    f"{TRANSFORMER}.epsilon": EPSILON,
    f"{AUTOENCODER}.picture_channels": SIZE,
    f"{AUTOENCODER}.widths": SIZES,
    f"{AUTOENCODER}.norm_groups": SIZE,
    f"{AUTOENCODER}.scaling_factor": POSITIVE,
    f"{AUTOENCODER}.shift_factor": NUMBER,
    f"{CLIP}.width": SIZE,
    f"{CLIP}.activation": CHOICE,
    f"{CLIP}.end_of_text": COUNT,
    f"{CLIP}.epsilon": EPSILON,
    f"{T5}.heads": SIZE,
    f"{T5}.position_buckets": SIZE,
    f"{T5}.position_reach": COUNT,
    f"{T5}.epsilon": EPSILON,
}
CONFIG, SEEN = "config", "preprocessing"
FEATURES_KEYS = {
    "format": SIZE,
    "kind": CHOICE,
    "dtype": CHOICE,
    f"{CONFIG}.width": SIZE,
    f"{CONFIG}.heads": SIZE,
    f"{CONFIG}.mlp_ratio": SIZE,
    f"{CONFIG}.layers": SIZE,
    f"{CONFIG}.picture_size": COUNT,
    f"{CONFIG}.patch_size": SIZE,
    f"{CONFIG}.registers": COUNT,
    f"{CONFIG}.swiglu": FLAG,
    f"{CONFIG}.epsilon": EPSILON,
    f"{SEEN}.shortest_edge": COUNT + OPTIONAL,
    f"{SEEN}.resample": SIZE,
    f"{SEEN}.crop": SIZES + OPTIONAL,
    f"{SEEN}.scale": POSITIVE,
    f"{SEEN}.mean": NUMBERS,
    f"{SEEN}.std": SIZES,
}


def _model(label: str, file: str, keys: dict[str, str]) -> Document:
    return Document(
        label=f"converted/{label}",
        category=JSON,
        part="converted",
        file=file,
        keys=keys,
        steps=(generate(),),
        accepted=unchanged_picture,
        alive=alive,
        needs=("painted",),
        names=("converted",),
        signed=True,
    )


def finite_features(box: Box) -> str | None:
    """What is wrong with the features that a step computed."""
    import numpy as np

    values = np.asarray(box.names["values"])
    return None if np.isfinite(values).all() else "features are not finite"


LOAD = (
    "import numpy as np\nfrom sflow_jax.catalogue import load_features\n"
    "ramp = np.arange(64 * 64 * 3, dtype=np.uint8).reshape(1, 64, 64, 3)"
)
FEATURES = Document(
    label="converted/features",
    category=JSON,
    part="dino",
    file="features.json",
    keys=FEATURES_KEYS,
    steps=(("python", f"{LOAD}\nvalues = load_features('dino')(ramp)"),),
    accepted=finite_features,
    alive=finite_features,
    names=("dino",),
    signed=True,
)


def cases(draw: random.Random) -> Iterator[Case]:
    """All of this file."""
    model = _model("model.json", "model.json", MODEL_KEYS)
    yield from value_cases(model, draw, 0.2)
    yield from whole_cases(model, draw, 14)
    scheduler = _model("scheduler", "scheduler/scheduler_config.json", SCHEDULER_KEYS)
    yield from value_cases(scheduler, draw, 0.15)
    yield from whole_cases(scheduler, draw, 6)
    yield from value_cases(FEATURES, draw, 0.2)
    yield from whole_cases(FEATURES, draw, 9)
    for folder in ("tokenizer", "tokenizer_2"):
        for file in ("tokenizer.json", "tokenizer_config.json"):
            yield from whole_cases(_model(f"{folder}/{file}", f"{folder}/{file}", {}), draw, 3)
    yield from info_cases(draw)
    yield from file_cases()
    yield from bit_cases(draw)


def info_cases(draw: random.Random) -> Iterator[Case]:
    """The same documents, looked at by `sflow info`."""
    model = Document(
        label="info/model.json",
        category=JSON,
        part="converted",
        file="model.json",
        keys={},
        steps=(("sflow", "info", "converted"),),
        accepted=lambda box: None,
        alive=lambda box: None,
    )
    yield from whole_cases(model, draw, 6)


def file_cases() -> Iterator[Case]:
    """Checkpoints with parts missing, or that are none."""

    def removed(name: str) -> Callable[[Box], None]:
        def prepare(box: Box) -> None:
            path = box.copy("converted") / name
            shutil.rmtree(path) if path.is_dir() else path.unlink()

        return prepare

    def case(name: str, prepare: Callable[[Box], None], *names: str, model: str = "converted") -> Case:
        return Case(
            name=f"files/{name}",
            category=FILES,
            steps=(generate(model=model),),
            expects=REFUSE,
            prepare=prepare,
            names=names,
            needs=("converted",),
        )

    for part in ("transformer", "autoencoder", "clip", "t5", "tokenizer", "tokenizer_2", "scheduler", "model.json"):
        yield case(f"without {part}", removed(part), part)
    for inner in ("transformer/_METADATA", "transformer/manifest.ocdbt", "t5/d", "clip/ocdbt.process_0"):
        yield case(f"without {inner}", removed(inner), inner.split("/")[0])
    for part in ("transformer", "tokenizer"):

        def emptied(box: Box, part: str = part) -> None:
            removed(part)(box)
            (box.work / "converted" / part).mkdir()

        yield case(f"{part} is empty", emptied, part)
    yield case("an empty folder", lambda box: (box.work / "empty").mkdir(), "empty", model="empty")
    yield case("a file", lambda box: box.write("file", "x"), "file", model="file")
    yield case("no folder", lambda box: None, "nowhere", model="nowhere")
    yield case("a published folder", lambda box: (box.work / "x/transformer").mkdir(parents=True), "x", model="x")
    yield case("no name", lambda box: None, "model", "checkpoint", model="")
    swapped = {"transformer": "autoencoder", "clip": "t5"}
    for one, other in swapped.items():

        def swap(box: Box, one: str = one, other: str = other) -> None:
            folder = box.copy("converted")
            shutil.rmtree(folder / one)
            shutil.copytree(folder / other, folder / one)

        yield case(f"{other} in the place of {one}", swap, one)
    for name in ("my [flux] {1}", "a**b", "a b", "flux?", "写真", "%20", "a#b", "$HOME", "~", "-m"):
        yield Case(
            name=f"files/a folder called {name}",
            category=FILES,
            steps=(generate(model=f"./{name}"),),
            # Orbax takes it for a pattern.
            expects=REFUSE if "**" in name else ACCEPT,
            prepare=lambda box, name=name: box.copy("converted", name),
            needs=("converted", "painted"),
            check=unchanged_picture,
        )
    yield Case(
        name="files/features as a model",
        category=FILES,
        steps=(generate(model="dino"),),
        expects=REFUSE,
        prepare=lambda box: box.link("dino"),
        names=("dino",),
        needs=("dino",),
    )
    yield Case(
        name="files/half-precision features on CPU",
        category=FILES,
        expects=ACCEPT,
        needs=("dino_source",),
        steps=(
            ("sflow-convert", "dino_source", "half", "--dtype", "float16"),
            ("python", f"{LOAD}\nvalues = load_features('half')(ramp)"),
        ),
        prepare=lambda box: box.link("dino_source"),
        creates=("half",),
        check=finite_features,
    )


def _data_files(box: Box) -> list[str]:
    """Files of the weights, in a fixed order, by what they hold (their names are random)."""
    folder = box.work / "converted"
    files = [
        path for path in folder.rglob("*") if path.is_file() and "/d/" in str(path) and path.stat().st_size > 64
    ]
    return sorted(
        (str(path) for path in files), key=lambda path: (path.split("/")[-4:-3], -len(open(path, "rb").read()))
    )


def bit_cases(draw: random.Random) -> Iterator[Case]:
    """One bit of the weights, of tokenizers, of JSON flipped: `sflow info --verify` must find it."""

    def flipped(seed: int, pattern: str | None = None) -> Callable[[Box], None]:
        def prepare(box: Box) -> None:
            folder, inner = box.copy("converted"), random.Random(seed)
            files = _data_files(box) if pattern is None else sorted(str(path) for path in folder.glob(pattern))
            # Large files hold more bits.
            sizes = [len(open(file, "rb").read()) for file in files]
            (file,) = inner.choices(files, sizes)
            data = bytearray(open(file, "rb").read())
            data[inner.randrange(len(data))] ^= 1 << inner.randrange(8)
            open(file, "wb").write(data)

        return prepare

    def case(name: str, expects: str, prepare: Callable[[Box], None], *, paints: bool = False, **options) -> Case:
        steps = (generate(),) if paints else (("sflow", "info", "--verify", "converted"),)
        needs = ("converted", "painted") if paints else ("converted",)
        return Case(
            name=f"bits/{name}",
            category=BITS,
            steps=steps,
            expects=expects,
            prepare=prepare,
            needs=needs,
            **options,
        )

    networks = ("transformer", "autoencoder", "clip", "t5", "converted", "verify")
    yield case("none flipped", ACCEPT, lambda box: box.copy("converted"))
    for number in range(FLIPS):
        yield case(f"weights {number + 1}", REFUSE, flipped(draw.getrandbits(32)), names=networks)
    for pattern in ("tokenizer/tokenizer.json", "tokenizer_2/tokenizer.json", "scheduler/scheduler_config.json"):
        yield case(pattern, REFUSE, flipped(draw.getrandbits(32), pattern), names=(pattern.split("/")[0],))
    for number in range(6):
        yield case(
            f"painted {number + 1}",
            EITHER,
            flipped(draw.getrandbits(32)),
            paints=True,
            check=unchanged_picture,
            names=networks,
        )
    yield case("a dropped byte", REFUSE, _shortened, names=networks)


def _shortened(box: Box) -> None:
    box.copy("converted")
    file = _data_files(box)[0]
    data = open(file, "rb").read()
    open(file, "wb").write(data[: len(data) // 2] + data[len(data) // 2 + 1 :])


def scores_of(box: Box, run: str = "run") -> dict:
    """A finished sweep's scores."""
    return json.loads((box.work / run / "scores.json").read_text())
