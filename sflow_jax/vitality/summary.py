"""What a sweep found, made from its table of similarities: what `scores.json`, `scores.csv` and the report tell.

Axes: p prompts, v variants, n layers.
"""

import csv
import dataclasses
import io
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal

import msgspec
import numpy as np
from jaxtyping import Float

from sflow_jax.settings import MOST_STEPS, PICTURES
from sflow_jax.storage.checksums import signed, unsigned
from sflow_jax.storage.files import without_nan
from sflow_jax.typed import Count, Name, parse_json, typed
from sflow_jax.vitality.scores import (
    IMPORTANCES,
    MEASURES,
    RESAMPLES,
    Choice,
    Importance,
    Rule,
    Variant,
    VariantScore,
    agreement,
    choose,
    interval,
    rank_correlation,
    resampled_means,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NO_SCORES = "this is not a sweep's scores.json"


@dataclasses.dataclass(frozen=True)
class Table:
    """Similarities of bypassed pictures to their references, float64 [p, v] a measure, seeds averaged.

    NaN where an adaptive sweep did not look.
    """

    variants: tuple[Variant, ...]
    values: dict[str, Float[np.ndarray, "p v"]]

    def columns(self, chosen: Sequence[int]) -> "Table":
        """Some of the variants."""
        return Table(
            tuple(self.variants[i] for i in chosen), {name: x[:, list(chosen)] for name, x in self.values.items()}
        )


class SweepRecord(msgspec.Struct):
    """What a sweep's settings must say."""

    steps: Annotated[int, msgspec.Meta(ge=1, le=MOST_STEPS)]
    by: Literal["pictures", "edits"] = "pictures"
    layer_kinds: Annotated[tuple[tuple[Name, Count], ...], msgspec.Meta(min_length=1, max_length=10)] = (("", 0),)
    prompts: tuple[str, ...] = ()
    model: str = ""


@dataclasses.dataclass(frozen=True)
class PromptScore:
    """One prompt, its number, and what every single layer does to its pictures: a number a layer, in their order.

    NaN where an adaptive sweep did not look.
    """

    prompt: int
    vitality: tuple[float, ...]
    clip: tuple[float, ...]
    psnr: tuple[float, ...]
    ssim: tuple[float, ...]


@dataclasses.dataclass(frozen=True)
class Pair:
    """Two layers bypassed together. interaction: vitality above the sum of their own (below 0: they overlap)."""

    score: VariantScore
    interaction: float


@dataclasses.dataclass(frozen=True)
class Halves:
    """The sweep cut into two disjoint halves of its prompts: how far they agree (rank correlation, Jaccard)."""

    rank_correlation: float
    agreement: float
    layers: tuple[tuple[int, ...], tuple[int, ...]]


@dataclasses.dataclass(frozen=True, repr=False)
class Summary:
    """A sweep's findings; notebooks show its chart.

    settings: the manifest's (model, prompts, steps, …; `layer_kinds` tells the kinds of layers apart). `by` there
    says what vitality is: of pictures without a layer, or what its injection is worth to edits (`importance`).
    layers: single layers bypassed at every step, by number. windows: single layers bypassed in a part of the
    steps. rank_correlations: of the layers' vitality with what the other measures would call it. by_prompt: the
    single layers once more, prompt by prompt; empty where an older file was read.
    """

    settings: dict[str, Any]
    layers: tuple[VariantScore, ...]
    windows: tuple[VariantScore, ...]
    pairs: tuple[Pair, ...]
    choice: Choice
    rank_correlations: dict[str, float]
    halves: Halves | None
    by_prompt: tuple[PromptScore, ...] = ()

    def __repr__(self) -> str:
        layers = ", ".join(map(str, self.choice.layers)) or "none"
        agree = f"the same in {self.choice.confidence:.0%} of resamples"
        return f"<vital layers {layers} of {len(self.layers)} ({self.choice.rule}; {agree})>"

    @property
    def vitality(self) -> Float[np.ndarray, " n"]:
        """Of every layer, in their order."""
        return np.array([score.vitality for score in self.layers])

    @property
    def by(self) -> str:
        """What the sweep looked at: "pictures" or "edits"."""
        return self.settings.get("by", PICTURES)

    @property
    def importance(self) -> Importance:
        """What its scores are, in words."""
        return IMPORTANCES[self.by]

    @property
    def kinds(self) -> list[str]:
        """Names of the model's kinds of layers, in global order."""
        return [kind for kind, _ in self.settings["layer_kinds"]]

    def kind_of(self, layer: int) -> str:
        """The kind of a layer, by its global number."""
        ends = np.cumsum([count for _, count in self.settings["layer_kinds"]])
        return self.kinds[int(np.searchsorted(ends, layer, side="right").clip(max=len(ends) - 1))]

    def plot(self) -> "Figure":
        """The chart of the report, a matplotlib figure: one bar a layer, with its interval."""
        from sflow_jax.vitality.charts import vitality_chart

        return vitality_chart(self)

    def _repr_png_(self) -> bytes:
        """How notebooks show it."""
        from sflow_jax.vitality.charts import to_png

        return to_png(self.plot())

    def to_dict(self) -> dict[str, Any]:
        """What `scores.json` holds, in lists, dicts, numbers and text; NaN and infinity as None."""
        return without_nan(dataclasses.asdict(self))

    def to_json(self) -> str:
        """The text of `scores.json`, with its own checksum; NaN and infinity as null."""
        return signed(self.to_dict())

    @classmethod
    def from_json(cls, text: str | bytes) -> "Summary":
        """Inverse of `to_json`; ValueError where the text is not one, or was changed."""
        try:
            signed_fields = parse_json(text, dict[str, Any])
        except ValueError as error:
            raise ValueError(f"{NO_SCORES} ({error}); finish the sweep again") from error
        fields = unsigned(signed_fields)
        try:
            known = {name: _numbers(value) for name, value in fields.items() if name not in ("settings", "halves")}
            halves = None if fields.get("halves") is None else _numbers(fields["halves"])
            settings = _current(typed(fields.get("settings"), dict[str, Any]))
            typed(settings, SweepRecord)
            return typed({**known, "settings": settings, "halves": halves}, cls)
        except ValueError as error:
            raise ValueError(f"{NO_SCORES} ({error}); finish the sweep again") from error

    def to_csv(self) -> str:
        """The text of `scores.csv`: one line a variant, then one a layer and prompt (its number)."""
        lines = io.StringIO()
        names = [field.name for field in dataclasses.fields(VariantScore)]
        writer = csv.DictWriter(lines, [*names, "vital", "prompt"], lineterminator="\n")
        writer.writeheader()
        for score in (*self.layers, *self.windows, *(pair.score for pair in self.pairs)):
            writer.writerow(self._row(score))
        for prompt in self.by_prompt:
            for at, score in enumerate(self.layers):
                seen = {name: getattr(prompt, name)[at] for name in ("vitality", *MEASURES[1:])}
                alone = {"prompts": 1, "low": "", "high": "", "prompt": prompt.prompt}
                if not np.isnan(seen["vitality"]):
                    writer.writerow(self._row(score) | seen | alone)
        return lines.getvalue()

    def _row(self, score: VariantScore) -> dict[str, Any]:
        vital = int(len(score.layers) == 1 and score.layers[0] in self.choice.layers)
        return dataclasses.asdict(score) | {"layers": "+".join(map(str, score.layers)), "vital": vital}


def summarise(table: Table, settings: dict[str, Any], rule: Rule) -> Summary:
    """Vitality of every variant, and the vital set.

    Steps, layers, windows and pairs are told apart by the variants themselves: a variant of one layer in all
    `settings["steps"]` steps is a layer's.
    """
    scores = _variant_scores(table)
    in_all_steps = [v.first == 0 and v.last == settings["steps"] for v in table.variants]
    alone = [len(v.layers) == 1 for v in table.variants]
    singles = [i for i, both in enumerate(zip(in_all_steps, alone)) if all(both)]
    own = {scores[i].layers[0]: scores[i].vitality for i in singles}
    layers = [scores[i].layers[0] for i in singles]
    single = table.columns(singles)
    others = {name: -_mean(single.values[name]) for name in MEASURES[1:]}
    vitality = np.array([scores[i].vitality for i in singles])
    return Summary(
        settings=settings,
        layers=tuple(scores[i] for i in singles),
        windows=tuple(score for score, spans, one in zip(scores, in_all_steps, alone) if one and not spans),
        pairs=tuple(
            Pair(score, score.vitality - sum(own[layer] for layer in score.layers))
            for score, one in zip(scores, alone)
            if not one
        ),
        choice=choose(single.values["dino"], layers, rule),
        rank_correlations={name: rank_correlation(vitality, values) for name, values in others.items()},
        halves=_halves(single.values["dino"], layers, rule),
        by_prompt=_by_prompt(single),
    )


def _by_prompt(single: Table) -> tuple[PromptScore, ...]:
    values = {name: single.values[name] for name in MEASURES[1:]} | {"vitality": 1 - single.values["dino"]}
    return tuple(
        PromptScore(number, **{name: tuple(rows[number].tolist()) for name, rows in values.items()})
        for number in range(len(values["vitality"]))
    )


def _variant_scores(table: Table) -> list[VariantScore]:
    with np.errstate(invalid="ignore"):
        low, high = interval(1 - resampled_means(table.values["dino"], resamples=RESAMPLES))
        means = {name: _mean(values) for name, values in table.values.items()}
    prompts = (~np.isnan(table.values["dino"])).sum(axis=0)
    return [
        VariantScore(
            **dataclasses.asdict(variant),
            prompts=int(prompts[i]),
            vitality=float(1 - means["dino"][i]),
            low=float(low[i]),
            high=float(high[i]),
            **{name: float(means[name][i]) for name in MEASURES[1:]},
        )
        for i, variant in enumerate(table.variants)
    ]


def _mean(values: Float[np.ndarray, "p v"]) -> Float[np.ndarray, " v"]:
    """Over the prompts that were seen; NaN for variants that were never seen, or a measure that nobody took."""
    seen = ~np.isnan(values)
    return np.where(seen.any(axis=0), np.nansum(values, axis=0) / np.maximum(seen.sum(axis=0), 1), np.nan)


def _halves(similarities: Float[np.ndarray, "p n"], layers: list[int], rule: Rule) -> Halves | None:
    """Even against odd prompts; None where a half lacks a layer."""
    halves = [similarities[::2], similarities[1::2]]
    if any(len(half) == 0 or np.isnan(half).all(axis=0).any() for half in halves):
        return None
    first, second = (1 - np.nanmean(half, axis=0) for half in halves)
    sets = tuple(choose(half, layers, rule, resamples=1).layers for half in halves)
    return Halves(rank_correlation(first, second), agreement(*sets), sets)


def _current(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings as they are written now; sweeps of version 0.1 told FLUX.1's two kinds by one number."""
    if not isinstance(settings.get("double_blocks"), int):
        return settings
    first, total = settings["double_blocks"], 1 + max(settings.get("layers", [0]))
    kinds = [["double", first], ["single", max(0, total - first)]]
    return {name: value for name, value in settings.items() if name != "double_blocks"} | {"layer_kinds": kinds}


def _numbers(value: Any) -> Any:
    """None as NaN, which JSON cannot say."""
    if isinstance(value, dict):
        return {key: _numbers(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_numbers(item) for item in value]
    return float("nan") if value is None else value
