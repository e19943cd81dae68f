"""JSON files changed in every way: single values by their kind, and the document as a whole."""

import copy
import dataclasses
import json
import os
import random
from collections.abc import Callable, Iterator
from typing import Any

from hardness.cases import ACCEPT, EITHER, REFUSE, Box, Case, Check, Prepare, Step

MISSING = object()
# Kinds of values: a positive whole number; one that may be 0; a positive number; a number of any sign; a small
# positive number; a switch; a name out of few; a list of positive whole numbers; a list of numbers of any sign;
# text; anything, for nobody reads it.
SIZE, COUNT, POSITIVE, NUMBER, EPSILON, FLAG, CHOICE, SIZES, NUMBERS, TEXT, UNREAD = (
    "size",
    "count",
    "positive",
    "number",
    "epsilon",
    "flag",
    "choice",
    "sizes",
    "numbers",
    "text",
    "unread",
)
OPTIONAL = "?"  # after a kind: the key may be missing or null


@dataclasses.dataclass(frozen=True)
class Document:
    """A JSON file that commands read.

    label: of the cases' names. part, file: the part of the world that is copied, and the file's place in it.
    keys: path of a value (dots between keys) → its kind. steps: the first is judged. accepted: check of an accepted
    document that says the same. alive: check of one that may say something else. links: parts that are not changed.
    signed: whether the part holds checksums, which single values are changed without (as in older files): else
    nothing but the checksum would be tried.
    """

    label: str
    category: str
    part: str
    file: str
    keys: dict[str, str]
    steps: tuple[Step, ...]
    accepted: Check
    alive: Check
    links: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()
    names: tuple[str, ...] = ()
    signed: bool = False

    @property
    def path(self) -> str:
        """In the case's folder."""
        return f"{self.part}/{self.file}"

    def case(self, name: str, expects: str, change: Prepare, *, same: bool = False, names: tuple = ()) -> Case:
        """A case of this document. same: where it is accepted, nothing may differ."""

        def prepare(box: Box) -> None:
            box.copy(self.part)
            box.link(*self.links)
            change(box)

        return Case(
            name=f"{self.label}/{name}",
            category=self.category,
            steps=self.steps,
            expects=expects,
            prepare=prepare,
            names=(os.path.basename(self.file), *self.names, *names),
            needs=(self.part, *self.links, *self.needs),
            check=self.accepted if same else self.alive,
        )


def value_cases(document: Document, draw: random.Random, share: float) -> Iterator[Case]:
    """For every key some of the wrong values of its kind: that share of them, at least one."""
    for key, kind in document.keys.items():
        options = list(wrong_values(kind, draw))
        count = max(1, round(share * len(options)))
        for label, value, expects in draw.sample(options, count):
            yield document.case(
                f"{key}/{label}",
                expects,
                _set(document, key, value),
                same=kind == UNREAD or label in SAME,
                names=(key.split(".")[-1],),
            )


# Labels of values that, where they are accepted, must mean the same as before.
SAME = ("as text", "as a float")


def wrong_values(kind: str, draw: random.Random) -> Iterator[tuple[str, Any, str]]:
    """(label, value or a function of the present one, what is expected) for one kind of value."""
    optional, kind = kind.endswith(OPTIONAL), kind.removesuffix(OPTIONAL)
    absent = EITHER if optional else REFUSE
    if kind == UNREAD:
        yield from ((label, value, EITHER) for label, value in _strange(draw))
        yield "missing", MISSING, EITHER
        return
    yield "missing", MISSING, absent
    yield "null", None, absent
    yield from _of_other_types(kind, draw)
    if kind in (SIZE, COUNT):
        yield "as text", lambda x: str(x), EITHER
        yield "as a float", lambda x: float(x), EITHER
        yield "with a fraction", lambda x: x + 0.5, REFUSE
        yield "another size", lambda x: x + draw.randint(1, 3), REFUSE if kind == SIZE else EITHER
    if kind == SIZE:
        yield "zero", 0, REFUSE
    if kind in (SIZE, COUNT):
        yield "negative", -draw.randint(1, 9999), REFUSE
        yield "absurd", 10**9 + draw.randint(0, 9999), REFUSE
        yield "immense", 10 ** draw.randint(20, 40), REFUSE
    if kind in (POSITIVE, NUMBER, EPSILON):
        yield "as text", lambda x: str(x), EITHER
        yield "NaN", float("nan"), REFUSE
        yield "Infinity", float("inf"), REFUSE
        yield "immense", 10.0 ** draw.randint(30, 300), REFUSE
        yield "immense whole", 10 ** draw.randint(400, 500), REFUSE
    if kind in (POSITIVE, EPSILON):
        yield "negative", -draw.random() - 1e-3, REFUSE
    if kind == POSITIVE:
        yield "zero", 0.0, REFUSE
    if kind in (SIZES, NUMBERS):
        yield from _wrong_lists(draw)
    if kind == SIZES:
        yield "a negative one", lambda x: [*x[:-1], -x[-1]], REFUSE
        yield "zeros", lambda x: [0] * len(x), REFUSE


