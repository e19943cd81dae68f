"""Settings: numbers, names, layers, meshes, prompts and counts, of every command and of the Python calls."""

import os
import random
from collections.abc import Callable, Iterator

from hardness.cases import ACCEPT, EITHER, MODEL, REFUSE, Box, Case, Check, Step, alive, generate
from hardness.runs import SWEEP

NUMBERS, NAMES, LAYERS, COUNTS, PYTHON = (
    "settings: numbers",
    "settings: names",
    "settings: layers",
    "settings: counts",
    "settings: Python",
)
INEFFECTIVE, PROMPTS, ADDRESSES = "settings without effect", "prompts' files", "addresses"
# Small, so that what is accepted ends soon; an option that comes again takes the place of the first.
GENERATE: Step = ("sflow", "generate", *MODEL, "-p", "a cat", "--out", "out", "--steps", "1")
EDIT: Step = ("sflow", "edit", *MODEL, "-p", "a cat", "-e", "a dog", "--out", "out", "--steps", "1")
INVERT: Step = ("sflow", "invert", *MODEL, "--image", "photo.png", "-p", "a cat", "--out", "out", "--steps", "1")
VITAL: Step = (
    *("sflow", "vital", *MODEL, "--features", "dino", "--out", "out", "--prompts", "prompts.txt"),
    *("--limit", "2", "--steps", "1", "--layers", "0-1", "--batch", "2"),
)
DRY: Step = ("sflow", "vital", *MODEL, "--dry-run")
COMMANDS = {"generate": GENERATE, "edit": EDIT, "invert": INVERT, "vital": VITAL, "dry": DRY}
WHOLE = {
    "generate": ("steps", "height", "width", "seed"),
    "edit": ("steps", "height", "width", "seed", "edits-at-once"),
    "invert": ("steps", "height", "width"),
    "vital": ("steps", "height", "width", "limit", "seeds", "batch", "windows", "top"),
}
REAL = {
    "generate": ("guidance",),
    "edit": ("guidance",),
    "invert": ("guidance", "nudge"),
    "vital": ("guidance", "threshold", "error"),
    "dry": ("step-seconds",),
}
NO_WHOLE = ("-1", "1.5", "abc", "", "nan", "1e3", "0x10", "1,000", "--5", "1 2", "²")
NO_REAL = ("nan", "inf", "-inf", "1e39", "1e400", "abc", "", "1,5", "0x1p3x", "--", "1e", "⅓")
PARTS = ("converted", "dino", "photo.png", "inversion", "prompts.txt")
COMPILED = ("edited", "inverted", "swept")


def cases(draw: random.Random) -> Iterator[Case]:
    """All of this file."""
    yield from number_cases(draw)
    yield from name_cases()
    yield from layer_cases(draw)
    yield from count_cases(draw)
    yield from ineffective_cases()
    yield from prompt_cases()
    yield from address_cases()
    yield from python_cases()


def _case(
    category: str,
    name: str,
    step: Step,
    expects: str,
    *names: str,
    prepare: Callable[[Box], None] = lambda box: None,
    check: Check = lambda box: None,
    needs: tuple[str, ...] = PARTS,
) -> Case:
    def linked(box: Box) -> None:
        box.link(*needs)
        prepare(box)

    return Case(
        name=name,
        category=category,
        steps=(step,),
        expects=expects,
        prepare=linked,
        names=names,
        needs=(*needs, *COMPILED),
        check=check,
    )


def number_cases(draw: random.Random) -> Iterator[Case]:
    """Every number of every command: none at all, and out of its bounds."""
    for command, options in WHOLE.items():
        for option in options:
            out = ["0"] if option != "seed" else ["-1", str(2**64)]
            out += [str(10 ** draw.randint(19, 60)), str(-draw.randint(2, 10**6))]
            out += draw.sample(NO_WHOLE, 2)
            for value in out:
                yield _number(command, option, value)
    for command, options in REAL.items():
        for option in options:
            values = ["nan", "inf", *draw.sample(NO_REAL[2:], 2)]
            values += {
                "nudge": ["0", "-1.15", "1e-45"],
                "error": ["0", "1", "-0.1"],
                "step-seconds": ["-1", "0"],
            }.get(option, [])
            for value in values:
                yield _number(command, option, value)
    for option in ("height", "width"):
        for value in ("1", "63", "100", "16385"):
            yield _number("generate", option, value)
    for option, value in (("steps", "٣"), ("seed", " 5 "), ("steps", "1_0"), ("guidance", "1_0"), ("seed", "+5")):
        yield _case(
            NUMBERS, f"generate/{option}={value}", (*GENERATE, f"--{option}={value}"), EITHER, option, check=alive
        )
    for seed in (2**32 + 42, 2**63, 2**64 - 1):
        yield _case(NUMBERS, f"generate/seed={seed}", generate("--seed", str(seed)), ACCEPT, "seed", check=alive)
    for guidance in ("0", "1", "100", "-1", "999", "1e-30"):
        yield _case(
            NUMBERS,
            f"generate/guidance={guidance}",
            generate("--guidance", guidance),
            EITHER,
            "guidance",
            check=alive,
        )


