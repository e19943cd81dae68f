"""Sweeps on a small random model: what they measure, what they leave on disk, and what stops them."""

import json

import jax
import numpy as np
import pytest

from sflow_jax.catalogue import load_features
from sflow_jax.pictures.files import to_uint8
from sflow_jax.runs.folder import RunFolder
from sflow_jax.runs.worker import Worker
from sflow_jax.sampling.control import LayerControl
from sflow_jax.vitality.adaptive import Elimination
from sflow_jax.vitality.plan import SweepPlan, make_variants
from sflow_jax.vitality.prompts import PROMPTS, load_prompts
from sflow_jax.vitality.scores import Rule
from sflow_jax.vitality.sweep import Sweep

WORDS = ("a red cat", "a dog in snow", "a tree", "a box at night", "a hat", "a bear", "rain", "the sea")


@pytest.fixture(scope="module")
def features():
    return {"dino": load_features("toyworld"), "clip": load_features("toyworld-clip")}


@pytest.fixture(scope="module")
def plan(flow) -> SweepPlan:
    variants = make_variants(range(flow.layers), 2, windows=2, pairs=(0, 2))
    return SweepPlan(WORDS[:2], 1, 2, 3.5, flow.info.canvas(64, 64), 4, variants)


def sweep(flow, features, plan, folder, **options) -> Sweep:
    return Sweep(flow.painter, features, plan, RunFolder(folder, {"plan": str(plan)}), **options)


