"""Methods by name, as an evaluation runs them: the one place that calls `flow.edit`."""

import dataclasses
import inspect
import json
import re
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
from jaxtyping import UInt8

from sflow_jax.editing.edit import Request, choose_method
from sflow_jax.editing.methods import METHODS
from sflow_jax.editing.methods import Method as Recipe
from sflow_jax.errors import SettingError
from sflow_jax.evaluation.cases import Case
from sflow_jax.pictures.files import to_uint8
from sflow_jax.pipeline import StableFlow
from sflow_jax.results import Edit
from sflow_jax.settings import MODEL_SHAPE, EditSettings, EvaluationSettings

REFERENCE = "reference"
# Names that stand for settings of the reference's recipe.
RECIPES: dict[str, dict[str, Any]] = {REFERENCE: {}, "none": {"layers": "none"}}
AUTOENCODER = "autoencoder"
"""Not a method: the right answers encoded and decoded, the best that any method can reach."""
# Settings that are read as text by what takes them.
TEXTS = ("layers", "region")
FORM = "names with perhaps settings, such as reference,none,reference:layers=all:steps=20"
_LABEL = re.compile(r"[\w.+-]+(:\w+=[\w.+-]+)*")
# Arguments of `edit` that the evaluation itself gives.
_OWN = {
    "source_prompt",
    "edit_prompts",
    "image",
    "inversion",
    "noise",
    "seed",
    "progress",
    "method",
    "edits_at_once",
    "method_options",
}
# Setting of a method → its type.
_RECIPE = {field.name: field.type for field in dataclasses.fields(Recipe) if field.name not in ("name", "paper")}
_OWN_NUMBERS = set(_RECIPE) - set(inspect.signature(StableFlow.edit).parameters)


@dataclasses.dataclass(frozen=True)
class Method:
    """A method and its settings.

    label: as it was asked for. name: what `flow.edit` calls it; None: its default. options: arguments of
    `flow.edit`. numbers: settings of the method that are none of these, such as begin.
    """

    label: str
    name: str | None
    options: dict[str, Any]
    numbers: dict[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Painted:
    """What a method made of a case.

    images: [edits, y, x, 3]. passes: of the transformer, an edit's share of all that its batch took, inversion and
    region included. source: what was edited, where that was painted. seconds: for all edits together.
    """

    images: UInt8[np.ndarray, "n y x 3"]
    passes: float
    seconds: float
    source: UInt8[np.ndarray, "y x 3"] | None = None


def parse_methods(text: str) -> tuple[Method, ...]:
    """`a,b:name=value` as methods; SettingError for what cannot be read, or is there twice.

    A value is a number, true, false, or a text; any setting of the method will do, also those that `flow.edit`
    takes as `method_options`. `reference` is the paper's recipe with the nudge undone at decoding, so that pictures
    have the source's contrast; `none` is the same without injection.
    """
    labels = [part.strip() for part in text.split(",")]
    if not all(map(_LABEL.fullmatch, labels)):
        raise SettingError(f"cannot read `methods` {text!r}: write {FORM}")
    if len(set(labels)) < len(labels):
        raise SettingError(f"`methods` {text!r} names one twice")
    if AUTOENCODER in labels:
        raise SettingError(f"`methods` needs no {AUTOENCODER}: it is there where right answers are known")
    return tuple(map(_parse_method, labels))


def each_layer(text: str, layers: Iterable[int]) -> str:
    """Every method without injection, and with that of each of these layers alone, as `methods` of an evaluation.

    SettingError for methods that say their layers themselves.
    """
    for method in parse_methods(text):
        if "layers" in method.options:
            raise SettingError(
                f"{method.label} in `methods` has layers of its own, where each layer is to inject alone"
            )
    labels, layers = [method.label for method in parse_methods(text)], list(layers)
    return ",".join(f"{label}:layers={layer}" for label in labels for layer in ("none", *layers))


def _parse_method(label: str) -> Method:
    name, *settings = label.split(":")
    texts = {key: value for key, _, value in (setting.partition("=") for setting in settings)}
    values = {key: text if key in TEXTS else _value(key, text) for key, text in texts.items()}
    numbers = {key: value for key, value in values.items() if key in _OWN_NUMBERS}
    options = {key: value for key, value in values.items() if key not in numbers}
    if name in RECIPES:
        return Method(label, None, {"unnudge": True} | RECIPES[name] | options, numbers)
    return Method(label, name, options, numbers)


def _value(name: str, text: str) -> Any:
    for read in (float,) if _RECIPE.get(name) in (float, float | None) else (json.loads, float):
        try:
            return read(text)
        except ValueError:
            continue
    return text


def check_methods(edit: Callable[..., Edit], methods: tuple[Method, ...]) -> None:
    """SettingError for methods and settings that `StableFlow.edit` does not have, before anything is loaded."""
    parameters = inspect.signature(edit).parameters
    taken = set(parameters)
    # What takes any setting refuses unknown ones itself.
    anything = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values())
    for method in methods:
        if method.name is not None and method.name not in METHODS:
            known = ", ".join([*RECIPES, *(name for name in METHODS if name not in RECIPES)])
            raise SettingError(f"unknown method {method.name} in `methods`; known: {known}")
        settings = {**method.options, **method.numbers}
        # As text, so that what is no number is refused here.
        of_recipe = {name: str(value) for name, value in settings.items() if name in _RECIPE and name not in TEXTS}
        METHODS[method.name or REFERENCE].read(of_recipe)
        unknown = [name for name in method.options if name in _OWN or not (anything or name in taken)]
        if unknown:
            known = ", ".join(sorted({*taken, *_OWN_NUMBERS} - _OWN))
            raise SettingError(f"{method.label} in `methods` has no setting {', '.join(unknown)}; known: {known}")


