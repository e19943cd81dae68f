"""What an evaluation says: a row a picture, a line a method, as CSV, JSON and Markdown."""

import csv
import dataclasses
import io
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy.stats import binomtest

from sflow_jax.evaluation.cases import Benchmark, Column, Scores
from sflow_jax.storage.files import without_nan

# Of the intervals of rates.
COVERAGE = 0.95
DASH = "–"


@dataclasses.dataclass(frozen=True)
class Row:
    """One edited picture.

    number: of the edit in its case. group: its family. scores: column → number. remark: what the benchmark says of
    it. passes, seconds: its share of its batch's.
    """

    method: str
    case: str
    number: int
    group: str
    prompt: str
    edit: str
    scores: Scores
    remark: str
    passes: float
    seconds: float


@dataclasses.dataclass(frozen=True)
class Rate:
    """How many of how many, and Wilson's 95 % interval of the rate; edits are taken as independent."""

    successes: int
    total: int
    low: float
    high: float

    @classmethod
    def of(cls, outcomes: Sequence[float]) -> "Rate":
        """From zeros and ones, at least one."""
        successes, total = int(sum(outcomes)), len(outcomes)
        interval = binomtest(successes, total).proportion_ci(COVERAGE, method="wilson")
        return cls(successes, total, float(interval.low), float(interval.high))

    @property
    def share(self) -> float:
        """0..1."""
        return self.successes / self.total

    def __str__(self) -> str:
        return f"{100 * self.share:.0f} % ({100 * self.low:.0f}–{100 * self.high:.0f})"


@dataclasses.dataclass(frozen=True)
class MethodSummary:
    """One method over all pictures.

    rate: of the benchmark's share; None where it has none. groups: family → its rate. means: column → mean of what
    is known, NaN where nothing is. kept: family → mean of what the chart calls preservation. passes: mean. seconds:
    median a picture, so that compiling once does not count.
    """

    method: str
    pictures: int
    rate: Rate | None
    groups: dict[str, Rate]
    means: dict[str, float]
    kept: dict[str, float]
    passes: float
    seconds: float

    @property
    def worst(self) -> str | None:
        """The family with the lowest rate."""
        return min(self.groups, key=lambda group: self.groups[group].share) if self.groups else None


