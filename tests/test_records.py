"""Results say how they were painted, in JSON and in every PNG, and are painted again from it with equal bytes."""

import dataclasses
import json

import numpy as np
import pytest
from commandline import run
from PIL import Image

from sflow_jax.pictures.files import png_bytes, read_png_record
from sflow_jax.records import RecordError, read_record
from sflow_jax.settings import EditSettings, GenerationSettings, InversionSettings, Placement

PROMPTS = ("-p", "a cat", "-e", "a dog", "-e", "snow")


def pictures(folder) -> dict[str, bytes]:
    """Name → bytes of every PNG in a folder."""
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.png"))}


def edited(record, folder, **changes) -> str:
    """A record with other values (None removes one), as a file."""
    content = {name: value for name, value in {**record, **changes}.items() if value is not ...}
    (folder / "changed.json").write_text(json.dumps(content))
    return str(folder / "changed.json")


@pytest.fixture(scope="module")
def folder(photo, checkpoint, tmp_path_factory):
    """A photo, a mask, its inversion, and an edit of it that is kept."""
    folder = tmp_path_factory.mktemp("records")
    photo.save(folder / "photo.jpg")
    mask = np.zeros((48, 64), np.uint8)
    mask[:, :32] = 255
    Image.fromarray(mask).save(folder / "mask.png")
    model = ("-m", checkpoint, "-p", "a cat", "--image", folder / "photo.jpg", "--steps", 2)
    assert run("invert", *model, "-o", folder / "inverted") == 0
    assert run("edit", *model, "-e", "a dog", "-e", "snow", "--method", "coupled", "--guidance", 2,
               "-o", folder / "edit") == 0  # fmt: skip
    return folder


@pytest.fixture(scope="module")
def record(folder):
    """What the edit's JSON file says."""
    return json.loads((folder / "edit" / "edit.json").read_text())


WAYS = {
    "painted": ("--seed", 7, "--layers", "0-1", "--edits-at-once", 1),
    "painted, coupled": ("--method", "coupled", "--region", "none"),
    "photo": ("--image", "{}/photo.jpg", "--method", "coupled", "--begin", 0.5, "--grow", 1, "--strength", 0.5),
    "photo, by what edits photos": ("--image", "{}/photo.jpg"),
    "photo, default": (
        "--image",
        "{}/photo.jpg",
        "--layers",
        "vital",
        "--guidance",
        "1,2,4",
        "--skip-layers",
        "1",
        "--steps",
        6,
    ),
    "mask": (
        "--image",
        "{}/photo.jpg",
        "--method",
        "uniinv",
        "--region",
        "{}/mask.png",
        "--paste",
        "--soften",
        0.5,
    ),
    "inversion": ("--inversion", "{}/inverted", "--unnudge", "--set", "inject_from=0.5"),
    "continued": ("--continue", "{}/edit/edit.json", "--pick", 2, "--method", "rf-solver"),
}


@pytest.mark.parametrize("way", WAYS)
def test_an_edit_is_painted_again_from_any_of_its_pictures(way, folder, checkpoint, tmp_path):
    asked = [str(part).format(folder) for part in WAYS[way]]
    steps = () if way == "inversion" else ("--steps", 2)
    assert run("edit", "-m", checkpoint, *PROMPTS, *steps, *asked, "-o", tmp_path / "first") == 0
    assert run("edit", "--from", tmp_path / "first" / "edit-2.png", "-o", tmp_path / "second") == 0
    assert run("edit", "--from", tmp_path / "second" / "edit.json", "-o", tmp_path / "third") == 0
    first, second, third = (pictures(tmp_path / name) for name in ("first", "second", "third"))
    assert first.keys() >= {"source.png", "edit-1.png", "edit-2.png", "grid.png"}
    assert first == second == third


def test_a_generation_is_painted_again_and_changed_by_what_is_beside_it(checkpoint, tmp_path, capsys):
    asked = ("-p", "a cat", "-p", "a dog", "--seed", "3,4", "--guidance", "2,3", "--steps", 2, "--bypass", "1")
    assert run("generate", "-m", checkpoint, *asked, "-o", tmp_path / "first") == 0
    assert run("generate", "--from", tmp_path / "first" / "grid.png", "-o", tmp_path / "second") == 0
    assert pictures(tmp_path / "first") == pictures(tmp_path / "second")
    assert run("generate", "--from", tmp_path / "first" / "grid.png", "--steps", 3, "-o", tmp_path / "third") == 0
    first, third = (read_record(tmp_path / name / "generate.json") for name in ("first", "third"))
    assert {name for name in first if first[name] != third[name]} == {"steps", "seconds"}


