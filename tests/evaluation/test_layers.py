"""Layers alone: what is gained and lost by each, and photos without right answers."""

import csv
import dataclasses
import itertools
from pathlib import Path

import numpy as np
import pytest
from commandline import run
from PIL import Image
from scipy.stats import spearmanr

import sflow_jax
from sflow_jax.errors import SettingError
from sflow_jax.evaluation.captions import read_captions
from sflow_jax.evaluation.importance import summarise_effects
from sflow_jax.evaluation.known import KnownAnswers
from sflow_jax.evaluation.layers import layer_effects, layers_alone, to_csv, to_markdown, worth
from sflow_jax.evaluation.methods import each_layer
from sflow_jax.evaluation.networks import Networks
from sflow_jax.evaluation.photos import PhotoBench
from sflow_jax.evaluation.run import evaluate
from sflow_jax.evaluation.summary import Row, summarise
from sflow_jax.pictures.files import fit_picture, to_unit
from sflow_jax.settings import EvaluationSettings
from sflow_jax.vitality.comparison import compare
from sflow_jax.vitality.find import read_summary
from sflow_jax.vitality.layer_file import layer_file
from sflow_jax.vitality.scores import Rule, Variant
from sflow_jax.vitality.summary import Summary, Table
from sflow_jax.vitality.summary import summarise as summarise_sweep

ASSETS = Path(sflow_jax.__file__).parent / "toyworld" / "assets"
BENCH = KnownAnswers(4, 0, 64)
# Layer → dB outside and share that happened, of every scene's two edits.
MEASURED = {
    "none": ([28.0, 30.0, 32.0, 30.0], [[1, 1], [1, 1], [1, 0], [1, 1]]),
    "0": ([29.0, 31.5, 33.5, 32.0], [[1, 0], [0, 1], [1, 0], [0, 0]]),
    "1": ([28.5, 30.5, 32.5, 30.5], [[1, 1], [1, 1], [1, 1], [1, 1]]),
    "4": ([27.0, 30.0, 31.0, 30.0], [[1, 1], [1, 0], [1, 0], [1, 1]]),
}
VITALITY = {0: 0.7, 1: 0.2, 4: 0.4, 5: 0.9}


def summary(measured=MEASURED):
    """Of rows that are made up."""
    rows = []
    for layer, (kept, happened) in measured.items():
        for scene, edit in itertools.product(range(4), range(2)):
            scores = {"lost": 0.0, "answer_db": 1.0, "outside_db": kept[scene]}
            scores["happened"] = float(happened[scene][edit])
            label = f"coupled:layers={layer}"
            rows.append(Row(label, f"scene-{scene}", edit, "add", "a", "b", scores, "", 1.0, 1.0))
    return summarise(BENCH, rows, [f"coupled:layers={layer}" for layer in measured], {}, {})


def test_a_layer_gains_and_loses_against_no_injection():
    (alone,) = layers_alone(BENCH, summary(), VITALITY)
    assert (alone.method, alone.kept_without, alone.success_without) == ("coupled", 30.0, 87.5)
    first, second, third = alone.layers
    assert [layer.layer for layer in alone.layers] == [0, 1, 4]
    # Four of seven are lost, and each twentieth takes the gain once more.
    assert (first.gained, first.lost, first.worth) == pytest.approx((1.5, 50, 1.5 / (1 + 20 * 4 / 7)))
    assert first.worth_low < first.worth < first.worth_high
    # More edits than without: nothing is lost.
    assert (second.gained, second.lost, second.worth) == pytest.approx((0.5, -12.5, 0.5))
    assert second.gained_low == second.gained == second.gained_high == second.worth_high
    assert (third.gained, third.lost, third.worth) == pytest.approx((-0.5, 12.5, -0.5))
    assert third.gained_low < -0.5 < third.gained_high
    for name, value in alone.rank_correlations.items():
        known = [getattr(layer, name) for layer in alone.layers]
        assert value == pytest.approx(spearmanr(known, [0.7, 0.2, 0.4]).statistic)