def recipe_of(flow: StableFlow, method: Method, case: Case, settings: EvaluationSettings) -> Recipe:
    """With all of its numbers, as `edit_case` would take it."""
    source, options = _edit_options(method, case, settings)
    asked = EditSettings(**options)
    request = Request(case.prompt, list(case.edits), source.get("image"), None, None, asked)
    return choose_method(flow.painter, request)


def _edit_options(
    method: Method, case: Case, settings: EvaluationSettings
) -> tuple[dict[str, Any], dict[str, Any]]:
    """(source, settings) that `flow.edit` takes."""
    asked = {name: getattr(settings, name) for name in ("steps", "guidance", "height", "width")}
    options = {name: value for name, value in asked.items() if value is not None} | method.options
    if method.name is not None:
        options["method"] = method.name
    if method.numbers:
        options["method_options"] = method.numbers
    # All pictures of a benchmark are of one size.
    options |= {"size": MODEL_SHAPE, "edits_at_once": settings.edits_at_once}
    if case.picture is None:
        options.pop("unnudge", None)
        return {}, options
    return {"image": case.picture}, options


def edit_case(flow: StableFlow, method: Method, case: Case, settings: EvaluationSettings, seed: int) -> Painted:
    """All edits of a case by a method, in one batch as far as `edits_at_once` goes; or in a row."""
    source, options = _edit_options(method, case, settings)
    options |= {"seed": seed, "progress": False}
    start = time.perf_counter()
    if case.chained:
        results = list(_turns(flow, case, source, options))
    else:
        results = [flow.edit(case.prompt, list(case.edits), **source, **options)]
    seconds = time.perf_counter() - start
    images = np.concatenate([result.images[1:] for result in results])
    passes = float(np.mean([passes_of(result) for result in results]))
    painted = to_uint8(results[0].images[0]) if case.picture is None else None
    return Painted(to_uint8(images), passes, seconds, painted)


def _turns(flow: StableFlow, case: Case, source: dict[str, Any], options: dict[str, Any]) -> Iterator[Edit]:
    """One edit after the other, each of the last one's clean latents. source: the first one's."""
    for prompt, wanted in zip(case.sources, case.edits, strict=True):
        result = flow.edit(prompt, [wanted], **source, **options)
        source = {"latents": result.clean_latents[1]}
        yield result


def passes_of(result: Edit) -> float:
    """An edit's share of the transformer passes of its batch."""
    return result.evaluations / (len(result.images) - 1)


def through_autoencoder(flow: StableFlow, case: Case) -> Painted:
    """The right answers of a case, encoded and decoded."""
    start, canvas = time.perf_counter(), flow.info.canvas(*case.answers.shape[1:3])
    latents = [np.asarray(flow.painter.encode_image(answer, canvas)) for answer in case.answers]
    images = flow.painter.decode(np.concatenate(latents), canvas)
    return Painted(to_uint8(images), 0.0, time.perf_counter() - start)