@dataclasses.dataclass(frozen=True)
class Summary:
    """An evaluation's results.

    share: the column that is told as a rate, where there is one. kept: the one that the chart calls preservation.
    notes: what a reader of the table must know. settings: the run's manifest.
    """

    benchmark: str
    share: str | None
    kept: Column
    notes: tuple[str, ...]
    columns: tuple[Column, ...]
    methods: tuple[MethodSummary, ...]
    rows: tuple[Row, ...]
    settings: dict[str, Any]
    costs: dict[str, Any]

    def to_csv(self) -> str:
        """The text of `scores.csv`: one line an edited picture, scores as measured, empty where not known."""
        lines, names = io.StringIO(), [column.name for column in self.columns]
        writer = csv.writer(lines, lineterminator="\n")
        writer.writerow(["method", "case", "group", "prompt", "edit", *names, "remark", "passes", "seconds"])
        for row in self.rows:
            numbers = [_cell(row.scores[name]) for name in names]
            costs = [_cell(row.passes), f"{row.seconds:.4f}"]
            writer.writerow([row.method, row.case, row.group, row.prompt, row.edit, *numbers, row.remark, *costs])
        return lines.getvalue()

    def to_json(self) -> str:
        """The text of `summary.json`: all but the rows; NaN as null."""
        methods = [dataclasses.asdict(method) | {"worst": method.worst} for method in self.methods]
        content = {
            "benchmark": self.benchmark,
            "notes": self.notes,
            "methods": methods,
            "settings": self.settings,
            "costs": self.costs,
        }
        return json.dumps(without_nan(content), indent=1, ensure_ascii=False) + "\n"

    def to_markdown(self) -> str:
        """The text of `summary.md`: a table of methods, and one of families where they have rates."""
        lines = [
            f"# {self.benchmark[0].upper()}{self.benchmark[1:]}",
            "",
            *(f"- {note}" for note in self.notes),
            "",
        ]
        lines += markdown_table(*self.table())
        for table in self.group_tables():
            lines += ["", *markdown_table(*table)]
        costs = "; ".join(f"{name} {value}" for name, value in self.costs.items())
        return "\n".join([*lines, "", f"Costs: {costs}.", ""])

    def table(self) -> tuple[list[str], list[list[str]]]:
        """Titles and cells: a line a method."""
        rated = any(method.rate for method in self.methods)
        shown = [column for column in self.columns if not (rated and column.name == self.share)]
        titles = ["method", "pictures", *([f"{self.share} (95 %)", "worst family"] if rated else [])]
        titles += [*(column.title for column in shown), "passes", "seconds a picture"]
        return titles, [self._cells(method, shown, rated) for method in self.methods]

    def group_tables(self) -> list[tuple[list[str], list[list[str]]]]:
        """Titles and cells, a line a method and a column a family: rates, and how much is kept.

        None where the benchmark has no rates.
        """
        groups = list(dict.fromkeys(group for method in self.methods for group in method.groups))
        if not groups:
            return []
        rates, kept = [], []
        for method in self.methods:
            rates.append([method.method, *(str(method.groups.get(group, DASH)) for group in groups)])
            values = (method.kept.get(group, math.nan) * self.kept.scale for group in groups)
            kept.append([method.method, *(_number(value, self.kept.digits) for value in values)])
        return [([f"{self.share} (95 %)", *groups], rates), ([self.kept.title, *groups], kept)]

    def _cells(self, method: MethodSummary, shown: Sequence[Column], rated: bool) -> list[str]:
        rate = []
        if rated:
            worst = method.groups.get(method.worst or "")
            rate = [str(method.rate), f"{method.worst} {100 * worst.share:.0f} %" if worst else DASH]
        means = [_number(method.means[column.name] * column.scale, column.digits) for column in shown]
        costs = [_number(method.passes, 0), _number(method.seconds, 3)]
        return [method.method, str(method.pictures), *rate, *means, *costs]


def summarise(
    benchmark: Benchmark,
    rows: Sequence[Row],
    labels: Sequence[str],
    settings: Mapping[str, Any],
    costs: Mapping[str, Any],
) -> Summary:
    """Rates, means and costs of every method."""
    methods = [_method(benchmark, label, [row for row in rows if row.method == label]) for label in labels]
    return Summary(
        benchmark.name,
        benchmark.share,
        next(column for column in benchmark.columns if column.name == benchmark.chart[1].column),
        tuple(benchmark.notes),
        benchmark.columns,
        tuple(methods),
        tuple(rows),
        dict(settings),
        dict(costs),
    )


def _method(benchmark: Benchmark, label: str, rows: Sequence[Row]) -> MethodSummary:
    rate, groups = None, {}
    if benchmark.share is not None:
        groups = {group: Rate.of(values) for group, values in _by_group(rows, benchmark.share).items()}
        rate = Rate.of([row.scores[benchmark.share] for row in rows])
    return MethodSummary(
        method=label,
        pictures=len(rows),
        rate=rate,
        groups=groups,
        means={column.name: _mean([row.scores[column.name] for row in rows]) for column in benchmark.columns},
        kept={group: _mean(values) for group, values in _by_group(rows, benchmark.chart[1].column).items()},
        passes=_mean([row.passes for row in rows]),
        seconds=float(np.median([row.seconds for row in rows])),
    )


def _by_group(rows: Sequence[Row], column: str) -> dict[str, list[float]]:
    values: dict[str, list[float]] = {}
    for row in rows:
        values.setdefault(row.group, []).append(row.scores[column])
    return values


def _mean(values: Sequence[float]) -> float:
    known = [value for value in values if not np.isnan(value)]
    return float(np.mean(known)) if known else float("nan")


def _number(value: float, digits: int) -> str:
    return DASH if np.isnan(value) else f"{value:.{digits}f}"


def _cell(value: float) -> str:
    return "" if np.isnan(value) else f"{value:.6g}"


def markdown_table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of Markdown."""
    return [f"| {' | '.join(titles)} |", "|" + " --- |" * len(titles), *(f"| {' | '.join(row)} |" for row in rows)]