def _number(command: str, option: str, value: str) -> Case:
    # Upper bounds of what is there anyway do no harm, however large.
    bound = option in ("limit", "edits-at-once") and value.isdecimal() and int(value) > 0
    tiny = value == "1e-45"
    return _case(
        NUMBERS,
        f"{command}/{option}={value[:24]}",
        (*COMMANDS[command], f"--{option}={value}"),
        EITHER if bound or tiny else REFUSE,
        option,
        option.replace("-", "_"),
        check=finite_record,
    )


def finite_record(box: Box) -> str | None:
    """What is wrong with the JSON of results: numbers that are not finite."""
    for file in (box.work / "out").glob("*.json"):
        text = file.read_text()
        if "NaN" in text or "Infinity" in text:
            return f"{file.name} has numbers that are not finite"
    return None


def name_cases() -> Iterator[Case]:
    """Choices, meshes, machines, workers: unknown ones."""
    for option in ("dtype", "attention", "quantize", "text-encoder"):
        for value in ("", "abc", "float8", "XLA", "\x1b[31m"):
            yield _case(NAMES, f"generate/{option}={value!r}", (*GENERATE, f"--{option}={value}"), REFUSE, option)
    yield _case(NAMES, "edit/replay=abc", (*EDIT, "--inversion", "inversion", "--replay", "abc"), REFUSE, "replay")
    yield _case(NAMES, "vital/keep-images=abc", (*VITAL, "--keep-images", "abc"), REFUSE, "keep-images")
    for mesh in (
        "",
        "data",
        "data=",
        "data=0",
        "data=-1",
        "data=1.5",
        "foo=2",
        "data=2,data=2",
        "data=2;tensor=2",
        "data=2",
        f"data={10**30}",
        "tensor=3",
        "=",
        ",",
        "data=٢",
        "x" * 10_000,
    ):
        yield _case(NAMES, f"mesh/{mesh[:30]}", (*GENERATE, f"--mesh={mesh}"), REFUSE, "mesh")
    for mesh in ("data=0", f"tensor={10**9}", f"data={10**5},tensor={10**5}", "tensor=7"):
        yield _case(NAMES, f"mesh of a dry run/{mesh}", (*DRY, f"--mesh={mesh}"), REFUSE, "mesh", "tensor", "data")
    for worker in ("", "0/1", "2/1", "1/0", "a/b", "1", "/", "-1/2", "1/1/1", "1.0/2", "١/٢", "1/2x"):
        # Digits of other scripts mean the same.
        expects = EITHER if worker == "١/٢" else REFUSE
        yield _case(NAMES, f"worker/{worker}", (*VITAL, f"--worker={worker}"), expects, "worker")
    for plan in (
        "",
        "v6e",
        "v6e-0",
        "v6e-",
        "v6e--8",
        "v6e-8x",
        "xyz-8",
        "h100",
        "h100x0",
        "v5p-3",
        "v6e-1.5",
        "v6e-٨",
    ):
        yield _case(
            NAMES, f"plan/{plan}", ("sflow", "info", "converted", f"--plan={plan}"), REFUSE, "machine", "plan"
        )
    for step in (
        ("sflow", "paint"),
        ("sflow", "generate"),
        ("sflow", "vital"),
        ("sflow-convert",),
        ("sflow-convert", "x"),
        (*GENERATE, "--no-such-option", "1"),
        (*GENERATE, "stray"),
        ("sflow", "info"),
        ("sflow", "vital", "--compare", "a"),
        ("sflow", "edit", *MODEL, "-p", "a cat", "--out", "out"),
    ):
        expects = "No such" if "--no-such-option" in step else ""
        case = _case(NAMES, f"words/{' '.join(step[:3] + step[-1:])}", step, REFUSE)
        if not expects:
            yield case
    yield _case(
        NAMES,
        "prompt of nothing",
        ("sflow", "generate", *MODEL, "-p", "", "--steps", "1", "--out", "out"),
        EITHER,
        "prompt",
        check=alive,
    )
    yield _case(
        NAMES,
        "prompt of 1 MB",
        ("sflow", "generate", *MODEL, "-p", "cat " * 25_000, "--steps", "1", "--out", "out"),
        EITHER,
        "prompt",
        check=alive,
    )
    yield _case(
        NAMES,
        "prompt that is not UTF-8",
        ("sflow", "generate", *MODEL, "-p", "caf\udce9", "--steps", "1", "--out", "out"),
        EITHER,
        "prompt",
        "UTF-8",
        check=alive,
    )
    yield _case(
        NAMES,
        "prompt of emoji and newlines",
        ("sflow", "generate", *MODEL, "-p", "🐱\n\t👩‍👩‍👧 \u202e cat", "--steps", "1", "--out", "out"),
        ACCEPT,
        check=alive,
    )


