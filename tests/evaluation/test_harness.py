"""The harness: known answers, resuming, sharing, methods and tables."""

import csv
import dataclasses
import json
import math
import re

import numpy as np
import pytest
from commandline import run
from PIL import Image

from sflow_jax.errors import SettingError
from sflow_jax.evaluation.chart import Point, chart_points, pareto
from sflow_jax.evaluation.known import KnownAnswers, read_outcome, scene_edits
from sflow_jax.evaluation.methods import check_methods, edit_case, parse_methods
from sflow_jax.evaluation.run import evaluate
from sflow_jax.evaluation.summary import Rate
from sflow_jax.pipeline import StableFlow
from sflow_jax.progress import Stopped
from sflow_jax.runs.worker import Worker
from sflow_jax.settings import EvaluationSettings
from sflow_jax.toyworld.edits import EDIT_FAMILIES

SETTINGS = EvaluationSettings(steps=2, methods="reference,none", scenes=2)


@pytest.fixture(scope="module")
def bench() -> KnownAnswers:
    return KnownAnswers(2, 0, 64)


@pytest.fixture(scope="module")
def whole(flow, bench, tmp_path_factory):
    """A folder and the summary of a run that nothing interrupted."""
    out = tmp_path_factory.mktemp("whole") / "run"
    return out, evaluate(flow, bench, SETTINGS, out, progress=False)


def numbers(summary) -> list[tuple]:
    """All of a summary's rows but their seconds."""
    return [
        (row.method, row.case, row.number, *row.scores.values(), row.remark, row.passes) for row in summary.rows
    ]


def test_scenes_are_their_own_and_edited_once_a_family():
    first = scene_edits(0, 3)
    assert tuple(edit.family for edit in first) == EDIT_FAMILIES
    assert len({edit.source for edit in first}) == 1 and first == scene_edits(0, 3)
    sources = [scene_edits(seed, number)[0].source for seed in (0, 1) for number in range(20)]
    assert len(set(sources)) == 40
    for number in range(20):
        for edit in scene_edits(1, number):
            before, after = edit.source.attributes(), edit.target.attributes()
            assert before[edit.attribute] != after[edit.attribute]
            assert ("none" in before[edit.attribute]) == (edit.family == "add")
            assert (after[edit.attribute] == "none") == (edit.family == "remove")


def test_right_answers_are_right_and_sources_are_not(bench):
    for case in bench.cases:
        right, remarks = bench.score(case, case.answers)
        assert [(row["happened"], row["lost"], row["answer_db"]) for row in right] == [(1, 0, 100)] * 6
        assert remarks == [""] * 6 and min(row["outside_db"] for row in right) > 40
        unchanged, _ = bench.score(case, np.repeat(case.picture[None], 6, axis=0))
        assert [(row["happened"], row["lost"], row["outside_db"]) for row in unchanged] == [(0, 0, 100)] * 6
        assert max(row["answer_db"] for row in unchanged) < 40
        assert max(map(bench.badness, right)) < min(map(bench.badness, unchanged))


def test_turns_follow_each_other_and_are_of_other_families():
    for number in range(20):
        turns = scene_edits(1, number, 4)
        assert len({turn.family for turn in turns}) == 4
        assert [turn.source for turn in turns[1:]] == [turn.target for turn in turns[:-1]]
    bench = KnownAnswers(1, 1, 64, turns=4)
    (case,) = bench.cases
    assert case.sources == (case.prompt, *case.edits[:3]) and case.groups[3] == "turn 4"
    right, _ = bench.score(case, case.answers)
    assert [(row["happened"], row["lost"], row["answer_db"]) for row in right] == [(1, 0, 100)] * 4
    assert min(row["outside_db"] for row in right) > 40
    with pytest.raises(SettingError, match="turns must be at most 6"):
        KnownAnswers(1, 0, 64, turns=7)


