"""Sweeps on gs://, through epath's own way there, into a bucket that is kept in memory."""

import json

import numpy as np
import pytest
from commandline import run
from etils import epath
from etils.epath.backend import fsspec_backend
from fsspec.implementations.memory import MemoryFileSystem

from sflow_jax.catalogue import load_features
from sflow_jax.runs.folder import RunFolder
from sflow_jax.runs.worker import Worker
from sflow_jax.vitality.plan import SweepPlan, make_variants
from sflow_jax.vitality.sweep import Sweep

RUN = "gs://bucket/run"


class Bucket(MemoryFileSystem):
    """One machine's view of a bucket: no folders, only files, and listings remembered until this machine writes."""

    cachable = False

    def __init__(self, files: dict):
        super().__init__()
        self.store, self.pseudo_dirs, self.listings = files, [""], {}

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(path.removeprefix("gs://"))

    def mkdir(self, path, create_parents=True, **kwargs):
        pass

    def makedirs(self, path, exist_ok=False):
        pass

    def ls(self, path, detail=True, **kwargs):
        path = self._strip_protocol(path)
        if path not in self.listings:
            self.listings[path] = super().ls(path)
        return self.listings[path] if detail else [file["name"] for file in self.listings[path]]

    def invalidate_cache(self, path=None):
        self.listings.clear()

    def _open(self, path, mode="rb", **kwargs):
        if mode != "rb":
            self.invalidate_cache()
        return super()._open(path, mode, **kwargs)

    def cp_file(self, path1, path2, **kwargs):
        self.invalidate_cache()
        super().cp_file(path1, path2, **kwargs)

    def rm_file(self, path):
        self.invalidate_cache()
        super().rm_file(path)


@pytest.fixture
def machine(monkeypatch):
    """Goes to a machine by its number; all see the same bucket, and the test starts on machine 0."""
    files, machines = {}, {}

    def go(number: int) -> None:
        bucket = machines.setdefault(number, Bucket(files))
        monkeypatch.setattr(fsspec_backend, "fs", lambda path: bucket)

    go(0)
    return go


@pytest.fixture(scope="module")
def plan(flow) -> SweepPlan:
    canvas = flow.info.canvas(64, 64)
    return SweepPlan(("a red cat", "a dog in snow"), 1, 2, 3.5, canvas, 4, make_variants(range(flow.layers), 2))


@pytest.fixture(scope="module")
def sweep(flow, plan):
    features = {"dino": load_features("toyworld")}

    def make(folder, worker="1/1") -> Sweep:
        made = RunFolder(folder, {"plan": str(plan)})
        return Sweep(flow.painter, features, plan, made, worker=Worker.parse(worker))

    return make


@pytest.fixture(scope="module")
def local(sweep, tmp_path_factory):
    """Similarities measured on a local folder."""
    return sweep(tmp_path_factory.mktemp("local") / "run").exhaustive().values["dino"]


def parts() -> list[str]:
    return sorted(file.name for file in (epath.Path(RUN) / "parts").iterdir())


def test_scores_are_those_of_a_local_folder_and_are_kept(machine, sweep, local, monkeypatch):
    np.testing.assert_array_equal(sweep(RUN).exhaustive().values["dino"], local)
    before, again = parts(), sweep(RUN)
    assert all(name.endswith(".npz") and not name.startswith(".") for name in before)
    monkeypatch.setattr(again, "_measure", None)
    np.testing.assert_array_equal(again.exhaustive().values["dino"], local)
    assert parts() == before


def test_a_stopped_sweep_goes_on(machine, sweep, local, monkeypatch):
    class Stopped(Exception):
        pass

    stopped, saved = sweep(RUN), []
    save = stopped.folder.save

    def dies(name, arrays):
        if len(saved) == 3:
            raise Stopped
        saved.append(name)
        save(name, arrays)

    monkeypatch.setattr(stopped.folder, "save", dies)
    with pytest.raises(Stopped):
        stopped.exhaustive()
    assert len(parts()) == 3
    kept = parts()
    np.testing.assert_array_equal(sweep(RUN).exhaustive().values["dino"], local)
    assert set(kept) < set(parts())


def test_a_damaged_part_is_done_again(machine, sweep, local):
    sweep(RUN).exhaustive()
    damaged = next(epath.Path(RUN) / "parts" / name for name in parts() if name.startswith("all-"))
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"?")
    assert sweep(RUN).folder.load(damaged) is None and not damaged.exists()
    np.testing.assert_array_equal(sweep(RUN).exhaustive().values["dino"], local)


def test_another_sweeps_folder_is_refused(machine):
    RunFolder(RUN, {"steps": 4})
    machine(1)
    with pytest.raises(ValueError, match="steps: 4 there, 8 now"):
        RunFolder(RUN, {"steps": 8})
    (epath.Path("gs://bucket/other") / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="choose a new folder"):
        RunFolder("gs://bucket/other", {"steps": 4})
    with pytest.raises(ValueError, match="is a file"):
        RunFolder("gs://bucket/other/notes.txt", {"steps": 4})


def test_machines_see_what_others_wrote(machine):
    first = RunFolder(RUN, {"steps": 4})
    assert first.finished() == {}
    first.save("all-000000", {"x": np.zeros(3)})
    assert list(first.finished()) == ["all-000000"]
    machine(1)
    RunFolder(RUN, {"steps": 4}).save("all-000001", {"x": np.ones(3)})
    machine(0)
    assert list(first.finished()) == ["all-000000", "all-000001"]
    np.testing.assert_array_equal(first.load(first.finished()["all-000001"])["x"], np.ones(3))


def test_workers_on_two_machines_share_a_sweep(machine, sweep, local):
    assert sweep(RUN, "1/2").exhaustive() is None
    machine(1)
    np.testing.assert_array_equal(sweep(RUN, "2/2").exhaustive().values["dino"], local)


def test_the_command_writes_its_report_there(machine, checkpoint, tmp_path, capsys):
    (tmp_path / "prompts.txt").write_text("a red cat\na dog in snow\n")
    plan = ("--steps", 2, "--batch", 4, "--height", 64, "--width", 64, "--prompts", tmp_path / "prompts.txt")
    command = ("vital", "--model", checkpoint, "--features", "toyworld", *plan, "--top", 2)
    assert run(*command, "--out", RUN) == 0
    assert f"{RUN}/report.html" in capsys.readouterr().out
    assert {file.name for file in epath.Path(RUN).iterdir()} == {
        "manifest.json", "parts", "pictures", "pictures.html", "report.html", "scores.csv", "scores.json",
        "vitality.png", "vitality.svg",
    }  # fmt: skip
    told = (epath.Path(RUN) / "scores.json").read_text()
    assert len(json.loads(told)["choice"]["layers"]) == 2
    assert "data:image" in (epath.Path(RUN) / "report.html").read_text()
    assert run(*command, "--out", tmp_path / "run") == 0
    assert (tmp_path / "run" / "scores.json").read_text() == told
    assert run(*command, "--steps", 3, "--out", RUN) == 2
    assert "steps: 2 there, 3 now" in capsys.readouterr().err
    assert run("vital", "--compare", RUN, tmp_path / "run", "--out", "gs://bucket/compared") == 0
    assert epath.Path("gs://bucket/compared/comparison.html").exists()
