"""Where results go and inputs come from: files in the way, rights, full disks, odd names, other machines."""

import ctypes
import json
import os
import random
import resource
import sys
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from PIL import Image

from hardness.cases import ACCEPT, EITHER, REFUSE, Box, Case, Step, alive, generate
from hardness.conversions import NETWORK_FILES, read_tensors, write_tensors
from hardness.documents import unsign
from hardness.settings import COMPILED, EDIT, INVERT, PARTS, VITAL

OUTPUTS, DISKS, HOMES, TERMINAL, REMOTE = (
    "outputs",
    "full disks",
    "homes",
    "terminal",
    "other machines",
)
NOBODY = 65_534
CONVERT: Step = ("sflow-convert", "source", "out")


def cases(draw: random.Random) -> Iterator[Case]:
    """All of this file."""
    yield from output_cases(draw)
    yield from destination_cases()
    yield from disk_cases(draw)
    yield from home_cases()
    yield from terminal_cases()
    yield from remote_cases()


def _case(
    category: str,
    name: str,
    step: Step,
    expects: str,
    *names: str,
    prepare: Callable[[Box], None] = lambda box: None,
    needs: tuple[str, ...] = PARTS,
    **options: Any,
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
        **options,
    )


def _to(step: Step, out: str) -> Step:
    """The same command with its results elsewhere."""
    options = list(step)
    if "--out" in options:
        options[options.index("--out") + 1] = out
    else:
        options[2] = out
    return tuple(options)


COMMANDS: dict[str, Step] = {
    "generate": generate(),
    "edit": (*EDIT, "--steps", "1"),
    "invert": (*INVERT, "--steps", "1"),
    "vital": (*VITAL, "--limit", "1", "--steps", "1", "--layers", "0-1", "--batch", "2"),
    "convert": CONVERT,
}


def unprivileged(box: Box, user: int = NOBODY) -> None:
    """Go on as nobody (or as another user), so that rights count; the folders become its own."""
    if os.getuid() == 0:
        for folder, folders, files in os.walk(box.root):
            for path in (folder, *(os.path.join(folder, x) for x in (*folders, *files))):
                os.chown(path, user, user, follow_symlinks=False)
        set_compiled(None)
        os.setgroups([])
        os.setgid(user)
        os.setuid(user)


def set_compiled(folder: str | None) -> None:
    """Where jax keeps compiled programs; it reads the environment only when it is imported, which comes later."""
    import jax

    jax.config.update("jax_compilation_cache_dir", folder)