def layer_cases(draw: random.Random) -> Iterator[Case]:
    """Layers that cannot be read, or that the model does not have."""
    number = draw.randint(5, 10**6)
    texts = (
        "",
        ",",
        "3-1",
        "1-",
        "-1",
        "abc",
        "1..3",
        "0x1",
        "１",
        "vital,1",
        str(number),
        f"0-{number}",
        "1,,2",
        "0-9999999",
        "0-" + "9" * 40,
        "1 2",
        "1;2",
        "1.5",
        "nan",
        "0,1," + ",".join(["1"] * 5000) + ",99",
        "x" * 10_000,
        "\x1b[31m",
        "0-1-2",
    )
    uses = {
        "bypass": GENERATE,
        "layers": (*EDIT, "--inversion", "inversion"),
        "pairs": VITAL,
        "vital-layers": ("sflow-convert", "source", "out"),
    }
    for option, step in uses.items():
        chosen = texts if option == "bypass" else draw.sample(texts, 8)
        for text in chosen:
            name = f"{option}={text[:20]}" + (f" ({len(text)})" if len(text) > 20 else "")
            yield _case(
                LAYERS,
                name,
                (*step, f"--{option}={text}"),
                REFUSE,
                option,
                "layer",
                "pairs",
                "bypass",
                needs=(*PARTS, "source"),
            )
    for text in draw.sample(texts, 6):
        yield _case(LAYERS, f"measured={text[:20]}", (*VITAL, f"--layers={text}"), REFUSE, "layers", "layer")
    for text in ("all", "vital", "vital,none"):
        yield _case(
            LAYERS,
            f"vital-layers={text}",
            ("sflow-convert", "source", "out", "--vital-layers", text),
            REFUSE,
            "vital-layers",
            "layers",
            needs=("source",),
        )
    for text in ("0-4", "0,1,2,3,4", "all", "0,0,0", " 0 , 1 "):
        yield _case(LAYERS, f"bypass={text}", generate("--bypass", text), EITHER, "bypass", "layer")
    yield _case(LAYERS, "none to measure", (*VITAL, "--layers=none"), REFUSE, "layers")
    yield _case(LAYERS, "pairs not measured", (*VITAL, "--layers=0-2", "--pairs=3-4"), REFUSE, "pairs")
    yield _case(LAYERS, "top beyond the layers", (*VITAL, "--top=99"), REFUSE, "top")
    yield _case(LAYERS, "top and threshold", (*VITAL, "--top=1", "--threshold=0.5"), REFUSE, "top", "threshold")
    yield _case(LAYERS, "windows beyond the steps", (*VITAL, "--steps=2", "--windows=3"), REFUSE, "windows")
    yield _case(
        LAYERS, "adaptive with windows", (*VITAL, "--adaptive", "--windows=2"), REFUSE, "adaptive", "windows"
    )
    yield _case(LAYERS, "vital layers unknown", (*EDIT, "-m", "plain"), REFUSE, "layers", needs=("plain",))
    yield _case(LAYERS, "no features", ("sflow", "vital", *MODEL, "--out", "out"), REFUSE, "features")
    yield _case(
        LAYERS, "features that are a model", (*VITAL, "--features=converted"), REFUSE, "converted", "features"
    )
    yield _case(LAYERS, "CLIP for DINOv2", (*VITAL, "--clip=dino"), REFUSE, "dino")
    yield _case(LAYERS, "no such features", (*VITAL, "--features=nowhere"), REFUSE, "nowhere")


