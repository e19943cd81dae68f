"""Does any bad input end in silence, in a traceback, without end, or with something left behind?

`python benchmarks/hardness.py --seed 0` runs every case of `benchmarks/hardness/` and writes the table by category.
Handled well is: exit code 2, one line on stderr that begins with `Error:`, has fewer than 400 characters and names
the setting or the file, within 20 seconds and 1 GiB, nothing changed; or exit code 0 with right results where the
input is fine. A part of the cases is drawn by the seed, so another seed has others of the same kinds.
"""

import dataclasses
import json
import random
import re
import sys
import tempfile
import time
import zlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path

import click
from hardness import (
    checkpoints,
    kills,
    layouts,
    pictures,
    places,
    runs,
    settings,
    sources,
    tokenizers,
    weights,
    world,
)
from hardness.cases import REFUSE, Case, shown
from hardness.judge import FAILURES, HANDLED, judge, messages
from hardness.runner import Ended, run_cases, run_command, warm_up

RESULTS = Path(__file__).resolve().parent / "results"
MODULES = (settings, pictures, sources, weights, layouts, tokenizers, checkpoints, runs, places, kills)
HEADINGS = {
    "traceback": "tracebacks",
    "silent": "silent",
    "endless": "endless",
    "left over": "left-overs",
    "unclear": "unclear",
    "late": "late",
    "refused": "refused though fine",
}


def all_cases(seed: int) -> list[Case]:
    """Every case of a seed, each name once."""
    cases: dict[str, Case] = {}
    for module in MODULES:
        # Cases of one file do not depend on how many another file has.
        for case in module.cases(random.Random(f"{seed} {module.__name__}")):
            # Values drawn may be those of a fixed case.
            if cases.setdefault(case.name, case).command != case.command:
                raise ValueError(f"two cases are called {case.name}")
    return list(cases.values())


def quick_part(cases: list[Case], share: float) -> list[Case]:
    """A share of every category, the same for the same names."""
    by_category: dict[str, list[Case]] = defaultdict(list)
    for case in cases:
        by_category[case.category].append(case)
    return [
        case
        for group in by_category.values()
        for case in sorted(group, key=lambda case: zlib.crc32(case.name.encode()))[
            : max(1, round(share * len(group)))
        ]
    ]


# Parts of the world that take seconds, and cases that take many.
CHEAP = {"source", "converted", "dino_source", "clip_source", "dino", "photo.png", "prompts.txt"}
SLOW = ("inversions", "sweeps", "full disks", "homes", "addresses", "settings: counts", "pictures that are fine")


def quick_cases(cases: list[Case]) -> list[Case]:
    """Inputs to be refused that need nothing painted, and are neither huge nor endless."""
    return [
        dataclasses.replace(case, needs=tuple(part for part in case.needs if part in CHEAP))
        for case in cases
        if case.expects == REFUSE
        and not case.category.startswith(SLOW)
        and not {"single", "plain", "run"} & {*case.needs}
        and not re.search(
            r"inversion|result of generate|100 MB|300 MB|pipe|endless|bomb|localhost", f"{case.name} {case.command}"
        )
    ]


def table(rows: Iterable[tuple[Case, str]]) -> Iterator[str]:
    """Lines of a Markdown table: categories × verdicts."""
    counts: dict[str, Counter] = defaultdict(Counter)
    for case, verdict in rows:
        counts[case.category][verdict] += 1
    yield "| inputs | cases | handled well | " + " | ".join(HEADINGS[x] for x in FAILURES) + " |"
    yield "| --- | " + " | ".join(["---"] * (2 + len(FAILURES))) + " |"
    total: Counter = sum(counts.values(), Counter())
    for category, verdicts in [*counts.items(), ("all", total)]:
        cells = [sum(verdicts.values()), verdicts[HANDLED], *(verdicts[x] for x in FAILURES)]
        yield f"| {category} | " + " | ".join(str(cell) if cell else "" for cell in cells) + " |"


def formats(rows: Iterable[tuple[Case, str]]) -> Iterator[str]:
    """Lines of a Markdown table: picture formats × what of each is read right, or is not."""
    read: dict[str, list[str]] = defaultdict(list)
    for case, verdict in rows:
        if case.name.startswith("picture/"):
            name, _, mode = case.name.removeprefix("picture/").partition(" ")
            read[name].append((mode or "colour") + ("" if verdict == HANDLED else f" (**{verdict}**)"))
    yield "| format | read as it should be |"
    yield "| --- | --- |"
    for name, modes in sorted(read.items()):
        yield f"| {name} | {', '.join(modes)} |"


def account(case: Case, verdict: str, happened: str, ended: Ended) -> dict:
    """A failure as JSON holds it."""
    lines = messages(ended.errors)
    return {
        "name": case.name,
        "category": case.category,
        "command": case.command,
        "expects": case.expects,
        "verdict": verdict,
        "happened": happened,
        "last_line": shown(lines[-1]) if lines else "",
        "changed": list(ended.changed[:20]),
        "seconds": round(ended.seconds, 1),
        "errors": ended.errors[-3000:],
    }


