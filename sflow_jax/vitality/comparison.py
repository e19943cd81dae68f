"""Sweeps side by side: how far they agree, and what was done differently."""

import dataclasses
import itertools
import json
from collections.abc import Sequence
from typing import Any

import numpy as np
from etils import epath

from sflow_jax.reports.pages import inline, layer_list, plain, render
from sflow_jax.storage.files import without_nan
from sflow_jax.storage.folders import output_folder
from sflow_jax.storage.paths import absolute
from sflow_jax.vitality.charts import comparison_chart, to_inline_svg, to_png
from sflow_jax.vitality.scores import agreement, rank_correlation
from sflow_jax.vitality.summary import Summary

UNSAID = "not told"


@dataclasses.dataclass(frozen=True)
class RunComparison:
    """What two sweeps agree on.

    layers: numbers of those that both measured; all else is about these. rank_correlation: Spearman's, of their
    vitality. agreement: vital layers of both over those of either (Jaccard). both, only: vital layers in both, and
    in just the first or the second. settings: those that differ, name → the two values.
    """

    names: tuple[str, str]
    runs: tuple[Summary, Summary]
    layers: tuple[int, ...]
    rank_correlation: float
    agreement: float
    both: tuple[int, ...]
    only: tuple[tuple[int, ...], tuple[int, ...]]
    settings: dict[str, tuple[Any, Any]]

    @property
    def vitality(self) -> dict[int, tuple[float, float]]:
        """Layer number → its vitality in the two runs."""
        first, second = map(_vitality, self.runs)
        return {layer: (first[layer], second[layer]) for layer in self.layers}

    def __str__(self) -> str:
        """A few lines for the terminal."""
        lines = [
            f"{name}: vital layers {layer_list(run.choice.layers)} ({run.choice.rule})"
            for name, run in zip(self.names, self.runs)
        ]
        lines.append(
            f"Over the {len(self.layers)} layers that both measured, rank correlation {self.rank_correlation:.3f}; "
            f"vital sets agree {self.agreement:.2f} (layers in both over layers in either)."
        )
        for name, layers in zip(self.names, self.only):
            if layers:
                lines.append(f"Vital in {name} only: {layer_list(layers)}")
        if self.settings:
            lines.append("Settings that differ:")
        for setting, values in self.settings.items():
            lines.append(f"  {setting}: {' → '.join(map(_short, values))}")
        return "\n".join(lines)


def compare(first: Summary, second: Summary, names: tuple[str, str] = ("first", "second")) -> RunComparison:
    """Compare two sweeps on the layers that both measured; ValueError where these are fewer than two."""
    here, there = _vitality(first), _vitality(second)
    layers = tuple(sorted(here.keys() & there.keys()))
    if len(layers) < 2:
        raise ValueError(f"{names[0]} and {names[1]} share {len(layers)} measured layers; a comparison needs two")
    vital, other = ({*run.choice.layers} & {*layers} for run in (first, second))
    return RunComparison(
        names=names,
        runs=(first, second),
        layers=layers,
        rank_correlation=rank_correlation(
            np.array([here[layer] for layer in layers]), np.array([there[layer] for layer in layers])
        ),
        agreement=agreement(sorted(vital), sorted(other)),
        both=tuple(sorted(vital & other)),
        only=(tuple(sorted(vital - other)), tuple(sorted(other - vital))),
        settings=_differing(first.settings, second.settings),
    )