def count_cases(draw: random.Random) -> Iterator[Case]:
    """Counts that no machine has."""
    many = str(10**9 + draw.randint(0, 10**6))
    for name, step, *names in (
        ("generate/steps", (*GENERATE, "--steps", many), "steps"),
        ("generate/height", (*GENERATE, "--height", many), "height"),
        ("generate/height divisible", (*GENERATE, "--height", str(16 * 10**8)), "height"),
        ("generate/both sides", (*GENERATE, "--height", "16384", "--width", "16384"), "height", "memory", "width"),
        ("generate/bypass", (*GENERATE, "--bypass", f"0-{many}"), "bypass", "layers"),
        ("generate/mesh", (*GENERATE, "--mesh", f"data={many}"), "mesh"),
        ("edit/steps", (*EDIT, "--steps", many), "steps"),
        ("invert/steps", (*INVERT, "--steps", many), "steps"),
        ("vital/steps", (*VITAL, "--steps", many), "steps"),
        ("vital/seeds", (*VITAL, "--seeds", many), "seeds"),
        ("vital/batch", (*VITAL, "--batch", many), "batch"),
        ("vital/windows", (*VITAL, "--windows", many), "windows"),
        ("vital/top", (*VITAL, "--top", many), "top"),
        ("vital/layers", (*VITAL, "--layers", f"0-{many}"), "layers"),
        ("vital/worker", (*VITAL, "--worker", f"1/{many}"), "worker"),
        ("dry run/seeds", (*DRY, "--seeds", many), "seeds"),
        ("dry run/batch", (*DRY, "--batch", many), "batch"),
        ("dry run/worker", (*DRY, "--worker", f"1/{many}", "--step-seconds", "1"), "worker"),
        ("dry run/mesh", (*DRY, "--mesh", f"tensor={many}"), "mesh"),
        ("info/plan", ("sflow", "info", "flux-dev", "--plan", f"v6e-{many}"), "plan", "machine"),
        ("info/plan of 10^40", ("sflow", "info", "flux-dev", "--plan", "v6e-1" + "0" * 40), "plan", "machine"),
        (
            "convert/vital layers",
            ("sflow-convert", "source", "out", "--vital-layers", f"0-{many}"),
            "vital-layers",
            "layers",
        ),
        (
            "convert/vital layers of 9 nines",
            ("sflow-convert", "source", "out", "--vital-layers", "0-999999999"),
            "layers",
        ),
        ("vital/process", (*VITAL, "--coordinator", "localhost:9", "--process", f"2/{many}"), "process"),
        ("edit/limit of the inversion", (*EDIT, "--inversion", "inversion", "--steps", many), "steps"),
    ):
        yield _case(COUNTS, f"counts/{name}", step, REFUSE, *names, needs=(*PARTS, "source"))
    yield _case(COUNTS, "counts/limit beyond the prompts", (*SWEEP[:-1], "out", "--limit", many), EITHER, "limit")


def ineffective_cases() -> Iterator[Case]:
    """Options that would change nothing."""
    real = ("--inversion", "inversion")
    for name, step, *names in (
        ("edit --nudge without a photo", (*EDIT, "--nudge", "1.3"), "nudge"),
        ("edit --unnudge without a photo", (*EDIT, "--unnudge"), "unnudge"),
        ("edit --replay without a photo", (*EDIT, "--replay", "residual"), "replay"),
        ("edit --replay with its default without a photo", (*EDIT, "--replay", "aligned"), "replay"),
        (
            "edit --seed with a photo",
            (*EDIT, "--image", "photo.png", "--method", "reference", "--seed", "3"),
            "seed",
        ),
        ("edit --seed with an inversion", (*EDIT, *real, "--seed", "3"), "seed"),
        ("edit --nudge with an inversion", (*EDIT, *real, "--nudge", "1.3"), "nudge"),
        ("edit --image with --inversion", (*EDIT, *real, "--image", "photo.png"), "image", "inversion"),
        (
            "info --quantize without --plan",
            ("sflow", "info", "converted", "--quantize", "int8"),
            "quantize",
            "plan",
        ),
        ("info --offload without --plan", ("sflow", "info", "converted", "--offload"), "offload", "plan"),
        ("info --plan of features", ("sflow", "info", "dino", "--plan", "v6e-8"), "dino", "plan"),
        ("vital --error without --adaptive", (*VITAL, "--error", "0.1"), "error", "adaptive"),
        ("vital --step-seconds without --dry-run", (*VITAL, "--step-seconds", "1"), "step-seconds", "dry-run"),
        ("vital --save with --dry-run", (*DRY, "--save"), "save", "dry-run"),
        ("vital --compare with -m", ("sflow", "vital", "--compare", "run", "run", *MODEL), "compare", "model"),
        (
            "vital --compare with --steps",
            ("sflow", "vital", "--compare", "run", "run", "--steps", "3"),
            "compare",
            "steps",
        ),
        ("vital --compare with --save", ("sflow", "vital", "--compare", "run", "run", "--save"), "compare", "save"),
        ("generate --process without --coordinator", (*GENERATE, "--process", "1/2"), "process", "coordinator"),
        ("vital --worker with --coordinator", (*VITAL, "--worker", "1/2", "--coordinator", "auto"), "worker"),
        (
            "convert --text-encoders for features",
            ("sflow-convert", "dino_source", "out", "--text-encoders", "source"),
            "text-encoders",
        ),
        (
            "convert --vital-layers for features",
            ("sflow-convert", "dino_source", "out", "--vital-layers", "0"),
            "vital-layers",
        ),
    ):
        yield _case(
            INEFFECTIVE, f"no effect/{name}", step, REFUSE, *names, needs=(*PARTS, "run", "source", "dino_source")
        )