def output_cases(draw: random.Random) -> Iterator[Case]:
    """Places where nothing can be written."""

    def shut(name: str) -> Callable[[Box], None]:
        def prepare(box: Box) -> None:
            (box.work / name).mkdir(parents=True, exist_ok=True)
            unprivileged(box)
            (box.work / name).chmod(0o555)

        return prepare

    for command, step in COMMANDS.items():
        needs = (*PARTS, "source")
        for name, out, prepare in (
            ("a file in the way", "out", lambda box: box.write("out", "mine")),
            ("a file among its parents", "out/deep/er", lambda box: box.write("out", "mine")),
            ("a folder that is shut", "shut/out", shut("shut")),
            ("a link to nowhere", "out", lambda box: (box.work / "out").symlink_to("nowhere/at/all")),
            ("a link to itself", "out", lambda box: (box.work / "out").symlink_to("out")),
            ("a name of 256 characters", "o" * 256, lambda box: None),
            ("below a device", "/dev/null/out", lambda box: None),
            ("in /proc", "/proc/out", lambda box: None),
            ("no name", "", lambda box: None),
            ("a pipe in the way", "out", lambda box: os.mkfifo(box.work / "out")),
        ):
            if command in ("edit", "invert") and draw.random() < 0.4:
                continue
            yield _case(
                OUTPUTS,
                f"{command} to {name}",
                _to(step, out),
                REFUSE,
                os.path.basename(out)[:40] or "out",
                "out",
                "destination",
                prepare=prepare,
                needs=needs,
            )
    for name, out in (("nested folders", "a/b/c"), ("a name in Japanese", "絵"), ("a dot", "."), ("a slash", "a/"),
                      ("a name with spaces", "my pictures"), ("a dash", "-x")):  # fmt: skip
        step = generate()
        creates = (out.split("/")[0],) if out != "." else ("picture-1.png", "grid.png", "generate.json")
        option = tuple(f"--out={out}" if x == "out" else x for x in step if x != "--out")
        yield _case(OUTPUTS, f"generate to {name}", option, ACCEPT, creates=creates)
    yield _case(
        OUTPUTS,
        "generate into a folder of the user's",
        generate(),
        ACCEPT,
        prepare=lambda box: box.write("out/notes.txt", "mine"),
        check=_kept("out/notes.txt"),
    )
    yield _case(
        OUTPUTS,
        "vital into a folder of the user's",
        COMMANDS["vital"],
        REFUSE,
        "out",
        prepare=lambda box: box.write("out/notes.txt", "mine"),
    )
    yield _case(
        OUTPUTS,
        "edit into the result of generate",
        _to(COMMANDS["edit"], "painted2"),
        REFUSE,
        "painted2",
        prepare=lambda box: box.copy("painted", "painted2"),
        needs=(*PARTS, "painted"),
    )
    yield _case(
        OUTPUTS,
        "edit into itself with fewer edits",
        COMMANDS["edit"],
        ACCEPT,
        changes=("out",),
        prepare=_more_edits,
        check=_two_pictures,
    )
    for partial in ("out.partial", ".out.partial"):
        yield _case(
            OUTPUTS,
            f"generate beside the user's {partial}",
            generate(),
            ACCEPT,
            prepare=lambda box, partial=partial: box.write(f"{partial}/thesis", "mine"),
            check=_kept(f"{partial}/thesis"),
        )
        yield _case(
            OUTPUTS,
            f"convert beside the user's {partial}",
            CONVERT,
            ACCEPT,
            needs=("source",),
            prepare=lambda box, partial=partial: box.write(f"{partial}/thesis", "mine"),
            check=_kept(f"{partial}/thesis"),
        )
    for setting, step in {
        "limit 0": (*VITAL, "--limit", "0"), "height 63": (*VITAL, "--height", "63"),
        "features nowhere": (*VITAL, "--features", "nowhere"), "top 99": (*VITAL, "--top", "99"),
        "a bad prompts file": (*VITAL, "--prompts", "nowhere"),
    }.items():  # fmt: skip
        yield _case(OUTPUTS, f"vital with {setting} leaves no folder", step, REFUSE)


def _kept(name: str) -> Callable[[Box], str | None]:
    return lambda box: None if (box.work / name).read_text() == "mine" else f"{name} changed"


def _more_edits(box: Box) -> None:
    for name in ("source", "edit-1", "edit-2", "edit-3", "grid"):
        (box.work / "out").mkdir(exist_ok=True)
        Image.new("RGB", (8, 8), "red").save(box.work / f"out/{name}.png")
    box.write("out/edit.json", json.dumps({"edits": ["x", "y", "z"]}))


def _two_pictures(box: Box) -> str | None:
    names = sorted(path.name for path in (box.work / "out").iterdir())
    right = ["edit-1.png", "edit.json", "grid.png", "latents.safetensors", "source.png"]
    return None if names == right else f"the folder has {names}"


