"""Edits of one source by one method: which settings hold, what they need, and what comes back."""

import dataclasses
import logging
import math
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
from etils import epath
from jaxtyping import Float

from sflow_jax.arrays import AnyArray
from sflow_jax.editing.bank import FEWEST_BATCHES, SourceBank, bank_at
from sflow_jax.editing.branches import Branches
from sflow_jax.editing.editor import Editor, Prompts, inversion_passes
from sflow_jax.editing.methods import NO_REGION, REFERENCE, Method, default_method, find_method
from sflow_jax.editing.recording import recorder
from sflow_jax.editing.regions import RegionRecipe, find_recipe, is_mask_file, paste, read_region
from sflow_jax.editing.sources import (
    Source,
    canvas_of_photo,
    encoded,
    inversion_settings,
    invert_latents,
    model_settings,
    painted_source,
    source_of_inversion,
)
from sflow_jax.editing.watch import Watch
from sflow_jax.errors import SettingError
from sflow_jax.painter import OnStep, Painter
from sflow_jax.pictures.canvas import Canvas
from sflow_jax.pictures.files import Picture, fit_picture, open_picture, to_unit
from sflow_jax.progress import Progress
from sflow_jax.records import OWN, checksum_of, photo_record
from sflow_jax.results import Edit, Inversion, inversion_file
from sflow_jax.sampling.control import LayerControl
from sflow_jax.sampling.guidance import BRANCHES, guidance_rows
from sflow_jax.settings import AUTOMATIC, BANK_PLACES, EditSettings, as_record

logger = logging.getLogger(__name__)
# Where the user gives a region to a method that has none, the background stays until this share of the steps.
LOCKED_UNTIL = 0.8


@dataclasses.dataclass(frozen=True)
class Request:
    """What the user asks for.

    source: its prompt. edits: theirs. image, inversion, latents (clean, packed): of the source; without them it is
    painted. noise: packed [s, c], replaces the seed of a painted source. strengths: of the injection, one an edit.
    watch: of an edit, which it fills. on_step: sees every step of the edits.
    """

    source: str
    edits: Sequence[str]
    image: Picture | None
    inversion: Inversion | epath.PathLike | None
    noise: Float[AnyArray, "s c"] | None
    settings: EditSettings
    latents: Float[AnyArray, "s c"] | None = None
    strengths: tuple[float, ...] | None = None
    watch: Watch | None = None
    on_step: OnStep | None = None

    def __post_init__(self) -> None:
        if isinstance(self.edits, str) or not self.edits:
            raise SettingError(f"`edit_prompts` must be a list of at least one text, found {self.edits!r}")
        if self.image is not None and self.inversion is not None:
            raise SettingError("give either `image` or `inversion`, not both")
        if self.latents is not None and not (self.image is None and self.inversion is None):
            raise SettingError("give `latents` alone, without `image` or `inversion`")

    @property
    def painted(self) -> bool:
        """Whether the model paints the source."""
        return self.image is None and self.inversion is None and self.latents is None

    @property
    def batch(self) -> int:
        """The source and its edits."""
        return 1 + len(self.edits)

    def loaded(self) -> "Request":
        """The same with the inversion itself where its folder was named."""
        if not isinstance(self.inversion, str | os.PathLike):
            return self
        return dataclasses.replace(self, inversion=Inversion.load(self.inversion))


