"""Where points of a picture and words of its prompt attend in every layer (Stable Flow's figure 6).

Axes: t steps, n layers, q queries, w text tokens, s image tokens.
"""

import dataclasses
import numbers
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from sflow_jax.arrays import AnyArray
from sflow_jax.editing.edit import Request, edit_pictures
from sflow_jax.editing.generation import generate_pictures
from sflow_jax.editing.sources import canvas_of_photo
from sflow_jax.editing.watch import Watch
from sflow_jax.errors import SettingError
from sflow_jax.families.text import word_spans
from sflow_jax.painter import Painter
from sflow_jax.pictures.canvas import Canvas
from sflow_jax.pictures.files import Picture
from sflow_jax.progress import Progress
from sflow_jax.results import AttentionAtlas, Edit, Generation, Inversion, Query
from sflow_jax.settings import EditSettings, GenerationSettings, check_prompts
from sflow_jax.storage.checkpoint import ModelInfo

# Tokens are watched in so many at once, the last repeated, so that other points and words compile nothing.
AT_ONCE = 8
# Beyond it what is handed out would be as large as a layer's own attention.
MOST_TOKENS = 64
POINT_FORM = "a row and a column: pixels such as 40,52, or shares such as 0.6,0.8"


@dataclasses.dataclass(frozen=True)
class Looked:
    """What is asked for.

    points: pairs of row and column, pixels if whole numbers, else shares of height and width. words: of the prompt.
    SettingError for none at all, and for points that are no pairs of numbers of one kind.
    """

    points: Sequence[Any] = ()
    words: Sequence[str] = ()

    def __post_init__(self) -> None:
        if isinstance(self.words, str) or not all(isinstance(word, str) for word in self.words):
            raise SettingError(f"`words` must be a list of texts, found {self.words!r:.80}")
        if not len(self.points) and not self.words:
            raise SettingError("give at least one `point` or `word` to look at")
        for point in self.points:
            _check_point(point)

    def check(self, prompt: str, canvas: Canvas) -> None:
        """SettingError for points outside the picture, and words that are not in its prompt; needs no model."""
        for point in self.points:
            _place(point, canvas)
        for word in self.words:
            word_spans(prompt, word)

    def queries(self, painter: Painter, prompt: str, canvas: Canvas) -> tuple[Query, ...]:
        """Tokens of everything; SettingError as of `check`, and for more tokens than can be watched."""
        self.check(prompt, canvas)
        text = painter.prompts.words
        at = [_place(point, canvas) for point in self.points]
        places = [
            Query(f"point {point[0]},{point[1]}", (text + row * canvas.columns + column,), row, column)
            for point, (row, column) in zip(self.points, at)
        ]
        words = [Query(f"word {word}", painter.prompts.locate(prompt, word)) for word in self.words]
        tokens = sum(len(query.tokens) for query in (*places, *words))
        if tokens > MOST_TOKENS:
            raise SettingError(
                f"each `point` and `word` takes tokens: at most {MOST_TOKENS} together, found {tokens}"
            )
        return *places, *words


def parse_point(text: str) -> tuple[int, int] | tuple[float, float]:
    """`40,52` as pixels, `0.6,0.8` as shares of height and width; SettingError for anything else."""
    kind = float if "." in text else int
    try:
        row, column = (kind(part) for part in text.split(","))
    except ValueError as error:
        raise SettingError(f"cannot read `point` {text!r:.80}: write {POINT_FORM}") from error
    return row, column


def canvas_of_edit(
    info: ModelInfo, asked: EditSettings, image: Picture | None, inversion: Inversion | None
) -> Canvas:
    """The size that an edit is painted in: its inversion's, or as settings ask for, perhaps of a photo's shape."""
    if inversion is not None:
        return info.canvas(inversion.settings["height"], inversion.settings["width"])
    return canvas_of_photo(info, asked, image)


