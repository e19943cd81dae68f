"""The commands end to end, in this process, and their one-line errors."""

import json
import shutil

import numpy as np
import pytest
from commandline import run, run_convert
from PIL import Image

from sflow_jax.catalogue import EMBEDDED_FEATURES as EMBEDDED


@pytest.fixture(scope="module")
def photo_file(photo, tmp_path_factory):
    path = tmp_path_factory.mktemp("photo") / "photo.jpg"
    photo.save(path)
    return path


@pytest.mark.quick
def test_generate(checkpoint, tmp_path):
    out = tmp_path / "new" / "out"
    arguments = (
        "--prompt",
        "a red cat",
        "--prompt",
        "a dog",
        "--steps",
        2,
        "--bypass",
        "0,3-4",
        "--width",
        32,
        "--out",
        out,
    )
    assert run("generate", "--model", checkpoint, *arguments) == 0
    assert {p.name for p in out.iterdir()} == {"picture-1.png", "picture-2.png", "grid.png", "generate.json"}
    assert Image.open(out / "picture-2.png").size == (32, 64)
    assert json.loads((out / "generate.json").read_text())["bypass"] == [0, 3, 4]


def test_a_photo_is_edited_by_default_without_vital_layers(checkpoint, photo_file, tmp_path, capsys):
    bare = tmp_path / "bare"
    shutil.copytree(checkpoint, bare)
    info = json.loads((bare / "model.json").read_text())
    for name in ("vital_layers", "vital_layers_origin", "checksum"):
        info.pop(name, None)
    (bare / "model.json").write_text(json.dumps(info))
    asked = ("--model", bare, "--prompt", "a red cat", "--edit", "a dog", "--steps", 2)
    photo = ("--image", photo_file, "--seed", 3, "--grow", 2)
    assert run("edit", *asked, *photo, "--out", tmp_path / "photo") == 0
    record = json.loads((tmp_path / "photo" / "edit.json").read_text())
    assert (record["method"], record["seed"], record["region"]) == ("coupled", 3, "auto")
    capsys.readouterr()
    # What asks for the reference draws nothing, and needs its layers; so does a source to paint.
    assert run("edit", *asked, *photo[:4], "--unnudge", "--out", tmp_path / "none") == 2
    assert "--seed has no effect" in capsys.readouterr().err
    for source in (("--image", photo_file, "--unnudge"), ()):
        assert run("edit", *asked, *source, "--out", tmp_path / "none") == 2
        assert "vital" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


def test_invert_then_edit(checkpoint, photo_file, tmp_path, capsys):
    model = ("--model", checkpoint, "--prompt", "a red cat")
    assert run("invert", *model, "--image", photo_file, "--steps", 2, "--out", tmp_path / "inverted") == 0
    told = json.loads((tmp_path / "inverted" / "inversion.json").read_text())
    assert np.isfinite(list(told["psnr_db"].values())).all() and told["steps"] == 2
    edits = ("--edit", "a dog", "--edit", "snow", "--layers", "0,2")
    direct = ("--image", photo_file, "--steps", 2, "--out", tmp_path / "direct")
    reused = ("--inversion", tmp_path / "inverted", "--out", tmp_path / "reused")
    for source in (direct, reused):
        assert run("edit", *model, *edits, *source) == 0
    names = {"source.png", "edit-1.png", "edit-2.png", "grid.png", "edit.json", "latents.safetensors"}
    assert {p.name for p in (tmp_path / "direct").iterdir()} == names
    # Their records differ: what the source was read from.
    direct, reused = (Image.open(tmp_path / name / "edit-2.png") for name in ("direct", "reused"))
    np.testing.assert_array_equal(direct, reused)
    told = json.loads((tmp_path / "direct" / "edit.json").read_text())
    assert (told["layers"], told["nudge"], told["guidance"]) == ([0, 2], 1.15, [1.0, 3.0, 3.0])
    assert told["versions"].keys() >= {"sflow_jax", "jax"} and told["seconds"]["edit"] > 0