def edit_pictures(painter: Painter, request: Request, progress: Progress) -> Edit:
    """Edits of one source; see `StableFlow.edit`."""
    record = source_record(request)
    request = request.loaded()
    asked, bank = request.settings, bank_at(request.settings.kv_cache, painter.placement)
    method = choose_method(painter, request)
    layers = painter.info.resolve_layers(method.layers)
    scale, branches = guidance_of(method, asked.guidance, request.batch), Branches.of(painter, request.batch, asked)
    branches.on(LayerControl.none(method.steps, 1, painter.layers))
    mask = _asked_region(request, method)
    canvas = canvas_of_photo(painter.info, asked, request.image)
    if request.noise is not None and not request.painted:
        raise SettingError("`noise` is where a painted source begins: it has no effect on other sources")
    noise = checked_noise(painter, asked.seed, request.noise, canvas) if request.painted else None
    if method.path == "painted":
        edit = _painted_together(painter, request, method, layers, scale, branches, canvas, noise, progress, bank)
        return dataclasses.replace(edit, record=edit_record(painter, edit, record))
    conditioning = painter.encode_prompts([request.source, *request.edits], progress)
    prompts = Prompts(conditioning, scale, branches.conditioning(painter))
    keep = None
    if request.inversion is None and request.watch is None:
        keep = recorder(painter, canvas, prompts, branches, method, layers, asked.attentions, bank)
    source, passes = _source(painter, request, method, conditioning, branches, canvas, noise, progress, keep)
    if method.inverts:
        method = method.changed(steps=source.inversion.settings["steps"], nudge=source.nudge)
    editor = Editor(
        painter, source.canvas, source.picture, prompts, source.inversion, asked.seed, asked.edits_at_once,
        progress, passes, branches, asked.attentions, request.watch, request.on_step, worth_filling(bank, request),
    )  # fmt: skip
    if keep is not None:
        editor.inversion = keep.finished(editor, method, layers)
    regions = _regions(editor, mask, method)
    method = _locking(method, regions)
    latents = editor.edited(method, layers, regions, request.strengths)
    edit = _result(painter, request, method, layers, scale, branches, source, latents, regions, editor)
    return dataclasses.replace(edit, record=edit_record(painter, edit, record))


def source_record(request: Request) -> dict[str, Any]:
    """What is edited, as results say it: prompts, and the files that were named."""
    inversion = request.inversion
    stored = isinstance(inversion, str | os.PathLike)
    kinds = {"image": request.image, "inversion": inversion, "latents": request.latents}
    return {
        "prompt": request.source,
        "edits": list(request.edits),
        "source": next((kind for kind, value in kinds.items() if value is not None), "painted"),
        **photo_record(request.image),
        "inversion": os.fspath(inversion) if stored else None,
        "inversion_checksum": checksum_of(inversion_file(inversion)) if stored else None,
        "continue": None,
        "continue_checksum": None,
        "pick": None,
        "noise": None if request.noise is None else OWN,
        "region_checksum": region_checksum(request.settings.region),
        "region_shape": {},
    }


def region_checksum(region: Any) -> str | None:
    """Of a mask's file; None for what is none."""
    return checksum_of(region) if is_mask_file(region) else None


def edit_record(painter: Painter, edit: Edit, source: dict[str, Any]) -> dict[str, Any]:
    """All that an edit was made of: what it is painted from again."""
    settings = {name: value for name, value in as_record(edit.settings).items() if name != "method_options"}
    numbers = dataclasses.asdict(edit.method) | {"layers": edit.settings.layers}
    return {
        "command": "edit",
        **source,
        **settings,
        "evaluations": edit.evaluations,
        "method_settings": numbers,
        **painter.record(),
    }


def choose_method(painter: Painter, request: Request) -> Method:
    """The method that was asked for, or the default, with the model's and the user's settings."""
    asked, given = request.settings, request.settings.method
    if given is None:
        given = default_method(asked, painted=request.painted, inverted=request.inversion is not None)
    of_model = model_settings(painter)
    if request.painted:
        defaults = painter.defaults
        of_model[REFERENCE] = {"steps": defaults.edit_steps, "guidance": defaults.guidance, "nudge": 1.0}
    method = find_method(given, of_model)
    if request.painted and given == REFERENCE:
        # One noise for all, painted side by side: the source has its edits' guidance.
        method = dataclasses.replace(method, path="painted", source_guidance=None)
    if method.path == "painted" and not request.painted:
        raise SettingError(f"`method` {method.name} paints its source; give no `image` or `inversion`")
    method = method.changed(**(asked.method_options or {}))
    own = {"steps": asked.steps, "replay": asked.replay}
    if not request.painted:
        own["nudge"] = asked.nudge
    if request.inversion is not None and method.inverts:
        own["steps"] = request.inversion.settings["steps"]
    if asked.layers is not None:
        own["layers"] = asked.layers
    return method.changed(**own)