def test_each_turn_begins_where_the_last_one_ended(flow, tmp_path):
    settings = EvaluationSettings(steps=2, methods="coupled:region=none", scenes=1, turns=2)
    summary = evaluate(flow, KnownAnswers(1, 0, 64, turns=2), settings, tmp_path / "run", progress=False)
    first, second = (row for row in summary.rows if row.method != "autoencoder")
    assert (first.group, second.group, second.prompt) == ("turn 1", "turn 2", first.edit)
    assert second.scores["outside_db"] < first.scores["outside_db"]
    rates, kept = summary.group_tables()
    assert rates[0][1:] == kept[0][1:] == ["turn 1", "turn 2"]
    assert kept[1][0][1:] == [f"{row.scores['outside_db']:.2f}" for row in (first, second)]


def test_painted_sources_are_judged_by_what_was_painted(flow, bench, tmp_path):
    """The reader finds where things are, so that what an edit leaves alone is known of any picture of the world."""
    painted = KnownAnswers(2, 0, 64, sources="painted")
    (case, _), (drawn, _) = painted.cases, bench.cases
    assert case.picture is None and case.answers is None and case.edits == drawn.edits
    seen = dataclasses.replace(case, picture=drawn.picture)
    right, _ = painted.score(seen, drawn.answers)
    assert [(row["happened"], row["lost"]) for row in right] == [(1, 0)] * 6
    assert min(row["outside_db"] for row in right) > 30 and "answer_db" not in right[0]
    unchanged, _ = painted.score(seen, np.repeat(drawn.picture[None], 6, axis=0))
    assert [(row["happened"], row["outside_db"]) for row in unchanged] == [(0, 100)] * 6
    settings = dataclasses.replace(SETTINGS, methods="reference:layers=all,coupled:region=none", sources="painted")
    summary = evaluate(flow, painted, settings, tmp_path / "run", progress=False)
    assert [method.method for method in summary.methods] == settings.methods.split(",")
    assert (tmp_path / "run" / "report.html").read_text().count("<img") >= 2 * 12 * 2
    with pytest.raises(SettingError, match="turns are of drawn sources"):
        KnownAnswers(1, 0, 64, turns=2, sources="painted")


def test_what_an_edit_brings_along_is_not_lost():
    edit = next(e for n in range(20) for e in scene_edits(0, n) if e.family == "add" and e.attribute == "object")
    after = edit.target.attributes()
    assert read_outcome(edit, after) == (True, [])
    assert read_outcome(edit, after | {"object_colour": "none"}) == (True, [])
    assert read_outcome(edit, after | {"object": "none", "species": "other"}) == (False, ["species"])