def destination_cases() -> Iterator[Case]:
    """Where a checkpoint is to be written and something is already."""

    def case(
        name: str,
        step: Step,
        expects: str,
        *names: str,
        prepare: Callable[[Box], None] = lambda box: None,
        **options: Any,
    ) -> Case:
        return _case(
            OUTPUTS,
            f"convert: {name}",
            step,
            expects,
            *names,
            prepare=prepare,
            needs=options.pop("needs", ("source", "dino_source")),
            **options,
        )

    yield case(
        "over a checkpoint",
        CONVERT,
        REFUSE,
        "out",
        "overwrite",
        prepare=lambda box: box.copy("converted", "out"),
        needs=("source", "converted"),
    )
    yield case(
        "over a checkpoint with --overwrite",
        (*CONVERT, "--overwrite"),
        ACCEPT,
        changes=("out",),
        prepare=lambda box: box.copy("converted", "out"),
        needs=("source", "converted"),
    )
    yield case(
        "over a folder of the user's", CONVERT, REFUSE, "out", prepare=lambda box: box.write("out/thesis", "mine")
    )
    yield case(
        "over a folder of the user's with --overwrite",
        (*CONVERT, "--overwrite"),
        REFUSE,
        "out",
        prepare=lambda box: box.write("out/thesis", "mine"),
    )
    yield case("over an empty folder", CONVERT, EITHER, "out", prepare=lambda box: (box.work / "out").mkdir())
    yield case("over itself", ("sflow-convert", "source", "source", "--overwrite"), REFUSE, "source")
    yield case(
        "over a file with --overwrite",
        (*CONVERT, "--overwrite"),
        REFUSE,
        "out",
        prepare=lambda box: box.write("out", "mine"),
    )
    yield case(
        "features over a checkpoint with --overwrite",
        ("sflow-convert", "dino_source", "out", "--overwrite"),
        REFUSE,
        "out",
        prepare=lambda box: box.copy("converted", "out"),
        needs=("dino_source", "converted"),
    )
    yield case(
        "a bad source over a checkpoint with --overwrite",
        ("sflow-convert", "broken", "out", "--overwrite"),
        REFUSE,
        prepare=_broken_source,
        needs=("source", "converted"),
    )
    yield case(
        "a bad source to nested folders",
        ("sflow-convert", "broken", "a/b/c"),
        REFUSE,
        prepare=_broken_source,
        needs=("source", "converted"),
    )
    yield case(
        "inside its source",
        ("sflow-convert", "mine", "mine/out"),
        EITHER,
        "mine",
        prepare=lambda box: box.copy("source", "mine"),
        creates=("mine",),
    )


def _broken_source(box: Box) -> None:
    """A source whose last network holds a number that is not finite, so that it is found late."""
    box.copy("converted", "out")
    box.copy("source", "broken")
    file = NETWORK_FILES["clip"].replace("source/", "broken/")
    tensors = read_tensors(box, file)
    name = sorted(tensors)[-1]
    write_tensors(box, file, tensors | {name: np.full_like(tensors[name], np.nan)})


def disk_cases(draw: random.Random) -> Iterator[Case]:
    """Full disks (small ones in memory, where this process may mount them), and files that may not grow."""

    def small(size: int, place: str = "disk") -> Callable[[Box], None]:
        def prepare(box: Box) -> None:
            (box.work / place).mkdir(exist_ok=True)
            mount(box.work / place, size)

        return prepare

    def bounded(size: int) -> Callable[[Box], None]:
        return lambda box: resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))

    about = ("space", "No space", "disk", "full", "large", "write")
    # In KiB: nearly all, and about half of what the command writes.
    nearly = {"convert": draw.randint(300, 1500), "vital": draw.randint(12, 60)}
    for command, step in COMMANDS.items():
        # What is done of a sweep is kept, for the same command to go on.
        keeps = ("out", "disk/out") if command == "vital" else ()
        for name, size in {
            "a full disk": 4,
            "a nearly full disk": nearly.get(command, draw.choice([8, 12])),
        }.items():
            if may_mount():
                yield _case(
                    DISKS,
                    f"{command} to {name}",
                    _to(step, "disk/out"),
                    REFUSE,
                    *about,
                    prepare=small(size << 10),
                    needs=(*PARTS, "source"),
                    keeps=keeps,
                )
        yield _case(
            # The bound holds for a file of messages too, so these go to a terminal.
            DISKS,
            f"{command} where files may not grow",
            step,
            REFUSE,
            *about,
            prepare=bounded(4096),
            needs=(*PARTS, "source"),
            keeps=keeps,
            terminal=True,
        )
    if may_mount():
        for size in (0, 64):
            yield _case(
                DISKS,
                f"the cache on a full disk ({size} KiB free)",
                generate(model="toyworld"),
                EITHER,
                *about,
                "cache",
                prepare=_full_cache(size),
                check=alive,
            )
            yield _case(
                DISKS,
                f"temporary files on a full disk ({size} KiB free)",
                generate(),
                EITHER,
                *about,
                "TMPDIR",
                prepare=_full_temporary(size),
                check=alive,
            )


def may_mount() -> bool:
    """Whether this process may make a disk of its own."""
    return os.getuid() == 0 and _in_child(lambda: mount("/tmp", 1 << 20))


def _in_child(function: Callable[[], Any]) -> bool:
    process = os.fork()
    if process == 0:
        try:
            function()
            os._exit(0)
        except BaseException:
            os._exit(1)
    return os.waitpid(process, 0)[1] == 0