def guidance_of(method: Method, guidance: float | Sequence[float] | None, batch: int) -> Float[np.ndarray, " b"]:
    """One a row, the source's first; a single number is the edits', and the source's where the method has none."""
    rows = guidance_rows(guidance, method.guidance, batch)
    if np.ndim(guidance) == 0 and method.source_guidance is not None:
        rows[0] = method.source_guidance
    return rows


def checked_noise(
    painter: Painter, seed: int, noise: Float[AnyArray, "s c"] | None, canvas: Canvas
) -> Float[np.ndarray, "s c"]:
    """The caller's noise, or the seed's; SettingError for another shape."""
    return painter.noise(canvas, seed) if noise is None else checked_latents(painter, noise, canvas, "noise")


def checked_latents(
    painter: Painter, latents: Float[AnyArray, "*any"], canvas: Canvas, name: str
) -> Float[np.ndarray, "s c"]:
    """Packed latents on this host; SettingError, with the setting's name, for another shape."""
    shape = (canvas.tokens, painter.info.channels)
    found = list(np.shape(latents))
    if tuple(found) != shape:
        raise SettingError(
            f"`{name}` must be packed latents {list(shape)} at this size, found {found}; "
            "give the `height` and `width` that they have"
        )
    return np.asarray(latents, np.float32)


def _asked_region(request: Request, method: Method) -> Any:
    """A recipe, a mask, or None. SettingError where there is nothing that could be kept outside it."""
    asked = request.settings.region
    wanted = method.region if asked is None else asked
    if isinstance(wanted, str) and wanted == NO_REGION:
        if request.settings.paste:
            raise SettingError("`paste` needs a `region`: outside it the photo's own pixels stay")
        return None
    if method.path == "painted":
        raise SettingError(
            "`region` needs a picture to keep: give `image`, or another `method`, such as coupled "
            "(reference paints the source and its edits side by side)"
        )
    if request.settings.paste and request.image is None:
        raise SettingError("`paste` needs `image`, whose own pixels stay outside the region")
    if isinstance(wanted, RegionRecipe):
        return wanted
    # A file is read now, before anything is computed.
    if is_mask_file(wanted):
        return open_picture(wanted)
    return find_recipe(wanted) if isinstance(wanted, str) else wanted


def _regions(editor: Editor, mask: Any, method: Method) -> Float[np.ndarray, "e r q"] | None:
    """Where each edit may change the picture."""
    if mask is None:
        return None
    if isinstance(mask, RegionRecipe):
        return editor.regions(mask, method)
    return np.repeat(read_region(mask, editor.canvas)[None], editor.prompts.edits, axis=0)


def _locking(method: Method, regions: Any) -> Method:
    """A region that the user gives to a method without one keeps the background."""
    return method if regions is None or method.lock_until else method.changed(lock_until=LOCKED_UNTIL)


def _source(painter, request, method, conditioning, branches, canvas, noise, progress, keep) -> tuple[Source, int]:
    """What is edited, and the passes that its inversion took."""
    asked, first = request.settings, branches.row(0)
    if request.inversion is not None:
        inversion = request.inversion
        if asked.kv_cache == BANK_PLACES[0]:
            inversion = dataclasses.replace(inversion, bank=None)
        source = source_of_inversion(
            painter, inversion, request.source, method, asked.steps, asked.height, asked.width
        )
        if (
            method.inverts
            and source.inversion.settings.get("solver", "reference") != method.inversion
            and (method.name != REFERENCE)
        ):
            logger.warning(
                "%s follows inversions by %s, and this one is by %s: make it with sflow invert --method %s",
                method.name, method.inversion, source.inversion.settings.get("solver"), method.name,
            )  # fmt: skip
        return source, 0
    if request.painted:
        source = painted_source(painter, conditioning.rows([0]), canvas, noise, progress, first)
    elif request.latents is not None:
        source = Source(canvas, checked_latents(painter, request.latents, canvas, "latents"))
    else:
        source = Source(canvas, encoded(painter, request.image, canvas))
    if not method.inverts:
        return source, 0
    wanted = inversion_settings(method)
    # Skip-layer guidance is of what is painted: the way to noise is the model's own.
    first = dataclasses.replace(first, layers=())
    inversion = invert_latents(
        painter, source.picture, request.source, conditioning.rows([0]), canvas, wanted, asked.seed, progress,
        first, keep=keep,
    )  # fmt: skip
    count = BRANCHES if first.negative is not None and wanted["guidance"] != 1 else 1
    passes = inversion_passes(method.inversion, method.steps, count)
    return dataclasses.replace(source, inversion=inversion), passes