LINES = ("a cat", "a dog", "ein Käfer")
READ = "from sflow_jax.vitality.prompts import load_prompts\nvalues = load_prompts('prompts')"


def prompt_cases() -> Iterator[Case]:
    """Files of prompts, through the library's reader where they are fine, and the command where they are not."""
    text = "\n".join(LINES) + "\n"
    fine: dict[str, tuple[bytes, tuple[str, ...]]] = {
        "utf-8": (text.encode(), LINES),
        "utf-8 with a mark": (text.encode("utf-8-sig"), LINES),
        "utf-16 with a mark": (text.encode("utf-16"), LINES),
        "utf-16 with a mark, big end first": (b"\xfe\xff" + text.encode("utf-16-be"), LINES),
        "Windows' line ends": (text.replace("\n", "\r\n").encode(), LINES),
        "old Mac's line ends": (text.replace("\n", "\r").encode(), LINES),
        "mixed line ends": ("a cat\r\na dog\rein Käfer\n".encode(), LINES),
        "no line end at the end": (text.rstrip().encode(), LINES),
        "a line separator in a prompt": ("a\u2028cat\n".encode(), ("a\u2028cat",)),
        "a form feed in a prompt": (b"a\x0ccat\n", ("a\x0ccat",)),
        "a next line in a prompt": ("a\u0085cat\n".encode(), ("a\u0085cat",)),
        "comments and blank lines": (b"# a title\n\n  \na cat\n#a dog\n", ("a cat",)),
        "a mark before a comment": ("\ufeff# a title\na cat\n".encode(), ("a cat",)),
    }
    for name, (data, expected) in fine.items():

        def check(box: Box, expected: tuple[str, ...] = expected) -> str | None:
            values = tuple(" ".join(x.split()) for x in box.names["values"])
            wanted = tuple(" ".join(x.split()) for x in expected)
            return None if values == wanted else f"read {values!r}"

        expects = EITHER if "utf-16" in name else ACCEPT
        yield _case(
            PROMPTS,
            f"prompts/{name}",
            ("python", READ),
            expects,
            "prompts",
            check=check,
            needs=(),
            prepare=lambda box, data=data: box.write("prompts", data),
        )
    bad: dict[str, Callable[[Box], None]] = {
        "latin-1": lambda box: box.write("prompts", text.encode("latin-1")),
        "utf-16 without a mark": lambda box: box.write("prompts", text.encode("utf-16-le")),
        "utf-32": lambda box: box.write("prompts", text.encode("utf-32")),
        "Shift JIS": lambda box: box.write("prompts", "赤い猫\n".encode("shift_jis")),
        "empty": lambda box: box.write("prompts", b""),
        "only a mark": lambda box: box.write("prompts", b"\xef\xbb\xbf"),
        "only comments": lambda box: box.write("prompts", b"# a\n# b\n\n"),
        "NUL bytes": lambda box: box.write("prompts", b"a cat\0\0\n"),
        "a picture": lambda box: box.write("prompts", (box.world / "photo.png").read_bytes()),
        "a folder": lambda box: (box.work / "prompts").mkdir(),
        "missing": lambda box: None,
        "a pipe": lambda box: os.mkfifo(box.work / "prompts"),
        "endless": lambda box: (box.work / "prompts").symlink_to("/dev/zero"),
        "an endless random one": lambda box: (box.work / "prompts").symlink_to("/dev/urandom"),
        "a link to itself": lambda box: (box.work / "prompts").symlink_to("prompts"),
        "300 MB in a line": lambda box: box.write("prompts", b"x" * (300 << 20)),
        "10 million lines": lambda box: box.write("prompts", b"a cat\n" * 10_000_000),
    }
    step = tuple("prompts" if x == "prompts.txt" else "out" if x == "run" else x for x in SWEEP)
    for name, prepare in bad.items():
        soft = name in ("10 million lines",)
        yield _case(
            PROMPTS,
            f"prompts/{name}",
            step,
            EITHER if soft else REFUSE,
            "prompts",
            prepare=prepare,
            needs=("converted", "dino", "photo.png"),
        )
    yield _case(
        PROMPTS,
        "prompts/no name",
        tuple("" if x == "prompts.txt" else "out" if x == "run" else x for x in SWEEP),
        EITHER,
        "prompts",
        needs=("converted", "dino"),
    )