NEW_MOUNTS, PRIVATE = 0x00020000, 1 << 18 | 1 << 14


def mount(place: Any, size: int) -> None:
    """A disk of `size` bytes at `place`, for this process and its children alone; OSError where that may not be."""
    system = ctypes.CDLL(None, use_errno=True)
    for failed in (
        system.unshare(NEW_MOUNTS),
        system.mount(b"none", b"/", None, PRIVATE, None),
        system.mount(b"tmpfs", os.fsencode(place), b"tmpfs", 0, f"size={max(size, 4096)},mode=777".encode()),
    ):
        if failed:
            raise OSError(ctypes.get_errno(), "cannot mount")


def _full_cache(kib: int) -> Callable[[Box], None]:
    def prepare(box: Box) -> None:
        (box.root / "cache").mkdir()
        mount(box.root / "cache", kib << 10)
        os.environ["XDG_CACHE_HOME"] = str(box.root / "cache")
        set_compiled(str(box.root / "cache" / "compiled"))

    return prepare


def _full_temporary(kib: int) -> Callable[[Box], None]:
    def prepare(box: Box) -> None:
        (box.root / "full").mkdir()
        mount(box.root / "full", kib << 10)
        os.environ["TMPDIR"] = str(box.root / "full")

    return prepare


def home_cases() -> Iterator[Case]:
    """No home, one that cannot be written, one that is a file."""

    def forget(*names: str) -> None:
        """Also where compiled programs are kept: that is the command's to find."""
        for name in (*names, "XDG_CACHE_HOME", "JAX_COMPILATION_CACHE_DIR"):
            os.environ.pop(name, None)

    def no_home(box: Box) -> None:
        unprivileged(box)
        forget("HOME")

    def unknown(box: Box) -> None:
        unprivileged(box, 54_321)
        forget("HOME")

    def shut(box: Box) -> None:
        unprivileged(box)
        forget()
        (box.root / "home").chmod(0o555)

    def file(box: Box) -> None:
        (box.root / "home").rmdir()
        (box.root / "home").write_text("mine")
        forget()

    about = ("XDG_CACHE_HOME", "HOME")
    for name, prepare in {
        "no HOME": no_home,
        "no HOME and an unknown user": unknown,
        "a HOME that is shut": shut,
        "a HOME that is a file": file,
    }.items():
        for model in ("toyworld", "converted"):
            expects = ACCEPT if model == "converted" else EITHER
            # Nothing is compiled yet where these look.
            yield _case(
                HOMES,
                f"{name}: {model}",
                generate(model=model),
                expects,
                *about,
                prepare=prepare,
                check=alive,
                seconds=90.0,
            )


ESCAPES = ("\x1b[31mred", "\x1b]0;title\x07", "a\rb", "\x9b31m", "\x7f\x08\x08", "a\nError: b")