def atlas_of_edit(painter: Painter, request: Request, looked: Looked, progress: Progress) -> AttentionAtlas:
    """Of the only edit of a request; see `StableFlow.attention_atlas`."""
    check_prompts([request.source, *request.edits])
    request = request.loaded()
    canvas = canvas_of_edit(painter.info, request.settings, request.image, request.inversion)
    queries = looked.queries(painter, request.edits[0], canvas)
    watch = Watch(_padded(queries), row=1)
    edit = edit_pictures(painter, dataclasses.replace(request, watch=watch), progress)
    return _atlas(painter, queries, watch, canvas, edit)


def atlas_of_generation(
    painter: Painter,
    prompt: str,
    noise: Float[AnyArray, "s c"] | None,
    asked: GenerationSettings,
    looked: Looked,
    progress: Progress,
) -> AttentionAtlas:
    """Of a generated picture, which has no source; SettingError for several seeds, which paint several."""
    check_prompts([prompt])
    if not isinstance(asked.seed, numbers.Integral):
        raise SettingError(f"`seed` must be one number here: an atlas is of one picture, found {asked.seed!r:.80}")
    canvas = painter.info.canvas(asked.height, asked.width)
    queries = looked.queries(painter, prompt, canvas)
    watch = Watch(_padded(queries), row=0)
    generation = generate_pictures(painter, [prompt], noise, asked, progress, watch)
    return _atlas(painter, queries, watch, canvas, generation)


def _atlas(
    painter: Painter, queries: tuple[Query, ...], watch: Watch, canvas: Canvas, result: Edit | Generation
) -> AttentionAtlas:
    """What was seen, by query and by whom it is seen."""
    seen, ends = watch.together(), np.cumsum([len(query.tokens) for query in queries])
    of_queries = [seen[:, :, end - len(query.tokens) : end].mean(axis=2) for query, end in zip(queries, ends)]
    weights, words = np.stack(of_queries, axis=2), painter.prompts.words
    text, own, source = np.split(weights, [words, words + canvas.tokens], axis=-1)
    grid = (*weights.shape[:3], canvas.rows, canvas.columns)
    first = result.settings.steps - len(seen)
    return AttentionAtlas(
        text, own.reshape(grid), source.reshape(grid), queries, first, painter.info.layer_kinds, result
    )


def _padded(queries: tuple[Query, ...]) -> tuple[int, ...]:
    tokens = [token for query in queries for token in query.tokens]
    return (*tokens, *[tokens[-1]] * (-len(tokens) % AT_ONCE))


def _check_point(point: Any) -> None:
    """SettingError unless it is two whole numbers, or two others."""
    try:
        row, column = point
    except (TypeError, ValueError) as error:
        raise SettingError(f"a `point` must be {POINT_FORM}, found {point!r:.80}") from error
    for kind in (numbers.Integral, numbers.Real):
        if all(isinstance(number, kind) and not isinstance(number, bool) for number in (row, column)):
            if kind is numbers.Integral or not any(isinstance(x, numbers.Integral) for x in (row, column)):
                return
    raise SettingError(f"a `point` must be {POINT_FORM}, found {point!r:.80}")


def _place(point: Sequence[Any], canvas: Canvas) -> tuple[int, int]:
    """Row and column of the image token that a point lies in; SettingError outside the picture."""
    sides, whole = (canvas.height, canvas.width), isinstance(point[0], numbers.Integral)
    if not all(0 <= number <= (side - 1 if whole else 1) for number, side in zip(point, sides)):
        rows, columns = (f"0 to {side - 1 if whole else '1.0'}" for side in sides)
        raise SettingError(f"`point` {point[0]},{point[1]} is outside the picture: rows {rows}, columns {columns}")
    # A share of one is the last pixel.
    row, column = (int(x) if whole else min(int(x * side), side - 1) for x, side in zip(point, sides))
    return row * canvas.rows // canvas.height, column * canvas.columns // canvas.width