def address_cases() -> Iterator[Case]:
    """Addresses of other processes that are none."""
    for coordinator in (
        "localhost",
        "localhost:",
        "localhost:abc",
        "localhost:0",
        "localhost:99999",
        "localhost:-1",
        ":1234",
        "",
        ":",
        "http://localhost:1234",
        "local host:1234",
        "a:b:c",
        "localhost:1234x",
        "\x1b[31m:1",
        "x" * 3000 + ":1",
        "localhost:٣",
    ):
        for command in (GENERATE, VITAL) if coordinator in ("localhost", "localhost:abc") else (GENERATE,):
            yield _case(
                ADDRESSES,
                f"{command[1]}/coordinator={coordinator[:20]!r}",
                (*command, f"--coordinator={coordinator}", "--process", "1/2"),
                REFUSE,
                "coordinator",
            )
    for process in ("", "0/2", "3/2", "a/b", "1", "1/0", "-1/2", "1/2/3"):
        yield _case(
            ADDRESSES,
            f"process={process}",
            (*GENERATE, "--coordinator=localhost:4321", f"--process={process}"),
            REFUSE,
            "process",
        )
    yield _case(ADDRESSES, "no process", (*GENERATE, "--coordinator=localhost:4321"), REFUSE, "process")
    yield _case(ADDRESSES, "auto without a cluster", (*GENERATE, "--coordinator=auto"), REFUSE, "coordinator")
    yield _case(
        ADDRESSES, "auto with a process", (*GENERATE, "--coordinator=auto", "--process=1/2"), REFUSE, "process"
    )


