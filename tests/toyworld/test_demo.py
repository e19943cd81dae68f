"""`sflow demo` needs nothing but the package."""

import json

from commandline import run
from PIL import Image


def test_the_demo_edits_and_says_what_happened(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert run("demo", "--out", tmp_path / "demo") == 0
    rows = ("painted", "drawn", "reference")
    pictures = {f"{row}-{x}.png" for row in rows for x in ("source", *(f"edit-{n}" for n in range(1, 5)))}
    assert {path.name for path in (tmp_path / "demo").iterdir()} == {"grid.png", "demo.json", *pictures}
    figures = json.loads((tmp_path / "demo" / "demo.json").read_text())
    assert all(len(figures[row]) == 4 for row in rows)
    assert all(edit["happened"] for row in ("painted", "drawn") for edit in figures[row])
    assert min(edit["psnr_to_right_answer_db"] for edit in figures["drawn"]) > 18
    assert Image.open(tmp_path / "demo" / "grid.png").width > 1000
    output = capsys.readouterr().out
    for change in ("pose → sitting", "place → snow", "hat → none", "species → dog"):
        assert change in output
    # Converted once: a second look finds the same folder.
    before = sorted((tmp_path / "cache").rglob("model.json"))
    assert run("info", "toyworld") == 0
    assert sorted((tmp_path / "cache").rglob("model.json")) == before and len(before) == 1


def test_a_demo_that_cannot_be_written_says_so(tmp_path, capsys):
    (tmp_path / "demo").write_text("in the way")
    assert run("demo", "--out", tmp_path / "demo") == 2
    assert "is a file" in capsys.readouterr().err


def test_the_embedded_model_is_a_checkpoint_like_any_other(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    arguments = ("--prompt", "a cat", "--edit", "a dog", "--steps", 1, "--out", tmp_path / "out")
    assert run("edit", "--model", "toyworld", *arguments) == 0
    assert (tmp_path / "out" / "edit-1.png").exists()