def test_info_of_published_models_and_features(tmp_path, capsys):
    assert run("info", "flux-schnell") == 0
    assert "11,891,178,560 parameters" in capsys.readouterr().out
    assert run_convert(EMBEDDED["toyworld"], tmp_path / "dino") == 0
    capsys.readouterr()
    assert run("info", tmp_path / "dino") == 0
    assert "dinov2" in capsys.readouterr().out


@pytest.mark.quick
def test_convert_and_info(source_folder, tmp_path, capsys):
    assert run_convert(source_folder, tmp_path / "made", "--dtype", "bfloat16") == 0
    assert run("info", tmp_path / "made") == 0
    told = capsys.readouterr().out
    for part in ("dev", "bfloat16", "layers 0 to 4", "314,496", "vital layers: not known"):
        assert part in told


def test_mesh_is_taken(wide_checkpoint, tmp_path):
    arguments = ("--prompt", "a cat", "--steps", 1, "--mesh", "fsdp=8", "--out", tmp_path / "out")
    assert run("generate", "--model", wide_checkpoint, *arguments) == 0


@pytest.mark.parametrize("command", ["generate", "edit", "invert", "info", "studio"])
def test_help_teaches(command, capsys):
    assert run(command, "--help") == 0
    assert f"sflow {command} " in capsys.readouterr().out


GENERATE = ("generate", "--model", "{model}", "--prompt", "a cat")
EDIT = ("edit", "--model", "{model}", "--prompt", "a cat", "--edit", "a dog")


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("generate", "--model", "nowhere", "--prompt", "a cat"), "no checkpoint at nowhere"),
        (("generate", "--model", "{source}", "--prompt", "a cat"), "sflow-convert"),
        ((*GENERATE, "--bypass", "9"), "no layer 9"),
        ((*GENERATE, "--bypass", "one"), "cannot read layers"),
        ((*GENERATE, "--width", "40"), "multiples of 16"),
        ((*GENERATE, "--steps", "0"), "steps must be at least 1"),
        ((*GENERATE, "--steps", "few"), "--steps"),
        ((*GENERATE, "--mesh", "data=9"), "needs 9 devices"),
        ((*EDIT, "--image", "nowhere.jpg"), "no picture at nowhere.jpg"),
        ((*EDIT, "--inversion", "nowhere"), "no inversion at nowhere"),
        ((*EDIT, "--layers", "5"), "no layer 5"),
        ((*EDIT, "--colour", "red"), "--colour"),
        (("edit", "--model", "{model}", "--prompt", "a cat"), "--edit"),
    ],
)
def test_mistakes_end_with_one_line_and_leave_nothing(
    arguments, message, checkpoint, source_folder, tmp_path, capsys
):
    filled = [part.format(model=checkpoint, source=source_folder) for part in arguments]
    assert run(*filled, "--out", tmp_path / "deep" / "out") == 2
    told = capsys.readouterr().err.strip().splitlines()[-1]
    assert told.startswith("Error: ") and message in told
    assert list(tmp_path.iterdir()) == []


def test_mistakes_in_conversion_end_with_one_line(source_folder, tmp_path, capsys):
    for arguments, message in [
        ((tmp_path / "nowhere", tmp_path / "out"), "no source at"),
        ((tmp_path, tmp_path / "out"), "known layout"),
        ((source_folder, tmp_path / "out", "--vital-layers", "all"), "takes numbers"),
        ((source_folder, tmp_path / "out", "--vital-layers", "77"), "no layer 77"),
    ]:
        assert run_convert(*arguments) == 2
        assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_the_folder_one_stands_in_will_do(checkpoint, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert run(*[part.format(model=checkpoint) for part in GENERATE], "--steps", 1, "--out", ".") == 0
    assert (tmp_path / "here" / "picture-1.png").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["here"]


def test_files_in_the_way_are_kept(checkpoint, tmp_path, capsys):
    (tmp_path / "out").write_text("mine")
    assert run(*[part.format(model=checkpoint) for part in GENERATE], "--out", tmp_path / "out") == 2
    assert (tmp_path / "out").read_text() == "mine"
