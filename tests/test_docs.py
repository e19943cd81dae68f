"""The documentation: code blocks run, links lead somewhere, and the package carries what it says."""

import json
import tomllib

import pytest
from pages import NOTEBOOKS, PAGES, ROOT, RUNNABLE, anchors, blocks, execute, links, run_notebook

from sflow_jax.painter import Painter

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
SETUPTOOLS = PROJECT["tool"]["setuptools"]
# Of the blocks that no comment excuses.
RUN = [page for page in PAGES if any(b.language in RUNNABLE and not b.reason for b in blocks(page))]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder and a cache that all pages share: the model is converted and loaded once, a sweep done once."""
    load, loaded = Painter.load, {}

    def load_once(*arguments) -> Painter:
        key = repr(arguments)
        if key not in loaded:
            loaded[key] = load(*arguments)
        return loaded[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Painter, "load", staticmethod(load_once))
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        patch.chdir(tmp_path_factory.mktemp("reader"))
        yield


@pytest.mark.parametrize("page", RUN, ids=lambda page: page.stem)
def test_code_blocks_run(page, world):
    names = {}
    for block in blocks(page):
        if block.language in RUNNABLE and not block.reason:
            execute(block, names)


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda notebook: notebook.stem)
def test_notebooks_run_and_show_pictures(notebook, world):
    shown = run_notebook(notebook)
    pictures = [value._repr_png_() for value in shown if hasattr(value, "_repr_png_")]
    assert len(pictures) >= 4 and all(picture.startswith(b"\x89PNG") for picture in pictures)
    text = json.loads(notebook.read_text())
    assert not any(cell.get("outputs") for cell in text["cells"]) and text["nbformat"] == 4


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_lead_somewhere(page):
    for target in links(page):
        if target.startswith("https://"):
            continue
        file, _, anchor = target.partition("#")
        place = (page.parent / file).resolve() if file else page
        assert place.exists(), target
        assert not anchor or anchor in anchors(place), target


def test_the_first_page_names_every_page():
    named = {target for target in links(PAGES[0]) if target.startswith("sflow_jax/docs/")}
    assert named == {path.relative_to(ROOT).as_posix() for path in (ROOT / "sflow_jax" / "docs").iterdir()}
    assert all("../../README.md" in links(page) for page in PAGES[1:])


def test_indexes_show_a_text_that_needs_no_file(tmp_path):
    """A link to a file would lead nowhere on PyPI; the commands are those of pages."""
    page = tmp_path / "index.md"
    page.write_text(PROJECT["project"]["readme"]["text"])
    assert all(target.startswith("https://") for target in links(page)) and "<img" not in page.read_text()
    commands = [line for block in blocks(page) for line in block.code.splitlines()]
    assert commands and set(commands) <= {line for p in PAGES for b in blocks(p) for line in b.code.splitlines()}


def test_the_metadata_is_that_of_the_files():
    project = PROJECT["project"]
    assert f"## {project['version']}" in (ROOT / "sflow_jax" / "docs" / "changes.md").read_text()
    assert (project["license"], project["license-files"]) == ("Apache-2.0", ["LICENSE"]) and project["authors"]
    assert "Apache License" in (ROOT / "LICENSE").read_text()
    assert not any(name.startswith("License ::") for name in project["classifiers"])  # refused beside `license`
    oldest = project["requires-python"].removeprefix(">=")
    assert f"Programming Language :: Python :: {oldest}" in project["classifiers"]
    assert all(address.startswith("https://") for address in project["urls"].values())


def test_the_wheel_has_every_package():
    """`pip install .` leaves out what is not listed; an editable installation does not show it."""
    folders = {file.parent.relative_to(ROOT) for file in ROOT.glob("sflow_jax/**/*.py")}
    assert set(SETUPTOOLS["packages"]) == {".".join(folder.parts) for folder in folders} | {"sflow_convert"}


def test_the_wheel_has_every_file_that_is_not_code():
    listed = {
        file
        for package, patterns in SETUPTOOLS["package-data"].items()
        for pattern in patterns
        for file in (ROOT / package.replace(".", "/")).glob(pattern)
        if file.is_file()
    }
    files = (f for f in ROOT.glob("sflow_jax/**/*") if f.is_file() and "__pycache__" not in f.parts)
    assert {file for file in files if file.suffix != ".py"} == listed