def test_a_trial_is_painted_again(folder, checkpoint, tmp_path):
    asked = ("-p", "a cat", "-e", "a dog", "--image", folder / "photo.jpg", "--try", "coupled,sdedit", "--choose")
    assert run("edit", "-m", checkpoint, *asked, "--begin", 0.8, "-o", tmp_path / "first") == 0
    assert run("edit", "--from", tmp_path / "first" / "candidates.png", "-o", tmp_path / "second") == 0
    assert pictures(tmp_path / "first") == pictures(tmp_path / "second")
    one = ("--method", "sdedit", "--steps", 10)
    assert run("edit", "--from", tmp_path / "first" / "edit.json", *one, "-o", tmp_path / "third") == 0
    assert read_record(tmp_path / "third" / "edit.json")["method"] == "sdedit"


@pytest.mark.parametrize(
    "options, changed",
    [
        (("--seed", 5), {"seed": 5}),
        (("-e", "a hat"), {"edits": ["a hat"], "guidance": [2.0, 2.0]}),
        (("--size", "fit"), {"size": "fit", "height": 64, "width": 64}),
        (("--guidance", 3), {"guidance": [3.0, 3.0, 3.0]}),
        # Another method brings its own numbers.
        (("--method", "uniinv"), {"method": "uniinv", "steps": 15, "guidance": [1.0, 1.0, 1.0], "region": "none"}),
        (("--inversion", "{}/inverted", "--method", "uniinv"), {"image": None, "steps": 2}),
    ],
)
def test_options_beside_a_record_change_it(options, changed, record, folder, tmp_path):
    asked = [str(part).format(folder) for part in options]
    assert run("edit", "--from", folder / "edit" / "edit.json", *asked, "-o", tmp_path / "out") == 0
    again = json.loads((tmp_path / "out" / "edit.json").read_text())
    assert {name: again[name] for name in changed} == changed
    same = ("prompt", "model", "model_digest", "dtype", "attentions")
    assert {name: again[name] for name in same} == {name: record[name] for name in same}


def test_records_hold_every_setting_and_the_pictures_hold_the_records(checkpoint, folder, record, tmp_path):
    assert run("generate", "-m", checkpoint, "-p", "a cat", "--steps", 1, "-o", tmp_path) == 0
    files = {
        tmp_path / "generate.json": (GenerationSettings, "picture-1.png"),
        folder / "edit" / "edit.json": (EditSettings, "region-1.png"),
        folder / "inverted" / "inversion.json": (InversionSettings, "reconstruction.png"),
    }
    for file, (settings, picture) in files.items():
        stored = json.loads(file.read_text())
        for kind in (settings, Placement):
            assert {field.name for field in dataclasses.fields(kind) if field.metadata} <= stored.keys()
        assert (
            stored["model"] == str(checkpoint)
            and len(stored["model_digest"]) == 16
            and stored["dtype"] == "float32"
        )
        # Seconds differ from run to run, and pictures should not.
        assert stored.pop("seconds").keys() >= {"load"}
        assert json.loads(read_png_record(file.parent / picture)) == stored
    assert record["image"] == str(folder / "photo.jpg") and record["size"] == "auto"
    assert (record["height"], record["width"]) == (48, 64)


def test_info_tells_how_a_picture_was_painted(folder, capsys, tmp_path):
    assert run("info", folder / "edit" / "edit-1.png") == 0
    shown = capsys.readouterr().out
    assert 'edits               ["a dog", "snow"]\n' in shown and 'method              "coupled"\n' in shown
    assert run("info", folder / "mask.png") == 2
    assert "does not say how it was painted" in capsys.readouterr().err
    assert run("info", folder / "edit" / "edit-1.png", "--plan", "v6e-8") == 2
    assert run("info", tmp_path / "nowhere.png") == 2
    assert "no record at" in capsys.readouterr().err


# ---- what somebody else wrote