def _of_other_types(kind: str, draw: random.Random) -> Iterator[tuple[str, Any, str]]:
    """Texts, lists and objects where there should be none."""
    word = "".join(draw.choices("abcdefgh", k=draw.randint(1, 12)))
    if kind not in (TEXT, CHOICE):
        yield "a word", word, REFUSE
        yield "empty text", "", REFUSE
    if kind == CHOICE:
        yield "an unknown word", word, REFUSE
    if kind in (TEXT, CHOICE):
        yield "a number", draw.randint(2, 99), REFUSE
    if kind == FLAG:
        yield "a number", draw.randint(2, 99), REFUSE
    else:
        yield "true", True, REFUSE
    if kind in (SIZES, NUMBERS):
        yield "a number", draw.randint(1, 99), REFUSE
    else:
        yield "a list", [draw.randint(1, 9)] * draw.randint(0, 3), REFUSE
    yield "an object", {word: draw.randint(1, 9)}, REFUSE


def _wrong_lists(draw: random.Random) -> Iterator[tuple[str, Any, str]]:
    yield "an empty list", [], REFUSE
    yield "one less", lambda x: x[:-1], REFUSE
    yield "one more", lambda x: [*x, x[-1]], REFUSE
    yield "words", lambda x: [str(i) + "x" for i in x], REFUSE
    yield "a list of lists", lambda x: [[i] for i in x], REFUSE
    yield "an absurd one", lambda x: [10 ** draw.randint(9, 30), *x[1:]], REFUSE
    yield "a null in it", lambda x: [None, *x[1:]], REFUSE


def _strange(draw: random.Random) -> Iterator[tuple[str, Any]]:
    yield "a list", [draw.randint(0, 9)]
    yield "an object", {"a": None}
    yield "a number", -draw.random()
    yield "immense", 10 ** draw.randint(30, 300)
    yield "null", None
    yield "text", "\u001b[31m" + "x" * draw.randint(0, 20)


def unsign(box: Box, part: str) -> None:
    """A converted folder without its checksums, as older versions wrote it."""
    (box.work / part / "checksums.json").unlink(missing_ok=True)
    for name in ("model.json", "features.json"):
        if (box.work / part / name).exists():
            box.change_json(f"{part}/{name}", lambda d: {key: x for key, x in d.items() if key != "checksum"})


def _set(document: Document, key: str, value: Any) -> Prepare:
    """Change one value of a file."""

    def change(box: Box) -> None:
        if document.signed:
            unsign(box, document.part)
        content = json.loads((box.work / document.path).read_text())
        *parents, last = key.split(".")
        place = content
        for parent in parents:
            place = place[parent]
        if value is MISSING:
            place.pop(last, None)
        else:
            before = copy.deepcopy(place.get(last))
            place[last] = value(before) if callable(value) and before is not None else value
            if callable(place[last]):
                place[last] = "x"
        box.write(document.path, json.dumps(content))

    return change


DEPTH, LONG = 100_000, 100 << 20


