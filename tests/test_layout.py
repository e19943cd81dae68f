"""Imports point one way: nothing knows what stands above it."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# Each part of the package and what it may import from the package; a folder stands for its files.
ALLOWED = {
    "arrays": set(),
    "paths": set(),
    "attention": {"sharding"},
    "control": set(),
    "metrics": {"arrays"},
    "preprocessing": {"arrays"},
    "console": {"paths"},
    "sharding": set(),
    "hardware": set(),
    "models": {"models", "attention", "sharding"},
    "latents": {"arrays"},
    "sampling": {"arrays", "control", "latents"},
    "prompts": {"models", "paths"},
    "results": set(),
    "placement": {"models"},
    "checkpoint": {"models", "paths", "placement", "sharding"},
    "programs": {"arrays", "latents", "models", "prompts", "sampling", "sharding"},
    "embedded": {"checkpoint", "paths"},
    "features": {"arrays", "checkpoint", "embedded", "models", "preprocessing"},
    "output": {"latents", "paths"},
    "pipeline": {
        "arrays", "attention", "checkpoint", "control", "embedded", "latents", "models", "placement", "programs",
        "prompts", "results", "sampling", "sharding",
    },
    "distributed": set(),
    "planning": {
        "attention", "checkpoint", "embedded", "latents", "models", "placement", "programs", "prompts", "sampling",
        "sharding",
    },
    "costs": {"checkpoint", "hardware", "latents", "models", "planning", "sharding"},
    "options": {
        "attention", "console", "costs", "distributed", "hardware", "pipeline", "placement", "planning", "sharding",
    },
    "vitality": {
        "arrays", "checkpoint", "console", "control", "embedded", "features", "latents", "metrics", "models",
        "options", "output", "paths", "pipeline", "planning", "prompts", "sharding", "toyworld", "vitality",
    },
}  # fmt: skip


def imported(path: Path) -> set[str]:
    """Parts of the package that a file imports."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("sflow_jax."):
            names.add(node.module.split(".")[1])
    return names


@pytest.mark.parametrize("part", ALLOWED)
def test_imports_point_one_way(part):
    place = ROOT / "sflow_jax" / part
    files = sorted(place.glob("*.py")) if place.is_dir() else [place.with_suffix(".py")]
    for file in files:
        assert imported(file) <= ALLOWED[part], f"{file.name} imports {imported(file) - ALLOWED[part]}"


def test_no_oracle_is_imported_at_run_time():
    for file in [*ROOT.glob("sflow_jax/**/*.py"), *ROOT.glob("convert/*.py")]:
        for node in ast.walk(ast.parse(file.read_text())):
            modules = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            modules += [name.name for name in node.names] if isinstance(node, ast.Import) else []
            assert not {m.split(".")[0] for m in modules} & {"torch", "diffusers"}, file
