"""`sflow vital` end to end, in this process, and its one-line errors."""

import json
import re

import jax
import pytest
from commandline import run

from sflow_jax import read_layer_file
from sflow_jax.commands.vital import describe
from sflow_jax.storage.checkpoint import load_info

# Of a sweep by edits.
SCENES = ("--scenes", 2, "--steps", 1, "--methods", "reference")


@pytest.fixture(scope="module")
def arguments(checkpoint, tmp_path_factory):
    prompts = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    prompts.write_text("a red cat\na dog & <b>a hat</b>\n")
    plan = ("--steps", 2, "--batch", 4, "--height", 64, "--width", 64, "--prompts", prompts)
    return ("vital", "--model", checkpoint, "--features", "toyworld", *plan)


@pytest.fixture(scope="module")
def finished(arguments, tmp_path_factory):
    """A finished sweep's folder."""
    folder = tmp_path_factory.mktemp("vital") / "run"
    assert run(*arguments, "--out", folder, "--top", 2) == 0
    return folder


@pytest.mark.quick
def test_a_sweep_leaves_its_findings(finished, capsys):
    names = {file.name for file in finished.iterdir()}
    assert names == {
        "manifest.json", "parts", "pictures", "pictures.html", "report.html", "scores.csv", "scores.json",
        "vitality.png", "vitality.svg",
    }  # fmt: skip
    told = json.loads((finished / "scores.json").read_text())
    assert len(told["choice"]["layers"]) == 2
    assert all(layer["prompts"] == 2 and layer["clip"] is None for layer in told["layers"])
    assert "<b>a hat</b>" not in (finished / "report.html").read_text()
    assert (finished / "pictures" / "prompt-001-seed-1-without-3.jpg").exists()


def test_saved_layers_become_vital(arguments, checkpoint, finished):
    before = (checkpoint / "model.json").read_text()
    try:
        assert run(*arguments, "--out", finished, "--top", 1, "--save") == 0
        assert len(load_info(checkpoint).vital_layers) == 1
        assert "top 1, 2 prompts, 2 steps" in load_info(checkpoint).vital_layers_origin
    finally:
        (checkpoint / "model.json").write_text(before)


def test_a_sweep_may_end_with_its_layer_file(arguments, finished, checkpoint, tmp_path, capsys):
    capsys.readouterr()
    assert run(*arguments, "--out", finished, "--top", 2, "--export", tmp_path / "layers.json", "--json") == 0
    assert json.loads(capsys.readouterr().out)["layers"][0]["clip"] is None
    content, scores = read_layer_file(tmp_path / "layers.json"), json.loads((finished / "scores.json").read_text())
    assert content.model.title == load_info(checkpoint).title and content.model.digest
    assert list(content.sets["vital"]) == scores["choice"]["layers"]


def test_runs_are_compared(finished, tmp_path, capsys):
    assert run("vital", "--compare", finished, finished, "--out", tmp_path / "compared") == 0
    assert "1.00" in capsys.readouterr().out
    assert (tmp_path / "compared" / "comparison.html").exists()
    assert run("vital", "--compare", finished, finished, finished, "--out", tmp_path / "three") == 0
    assert len(json.loads((tmp_path / "three" / "comparison.json").read_text())["pairs"]) == 3
    assert run("vital", finished, "--out", tmp_path / "three") == 2
    assert "only --compare takes names of runs" in capsys.readouterr().err


@pytest.fixture(scope="module")
def edited(checkpoint, tmp_path_factory):
    """Options and folder of a finished sweep by edits."""
    folder = tmp_path_factory.mktemp("edited") / "run"
    options = ("vital", "--model", checkpoint, "--by", "edits", *SCENES)
    assert run(*options, "--out", folder, "--top", 2) == 0
    return options, folder


def test_a_sweep_by_edits_is_an_evaluation_and_a_sweep(edited, finished, checkpoint, tmp_path, capsys):
    options, folder = edited
    assert {"report.html", "layers.md", "summary.json", "vital"} <= {file.name for file in folder.iterdir()}
    page = (folder / "vital" / "report.html").read_text()
    assert "injecting alone into edits of 2 sources" in page and '"../report.html">all edits' in page
    assert run("vital", "--compare", finished, folder, "--out", tmp_path / "compared") == 0
    assert "Over the 5 layers that both measured, rank correlation" in capsys.readouterr().out
    assert "each has its own scale" in (tmp_path / "compared" / "comparison.html").read_text()
    assert run("vital", "--out", folder, "--export", tmp_path / "layers.json") == 0
    exported = read_layer_file(tmp_path / "layers.json")
    assert (exported.sweep["by"], exported.sweep["method"], exported.sweep["steps"]) == ("edits", "reference", 1)


def test_a_finished_sweep_by_edits_goes_on_either_way(edited, checkpoint, capsys):
    """With another rule, saved; and by the command that it stands for."""
    (options, folder), known = edited, (checkpoint / "model.json").read_text()
    before = {file: file.stat().st_mtime_ns for file in (folder / "parts").iterdir()}
    try:
        assert run(*options, "--out", folder, "--threshold", -100, "--save", "--force", "--json") == 0
        assert json.loads(capsys.readouterr().out)["choice"]["layers"] == list(range(5))
        saved = load_info(checkpoint)
    finally:
        (checkpoint / "model.json").write_text(known)
    assert saved.vital_layers == (0, 1, 2, 3, 4)
    assert saved.vital_layers_origin == "sflow vital --by edits, reference: threshold -100, 2 sources, 1 steps"
    same = ("--known-answers", *SCENES, "--layers-alone")
    assert run("evaluate", "--model", checkpoint, *same, "--out", folder) == 0
    assert {file: file.stat().st_mtime_ns for file in (folder / "parts").iterdir()} == before