def whole_cases(document: Document, draw: random.Random, count: int | None = None) -> Iterator[Case]:
    """The document as a whole: of another type, encoding, length or depth, or no file at all."""
    options = list(WHOLE.items())
    # Whose checksum fits no longer, or what a library reads that takes no marks.
    strict = document.signed or "tokenizer" in document.path
    for label, (expects, content) in options if count is None else draw.sample(options, count):
        expects = EITHER if strict and expects == ACCEPT else expects
        yield document.case(label, expects, _rewrite(document.path, content), same=expects != REFUSE)


def _rewrite(path: str, content: Callable[[bytes], bytes] | bytes | Prepare) -> Prepare:
    def change(box: Box) -> None:
        place = box.work / path
        if isinstance(content, bytes):
            box.write(path, content)
        elif content in SPECIAL:
            place.unlink()
            content(place)
        else:
            box.write(path, content(place.read_bytes()))

    return change


def _extra(text: bytes) -> Callable[[bytes], bytes]:
    """A further first key with this value."""
    return lambda document: b'{"an extra key": ' + text + b", " + document.lstrip()[1:]


def _folder(path) -> None:
    path.mkdir()


def _nothing(path) -> None:
    pass


def _pipe(path) -> None:
    os.mkfifo(path)


def _endless(path) -> None:
    path.symlink_to("/dev/zero")


def _loop(path) -> None:
    path.symlink_to(path.name)


def _dangling(path) -> None:
    path.symlink_to("nowhere")


SPECIAL = (_folder, _nothing, _pipe, _endless, _loop, _dangling)
WHOLE: dict[str, tuple[str, Any]] = {
    "empty": (REFUSE, b""),
    "blank": (REFUSE, b" \n\n"),
    "a list": (REFUSE, b"[]"),
    "a list of itself": (REFUSE, lambda text: b"[" + text + b"]"),
    "null": (REFUSE, b"null"),
    "a text": (REFUSE, b'"text"'),
    "a number": (REFUSE, b"3"),
    "an empty object": (REFUSE, b"{}"),
    "cut short": (REFUSE, lambda text: text[: len(text) * 2 // 3]),
    "something after it": (REFUSE, lambda text: text + b" x"),
    "no JSON": (REFUSE, b"<html>404 Not Found</html>"),
    "a pointer of git lfs": (REFUSE, b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 4\n"),
    "single quotes": (REFUSE, lambda text: text.replace(b'"', b"'")),
    "latin-1": (EITHER, _extra('"é"'.encode("latin-1"))),
    "utf-16": (EITHER, lambda text: text.decode().encode("utf-16")),
    "utf-16 without a mark": (REFUSE, lambda text: text.decode().encode("utf-16-le")),
    "utf-8 with a mark": (ACCEPT, lambda text: b"\xef\xbb\xbf" + text),
    "NUL bytes": (REFUSE, lambda text: bytes(len(text))),
    "deep": (REFUSE, b"[" * DEPTH + b"]" * DEPTH),
    "a deep value": (EITHER, _extra(b"[" * DEPTH + b"]" * DEPTH)),
    "deep objects": (EITHER, _extra(b'{"a":' * DEPTH + b"1" + b"}" * DEPTH)),
    "100 MB of text": (EITHER, _extra(b'"' + b"x" * LONG + b'"')),
    "100 MB of numbers": (EITHER, _extra(b"[" + b"1,2,3,4,5," * (LONG // 10) + b"6]")),
    "100 MB of nothing": (EITHER, lambda text: text + b" " * LONG),
    "a number of 5,000 digits": (EITHER, _extra(b"1" * 5000)),
    "a key twice": (EITHER, lambda text: b'{"_class_name": 1, ' + text.lstrip()[1:]),
    "a lone surrogate": (EITHER, _extra(b'"\\ud800"')),
    "a folder": (REFUSE, _folder),
    "missing": (REFUSE, _nothing),
    "a pipe": (REFUSE, _pipe),
    "endless": (REFUSE, _endless),
    "a link to itself": (REFUSE, _loop),
    "a link to nowhere": (REFUSE, _dangling),
}