def test_worth_falls_with_what_is_lost_and_is_bounded_where_nothing_is():
    lost = np.linspace(0, 1, 9)
    falling = worth(np.full(9, 2.0), 0.8, 0.8 * (1 - lost))
    assert falling[0] == 2 and (np.diff(falling) < 0).all() and falling[-1] == pytest.approx(2 / 21)
    np.testing.assert_allclose(worth(np.ones(3), 0.8, np.array([0.76, 0.80, 0.84])), [0.5, 1, 1])
    # What keeps less is not the better for losing edits too.
    np.testing.assert_array_equal(worth(np.array([-1.0, -1.0]), 1.0, np.array([1.0, 0.5])), [-1, -1])
    assert np.isnan(worth(np.ones(2), 0.0, np.array([0.0, 1.0]))).all()


def test_a_sweep_by_edits_scores_layers_by_their_worth():
    effects = layer_effects(BENCH, summary())["coupled"]
    settings = {"steps": 20, "prompts": list("abcd"), "layer_kinds": [["double", 2], ["single", 4]]}
    made = summarise_effects(effects, settings, Rule("top", 1))
    (alone,) = layers_alone(BENCH, summary())
    for score, layer in zip(made.layers, alone.layers, strict=True):
        known = (layer.worth, layer.worth_low, layer.worth_high)
        assert score.layers == (layer.layer,) and (score.vitality, score.low, score.high) == known
    assert made.choice.layers == (1,) and (made.importance.name, made.layers[0].prompts) == ("worth", 4)
    assert made.by_prompt[1].vitality == pytest.approx((1.5 / 11, 0.5, 0.0))
    assert made.halves.layers == ((1,), (1,)) and Summary.from_json(made.to_json()).to_json() == made.to_json()
    # The other tools of sweeps take it.
    by_vitality = np.array([[0.3, 0.8, 0.6]] * 4)
    variants = tuple(Variant((layer,), 0, 20) for layer in (0, 1, 4))
    values = dict.fromkeys(("clip", "psnr", "ssim"), by_vitality) | {"dino": by_vitality}
    other = summarise_sweep(Table(variants, values), settings, Rule("top", 1))
    compared = compare(other, made)
    expected = spearmanr([0.7, 0.2, 0.4], made.vitality).statistic
    assert compared.rank_correlation == pytest.approx(expected)
    assert (compared.agreement, compared.only) == (0, ((0,), (1,)))
    assert layer_file(made).sweep["by"] == "edits" and layer_file(made).sets["vital"] == (1,)


def test_nothing_is_known_where_no_edit_happens():
    measured = {layer: (kept, [[0, 0]] * 4) for layer, (kept, _) in MEASURED.items()}
    made = summarise_effects(layer_effects(BENCH, summary(measured))["coupled"], {"steps": 2}, Rule())
    assert np.isnan(made.vitality).all() and made.choice.layers == () and made.halves is None


def test_tables_say_the_same():
    alone = layers_alone(BENCH, summary(), VITALITY)
    rows = list(csv.DictReader(to_csv(alone).splitlines()))
    assert [(row["layer"], row["vitality"]) for row in rows] == [("0", "0.7"), ("1", "0.2"), ("4", "0.4")]
    assert "| 0 | +1.50 (" in to_markdown(alone) and "rank correlation with vitality" in to_markdown(alone)
    unknown = layers_alone(BENCH, summary())
    assert "rank correlation" not in to_markdown(unknown) and next(csv.DictReader(to_csv(unknown).splitlines()))
    # Without a row to compare with there is nothing to say.
    assert layers_alone(BENCH, summary({"0": MEASURED["0"], "1": MEASURED["1"]})) == ()


def test_methods_go_through_all_layers():
    expected = "coupled:begin=.1:layers=none,coupled:begin=.1:layers=0,coupled:begin=.1:layers=1"
    assert each_layer("coupled:begin=.1", range(2)) == expected
    for text in ("coupled:layers=3", "none"):
        with pytest.raises(SettingError, match=f"{text} in methods has layers of its own"):
            each_layer(text, range(2))


def test_a_run_says_what_each_layer_is_worth(flow, tmp_path):
    settings = EvaluationSettings(steps=1, scenes=1, methods="reference", layers_alone=True)
    bench = KnownAnswers(1, 0, 64)
    made = evaluate(flow, bench, settings, tmp_path / "run", vitality=VITALITY, progress=False)
    labels = [f"reference:layers={layer}" for layer in ("none", *range(flow.layers))]
    assert [method.method for method in made.methods] == [*labels, "autoencoder"]
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert {"layers.md", "layers.csv", "layers-1.png", "layers-1.svg"} <= names
    page = (tmp_path / "run" / "report.html").read_text()
    assert "Each layer alone: reference" in page and page.count("<img") == 6 * 3
    # It goes on, whichever way it is asked for.
    again = dataclasses.replace(settings, layers_alone=False, methods=",".join(labels))
    assert evaluate(flow, bench, again, tmp_path / "run", progress=False).rows == made.rows