def terminal_cases() -> Iterator[Case]:
    """Control characters of names and files must not reach the terminal as they are."""

    def case(
        name: str, step: Step, expects: str, prepare: Callable[[Box], None] = lambda box: None, **options: Any
    ) -> Case:
        return _case(TERMINAL, f"terminal/{name}", step, expects, prepare=prepare, terminal=True, **options)

    for number, escape in enumerate(ESCAPES):
        yield case(f"model {number}", generate(model=f"no{escape}"), REFUSE)
        yield case(f"image {number}", tuple(f"no{escape}.png" if x == "photo.png" else x for x in INVERT), REFUSE)
    for number, escape in enumerate(ESCAPES[:4]):
        yield case(f"prompts {number}", (*VITAL, "--prompts", f"no{escape}"), REFUSE)
        yield case(f"features {number}", (*VITAL, "--features", f"no{escape}"), REFUSE)
        yield case(f"source {number}", ("sflow-convert", f"no{escape}", "out"), REFUSE)
        yield case(f"layers {number}", (*generate(), "--bypass", escape), REFUSE)
        yield case(f"inversion {number}", (*EDIT, "--inversion", f"no{escape}"), REFUSE)
        yield case(f"compared {number}", ("sflow", "vital", "--compare", f"no{escape}", "b"), REFUSE)
        yield case(f"info {number}", ("sflow", "info", f"no{escape}"), REFUSE)
        yield case(f"mesh {number}", (*generate(), "--mesh", escape), REFUSE)

        def named(box: Box, key: str, escape: str = escape) -> None:
            box.copy("converted", "evil")
            unsign(box, "evil")
            box.change_json("evil/model.json", lambda d: d | {key: f"x{escape}"})

        for key in ("named", "vital_layers_origin"):
            yield case(
                f"info of {key} {number}",
                ("sflow", "info", "evil"),
                EITHER,
                lambda box, key=key, named=named: named(box, key),
                needs=("converted",),
            )
        for key in ("family", "variant", "dtype"):
            yield case(
                f"{key} {number}",
                ("sflow", "info", "evil"),
                EITHER,
                lambda box, key=key, named=named: named(box, key),
                needs=("converted",),
            )
    for number, escape in enumerate(ESCAPES[:3]):
        yield case(f"a tensor's name {number}", CONVERT, REFUSE, _named_tensor(escape), needs=())
        yield case(
            f"an activation {number}",
            CONVERT,
            REFUSE,
            _config_value("text_encoder", "hidden_act", escape),
            needs=(),
        )
        yield case(
            f"a scheduler {number}",
            CONVERT,
            REFUSE,
            _config_value("scheduler", "time_shift_type", escape),
            needs=(),
        )
        yield case(f"out {number}", (*generate()[:-1], f"x{escape}"), EITHER, creates=(f"x{escape}",))
        yield case(
            f"a file's name {number}",
            ("sflow-convert", f"x{escape}", "out"),
            REFUSE,
            lambda box, escape=escape: box.write(f"x{escape}", "nothing"),
            needs=(),
        )
        yield case(
            f"a finished result {number}",
            ("sflow", "vital", "--compare", f"r{escape}", "run"),
            EITHER,
            lambda box, escape=escape: box.copy("run", f"r{escape}"),
            needs=("run",),
        )


def _named_tensor(escape: str) -> Callable[[Box], None]:
    def prepare(box: Box) -> None:
        box.copy("source")
        file = NETWORK_FILES["vae"]
        write_tensors(box, file, read_tensors(box, file) | {f"x{escape}": np.zeros((2, 2), np.float32)})

    return prepare


def _config_value(folder: str, key: str, escape: str) -> Callable[[Box], None]:
    file = "scheduler_config.json" if folder == "scheduler" else "config.json"

    def prepare(box: Box) -> None:
        box.copy("source")
        box.change_json(f"source/{folder}/{file}", lambda d: d | {key: f"x{escape}"})

    return prepare


def remote_cases() -> Iterator[Case]:
    """Addresses of object stores, where their package is not installed."""

    def without_packages(box: Box) -> None:
        for package in ("gcsfs", "s3fs", "tensorflow", "adlfs"):
            sys.modules[package] = None

    def case(name: str, step: Step, *names: str) -> Case:
        return _case(
            REMOTE, f"remote/{name}", step, REFUSE, *names, prepare=without_packages, needs=(*PARTS, "source")
        )

    for address in ("gs://bucket/x", "gs://", "s3://bucket/x"):
        about = ("gcs", "gcsfs", "s3", address)
        yield case(f"model {address}", generate(model=address), *about)
        yield case(f"out {address}", _to(generate(), address), *about)
        yield case(f"features {address}", (*VITAL, f"--features={address}"), *about)
        yield case(f"prompts {address}", (*VITAL, f"--prompts={address}"), *about)
        yield case(f"run {address}", _to(VITAL, address), *about)
        yield case(f"inversion {address}", (*EDIT, f"--inversion={address}"), *about)
        yield case(f"image {address}", tuple(address if x == "photo.png" else x for x in INVERT), *about)
        yield case(f"destination {address}", ("sflow-convert", "source", address), *about)
        yield case(f"source {address}", ("sflow-convert", address, "out"), *about, "source")
        yield case(f"info {address}", ("sflow", "info", address), *about)
        yield case(f"compare {address}", ("sflow", "vital", "--compare", address, "run"), *about)
    for address in ("http://example.invalid/x", "file:///nowhere", "gs:/bucket", "://x", "ftp://x/y"):
        yield case(f"model {address}", generate(model=address), address.split("/")[-1] or address, address)
        yield (
            case(f"out {address}", _to(generate(), address), address, "out")
            if "://" in address
            else case(f"features {address}", (*VITAL, f"--features={address}"), address)
        )