@click.command()
@click.option("--seed", default=0, show_default=True, help="Of what is drawn.")
@click.option("--category", "categories", multiple=True, help="Only categories that begin so; repeat for more.")
@click.option("--only", "names", multiple=True, help="Only the case of this name; repeat for more.")
@click.option(
    "--moments",
    type=click.IntRange(2),
    help="Instead: only the killed commands, each at so many of its changes, evenly chosen.",
)
@click.option("--jobs", default=2, show_default=True, help="Cases at once.")
@click.option("--share", default=1.0, show_default=True, help="Only so much of every category.")
@click.option("--quick", is_flag=True, help="Only inputs to be refused that take little; for the tests.")
@click.option("--list", "listing", is_flag=True, help="Only say which cases there are.")
@click.option("--list-failures", is_flag=True, help="Say each failure as it happens.")
@click.option("--failures", type=click.Path(path_type=Path), help="JSON file of all failures.")
@click.option("--again", type=click.Path(path_type=Path), help="Only the failures of such a file.")
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    help="Markdown file of the table, for a whole run by default among the results.",
)
@click.option(
    "--world", "shared", type=click.Path(path_type=Path), help="Folder of the shared parts, made if missing."
)
def main(
    seed: int,
    categories: tuple[str, ...],
    names: tuple[str, ...],
    moments: int | None,
    jobs: int,
    share: float,
    quick: bool,
    listing: bool,
    list_failures: bool,
    failures: Path | None,
    again: Path | None,
    out: Path | None,
    shared: Path | None,
) -> None:
    """Run bad inputs of every kind, and say how many are handled well."""
    chosen = list(kills.evenly(moments)) if moments else all_cases(seed)
    whole = not (categories or names or moments or again or quick) and share == 1
    if quick:
        chosen = quick_cases(chosen)
    if again is not None:
        names += tuple(failure["name"] for failure in json.loads(again.read_text()))
    if categories or names:
        chosen = [case for case in chosen if case.category.startswith(categories) or case.name in names]
    chosen = quick_part(chosen, share) if share < 1 else chosen
    if listing:
        click.echo(
            "\n".join(f"{case.category}: {shown(case.name)}: {case.expects}: {case.command}" for case in chosen)
        )
        return
    with tempfile.TemporaryDirectory(prefix="hardness-") as temporary:
        place = Path(temporary)
        # Whoever a case runs as must reach it.
        place.chmod(0o755)
        rows, faults = run_all(chosen, place, shared or place / "world", jobs, list_failures)
    lines = list(table(rows))
    click.echo("\n".join(lines))
    if failures is not None:
        failures.write_text(json.dumps(faults, indent=1, ensure_ascii=True) + "\n")
    if out is not None or whole:
        write_table(out or RESULTS / "hardness.md", seed, lines, formats(rows))
    sys.exit(1 if faults else 0)


def run_all(
    cases: list[Case], place: Path, shared: Path, jobs: int, list_failures: bool
) -> tuple[list[tuple[Case, str]], list[dict]]:
    """Verdicts of all cases in their order, and accounts of the failures."""
    # Beside the shared parts, so that a world that is kept keeps its compiled programs.
    warm_up(shared.parent / f"{shared.name}-cache")
    world.make(shared, {part for case in cases for part in case.needs}, run_command)
    verdicts: dict[str, str] = {}
    faults: dict[str, dict] = {}
    start = time.monotonic()

    def report(case: Case, ended: Ended) -> None:
        verdict, happened = judge(case, ended)
        verdicts[case.name] = verdict
        if verdict != HANDLED:
            faults[case.name] = account(case, verdict, happened, ended)
            if list_failures:
                click.echo(
                    f"{verdict}: {shown(case.name)}: {case.command}\n    expects {case.expects}: {shown(happened)}"
                )
        if sys.stderr.isatty() or len(verdicts) % 50 == 0:
            click.echo(
                f"{len(verdicts)} of {len(cases)}, {len(faults)} failures, {time.monotonic() - start:.0f} s",
                err=True,
            )

    run_cases(cases, shared, place, jobs, report)
    return [(case, verdicts[case.name]) for case in cases], [
        faults[case.name] for case in cases if case.name in faults
    ]


def write_table(file: Path, seed: int, lines: Iterable[str], pictures: Iterable[str]) -> None:
    """Both tables with what made them."""
    text = [
        "# Bad inputs",
        "",
        f"`python benchmarks/hardness.py --seed {seed}`. Handled well: exit code 2 and one line that names the",
        "setting or the file, in bounded time and memory, with nothing changed; or right results where the input",
        "is fine.",
        "",
        *lines,
        "",
        "## Pictures",
        "",
        "Levels are compared with those that Pillow and littlecms compute in another way.",
        "",
        *pictures,
    ]
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("\n".join(text) + "\n")


if __name__ == "__main__":
    main()
