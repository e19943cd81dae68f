"""Painting what the Edit page's form asks for."""

import collections
import dataclasses
from collections.abc import Callable, Hashable
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8

from sflow_jax.editing.edit import Request, choose_method
from sflow_jax.editing.methods import Method
from sflow_jax.editing.sources import canvas_of_photo, inversion_settings
from sflow_jax.errors import SettingError
from sflow_jax.pictures.canvas import Canvas
from sflow_jax.pipeline import StableFlow
from sflow_jax.records import checksum_of, photo_record
from sflow_jax.results import Edit, Inversion, Turn, turn_file
from sflow_jax.settings import EditSettings, as_record
from sflow_jax.studio.desk import Watch
from sflow_jax.studio.form import MOST_PIXELS, Form

MOST_INVERSIONS = 4


class Inversions:
    """The last few inversions, each by all that it depends on."""

    def __init__(self) -> None:
        self._known: collections.OrderedDict[Hashable, Inversion] = collections.OrderedDict()

    def of(self, key: Hashable, invert: Callable[[], Inversion]) -> Inversion:
        """The one that was made before, or a new one; the one unused for longest leaves."""
        if key not in self._known:
            self._known[key] = invert()
        self._known.move_to_end(key)
        while len(self._known) > MOST_INVERSIONS:
            self._known.popitem(last=False)
        return self._known[key]


def paint_edit(flow: StableFlow, form: Form, inversions: Inversions, watch: Watch) -> Edit:
    """What the form asks for; a photo's inversion is reused. SettingError for what cannot be."""
    form.check()
    settings, prompts = form.settings(), form.edit_prompts
    if form.before is not None:
        return _paint_turn(flow, form, settings, watch)
    canvas = canvas_of_photo(flow.info, settings, form.photo)
    check_size(flow, canvas)
    about, source = {}, {"image": form.photo}
    method = choose_method(flow.painter, Request(form.prompt, prompts, form.photo, None, None, settings))
    if form.photo is not None and method.inverts and settings.negative is None and not settings.paste:
        inversion = inverted(flow, form, method, canvas, inversions, watch)
        about, source = photo_record(form.photo) | {"source": "image"}, {"inversion": inversion}
        # By its object: an inversion by itself would mean the reference's method.
        settings = dataclasses.replace(settings, method=method)
    result = flow.edit(form.prompt, prompts, **source, **_watched(flow, settings, canvas, watch))
    return dataclasses.replace(result, record=result.record | about)


def inverted(
    flow: StableFlow, form: Form, method: Method, canvas: Canvas, inversions: Inversions, watch: Watch
) -> Inversion:
    """The photo's path to noise as the method wants it, made once."""
    wanted = inversion_settings(method)
    asked = {**wanted, "seed": form.seed, "height": canvas.height, "width": canvas.width}
    key = (checksum_of(form.photo), form.prompt, *asked.items())
    invert = lambda: flow.invert(form.photo, form.prompt, method=method, progress=watch.progress, **asked)
    return inversions.of(key, invert)


def _paint_turn(flow: StableFlow, form: Form, settings: EditSettings, watch: Watch) -> Edit:
    """Edits of an earlier edit's picture, from its latents."""
    turn = Turn.load(form.before)
    if form.row >= len(turn.latents):
        raise SettingError(f"that result has no picture {form.row}")
    canvas = flow.info.canvas(turn.height, turn.width)
    check_size(flow, canvas)
    settings = dataclasses.replace(settings, height=turn.height, width=turn.width)
    latents = turn.latents[form.row]
    result = flow.edit(form.prompt, form.edit_prompts, latents=latents, **_watched(flow, settings, canvas, watch))
    checksum = checksum_of(turn_file(form.before))
    about = {"continue": form.before, "continue_checksum": checksum, "pick": form.row}
    return dataclasses.replace(result, record=result.record | about)


def _watched(flow: StableFlow, settings: EditSettings, canvas: Canvas, watch: Watch) -> dict[str, Any]:
    return {**as_record(settings), "on_step": watch.preview(flow.painter, canvas), "progress": watch.progress}


def check_size(flow: StableFlow, canvas: Canvas) -> None:
    """SettingError for pictures beyond what one visitor may ask for."""
    own = flow.info.canvas()
    if canvas.height * canvas.width > MOST_PIXELS * own.height * own.width:
        raise SettingError(f"a picture of {canvas.width}×{canvas.height} is too large here; use sflow edit")


def difference(source: Float[np.ndarray, "y x 3"], edit: Float[np.ndarray, "y x 3"]) -> UInt8[np.ndarray, "y x"]:
    """How far an edit's pixels are from the source's: the largest of three colours, white is as far as can be."""
    return np.uint8(np.round(255 * np.abs(edit - source).max(axis=-1)))


def picture_files(folder: Path, edits: int) -> list[str]:
    """The source's file and the edits'."""
    return [str(folder / name) for name in ("source.png", *(f"edit-{i}.png" for i in range(1, edits + 1)))]
