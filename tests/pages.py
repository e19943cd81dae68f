"""Pages of the documentation: their links, and their code blocks as tests run them."""

import ast
import dataclasses
import json
import re
import shlex
from pathlib import Path
from typing import Any

from commandline import run

ROOT = Path(__file__).parent.parent
PAGES = (ROOT / "README.md", *sorted((ROOT / "sflow_jax" / "docs").glob("*.md")))
NOTEBOOKS = sorted((ROOT / "sflow_jax" / "docs").glob("*.ipynb"))
BLOCK = re.compile(r"^(?:<!-- not run: ([^\n]+) -->\n)?( *)```(\w*)\n(.*?)^ *```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)\s]+)\)")
RUNNABLE = ("sh", "python")


@dataclasses.dataclass(frozen=True)
class Block:
    """A fenced block of a page. reason: why tests cannot run it; empty where they can."""

    language: str
    code: str
    reason: str


def blocks(page: Path) -> list[Block]:
    """In order of the page; those that no comment excuses are run."""
    found = BLOCK.findall(page.read_text())
    return [Block(language, _unindented(code, indent), reason) for reason, indent, language, code in found]


def links(page: Path) -> list[str]:
    """All targets of a page's links and pictures."""
    return LINK.findall(page.read_text())


def anchors(page: Path) -> set[str]:
    """Of a page's headings, as the sites that show Markdown name them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading).strip().lower().replace(" ", "-") for heading in headings}


def execute(block: Block, names: dict) -> None:
    """Run a block here: Python with the names of the blocks before, `sflow` as a command of this process."""
    if block.language == "python":
        exec(block.code, names)
        return
    for line in block.code.replace("\\\n", " ").splitlines():
        program, *arguments = shlex.split(line, comments=True)
        assert program == "sflow", f"tests run no {program}; say why in a comment above the block"
        assert run(*arguments) == 0, line


def run_notebook(notebook: Path) -> list[Any]:
    """What its code cells show, one after the other, as a notebook would show it."""
    cells = [cell for cell in json.loads(notebook.read_text())["cells"] if cell["cell_type"] == "code"]
    names = {}
    return [_last_value("".join(cell["source"]), names) for cell in cells]


def _last_value(code: str, names: dict) -> Any:
    *statements, last = ast.parse(code).body
    if not isinstance(last, ast.Expr):
        exec(code, names)
        return None
    exec(compile(ast.Module(statements, []), "<cell>", "exec"), names)
    return eval(compile(ast.Expression(last.value), "<cell>", "eval"), names)


def _unindented(code: str, indent: str) -> str:
    return "".join(line.removeprefix(indent) for line in code.splitlines(keepends=True))
