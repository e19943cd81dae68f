"""The house: imports run one way over both packages, and nobody opens a room that stands above."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import sflow_jax

ROOT = Path(__file__).parent.parent
# From the ground up: every file imports from rooms below its own, and within its room without a loop.
FLOORS = (
    "arrays", "errors", "typed", "settings", "progress", "machine", "pictures", "models", "sampling", "families",
    "storage", "measures", "records", "results", "convert", "embedded", "catalogue", "painter", "editing",
    "planning", "runs", "reports", "toyworld", "vitality", "atlas", "pipeline", "evaluation", "studio",
    "commands",
)  # fmt: skip
# Importing takes time, and not every caller needs it: (file, module) → what is slow.
LATE = {
    ("vitality/find", "vitality/report"): "matplotlib",
    ("vitality/summary", "vitality/charts"): "matplotlib",
    ("evaluation/run", "evaluation/report"): "matplotlib",
    ("evaluation/importance", "vitality/report"): "matplotlib",
}
FILES = {
    path.relative_to(ROOT / "sflow_jax").with_suffix("").as_posix(): path for path in ROOT.glob("sflow_jax/**/*.py")
} | {f"convert/{path.stem}": path for path in ROOT.glob("convert/*.py")}
FACES = ("__init__", "__main__")


def modules(node: ast.stmt) -> list[str]:
    """Files of both packages that an import statement names, such as `models/flux1`."""
    if isinstance(node, ast.Import):
        names = [name.name for name in node.names]
    elif isinstance(node, ast.ImportFrom) and node.module:
        names = [f"{node.module}.{name.name}" for name in node.names] + [node.module]
    else:
        return []
    paths = [
        name.replace("sflow_convert", "convert", 1).removeprefix("sflow_jax.").replace(".", "/") for name in names
    ]
    return [path for path in dict.fromkeys(paths) if path in FILES]


def imports(name: str) -> list[tuple[str, bool]]:
    """(file, whether inside a function) of all imports of a file, but for those that only type checkers see."""
    tree = ast.parse(FILES[name].read_text())
    unseen = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    outside = {id(node) for node in tree.body}
    return [
        (module, id(node) not in outside)
        for node in ast.walk(tree)
        if id(node) not in unseen
        for module in modules(node)
    ]


def room(name: str) -> str:
    return name.split("/")[0]


@pytest.mark.parametrize("name", sorted(FILES.keys() - set(FACES)))
def test_imports_run_downwards(name):
    assert room(name) in FLOORS, f"{name} stands in a room without a floor"
    for module, late in imports(name):
        if module in FACES:
            continue
        assert FLOORS.index(room(module)) <= FLOORS.index(room(name)), f"{name} imports {module}"
        # What commands import late keeps `--help` and completion quick.
        allowed = room(name) == "commands" or (name, module) in LATE
        assert allowed or not late, f"{name} imports {module} inside a function"


def test_no_room_has_a_loop():
    seen, path = set(), []

    def walk(name: str) -> None:
        assert name not in path, " → ".join([*path[path.index(name) :], name])
        if name in seen:
            return
        seen.add(name)
        path.append(name)
        for module, _ in imports(name):
            walk(module)
        path.pop()

    for name in FILES:
        walk(name)


def test_only_the_catalogue_and_training_call_the_converter():
    callers = {
        name
        for name in FILES
        if room(name) != "convert"
        for module, _ in imports(name)
        if room(module) == "convert"
    }
    # Training reads and writes the published layout by the converter's tables; the command is the converter's own.
    training = {"toyworld/train/export", "toyworld/train/sd3"}
    assert callers == {"embedded", "catalogue", "commands/convert", *training}


GENERAL = (
    "sampling",
    "painter",
    "editing",
    "planning",
    "runs",
    "reports",
    "vitality",
    "atlas",
    "pipeline",
    "storage",
    "measures",
    "evaluation",
    "studio",
)
NAMES_OF_ONE_FAMILY = ("flux", "double", "single_blocks", "t5", "pooled", "schnell", "krea")


@pytest.mark.parametrize("name", sorted(name for name in FILES if room(name) in GENERAL))
def test_general_parts_name_no_family(name):
    """In code; prose may give an example, and old files may be read."""
    tree = ast.parse(FILES[name].read_text())
    words = {
        word.lower()
        for node in ast.walk(tree)
        for word in (getattr(node, "id", ""), getattr(node, "attr", ""), getattr(node, "arg", ""))
        if isinstance(word, str)
    }
    assert not [word for word in words for part in NAMES_OF_ONE_FAMILY if part in word.split("_")]


def test_no_oracle_is_imported_at_run_time():
    for path in FILES.values():
        for node in ast.walk(ast.parse(path.read_text())):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names += [name.name for name in node.names] if isinstance(node, ast.Import) else []
            assert not {name.split(".")[0] for name in names} & {"torch", "diffusers"}, path


def test_the_public_face_hands_on_what_it_names():
    for name in sflow_jax.__all__:
        assert getattr(sflow_jax, name) is not None
    assert set(sflow_jax.__all__) <= set(dir(sflow_jax))
    with pytest.raises(AttributeError, match="no attribute 'StabelFlow'"):
        sflow_jax.StabelFlow  # noqa: B018


def test_help_and_completion_of_every_command_import_nothing_slow():
    program = """
import sys

from sflow_jax.commands.convert import command
from sflow_jax.commands.main import COMMANDS, group

context = group.make_context("sflow", [], resilient_parsing=True)
print(group.get_help(context))
for command in (command, *(group.get_command(context, name) for name in COMMANDS)):
    print(command.get_help(command.make_context(command.name, [], parent=context, resilient_parsing=True)))
slow = {"jax", "orbax", "flax", "scipy", "matplotlib", "transformers", "numpy", "etils", "tqdm"} & set(sys.modules)
assert not slow, slow
"""
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    assert "Find a model's vital layers" in ended.stdout and "--list-methods" in ended.stdout


def test_test_files_have_names_of_their_own():
    """Two of one name cannot be collected together."""
    names = [path.name for path in Path(__file__).parent.rglob("test_*.py")]
    assert len(names) == len(set(names))