@pytest.fixture(scope="module")
def whole(flow, features, plan, tmp_path_factory):
    """An uninterrupted sweep: its folder and its table."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    return folder, sweep(flow, features, plan, folder).exhaustive()


def parts(folder) -> list[str]:
    return sorted(file.name.rpartition("-")[0] for file in (folder / "parts").iterdir())


def test_scores_are_those_of_plain_generation(flow, features, plan, whole):
    """The last unit of the last batch, painted again by the public interface."""
    _, table = whole
    number, variant = len(plan.variants) - 1, plan.variants[-1]
    assert variant.layers == (0, 2)
    images = [
        flow.generate(
            [WORDS[1]], steps=2, guidance=3.5, height=64, width=64, seed=1, bypass=bypass, progress=False
        ).images
        for bypass in ((), variant.layers)
    ]
    first, second = (np.asarray(features["dino"](np.round(255 * image).astype(np.uint8)))[0] for image in images)
    cosine = first @ second / np.linalg.norm(first) / np.linalg.norm(second)
    assert table.values["dino"][1, number] == pytest.approx(cosine, abs=1e-4)
    for values in table.values.values():
        assert values.shape == (2, len(plan.variants)) and np.isfinite(values).all()


def test_windows_that_begin_late_start_from_the_reference(flow, features, plan, whole):
    """A picture bypassed in the second step only, painted again from its noise."""
    _, table = whole
    number, variant = next((i, v) for i, v in enumerate(plan.variants) if v.first == 1)
    noise = flow.painter.noise(flow.info.canvas(64, 64), 1)
    control = LayerControl.none(2, 2, flow.layers).bypassing(variant.layers, steps=[1], elements=[0])
    latents = flow.denoise(
        np.stack([noise, noise]), flow.encode_prompts([WORDS[1]] * 2), control,
        guidance=np.full(2, 3.5, np.float32), height=64, width=64, groups=2,
    )  # fmt: skip
    first, second = np.asarray(features["dino"](to_uint8(flow.decode(latents, height=64, width=64))))
    cosine = first @ second / np.linalg.norm(first) / np.linalg.norm(second)
    assert 0.999999 > cosine and table.values["dino"][1, number] == pytest.approx(cosine, abs=1e-4)


def test_a_sweep_compiles_once(flow, features, plan, whole, tmp_path):
    with jax.no_tracing():
        other = SweepPlan(WORDS[2:4], 1, 2, 1.5, plan.canvas, 4, make_variants((1, 3), 2))
        sweep(flow, features, other, tmp_path / "run").exhaustive()


def test_a_stopped_sweep_goes_on_and_gives_the_same(flow, features, plan, whole, tmp_path, monkeypatch):
    class Stopped(Exception):
        pass

    folder = tmp_path / "run"
    stopped = sweep(flow, features, plan, folder)
    save, left = stopped.folder.save, [3]

    def dies(name, arrays):
        left[0] -= 1
        if not left[0]:
            raise Stopped
        save(name, arrays)

    monkeypatch.setattr(stopped.folder, "save", dies)
    with pytest.raises(Stopped):
        stopped.exhaustive()
    assert 0 < len(parts(folder)) < len(parts(whole[0]))
    table = sweep(flow, features, plan, folder).exhaustive()
    assert parts(folder) == parts(whole[0])
    for name, values in table.values.items():
        np.testing.assert_array_equal(values, whole[1].values[name])


def test_a_damaged_part_is_done_again(flow, features, plan, whole, tmp_path):
    folder = tmp_path / "run"
    sweep(flow, features, plan, folder).exhaustive()
    damaged = sorted((folder / "parts").glob("all-*"))
    damaged[0].write_bytes(damaged[0].read_bytes()[:100])
    damaged[1].write_bytes(damaged[1].read_bytes()[:-1] + b"?")
    table = sweep(flow, features, plan, folder).exhaustive()
    np.testing.assert_array_equal(table.values["dino"], whole[1].values["dino"])


def test_workers_share_a_folder(flow, features, plan, whole, tmp_path):
    workers = [sweep(flow, features, plan, tmp_path / "run", worker=Worker.parse(f"{i}/3")) for i in (1, 2, 3)]
    tables = [worker.exhaustive() for worker in workers]
    assert tables[0] is None and tables[1] is None
    for name, values in tables[2].values.items():
        np.testing.assert_array_equal(values, whole[1].values[name])


def test_adaptive_stops_early_and_keeps_to_its_rounds(flow, features, tmp_path):
    plan = SweepPlan(WORDS, 1, 2, 3.5, flow.info.canvas(64, 64), 4, make_variants(range(flow.layers), 2))
    far_below = Elimination(Rule("threshold", -5.0), len(WORDS))
    events, running = [], sweep(flow, features, plan, tmp_path / "run")
    running.progress = lambda done, total, what: events.append((done, total))
    table = running.adaptive(far_below)
    # What is left out is no longer waited for: progress ends at its end.
    assert events[0] == (0, running.pictures) and events[-1] == (far_below.rounds[0] * flow.layers,) * 2
    seen = ~np.isnan(table.values["dino"])
    assert seen[: far_below.rounds[0]].all() and not seen[far_below.rounds[0] :].any()
    assert all(name.startswith(("round00", "reference")) for name in parts(tmp_path / "run"))


def test_another_sweeps_folder_is_refused(tmp_path):
    RunFolder(tmp_path / "run", {"steps": 4, "prompts": ["a"]})
    with pytest.raises(ValueError, match="steps: 4 there, 8 now"):
        RunFolder(tmp_path / "run", {"steps": 8, "prompts": ["a"]})
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="choose a new folder"):
        RunFolder(tmp_path / "other", {"steps": 4})
    with pytest.raises(ValueError, match="is a file"):
        RunFolder(tmp_path / "other" / "notes.txt", {"steps": 4})
    (tmp_path / "run" / "manifest.json").write_text("{")
    with pytest.raises(ValueError, match="cannot read"):
        RunFolder(tmp_path / "run", {"steps": 4})


def test_a_full_disk_leaves_nothing_half_written(tmp_path, monkeypatch):
    folder = RunFolder(tmp_path / "run", {"steps": 4})

    def full(self, content):
        with open(self, "wb") as file:
            file.write(content[:10])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(type(folder.path), "write_bytes", full)
    with pytest.raises(OSError, match="No space left"):
        folder.save("all-000000", {"x": np.zeros(100)})
    assert list((tmp_path / "run" / "parts").iterdir()) == []


def test_variants():
    made = make_variants((3, 5), 15, windows=3, pairs=(3, 5))
    assert [(v.layers, v.first, v.last) for v in made] == [
        ((3,), 0, 15), ((5,), 0, 15),
        ((3,), 0, 5), ((3,), 5, 10), ((3,), 10, 15), ((5,), 0, 5), ((5,), 5, 10), ((5,), 10, 15),
        ((3, 5), 0, 15),
    ]  # fmt: skip
    with pytest.raises(ValueError, match="windows must be 1 to 15"):
        make_variants((3,), 15, windows=16)
    with pytest.raises(ValueError, match="missing: 7"):
        make_variants((3,), 15, pairs=(3, 7))


@pytest.mark.parametrize("text", ["0/2", "3/2", "2", "a/b", "1/0"])
def test_bad_workers(text):
    with pytest.raises(ValueError, match="worker must be"):
        Worker.parse(text)


def test_shares_cover_all_batches_once():
    shares = [list(Worker(i, 4).share(10)) for i in range(4)]
    assert sum(shares, []) == list(range(10))


def test_prompts(tmp_path):
    assert len(load_prompts("builtin")) == len(set(PROMPTS)) == 64
    assert len(set(load_prompts("toyworld"))) == 64
    (tmp_path / "prompts.txt").write_text("# mine\na cat\n\n  a dog \n")
    assert load_prompts(str(tmp_path / "prompts.txt")) == ["a cat", "a dog"]
    (tmp_path / "empty.txt").write_text("\n")
    for name, message in (("empty.txt", "no prompts"), ("missing.txt", "cannot read")):
        with pytest.raises(ValueError, match=message):
            load_prompts(str(tmp_path / name))


def test_manifest_is_readable(tmp_path):
    RunFolder(tmp_path / "run", {"steps": 4})
    assert json.loads((tmp_path / "run" / "manifest.json").read_text()) == {"steps": 4}
