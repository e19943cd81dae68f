"""Successive elimination: a layer is measured no more once it is clear whether it is vital.

The exhaustive sweep measures every layer on all N prompts. Here prompts come in rounds, in their order. After each
round, what every layer's mean over the N prompts may turn out to be is drawn from what k of them showed (Student's
distribution, corrected for drawing k of a finite N), the rule is applied to each draw, and a layer whose place is
the same in all but error / n of the draws (n layers: Bonferroni) is left out of later rounds.

The claim: the set is the exhaustive sweep's with at least 1 − error probability over the order of the prompts, as
far as means of k prompts are normally distributed and layers that were left out stay where they were. Rounds are
not counted as further tests; that the claim holds all the same is checked by simulation on recorded sweeps
(`benchmarks/vitality.py`). It holds for "top" and "threshold" whatever the vitalities, and for "auto" where the
layers do fall into two groups: without any gap its boundary hangs on every layer, and the set differs more often.
"""

import dataclasses
from collections.abc import Callable

import numpy as np
from jaxtyping import Bool, Float

from sflow_jax.errors import SettingError
from sflow_jax.vitality.scores import Rule

FIRST, MORE = 6, 4
"""Prompts of the first round, and of each later one."""
DRAWS = 4000
# Correlation of a layer's vitality with the size of the set from which on the layer stays in the sweep.
INFLUENCE = 0.1


@dataclasses.dataclass(frozen=True)
class Elimination:
    """When a layer has been seen enough.

    rule: how the set is chosen. prompts: N of the exhaustive sweep. error: largest probability of another set.
    """

    rule: Rule
    prompts: int
    error: float = 0.05

    def __post_init__(self) -> None:
        if not 0 < self.error < 1:
            raise SettingError(f"`error` must be between 0 and 1, found {self.error:g}")

    @property
    def rounds(self) -> list[int]:
        """Number of prompts seen after each round; the last is N."""
        return [*range(FIRST, self.prompts, MORE), self.prompts]

    def undecided(self, similarities: Float[np.ndarray, "p n"]) -> Bool[np.ndarray, " n"]:
        """Layers to go on with after a round: their own place is open, or another's hangs on them.

        similarities: NaN where not seen; every layer has been seen on two prompts or more.
        """
        seen = (~np.isnan(similarities)).sum(axis=0)
        vitality = 1 - np.nanmean(similarities, axis=0)
        # Drawing k of a finite N without replacement: at k = N nothing is left open.
        spread = np.nanstd(similarities, axis=0, ddof=1) * np.sqrt((1 - seen / self.prompts) / seen)
        rng = np.random.default_rng(int(seen.sum()))
        possible = vitality[None] + spread[None] * rng.standard_t(seen - 1, size=(DRAWS, len(seen)))
        chosen = self.rule(possible)
        share, doubt = chosen.mean(axis=0), self.error / len(seen)
        open_places = (doubt < share) & (share < 1 - doubt)
        if not open_places.any():
            return open_places
        # With the rule "auto" a layer far from the boundary may still decide where the boundary is.
        count = chosen.sum(axis=1)
        count, centred = count - count.mean(), possible - possible.mean(axis=0)[None]
        scale = np.linalg.norm(count) * np.linalg.norm(centred, axis=0)
        correlation = np.abs(count @ centred) / np.where(scale > 0, scale, 1.0)
        return (open_places | (correlation > INFLUENCE)) & (spread > 0)


def simulate(
    elimination: Elimination, similarities: Float[np.ndarray, "p n"]
) -> tuple[Bool[np.ndarray, " n"], int]:
    """The set that an adaptive sweep would choose on a recorded full one, and its generations, references too."""
    return run(elimination, similarities.shape[1], lambda prompts, layers: similarities[np.ix_(prompts, layers)])


def run(
    elimination: Elimination,
    layers: int,
    measure: Callable[[np.ndarray, np.ndarray], Float[np.ndarray, "p n"]],
) -> tuple[Bool[np.ndarray, " n"], int]:
    """Rounds until every layer is clear; `measure(prompts, layers)` gives the similarities of all combinations."""
    table = np.full((elimination.prompts, layers), np.nan)
    active, before, generations = np.arange(layers), 0, 0
    for count in elimination.rounds:
        prompts = np.arange(before, count)
        table[np.ix_(prompts, active)] = measure(prompts, active)
        generations += len(prompts) * (1 + len(active))
        before = count
        active = np.flatnonzero(elimination.undecided(table) & ~np.isnan(table[before - 1]))
        if not len(active):
            break
    return elimination.rule(1 - np.nanmean(table, axis=0)), generations