def test_a_run_says_what_it_measured(whole, bench):
    out, summary = whole
    names = {"manifest.json", "parts", "report.html", "scores.csv", "summary.md", "summary.json"}
    assert {path.name for path in out.iterdir()} == names | {"pareto.png", "pareto.svg"}
    with (out / "scores.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(summary.rows) == 3 * 2 * 6
    assert [row["method"] for row in rows[::12]] == ["reference", "none", "autoencoder"]
    for name in ("answer_db", "outside_db", "lost"):
        mean = np.mean([float(row[name]) for row in rows if row["method"] == "none"])
        assert summary.methods[1].means[name] == pytest.approx(mean, rel=1e-4)
    passes = [method.passes for method in summary.methods]
    assert passes[0] == passes[1] > 2 and passes[2] == 0
    told = json.loads((out / "summary.json").read_text())
    assert told["methods"][0]["rate"]["total"] == 12 and told["methods"][0]["worst"] in EDIT_FAMILIES
    assert "| reference | 12 |" in (out / "summary.md").read_text()
    assert Image.open(out / "pareto.png").width > 800
    page = (out / "report.html").read_text()
    assert "<svg" in page and "The worst pictures first" in page and page.count("<img") >= 2 * 12 * 3
    assert summary.costs["peak memory, GiB"] > 0
    # The autoencoder's own pictures, from the drawings.
    assert [point.name for point in chart_points(bench, summary)] == ["reference", "none", "autoencoder"]


def test_a_stopped_run_goes_on_with_equal_numbers(flow, bench, whole, tmp_path):
    def stop(done: int, total: int, what: str) -> None:
        assert total == 6
        if done == 3:
            raise Stopped

    with pytest.raises(Stopped):
        evaluate(flow, bench, SETTINGS, tmp_path / "run", progress=stop)
    assert len(list((tmp_path / "run" / "parts").iterdir())) == 3
    assert not (tmp_path / "run" / "report.html").exists()
    events = []
    resumed = evaluate(flow, bench, SETTINGS, tmp_path / "run", progress=lambda *event: events.append(event[:2]))
    assert events[0] == (3, 6) and events[-1] == (6, 6)
    assert numbers(resumed) == numbers(whole[1])


def test_workers_share_a_run(flow, bench, whole, tmp_path):
    shares = [
        evaluate(flow, bench, SETTINGS, tmp_path / "run", worker=Worker(i, 2), progress=False) for i in range(2)
    ]
    assert shares[0] is None and numbers(shares[1]) == numbers(whole[1])


def test_other_settings_need_another_folder(flow, bench, whole):
    for other, difference in (({"steps": 3}, "steps: 2 there, 3 now"), ({"methods": "none"}, "methods: ")):
        settings = EvaluationSettings(**{"steps": 2, "methods": "reference,none", "scenes": 2} | other)
        with pytest.raises(SettingError, match=difference):
            evaluate(flow, bench, settings, whole[0], progress=False)


def test_methods_are_names_with_settings():
    reference, injected, other = parse_methods("reference, none:steps=4, coupled:strength=.5:region=auto")
    assert (reference.name, reference.options) == (None, {"unnudge": True})
    assert injected.options == {"unnudge": True, "layers": "none", "steps": 4}
    assert (other.label, other.name) == ("coupled:strength=.5:region=auto", "coupled")
    assert other.options == {"strength": 0.5, "region": "auto"}
    (numbers,) = parse_methods("coupled:begin=0.1:layers=3:until=.2")
    assert (numbers.options, numbers.numbers) == ({"layers": "3"}, {"begin": 0.1, "until": 0.2})
    for text, message in (("", "cannot read"), ("a,,b", "cannot read"), ("a:b", "cannot read"), ("a,a", "twice")):
        with pytest.raises(SettingError, match=message):
            parse_methods(text)
    with pytest.raises(SettingError, match="needs no autoencoder"):
        parse_methods("reference,autoencoder")


def test_what_edit_does_not_have_is_refused(flow):
    with pytest.raises(
        SettingError, match="reference:colour=red in methods has no setting colour; known: .*layers"
    ):
        check_methods(flow.edit, parse_methods("reference:colour=red"))
    for text, name in (("coupled:begin=early", "begin"), ("reference:steps=2.5", "steps")):
        with pytest.raises(SettingError, match=f"{name} must be a number"):
            check_methods(flow.edit, parse_methods(text))
    with pytest.raises(SettingError, match="begin must be a share from 0 to 1"):
        check_methods(flow.edit, parse_methods("coupled:begin=2"))
    with pytest.raises(SettingError, match="no setting seed"):
        check_methods(flow.edit, parse_methods("reference:seed=3"))


class Recording(StableFlow):
    """Edits as the reference does, and remembers what it was asked for."""

    def edit(self, source_prompt, edit_prompts, *, method=None, strength=1.0, **options):
        self.asked = {"method": method, "strength": strength, **options}
        result = super().edit(source_prompt, edit_prompts, **options)
        object.__setattr__(result, "evaluations", 6 * 17)
        return result


def test_the_name_of_a_method_is_handed_on_and_its_passes_taken(flow, bench):
    recording = Recording(flow.painter)
    coupled, reference = methods = parse_methods("coupled:strength=0.25,reference:steps=1")
    check_methods(recording.edit, methods)
    painted = edit_case(recording, coupled, bench.cases[0], SETTINGS, seed=5)
    assert painted.passes == 17 and painted.images.shape == (6, 64, 64, 3) and painted.seconds > 0
    asked = recording.asked
    assert (asked["method"], asked["strength"], asked["steps"], asked["seed"]) == ("coupled", 0.25, 2, 5)
    assert "unnudge" not in asked and "guidance" not in asked
    edit_case(recording, reference, bench.cases[0], SETTINGS, seed=5)
    assert recording.asked["method"] is None and recording.asked["steps"] == 1 and recording.asked["unnudge"]


@pytest.mark.parametrize("successes, total", [(0, 7), (3, 7), (31, 72), (72, 72)])
def test_intervals_are_wilsons(successes, total):
    rate, z = Rate.of([1.0] * successes + [0.0] * (total - successes)), 1.959964
    share = successes / total
    middle = (share + z**2 / (2 * total)) / (1 + z**2 / total)
    half = z / (1 + z**2 / total) * math.sqrt(share * (1 - share) / total + z**2 / (4 * total**2))
    assert (rate.low, rate.high) == pytest.approx((middle - half, middle + half), abs=1e-6)
    assert rate.share == share and re.fullmatch(r"\d+ % \(\d+–\d+\)", str(rate))


def test_the_best_are_those_that_none_beats():
    points = [Point(str(i), kept, success, 0.0, 0.0) for i, (kept, success) in enumerate(
        [(1.0, 9.0), (2.0, 5.0), (2.0, 7.0), (3.0, 7.0), (3.0, 7.0), (4.0, 1.0)]
    )]  # fmt: skip
    assert [point.name for point in pareto(points)] == ["0", "3", "4", "5"]


def test_the_command(checkpoint, tmp_path, capsys):
    arguments = ("--known-answers", "--scenes", 1, "--steps", 1, "--methods", "none", "--out", tmp_path / "out")
    assert run("evaluate", "-m", checkpoint, *arguments) == 0
    told = capsys.readouterr().out
    assert "| none | 6 |" in told and f"{tmp_path}/out/report.html" in told
    assert run("evaluate", "-m", checkpoint, *arguments, "--worker", "1/2") == 0
    assert "| autoencoder | 6 |" in capsys.readouterr().out


KNOWN = ("evaluate", "-m", "{model}", "--known-answers", "--out", "{out}")


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("evaluate", "-m", "{model}", "--out", "{out}"), "give one of --known-answers, --pie"),
        ((*KNOWN, "--pie", "folder"), "give one of"),
        (("evaluate", "--known-answers", "--out", "{out}"), "--model and --out are needed"),
        ((*KNOWN, "--methods", "best"), "unknown method best in --methods; known: reference, none, coupled"),
        ((*KNOWN, "--methods", "a b"), "cannot read --methods"),
        ((*KNOWN, "--scenes", "0"), "--scenes must be at least 1"),
        ((*KNOWN, "--width", "32"), "drawn scenes are square"),
        ((*KNOWN, "--width", "33"), "--width must be multiples of 16"),
        ((*KNOWN, "--clip", "toyworld-clip"), "--clip has no effect on drawn scenes"),
        ((*KNOWN[:3], "--pie", "nowhere", "--scenes", "3", "--out", "{out}"), "--scenes has no effect"),
        (("evaluate", "--draw-pie", "{out}", "--steps", "3"), "--steps has no effect with --draw-pie"),
        ((*KNOWN, "--worker", "3/2"), "--worker must be such as"),
        ((*KNOWN[:3], "--pie", "nowhere", "--out", "{out}"), "no mapping_file.json"),
        ((*KNOWN[:3], "--captions", "nowhere", "--out", "{out}"), "no file at nowhere"),
        (("evaluate", "-m", "nowhere", *KNOWN[3:]), "no checkpoint at nowhere"),
    ],
)  # fmt: skip
def test_mistakes_end_with_one_line_and_leave_nothing(arguments, message, checkpoint, tmp_path, capsys):
    filled = [part.format(model=checkpoint, out=tmp_path / "out") for part in arguments]
    assert run(*filled) == 2
    told = capsys.readouterr().err.strip()
    assert told.startswith("Error: ") and "\n" not in told and message in told
    assert list(tmp_path.iterdir()) == []


def test_a_methods_own_numbers_reach_it(flow, bench):
    passes = [
        edit_case(flow, method, bench.cases[0], EvaluationSettings(steps=4), seed=0).passes
        for method in parse_methods("flowedit:begin=0,flowedit:begin=0.5,flowedit:begin=0.5:steps=8")
    ]
    assert passes[0] == passes[2] == 2 * passes[1] > 0