@dataclasses.dataclass(frozen=True)
class SeveralCompared:
    """Every two of some sweeps compared.

    layers: numbers of those that all measured. pairs: of the runs' places, in order, the first with each other.
    settings: those that differ, name → a value a run.
    """

    names: tuple[str, ...]
    runs: tuple[Summary, ...]
    layers: tuple[int, ...]
    pairs: dict[tuple[int, int], RunComparison]
    settings: dict[str, tuple[Any, ...]]

    @property
    def vitality(self) -> dict[int, tuple[float, ...]]:
        """Layer number → its vitality in every run."""
        known = [_vitality(run) for run in self.runs]
        return {layer: tuple(run[layer] for run in known) for layer in self.layers}

    @property
    def vital_in(self) -> dict[int, tuple[str, ...]]:
        """Layer number → names of the runs that call it vital."""
        chosen = list(zip(self.names, (run.choice.layers for run in self.runs)))
        return {layer: tuple(name for name, layers in chosen if layer in layers) for layer in self.layers}

    def to_dict(self) -> dict[str, Any]:
        """What `comparison.json` holds."""
        pairs = [
            {
                "runs": pair.names,
                "layers": len(pair.layers),
                "rank_correlation": pair.rank_correlation,
                "agreement": pair.agreement,
                "both": pair.both,
                "only": pair.only,
            }
            for pair in self.pairs.values()
        ]
        layers = [
            {"layer": layer, "vitality": values, "vital_in": self.vital_in[layer]}
            for layer, values in self.vitality.items()
        ]
        return without_nan({"runs": self.names, "pairs": pairs, "layers": layers, "settings": self.settings})

    def __str__(self) -> str:
        """A few lines for the terminal."""
        return "\n\n".join(map(str, self.pairs.values()))


def compare_all(runs: Sequence[Summary], names: Sequence[str]) -> SeveralCompared:
    """Compare every two of two or more sweeps; ValueError where all together share fewer than two layers."""
    layers = sorted(set.intersection(*({*_vitality(run)} for run in runs)))
    if len(layers) < 2:
        raise ValueError(f"{', '.join(names)} share {len(layers)} measured layers; a comparison needs two")
    pairs = {
        (i, j): compare(runs[i], runs[j], (names[i], names[j]))
        for i, j in itertools.combinations(range(len(runs)), 2)
    }
    settings = _differing(*(run.settings for run in runs))
    return SeveralCompared(tuple(names), tuple(runs), tuple(layers), pairs, settings)


def write_comparison(destination: epath.PathLike, comparison: RunComparison | SeveralCompared) -> None:
    """Write `comparison.html`, `comparison.png` and `comparison.json` into a folder.

    A destination that ends in .html names the page instead, and the others lie beside it. ValueError if the folder
    is a file, OSError if it cannot be written.
    """
    if isinstance(comparison, RunComparison):
        comparison = compare_all(comparison.runs, comparison.names)
    chart = comparison_chart(comparison.runs, comparison.names)
    scores = " or ".join(dict.fromkeys(run.importance.name for run in comparison.runs))
    described = f"Bar charts of the {scores} of every layer in {' and '.join(comparison.names)}"
    place = absolute(destination)
    folder, stem = (place.parent, place.stem) if place.suffix == ".html" else (place, "comparison")
    page = render(
        "comparison.html.jinja", comparison=comparison, chart=inline(to_inline_svg(chart), described), stem=stem
    )
    with output_folder(folder) as output:
        (output.path / f"{stem}.html").write_bytes(page.encode())
        (output.path / f"{stem}.png").write_bytes(to_png(chart))
        text = json.dumps(comparison.to_dict(), indent=1, ensure_ascii=False)
        (output.path / f"{stem}.json").write_bytes(f"{text}\n".encode())


def _vitality(run: Summary) -> dict[int, float]:
    """Of the layers whose vitality is known."""
    return {score.layers[0]: score.vitality for score in run.layers if not np.isnan(score.vitality)}


def _differing(*runs: dict[str, Any]) -> dict[str, tuple[Any, ...]]:
    # Through JSON, so that tuples compare as the lists that they become in a file.
    read = [json.loads(json.dumps(settings)) for settings in runs]
    names = dict.fromkeys(name for settings in read for name in settings)
    values = {name: tuple(settings.get(name, UNSAID) for settings in read) for name in names}
    return {name: row for name, row in values.items() if any(value != row[0] for value in row)}


def _short(value: Any) -> str:
    if isinstance(value, Sequence) and not isinstance(value, str) and len(value) > 6:
        return f"{len(value)} entries"
    text = plain(value)
    return text if len(text) <= 60 else f"{text[:59]}…"