@pytest.mark.parametrize(
    "options, message",
    [
        (("--scenes", 1, "--adaptive"), "--adaptive has no effect with --by edits"),
        (("--scenes", 1, "--dry-run"), "--dry-run has no effect with --by edits"),
        (("--scenes", 1, "--clip", "toyworld-clip"), "--clip has no effect on scenes"),
        (("--scenes", 1, "--methods", "coupled,uniinv"), "--methods must be one"),
        (("--scenes", 1, "--methods", "coupled:layers=all"), "has layers of its own"),
        (("--scenes", 1, "--methods", "faster"), "unknown method faster"),
        (("--scenes", 1, "--layers", "none"), "--layers names no layer"),
        (("--scenes", 1, "--top", 9), "--top 9 is more than the 5 layers"),
        (("--scenes", 0), "--scenes must be at least 1"),
        (("--scenes", 1, "--photos", "lines.csv"), "give --photos, or --scenes and --sources, not both"),
        (("--photos", "lines.csv"), "--clip is needed with --photos"),
        (("--photos", "nowhere.csv", "--clip", "toyworld-clip"), "no file at nowhere.csv"),
        ((), "--photos is needed"),
    ],
)
def test_bad_sweeps_by_edits(options, message, checkpoint, tmp_path, capsys):
    assert run("vital", "--model", checkpoint, "--by", "edits", *options, "--out", tmp_path / "out") == 2
    assert message in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_the_gallery_links_to_the_pictures(finished):
    links = re.findall(r'<a href="(pictures/[^"]*)"', (finished / "pictures.html").read_text())
    assert len(links) == len(set(links)) == len(list((finished / "pictures").iterdir()))
    assert all((finished / link).is_file() for link in links)


def test_changed_scores_are_no_findings(finished, tmp_path, capsys):
    content = json.loads((finished / "scores.json").read_text())
    content["choice"]["layers"] = [0]
    (tmp_path / "scores.json").write_text(json.dumps(content))
    assert run("vital", "--compare", finished, tmp_path) == 2
    assert "scores.json: was changed since it was written" in capsys.readouterr().err
    del content["checksum"]
    (tmp_path / "scores.json").write_text(json.dumps(content))
    assert run("vital", "--compare", finished, tmp_path) == 0


@pytest.mark.parametrize(
    "options, message",
    [
        (("--steps", 3), "steps: 2 there, 3 now"),
        (("--top", 1, "--threshold", 0.5), "not both"),
        (("--layers", "99"), "no layer 99"),
        (("--layers", "none"), "names no layer"),
        (("--batch", 0), "--batch must be at least 1"),
        (("--windows", 5), "--windows must be 1 to 2"),
        (("--adaptive", "--windows", 2), "leave out --windows"),
        (("--worker", "3/2"), "--worker must be"),
        (("--features", "toyworld-clip"), "where a dinov2 is needed"),
        (("--prompts", "nowhere.txt"), "cannot read prompts"),
        (("--scenes", 2), "--scenes has no effect without --by edits"),
    ],
)
def test_bad_input(arguments, finished, options, message, capsys):
    assert run(*arguments, "--out", finished, *options) == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error


def test_features_are_asked_for(checkpoint, tmp_path, capsys):
    assert run("vital", "--model", checkpoint, "--out", tmp_path / "run") == 2
    assert "--features is needed" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_full_size_dry_run_needs_no_files(capsys):
    options = ("--mesh", "data=2,tensor=4", "--step-seconds", 2, "--worker", "1/4", "--adaptive")
    assert run("vital", "--model", "flux-dev", "--dry-run", *options) == 0
    told = capsys.readouterr().out
    assert "3,648 pictures" in told and "464 of 8, 6,960 steps" in told and "[8, 4096, 64]" in told
    # 11.9 billion weights of two bytes, nearly all of them split over four devices.
    assert 5.5 < float(told.split("transformer")[1].split()[0]) < 5.8
    assert "at least 348" in told and "0:58:00" in told


def test_a_dry_run_takes_its_time_from_a_run_that_has_begun(arguments, finished, capsys):
    assert run(*arguments, "--dry-run", "--out", finished, "--json") == 0
    planned = json.loads(capsys.readouterr().out)
    assert planned["time"]["picture_seconds"] > 0 and planned["work"]["references"] == planned["prompts"]
    assert "as measured in this run" in describe(planned)[-1]


def test_one_device_needs_no_mesh(capsys, monkeypatch):
    """`--mesh auto`, as the help offers it, also of a dry run."""
    one = jax.devices()[:1]
    for name in ("devices", "local_devices"):
        monkeypatch.setattr(jax, name, lambda *_, **__: one)
    options = ("--model", "toyworld", "--dry-run", "--mesh", "auto", "--limit", 2, "--steps", 1)
    assert run("vital", *options) == 0
    assert "1 devices (no mesh)" in capsys.readouterr().out


@pytest.mark.parametrize(
    "options, message",
    [
        (("--model", "flux-krea"), "no checkpoint at"),
        (("--model", "flux-dev", "--mesh", "tensor=7"), "cannot be split over tensor=7"),
        (("--model", "flux-dev", "--mesh", "tensor=16"), "start anew"),
        (("--model", "flux-schnell", "--layers", "vital"), "does not say which"),
    ],
)
def test_bad_dry_runs(options, message, capsys):
    assert run("vital", "--dry-run", *options) == 2
    assert message in capsys.readouterr().err
