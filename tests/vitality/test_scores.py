"""Vitality, intervals, and the choice of a set."""

import numpy as np
import pytest

from sflow_jax.vitality.adaptive import Elimination, simulate
from sflow_jax.vitality.scores import Rule, Variant, agreement, choose, rank_correlation
from sflow_jax.vitality.summary import Summary, Table, summarise

VITALITY = np.array([0.40, 0.05, 0.35, 0.06, 0.30, 0.04])


def similarities(prompts: int = 32, spread: float = 0.02, seed: int = 0) -> np.ndarray:
    return 1 - VITALITY[None] - spread * np.random.default_rng(seed).normal(size=(prompts, len(VITALITY)))


@pytest.mark.parametrize("rule", [Rule(), Rule("top", 3), Rule("threshold", 0.2)])
def test_every_rule_finds_clear_layers(rule):
    made = choose(similarities(), range(10, 16), rule)
    assert made.layers == (10, 12, 14)
    assert made.confidence == 1 and made.membership == (1, 0, 1, 0, 1, 0)
    assert 0.06 < made.boundary < 0.30


def test_a_doubtful_layer_is_told():
    vitality = similarities(prompts=8, spread=0.2)
    vitality[:, 4] = 1 - 0.2 - 0.3 * np.random.default_rng(1).normal(size=8)
    made = choose(vitality, range(6), Rule())
    assert made.confidence < 0.95 and 0 < made.membership[4] < 1


def test_auto_ignores_scale_and_finds_nothing_in_equals():
    vitality = 1 - similarities().mean(axis=0)
    np.testing.assert_array_equal(Rule()(vitality), Rule()(0.01 * vitality))
    assert not Rule()(np.full(5, 0.3)).any()


def test_intervals_cover_the_truth():
    variants = tuple(Variant((i,), 0, 4) for i in range(6))
    inside = []
    for seed in range(20):
        values = similarities(spread=0.1, seed=seed)
        table = Table(variants, {"dino": values, "clip": values, "psnr": 30 * values, "ssim": values})
        scores = summarise(table, {"steps": 4}, Rule()).layers
        inside += [score.low <= truth <= score.high for score, truth in zip(scores, VITALITY)]
    assert 0.85 <= np.mean(inside) <= 1.0


def test_a_summary_survives_json_and_tells_windows_and_pairs_apart():
    variants = (
        *(Variant((i,), 0, 4) for i in range(6)),
        Variant((0,), 0, 2),
        Variant((0,), 2, 4),
        Variant((0, 2), 0, 4),
    )
    values = np.concatenate([similarities(), 1 - np.tile([0.3, 0.1, 0.6], (32, 1))], axis=1)
    measures = {"dino": values, "clip": values, "psnr": values, "ssim": np.full_like(values, np.nan)}
    made = summarise(Table(variants, measures), {"steps": 4}, Rule())
    assert [score.layers for score in made.layers] == [(i,) for i in range(6)]
    assert [(score.first, score.last) for score in made.windows] == [(0, 2), (2, 4)]
    assert made.pairs[0].interaction == pytest.approx(0.6 - 0.75, abs=0.02)
    assert made.rank_correlations["clip"] == pytest.approx(1)
    assert made.halves.agreement == 1
    again = Summary.from_json(made.to_json())
    assert again.choice == made.choice and again.halves == made.halves and np.isnan(again.layers[0].ssim)
    assert again.to_json() == made.to_json()
    # Titles, nine variants, and every layer of every prompt.
    assert len(made.to_csv().splitlines()) == 10 + 6 * 32
    with pytest.raises(ValueError, match="finish the sweep"):
        Summary.from_json("{}")


@pytest.mark.parametrize("rule", [Rule(), Rule("top", 3), Rule("threshold", 0.2)])
def test_adaptive_finds_the_same_set_with_fewer_pictures(rule):
    same, spent = [], []
    for seed in range(20):
        table = similarities(prompts=64, spread=0.1, seed=seed)
        found, generations = simulate(Elimination(rule, 64), table)
        same.append(np.array_equal(found, rule(1 - table.mean(axis=0))))
        spent.append(generations / (64 * 7))
    assert np.mean(same) >= 0.95
    assert np.mean(spent) <= 0.4


def test_adaptive_looks_at_everything_if_it_must():
    table = similarities(prompts=24, spread=1.0)
    found, generations = simulate(Elimination(Rule("threshold", float(1 - table[:, 1].mean())), 24), table)
    assert generations > 24 * 2 and found.shape == (6,)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: Rule("best"), "auto, top or threshold"),
        (lambda: Rule("top"), "needs a value"),
        (lambda: Rule("top", 0), "at least 1"),
        (lambda: Rule("top", 7)(VITALITY), "more than the 6 layers"),
        (lambda: Elimination(Rule(), 8, error=1.5), "between 0 and 1"),
    ],
)
def test_bad_rules(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_agreement_of_ranks_and_sets():
    assert rank_correlation(np.array([1.0, 2, 3]), np.array([10.0, 20, 15])) == pytest.approx(0.5)
    assert np.isnan(rank_correlation(np.ones(3), np.arange(3.0)))
    assert agreement((1, 2), (2, 3)) == pytest.approx(1 / 3)
    assert agreement((), ()) == 1