SETUP = (
    "import numpy as np, math, sflow_jax\nfrom pathlib import Path\nfrom PIL import Image\n"
    "from sflow_jax import *\nfrom sflow_jax.settings import *\n"
    "flow = StableFlow.load('converted')\nphoto = Image.open('photo.png').copy()\nquiet = dict(progress=False)"
)
# Call → names of which the message must have one.
CALLS: dict[str, tuple[str, ...]] = {
    "flow.generate(['a'], steps='3', **quiet)": ("steps",),
    "flow.generate(['a'], steps=2.5, **quiet)": ("steps",),
    "flow.generate(['a'], steps=0, **quiet)": ("steps",),
    "flow.generate(['a'], steps=[3], **quiet)": ("steps",),
    "flow.generate(['a'], steps=float('nan'), **quiet)": ("steps",),
    "flow.generate(['a'], steps=10**9, **quiet)": ("steps",),
    "flow.generate(['a'], guidance='a', **quiet)": ("guidance",),
    "flow.generate(['a'], guidance=float('nan'), **quiet)": ("guidance",),
    "flow.generate(['a', 'b'], guidance=[1.0], **quiet)": ("guidance",),
    "flow.generate(['a'], guidance=[[1.0]], **quiet)": ("guidance",),
    "flow.generate(['a'], guidance=[float('inf')], **quiet)": ("guidance",),
    "flow.generate(['a'], guidance={'a': 1}, **quiet)": ("guidance",),
    "flow.generate(['a'], guidance=1j, **quiet)": ("guidance",),
    "flow.generate(['a'], seed=-1, **quiet)": ("seed",),
    "flow.generate(['a'], seed=1.5, **quiet)": ("seed",),
    "flow.generate(['a'], seed='x', **quiet)": ("seed",),
    "flow.generate(['a'], seed=None, **quiet)": ("seed",),
    "flow.generate(['a'], seed=2**64, **quiet)": ("seed",),
    "flow.generate('a cat', **quiet)": ("prompts",),
    "flow.generate([], **quiet)": ("prompts",),
    "flow.generate([1], **quiet)": ("prompts", "text"),
    "flow.generate([None], **quiet)": ("prompts", "text"),
    "flow.generate(None, **quiet)": ("prompts",),
    "flow.generate(b'a cat', **quiet)": ("prompts",),
    "flow.generate(['a'], height='64', **quiet)": ("height",),
    "flow.generate(['a'], height=63, **quiet)": ("height",),
    "flow.generate(['a'], height=0, **quiet)": ("height",),
    "flow.generate(['a'], width=-64, **quiet)": ("width",),
    "flow.generate(['a'], width=64.5, **quiet)": ("width",),
    "flow.generate(['a'], height=10**9, **quiet)": ("height",),
    "flow.generate(['a'], noise=np.zeros((3, 3)), **quiet)": ("noise",),
    "flow.generate(['a'], noise=np.full((16, 16), np.nan, np.float32), **quiet)": ("noise", "finite"),
    "flow.generate(['a'], noise='x', **quiet)": ("noise",),
    "flow.generate(['a'], bypass=[99], **quiet)": ("layer", "bypass"),
    "flow.generate(['a'], bypass=[-1], **quiet)": ("layer", "bypass"),
    "flow.generate(['a'], bypass=[1.5], **quiet)": ("layer", "bypass"),
    "flow.generate(['a'], bypass=['a'], **quiet)": ("layer", "bypass"),
    "flow.generate(['a'], bypass='x', **quiet)": ("layers", "bypass"),
    "flow.generate(['a'], bypass=5, **quiet)": ("layer", "bypass"),
    "flow.generate(['a'], bypass=range(10**9), **quiet)": ("layer", "bypass"),
    "flow.generate(['a'], bypass=None, **quiet)": ("layer", "bypass"),
    "flow.invert(None, 'a', **quiet)": ("picture", "image"),
    "flow.invert(123, 'a', **quiet)": ("picture", "image"),
    "flow.invert(np.zeros((64, 64, 3)), 'a', **quiet)": ("picture", "uint8"),
    "flow.invert(np.zeros((0, 0, 3), np.uint8), 'a', **quiet)": ("picture", "image"),
    "flow.invert(np.zeros((64, 64, 5), np.uint8), 'a', **quiet)": ("picture", "uint8"),
    "flow.invert(b'bytes', 'a', **quiet)": ("picture", "image"),
    "flow.invert('nowhere.png', 'a', **quiet)": ("nowhere.png",),
    "flow.invert(photo, None, **quiet)": ("prompt",),
    "flow.invert(photo, ['a'], **quiet)": ("prompt",),
    "flow.invert(photo, 'a', nudge=0, **quiet)": ("nudge",),
    "flow.invert(photo, 'a', nudge=float('inf'), **quiet)": ("nudge",),
    "flow.invert(photo, 'a', nudge='x', **quiet)": ("nudge",),
    "flow.invert(photo, 'a', nudge=[1.15], **quiet)": ("nudge",),
    "flow.invert(photo, 'a', solver='x', **quiet)": ("solver",),
    "flow.invert(photo, 'a', solver=3, **quiet)": ("solver",),
    "flow.invert(photo, 'a', guidance=[1.0, 2.0], **quiet)": ("guidance",),
    "flow.edit('a', 'b', **quiet)": ("edit_prompts",),
    "flow.edit('a', [], **quiet)": ("edit_prompts",),
    "flow.edit('a', [3], **quiet)": ("prompt", "text"),
    "flow.edit(None, ['b'], **quiet)": ("prompt", "text"),
    "flow.edit('a', ['b'], layers='x', **quiet)": ("layers",),
    "flow.edit('a', ['b'], layers=[77], **quiet)": ("layer",),
    "flow.edit('a', ['b'], layers=0.5, **quiet)": ("layers",),
    "flow.edit('a', ['b'], layers=3.5, **quiet)": ("layers",),
    "flow.edit('a', ['b'], replay='x', **quiet)": ("replay",),
    "flow.edit('a', ['b'], edits_at_once=0, **quiet)": ("edits_at_once",),
    "flow.edit('a', ['b'], edits_at_once='x', **quiet)": ("edits_at_once",),
    "flow.edit('a', ['b'], guidance=[1.0, float('nan')], **quiet)": ("guidance",),
    "flow.edit('a', ['b'], image=photo, inversion=3, **quiet)": ("inversion",),
    "flow.edit('a', ['b'], image=photo, noise=np.zeros((16, 16), np.float32), **quiet)": ("noise",),
    "flow.decode(np.zeros((1, 3, 3), np.float32))": ("latents",),
    "flow.decode(np.full((1, 16, 16), np.nan, np.float32))": ("latents", "finite"),
    "flow.encode_prompts('a')": ("prompts",),
    "flow.encode_prompts([])": ("prompts",),
    "flow.resolve_layers('0-9999999')": ("layers",),
    "StableFlow.load(123)": ("checkpoint",),
    "StableFlow.load(None)": ("checkpoint",),
    "StableFlow.load('')": ("checkpoint",),
    "StableFlow.load('converted', dtype='float8')": ("dtype",),
    "StableFlow.load('converted', dtype='int32')": ("dtype",),
    "StableFlow.load('converted', dtype='abc')": ("dtype",),
    "StableFlow.load('converted', mesh=3)": ("mesh",),
    "StableFlow.load('converted', mesh='foo=3')": ("mesh",),
    "StableFlow.load('converted', attention='x')": ("attention",),
    "StableFlow.load('converted', attention=['xla'])": ("attention",),
    "StableFlow.load('converted', quantisation='int3')": ("quantisation",),
    "StableFlow.load('converted', text_encoder='moon')": ("text_encoder",),
    "StableFlow.load('converted', offload='no')": ("offload",),
    "SweepSettings(limit='3')": ("limit",),
    "SweepSettings(limit=0)": ("limit",),
    "SweepSettings(seeds=1.5)": ("seeds",),
    "SweepSettings(threshold=float('nan'))": ("threshold",),
    "SweepSettings(threshold='x')": ("threshold",),
    "SweepSettings(error=float('nan'))": ("error",),
    "SweepSettings(error='x')": ("error",),
    "SweepSettings(batch=10**12)": ("batch",),
    "SweepSettings(windows=-1)": ("windows",),
    "SweepSettings(keep_images='x')": ("keep_images",),
    "SweepSettings(top=1.5)": ("top",),
    "flow.find_vital_layers('out', SweepSettings(features='dino', prompts='nowhere'), **quiet)": ("nowhere",),
    "flow.find_vital_layers('out', SweepSettings(features='dino', prompts=3), **quiet)": ("prompts",),
    "flow.find_vital_layers('out', SweepSettings(features='dino', layers=[77]), **quiet)": ("layer",),
    "flow.find_vital_layers('out', SweepSettings(features=3), **quiet)": ("features",),
    "flow.find_vital_layers('out', SweepSettings(features='dino', height=63), **quiet)": ("height",),
    "flow.find_vital_layers(None, SweepSettings(features='dino'), **quiet)": ("out",),
    "make_mesh({'data': 3})": ("mesh",),
    "make_mesh({'foo': 1})": ("mesh",),
    "make_mesh({'data': 'x'})": ("mesh",),
    "make_mesh(3)": ("mesh",),
    "LayerControl.none(steps=0, batch=1, layers=5)": ("steps",),
    "LayerControl.none(steps=1, batch=0, layers=5)": ("batch",),
    "LayerControl.none(steps=1, batch=1, layers=5).injecting([9])": ("layer",),
    "LayerControl.none(steps=1, batch=1, layers=5).injecting([1], values=float('nan'))": (
        "values",
        "finite",
        "injecting",
    ),
    "LayerControl.none(steps=1, batch=1, layers=5).scaling([1], mlp=float('inf'))": ("mlp", "finite"),
    "Inversion.load('nowhere')": ("nowhere",),
    "Inversion.load(3)": ("inversion", "path"),
}


def python_cases() -> Iterator[Case]:
    """Calls of the library."""
    for call, names in CALLS.items():

        def prepare(box: Box) -> None:
            box.link(*PARTS)

        yield Case(
            name=f"python/{call}",
            category=PYTHON,
            steps=(("python", call),),
            expects=REFUSE,
            prepare=prepare,
            setup=SETUP,
            names=names,
            needs=PARTS,
        )
