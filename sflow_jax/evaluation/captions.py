"""The paper's COCO protocol: CLIP's view of (picture, source caption, edited caption).

CLIP_text: similarity of the edited picture to its caption. CLIP_image: of the edited picture to the source.
CLIP_direction: cosine of the change of the picture's features and the change of the captions' (Avrahami et al.
2024). Features are of length one before they are subtracted.
"""

import contextlib
import csv
import hashlib
import io
import json
from collections.abc import Iterator, Sequence
from typing import Any

import msgspec
import numpy as np
from etils import epath
from jaxtyping import Float, UInt8

from sflow_jax.errors import SettingError
from sflow_jax.evaluation.cases import Axis, Case, Column, Prompt, Scores
from sflow_jax.evaluation.networks import CaptionedClip, Networks
from sflow_jax.measures.metrics import cosine_similarity
from sflow_jax.pictures.canvas import Canvas
from sflow_jax.pictures.files import fit_picture, open_picture
from sflow_jax.storage.files import read_text
from sflow_jax.storage.paths import absolute
from sflow_jax.typed import Name, parse_json, typed

FIELDS = ("image", "source", "edit")
# Features nearer than this have no direction from one to the other.
LEAST_CHANGE = 1e-6


class Captioned(msgspec.Struct, frozen=True):
    """One line of the file. image: relative to the file's folder."""

    image: Name
    source: Prompt
    edit: Prompt


def read_captions(file: epath.PathLike) -> list[Captioned]:
    """Lines of a CSV file with the columns image, source and edit, or of a JSON-lines file with these fields.

    SettingError in one line, with its number, for what is missing or cannot be read.
    """
    path = absolute(file)
    if not path.exists() or path.is_dir():
        raise SettingError(f"no file at {file}: name JSON lines or CSV with {', '.join(FIELDS)}")
    try:
        text = read_text(path)
        lines = list(_csv_lines(text) if path.suffix.lower() == ".csv" else _json_lines(text))
    except (ValueError, csv.Error) as error:
        raise SettingError(f"cannot read {file}: {error}") from error
    if not lines:
        raise SettingError(f"{file} holds no lines; write JSON lines or CSV with {', '.join(FIELDS)}")
    return lines


def _csv_lines(text: str) -> Iterator[Captioned]:
    for number, row in enumerate(csv.DictReader(io.StringIO(text)), 2):
        with _in_line(number):
            yield typed({name: row.get(name) for name in FIELDS}, Captioned)


def _json_lines(text: str) -> Iterator[Captioned]:
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip():
            with _in_line(number):
                yield parse_json(line, Captioned)


@contextlib.contextmanager
def _in_line(number: int) -> Iterator[None]:
    """ValueError with the line's number and what it must say."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"line {number} must say {', '.join(FIELDS)}, each a text ({error})") from error


def direction_similarity(
    before: Float[np.ndarray, "n p"],
    after: Float[np.ndarray, "n p"],
    caption_before: Float[np.ndarray, "n p"],
    caption_after: Float[np.ndarray, "n p"],
) -> Float[np.ndarray, " n"]:
    """Cosine of the change of pictures and the change of captions, −1..1; 0 where one of them does not change."""
    changes = [after - before, caption_after - caption_before]
    moved = np.min([np.linalg.norm(change, axis=-1) for change in changes], axis=0) > LEAST_CHANGE
    with np.errstate(invalid="ignore"):
        return np.where(moved, cosine_similarity(*changes), 0.0)


def caption_cases(file: epath.PathLike, lines: Sequence[Captioned]) -> tuple[Case, ...]:
    """Lines of one picture and source caption as one case; ValueError for pictures that cannot be read."""
    edits: dict[tuple[str, str], list[str]] = {}
    for line in lines:
        edits.setdefault((line.image, line.source), []).append(line.edit)
    cases = []
    for number, ((image, source), texts) in enumerate(edits.items()):
        place = absolute(file).parent / image
        open_picture(place)  # a bad file is named before anything is painted
        cases.append(Case(f"picture-{number:05d}", place, source, tuple(texts), ("",) * len(texts)))
    return tuple(cases)


def record_of_lines(name: str, cases: Sequence[Case], networks: Networks) -> dict[str, Any]:
    """What a benchmark of such lines is: a digest of pictures and captions, and the networks."""
    digest = hashlib.sha256()
    for case in cases:
        digest.update(json.dumps([case.prompt, case.edits]).encode())
        digest.update(case.picture.read_bytes())
    return {
        "benchmark": name,
        "pictures": sum(len(case.edits) for case in cases),
        "lines": digest.hexdigest()[:16],
        **networks.record(),
    }


class CaptionBench:
    """Pictures with captions; lines of one picture and source caption are edited together."""

    name = "the paper's COCO protocol"
    share = None
    columns = tuple(Column(f"clip_{kind}", f"CLIP {kind}", 3) for kind in ("text", "image", "direction"))
    chart = (Axis("clip_text", "CLIP text"), Axis("clip_image", "CLIP image"))

    def __init__(self, file: epath.PathLike, lines: Sequence[Captioned], canvas: Canvas, networks: Networks):
        """lines: from `read_captions`. canvas: pictures are scaled and cut to it. ValueError without CLIP, and for
        pictures that cannot be read."""
        if networks.clip is None:
            raise SettingError("`captions` needs `clip`, a converted CLIP (sflow-convert SOURCE DEST)")
        self.clip: CaptionedClip = networks.clip
        self.networks, self.canvas = networks, canvas
        self.cases = caption_cases(file, lines)

    @property
    def notes(self) -> tuple[str, ...]:
        """Which CLIP judges."""
        return (f"CLIP: {self.clip.features.name}; similarities are cosines, −1 to 1",)

    def record(self) -> dict[str, Any]:
        """A digest of pictures and captions, and the networks."""
        return record_of_lines(self.name, self.cases, self.networks)

    def keep(
        self, folder: epath.Path, method: str, case: Case, pictures: UInt8[np.ndarray, "n y x 3"]
    ) -> np.ndarray:
        """Nothing is written."""
        return pictures

    def score(self, case: Case, pictures: UInt8[np.ndarray, "n y x 3"]) -> tuple[list[Scores], list[str]]:
        """Three numbers of every edit."""
        fitted = fit_picture(open_picture(case.picture), self.canvas.height, self.canvas.width)
        before, *after = self.clip.pictures(np.concatenate([fitted[None], pictures]))
        source, *edited = self.clip.captions([case.prompt, *case.edits])
        before, source = (np.repeat(x[None], len(pictures), axis=0) for x in (before, source))
        after, edited = np.stack(after), np.stack(edited)
        columns = (
            cosine_similarity(after, edited),
            cosine_similarity(after, before),
            direction_similarity(before, after, source, edited),
        )
        names = [column.name for column in self.columns]
        return [dict(zip(names, map(float, row))) for row in zip(*columns)], [""] * len(pictures)

    def badness(self, scores: Scores) -> float:
        """The worst change least in the direction that was asked for."""
        return -scores["clip_direction"]