def _painted_together(painter, request, method, layers, scale, branches, canvas, noise, progress, bank) -> Edit:
    """The source and its edits side by side from one noise (the reference's edits of generated pictures)."""
    conditioning = painter.encode_prompts([request.source, *request.edits], progress)
    prompts, asked = Prompts(conditioning, scale, branches.conditioning(painter)), request.settings
    editor = Editor(
        painter, canvas, noise, prompts, None, asked.seed, asked.edits_at_once, progress, branches=branches,
        attentions=asked.attentions, watch=request.watch, on_step=request.on_step,
        bank=worth_filling(bank, request),
    )  # fmt: skip
    latents = editor.edited(method, layers, strengths=request.strengths)
    source = Source(canvas, np.asarray(latents[0]))
    return _result(painter, request, method, layers, scale, branches, source, latents, None, editor)


def worth_filling(bank: SourceBank | None, request: Request) -> SourceBank | None:
    """What the first batch fills: the caller's bank, or this call's if it has batches enough."""
    asked = request.settings
    if isinstance(asked.kv_cache, SourceBank):
        return bank
    fewest = FEWEST_BATCHES if asked.kv_cache == AUTOMATIC else 2
    return bank if math.ceil(len(request.edits) / asked.edits_at_once) >= fewest else None


def _result(painter, request, method, layers, scale, branches, source, latents, regions, editor) -> Edit:
    """What comes back, with every default filled in."""
    asked, canvas, nudge = request.settings, source.canvas, source.nudge if method.inverts else 1.0
    place = asked.kv_cache.asked if isinstance(asked.kv_cache, SourceBank) else asked.kv_cache
    if place == AUTOMATIC:
        # What was chosen, so that the same is computed when it is painted again.
        place = BANK_PLACES[0] if editor.used_bank is None else editor.used_bank.chosen
    region = method.region if asked.region is None else asked.region
    region = os.fspath(region) if isinstance(region, str | os.PathLike) else OWN
    settings = dataclasses.replace(
        asked,
        method=method.name,
        layers=layers,
        steps=method.steps,
        guidance=tuple(scale.tolist()),
        height=canvas.height,
        width=canvas.width,
        nudge=nudge,
        replay=method.replay,
        region=region,
        kv_cache=place,
        **branches.record(method.steps),
    )
    images = painter.decode(latents / nudge if asked.unnudge else latents, canvas)
    if asked.paste:
        photo = to_unit(fit_picture(open_picture(request.image), canvas.height, canvas.width))
        images = np.concatenate([images[:1], paste(images[1:], photo, regions)])
    return Edit(images, latents, settings, regions, editor.passes, method)


def find_region(
    painter: Painter,
    image: Picture,
    prompts: tuple[str, str],
    recipe: RegionRecipe,
    guidance: float | None,
    seed: int,
    canvas: Canvas,
    progress: Progress,
) -> Float[np.ndarray, "rows columns"]:
    """Where an edit (the second prompt) would change a picture; see `StableFlow.region`."""
    picture = encoded(painter, image, canvas)
    return find_region_of(painter, picture, prompts, recipe, guidance, seed, canvas, progress)[0]


def find_region_of(
    painter: Painter,
    picture: Float[np.ndarray, "s c"],
    prompts: tuple[str, str],
    recipe: RegionRecipe,
    guidance: float | None,
    seed: int,
    canvas: Canvas,
    progress: Progress,
) -> tuple[Float[np.ndarray, "rows columns"], int]:
    """The same of clean latents, and the passes that it took."""
    method = find_method("coupled", model_settings(painter))
    scale = np.full(2, method.guidance if guidance is None else guidance, np.float32)
    asked = Prompts(painter.encode_prompts(prompts), scale, Branches.of(painter, 2).conditioning(painter))
    editor = Editor(painter, canvas, picture, asked, None, seed, 1, progress)
    return editor.regions(recipe, method)[0], editor.passes