BAD = [
    ({"colour": "red"}, "unknown field colour"),
    ({"command": ...}, "command"),
    ({"command": "paint"}, "paint"),
    ({"steps": ...}, "steps"),
    ({"steps": "many"}, "steps: Expected int, got str"),
    ({"steps": 10**30}, "steps"),
    ({"steps": 2_000_000}, "--steps must be at most 10,000"),
    ({"seed": -1}, "--seed must be a whole number"),
    ({"seed": 2**70}, "seed"),
    ({"seed": [1, 2]}, "seed: Expected int, got array"),
    ({"guidance": [1e30]}, "guidance"),
    ({"guidance": []}, "guidance"),
    ({"layers": [99]}, "no layer 99"),
    ({"layers": "vital"}, "layers"),
    ({"height": 1 << 40}, "height"),
    ({"edits": []}, "edits"),
    ({"prompt": "x" * 100_001}, "prompt"),
    ({"size": "huge"}, "--size must be auto"),
    ({"quantisation": "int4"}, "quantisation"),
    ({"mesh": "data=\x1b[31m"}, "cannot read mesh"),
    ({"method_settings": {"name": "own"}}, "the record's method cannot be read"),
    ({"method_settings": {"evil\x1b[2J": 1}}, "the record's method cannot be read"),
    ({"region": "own"}, "an array that only Python had"),
    ({"noise": "own"}, "a noise that only Python had"),
    ({"model": "nowhere"}, "is not here; name the model with --model"),
    ({"model": "nobody/model"}, "is not here; name the model with --model"),
    ({"model": "gs://bucket/model"}, "is not here; name the model with --model"),
    ({"model_digest": "0" * 16}, "is another model than that of"),
    ({"image": "nowhere.jpg"}, "the record's nowhere.jpg is not there; give --image"),
    ({"image": "gs://bucket/photo.jpg"}, "opened only if you name it"),
    ({"image_checksum": "0" * 32}, "has changed since; give --image"),
    ({"image": None, "image_checksum": None}, "was no file; give a photo with --image"),
    ({"region_shape": {"grow": "much"}}, "region_shape"),
    ({"versions": 3}, "versions"),
]


@pytest.mark.parametrize("changes, message", BAD, ids=[str(i) for i in range(len(BAD))])
def test_bad_records_end_with_one_line_and_leave_nothing(changes, message, record, tmp_path, capsys):
    path = edited(record, tmp_path, **changes)
    assert run("edit", "--from", path, "-o", tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert error.startswith("Error: ") and message in error and error.count("\n") == 1 and "\x1b" not in error
    assert [file.name for file in tmp_path.iterdir()] == ["changed.json"]


@pytest.mark.parametrize(
    "text, message",
    [
        ("{", "no JSON"),
        ("[" * 100_000, "no record that can be read"),
        ("null", "Expected"),
        ('{"command": "edit", "prompt": "\ud800"}'.encode("utf-8", "surrogatepass"), "no record that can be read"),
        (b"\x89PNG\r\n\x1a\n broken", "chunks are broken"),
    ],
)
def test_files_that_are_no_records_are_refused(text, message, tmp_path, capsys):
    (tmp_path / "file.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    for command in (
        ("edit", "--from", tmp_path / "file.json", "-o", tmp_path / "o"),
        ("info", tmp_path / "file.json"),
    ):
        assert run(*command) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1


def test_broken_chunks_of_pictures_are_refused(folder, tmp_path, capsys):
    whole = (folder / "edit" / "edit-1.png").read_bytes()
    at = whole.index(b"sflow_jax\0")
    for number, data in enumerate((whole[: at + 40], whole[: at + 30] + b"?" + whole[at + 31 :])):
        (tmp_path / f"{number}.png").write_bytes(data)
        with pytest.raises(RecordError, match="chunks are broken"):
            read_record(tmp_path / f"{number}.png")
    (tmp_path / "text.png").write_bytes(png_bytes(Image.new("RGB", (4, 4)), '{"command": 1}'))
    assert run("info", tmp_path / "text.png") == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_control_characters_are_shown_and_not_obeyed(record, tmp_path, capsys):
    assert run("info", edited(record, tmp_path, prompt="a\ncat\x1b[31m")) == 0
    shown = capsys.readouterr().out
    assert '"a\\ncat\\u001b[31m"' in shown and "\x1b" not in shown


def test_results_of_other_commands_are_not_painted(folder, tmp_path, capsys):
    assert run("generate", "--from", folder / "edit" / "edit.json", "-o", tmp_path / "out") == 2
    assert "is a result of sflow edit" in capsys.readouterr().err
    assert run("edit", "--from", folder / "inverted" / "reconstruction.png", "-o", tmp_path / "out") == 2
    assert "is a result of sflow invert" in capsys.readouterr().err


def test_another_model_is_taken_where_it_is_named(folder, record, wide_checkpoint, tmp_path, capsys):
    again = ("edit", "--from", folder / "edit" / "edit.json", "-m", wide_checkpoint)
    assert run(*again, "--steps", 2, "-o", tmp_path / "out") == 0
    assert "another model than that of" in capsys.readouterr().err
    assert read_record(tmp_path / "out" / "edit.json")["model"] == str(wide_checkpoint)


def test_other_versions_are_mentioned(folder, record, tmp_path, capsys):
    path = edited(record, tmp_path, versions={**record["versions"], "jax": "0.1"})
    assert run("edit", "--from", path, "-o", tmp_path / "out") == 0
    assert "painted with jax 0.1 (here " in capsys.readouterr().err
