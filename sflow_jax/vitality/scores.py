"""From similarities of pictures to vital layers: vitality, intervals, and the choice of a set.

Axes: p prompts, v variants (what was bypassed, and when), n layers, r bootstrap resamples.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float
from scipy.stats import rankdata

from sflow_jax.errors import SettingError
from sflow_jax.settings import EDITS, PICTURES

RESAMPLES = 2000
# Share of them that must choose a set before it is recorded without being asked twice.
SURE = 0.9
# Of the intervals.
COVERAGE = 0.95
MEASURES = ("dino", "clip", "psnr", "ssim")
"""What every bypassed picture is compared with its reference by: DINOv2's and CLIP's cosine similarity of global
features, PSNR in dB, and SSIM. Vitality is made of the first; the others are told beside it."""


@dataclasses.dataclass(frozen=True)
class Importance:
    """What a sweep's score of a layer is, in words.

    name: in tables. title: with its unit. about: how it is computed. tried: what is done to a layer. case: what
    scores are means over.
    """

    name: str
    title: str
    about: str
    tried: str
    case: str


IMPORTANCES = {
    PICTURES: Importance(
        "vitality",
        "vitality",
        "1 − the mean cosine similarity of DINO features of the pictures painted with and without it",
        "layer bypassed",
        "prompt",
    ),
    EDITS: Importance(
        "worth",
        "worth (dB)",
        "dB gained outside the edit where the layer alone injects, halved where that costs a twentieth of the "
        "edits (of photos: of CLIP's similarity)",
        "the only layer that injects",
        "source",
    ),
}
"""By what a sweep looks at: pictures without a layer, or edits with its injection alone."""


@dataclasses.dataclass(frozen=True)
class Variant:
    """Layers that are bypassed together, in steps `first` up to but not including `last`."""

    layers: tuple[int, ...]
    first: int
    last: int


@dataclasses.dataclass(frozen=True)
class VariantScore:
    """One variant: vitality with its 95 % interval over prompts, and the mean of every other measure."""

    layers: tuple[int, ...]
    first: int
    last: int
    prompts: int
    vitality: float
    low: float
    high: float
    clip: float
    psnr: float
    ssim: float


@dataclasses.dataclass(frozen=True)
class Rule:
    """How the vital set is chosen.

    kind: "top" (the `value` most vital layers), "threshold" (vitality of at least `value`: the paper's rule) or
    "auto" (see `largest_contrast`).
    """

    kind: str = "auto"
    value: float | int | None = None

    def __post_init__(self) -> None:
        if self.kind not in ("auto", "top", "threshold"):
            raise ValueError(f"the rule must be auto, top or threshold, found {self.kind!r}")
        if (self.kind == "auto") != (self.value is None):
            raise ValueError(f"the rule {self.kind} needs {'no' if self.kind == 'auto' else 'a'} value")
        if self.kind == "top" and self.value < 1:
            raise SettingError(f"`top` must be at least 1, found {self.value:g}")

    def check(self, layers: int) -> None:
        """SettingError where so many layers are too few to choose from."""
        if self.kind == "top" and self.value > layers:
            raise SettingError(f"`top` {self.value:g} is more than the {layers} layers that are compared")

    def __str__(self) -> str:
        return self.kind if self.value is None else f"{self.kind} {self.value:g}"

    def __call__(self, vitality: Float[np.ndarray, "*r n"]) -> Bool[np.ndarray, "*r n"]:
        """Which layers are vital, for one vector of vitalities or many."""
        if self.kind == "threshold":
            return vitality >= self.value
        if self.kind == "auto":
            return largest_contrast(vitality)
        self.check(vitality.shape[-1])
        ranks = np.argsort(np.argsort(-vitality, axis=-1, kind="stable"), axis=-1)
        return ranks < self.value


@dataclasses.dataclass(frozen=True)
class Choice:
    """A vital set and how sure it is.

    layers: global numbers. boundary: vitality half-way between the least vital layer chosen and the most vital one
    left out (infinite on the side where there is none). confidence: share of bootstrap resamples of the prompts
    that choose the same set. membership: for each layer compared, the share that choose it.
    """

    layers: tuple[int, ...]
    rule: str
    boundary: float
    confidence: float
    membership: tuple[float, ...]


def largest_contrast(vitality: Float[np.ndarray, "*r n"]) -> Bool[np.ndarray, "*r n"]:
    """Split each row in two groups that differ most (least squares within groups; Otsu 1979, Fisher 1958).

    The upper group is vital. Nothing has to be set, and it does not change when all vitalities are scaled. A row
    of equal vitalities has no vital layer; NaN is left out.
    """
    order = np.argsort(-vitality, axis=-1, kind="stable")
    ordered = np.take_along_axis(vitality, order, axis=-1)
    known = ~np.isnan(ordered)
    values = np.where(known, ordered, 0.0)
    above, total = np.cumsum(known, axis=-1), known.sum(axis=-1, keepdims=True)
    below = total - above
    sum_above = np.cumsum(values, axis=-1)
    sum_below = values.sum(axis=-1, keepdims=True) - sum_above
    difference = sum_above / np.maximum(above, 1) - sum_below / np.maximum(below, 1)
    # Splitting off k of n explains k (n − k) / n times the squared difference of the means.
    explained = np.where(known & (below > 0), above * below * difference**2, 0.0)
    # Equal up to rounding is equal.
    differ = explained.max(axis=-1) > 1e-12 * np.sum(values**2, axis=-1)
    count = np.where(differ, explained.argmax(axis=-1) + 1, 0)
    ranks = np.argsort(order, axis=-1, kind="stable")
    return ranks < count[..., None]


def resampled_means(
    values: Float[np.ndarray, "p v"], *, resamples: int = RESAMPLES, seed: int = 0
) -> Float[np.ndarray, "r v"]:
    """Means over prompts drawn with replacement, the same draws for all variants; NaN is left out."""
    prompts = len(values)
    rng = np.random.default_rng(seed)
    # How often each prompt is drawn: one product with the values is all that the means need.
    weights = rng.multinomial(prompts, np.full(prompts, 1 / prompts), size=resamples).astype(np.float64)
    known = ~np.isnan(values)
    counts = weights @ known
    with np.errstate(invalid="ignore"):
        return np.where(counts > 0, (weights @ np.where(known, values, 0.0)) / counts, np.nan)


def interval(resampled: Float[np.ndarray, "r v"]) -> tuple[Float[np.ndarray, " v"], Float[np.ndarray, " v"]]:
    """Lower and upper end of the percentile interval that covers `COVERAGE`."""
    tail = 100 * (1 - COVERAGE) / 2
    low, high = np.nanpercentile(resampled, [tail, 100 - tail], axis=0)
    return low, high


def choose(
    similarities: Float[np.ndarray, "p n"], layers: Sequence[int], rule: Rule, *, resamples: int = RESAMPLES
) -> Choice:
    """The vital set of layers, from the similarity of every prompt's pictures with and without each of them."""
    again = 1 - resampled_means(similarities, resamples=resamples)
    return choice_of(1 - np.nanmean(similarities, axis=0), again, layers, rule)


def choice_of(
    scores: Float[np.ndarray, " n"], again: Float[np.ndarray, "r n"], layers: Sequence[int], rule: Rule
) -> Choice:
    """The set of layers by their scores. again: the scores of every resample."""
    chosen, sets = rule(scores), rule(again)
    least_in = scores[chosen].min(initial=np.inf)
    most_out = scores[~chosen].max(initial=-np.inf)
    return Choice(
        layers=tuple(int(layer) for layer, vital in zip(layers, chosen) if vital),
        rule=str(rule),
        boundary=float((least_in + most_out) / 2),
        confidence=float(np.mean((sets == chosen).all(axis=-1))),
        membership=tuple(float(share) for share in sets.mean(axis=0)),
    )


def rank_correlation(first: Float[np.ndarray, " n"], second: Float[np.ndarray, " n"]) -> float:
    """Spearman's, −1..1; NaN where one of the two does not vary."""
    ranks = [rankdata(values) - (len(values) + 1) / 2 for values in (first, second)]
    size = np.linalg.norm(ranks[0]) * np.linalg.norm(ranks[1])
    return float(ranks[0] @ ranks[1] / size) if size else float("nan")


def agreement(first: Sequence[int], second: Sequence[int]) -> float:
    """Layers in both sets over layers in either (Jaccard), 0..1; 1 for two empty sets."""
    either = set(first) | set(second)
    return len(set(first) & set(second)) / len(either) if either else 1.0