@pytest.fixture
def lines(photo, tmp_path):
    """A photo and two edits of it."""
    photo.save(tmp_path / "photo.png")
    rows = ["image,source,edit", "photo.png,a red cat,a blue cat", "photo.png,a red cat,a red dog"]
    (tmp_path / "lines.csv").write_text("\n".join(rows))
    return tmp_path / "lines.csv"


def test_photos_are_judged_outside_the_region(lines, photo, flow):
    canvas, asked = flow.info.canvas(), []

    def find(*arguments):
        asked.append(arguments[1:])
        return np.float32(np.arange(16).reshape(4, 4) == len(asked))

    bench = PhotoBench.of(lines, read_captions(lines), canvas, Networks(), 0)
    bench.find = find
    source = fit_picture(photo, canvas.height, canvas.width)
    edited = np.stack([source, source])
    # The second token, and in the other picture the same one: inside the first region, outside the second.
    edited[:, :16, 16:32] = 255 - edited[:, :16, 16:32]
    scores, _ = bench.score(bench.cases[0], edited)
    assert asked == [("a red cat", "a blue cat"), ("a red cat", "a red dog")]
    outside = np.ones((64, 64), bool)
    outside[:16, 32:48] = False
    error = np.square(to_unit(edited[1]) - to_unit(source))[outside].mean()
    assert scores[0]["outside_db"] == 100 and scores[1]["outside_db"] == pytest.approx(-10 * np.log10(error))
    assert np.isnan(scores[0]["clip_text"])
    bench.score(bench.cases[0], edited)
    assert len(asked) == 2


def test_the_command_goes_through_layers_on_photos(checkpoint, lines, tmp_path, capsys):
    out, layers = tmp_path / "out", ("--photos", lines, "--layers-alone", "--methods", "flowedit", "--steps", 2)
    assert run("evaluate", "-m", checkpoint, *layers, "--limit", 1, "-o", out) == 0
    told = capsys.readouterr().out
    assert "| flowedit:layers=4 | 1 |" in told and "# flowedit: each layer alone" in told
    assert Image.open(out / "layers-1.png").width > 500


def test_layers_are_scored_by_edits_of_photos(checkpoint, lines, tmp_path):
    out, clip = tmp_path / "out", ("--clip", "toyworld-clip", "--clip-tokenizer", ASSETS / "tokenizer")
    options = ("--by", "edits", "--photos", lines, *clip, "--methods", "flowedit", "--steps", 2, "--layers", "0,3")
    assert run("vital", "-m", checkpoint, *options, "-o", out) == 0
    made = read_summary(out)
    assert [score.layers for score in made.layers] == [(0,), (3,)] and made.settings["prompts"] == ["a red cat"]
    # One picture: its own edits are the mean.
    np.testing.assert_allclose(made.by_prompt[0].vitality, made.vitality)
    assert Image.open(out / "vital" / "vitality.png").width > 500


def test_a_sweep_by_edits_is_not_shown_beside_itself(checkpoint, tmp_path, capsys):
    made = summarise_effects(layer_effects(BENCH, summary())["coupled"], {"steps": 20}, Rule())
    (tmp_path / "scores.json").write_text(made.to_json())
    options = ("--known-answers", "--layers-alone", "--methods", "reference", "--beside", tmp_path)
    assert run("evaluate", "-m", checkpoint, *options, "-o", tmp_path / "out") == 2
    assert "--beside takes a sweep by pictures" in capsys.readouterr().err


@pytest.mark.parametrize(
    "options, message",
    [
        (("--layers-alone", "--methods", "reference:layers=all"), "in --methods has layers of its own"),
        (("--layers-alone", "--beside", "nowhere", "--methods", "reference"), "no finished sweep at nowhere"),
        (("--beside", "nowhere"), "--beside has no effect without --layers-alone"),
    ],
)
def test_mistakes_end_with_one_line(options, message, checkpoint, tmp_path, capsys):
    assert run("evaluate", "-m", checkpoint, "--known-answers", *options, "-o", tmp_path / "out") == 2
    assert message in capsys.readouterr().err and not (tmp_path / "out").exists()
