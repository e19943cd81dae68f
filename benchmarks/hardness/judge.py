"""What counts as handled well, and what each failure is called."""

import re

from hardness.cases import ACCEPT, REFUSE, Case
from hardness.runner import GROWTH, Ended

HANDLED = "handled"
TRACEBACK, SILENT, ENDLESS, LEFT_OVER, UNCLEAR, LATE, REFUSED = FAILURES = (
    "traceback",
    "silent",
    "endless",
    "left over",
    "unclear",
    "late",
    "refused",
)
LONGEST = 400
# Progress bars, and a log's lines in their place, are no messages.
PROGRESS = re.compile(
    r"\d+%\|.*\||\d+(\.\d+)?[kMG]?B? \[\d\d:\d\d|^\w[^:]*: \d+it \[|^[\w ]+: [\d,]+ of [\d,]+, \d+ s"
)
RAW = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\x80-\x9f]")
# What a progress bar itself sends to a terminal.
BAR_MOVES = re.compile(r"\x1b\[[AK]")


def judge(case: Case, ended: Ended) -> tuple[str, str]:
    """The verdict, and in a line what happened."""
    lines = messages(ended.errors)
    last = lines[-1] if lines else ""
    code = ended.codes[0]
    if ended.stopped == "preparation":
        return UNCLEAR, f"the case could not be prepared: {last}"
    if ended.stopped in ("time", "memory"):
        bound = f"{case.seconds:.0f} s" if ended.stopped == "time" else f"{GROWTH >> 30} GiB more"
        return ENDLESS, f"ended from outside: {ended.stopped} beyond {bound}"
    if ended.stopped:
        return TRACEBACK, f"died of {ended.stopped}"
    if code == 3:
        return SILENT, last
    if "Traceback (most recent call last)" in ended.errors or any(x not in (0, 2) for x in ended.codes):
        return TRACEBACK, f"exit {ended.codes[-1]}: {last}"
    if raw := RAW.search(BAR_MOVES.sub("", ended.output + ended.errors)):
        return UNCLEAR, f"the raw character {raw[0]!r} reaches the terminal"
    if code == 0:
        return _accepted(case, ended, last)
    return _refused(case, ended, lines)


def messages(errors: str) -> list[str]:
    """Lines of standard error without progress bars."""
    pieces = re.split(r"[\r\n]", BAR_MOVES.sub("", errors))
    return [piece for piece in pieces if piece.strip() and not PROGRESS.search(piece)]


def _accepted(case: Case, ended: Ended, last: str) -> tuple[str, str]:
    if case.expects == REFUSE:
        return SILENT, f"exit 0: {ended.output.strip().splitlines()[-1:] or ''}"
    if ended.codes[-1] == 2:
        return LATE, f"accepted first, refused by a later command: {last}"
    if ended.fault:
        return SILENT, ended.fault
    allowed = [f"+ work/{name}" for name in (*case.creates, "painted")]
    extra = left_over(ended, allowed + [f"{sign} work/{name}" for name in case.changes for sign in "+-~"])
    if extra:
        return LEFT_OVER, f"exit 0, and {', '.join(extra[:4])}"
    return HANDLED, "accepted"


def left_over(ended: Ended, allowed: list[str]) -> list[str]:
    """Changed paths that are neither allowed nor below what is; partial files never are."""
    return [
        path
        for path in ended.changed
        if path.endswith(".partial") or not any(path == x or path.startswith(f"{x}/") for x in allowed)
    ]


def _refused(case: Case, ended: Ended, lines: list[str]) -> tuple[str, str]:
    if case.expects == ACCEPT:
        return REFUSED, lines[-1] if lines else "exit 2 without a word"
    extra = left_over(ended, [f"+ work/{name}" for name in case.keeps])
    if extra:
        return LEFT_OVER, f"refused, but {', '.join(extra[:4])} ({len(extra)} paths)"
    if len(lines) != 1:
        return UNCLEAR, f"{len(lines)} lines on stderr: {' ⏎ '.join(lines)[:300]}"
    (line,) = lines
    if not line.startswith("Error: "):
        return UNCLEAR, f"not `Error: …`: {line[:200]}"
    if len(line) >= LONGEST:
        return UNCLEAR, f"a line of {len(line)} characters: {line[:200]}…"
    if "No such option" in line:
        return UNCLEAR, line
    if case.names and not any(name.lower() in line.lower() for name in case.names):
        return UNCLEAR, f"names none of {', '.join(case.names)}: {line[:300]}"
    return HANDLED, "refused"
