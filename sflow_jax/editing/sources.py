"""What is edited: a photo, its stored inversion, or a picture that the model paints first.

Axes: s image tokens, c channels.
"""

import dataclasses
import logging
from typing import Any

import numpy as np
from jaxtyping import Float

from sflow_jax.arrays import AnyArray
from sflow_jax.editing.bank import SourceBank
from sflow_jax.editing.branches import Branches
from sflow_jax.editing.editor import Editor, Prompts
from sflow_jax.editing.methods import Method, find_method
from sflow_jax.editing.recording import Recorder, recorder
from sflow_jax.errors import SettingError
from sflow_jax.machine.meshes import on_this_host
from sflow_jax.models.conditioning import Conditioning
from sflow_jax.painter import OnStep, Painter
from sflow_jax.pictures.canvas import Canvas
from sflow_jax.pictures.files import Picture, open_picture
from sflow_jax.pictures.latents import draw_noise
from sflow_jax.progress import Progress
from sflow_jax.records import photo_record
from sflow_jax.results import Inversion
from sflow_jax.sampling.control import LayerControl
from sflow_jax.sampling.solvers import find_solver
from sflow_jax.settings import ATTENTIONS, NUDGE, OWN_SHAPE, InversionSettings, PhotoSettings, as_record
from sflow_jax.storage.checkpoint import ModelInfo

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Source:
    """A picture to be edited: clean latents [s, c], and its path to noise where a method follows one."""

    canvas: Canvas
    picture: Float[np.ndarray, "s c"]
    inversion: Inversion | None = None

    @property
    def nudge(self) -> float:
        """Of the inversion, else 1."""
        return 1.0 if self.inversion is None else float(self.inversion.settings["nudge"])


def model_settings(painter: Painter) -> dict[str, dict[str, Any]]:
    """Method → settings where the model's differ from those in `METHODS`."""
    defaults = painter.defaults
    of_reference = {
        "steps": defaults.real_steps,
        "guidance": defaults.real_edit_guidance,
        "source_guidance": defaults.real_source_guidance,
        "inversion_guidance": defaults.real_source_guidance,
    }
    return {"reference": of_reference} | dict(painter.family.method_settings(painter.info.configs))


def canvas_of_photo(info: ModelInfo, asked: PhotoSettings, image: Picture | None) -> Canvas:
    """The size that a photo is painted in (opened for its own shape), or that settings ask for without one."""
    own = asked.size == OWN_SHAPE and asked.height is None and asked.width is None
    return info.canvas_of(asked, open_picture(image).size if own and image is not None else None)


def invert_picture(
    painter: Painter,
    image: Picture,
    prompt: str,
    asked: InversionSettings,
    progress: Progress,
    on_step: OnStep | None = None,
    bank: SourceBank | None = None,
) -> Inversion:
    """A picture's path to noise, by a method's settings where one is named; see `StableFlow.invert`.

    bank: filled for edits by a method that replays exactly.
    """
    method = None if asked.method is None else find_method(asked.method, model_settings(painter))
    if method is not None and not method.inverts:
        raise SettingError(f"`method` {method.name} inverts nothing; give the picture itself to its edits")
    defaults = {
        "steps": painter.defaults.real_steps,
        "guidance": painter.defaults.real_source_guidance,
        "nudge": NUDGE,
        "solver": "reference",
    }
    if method is not None:
        defaults = inversion_settings(method)
    wanted = {
        name: value if getattr(asked, name) is None else getattr(asked, name) for name, value in defaults.items()
    }
    find_solver(wanted["solver"])
    branches = Branches.of(painter, 1, asked)
    canvas = canvas_of_photo(painter.info, asked, image)
    conditioning = painter.encode_prompts([prompt], progress)
    keep, prompts = None, Prompts(conditioning, np.float32([wanted["guidance"]]), branches.conditioning(painter))
    if method is not None and painter.family.guidance != "branches":
        changes = {"inversion": wanted["solver"], "inversion_guidance": wanted["guidance"]}
        method = method.changed(steps=wanted["steps"], nudge=wanted["nudge"], **changes)
        layers = painter.info.resolve_layers(method.layers)
        keep = recorder(painter, canvas, prompts, branches, method, layers, ATTENTIONS[0], bank)
    inversion = invert_latents(
        painter,
        encoded(painter, image, canvas),
        prompt,
        conditioning,
        canvas,
        wanted,
        asked.seed,
        progress,
        branches,
        on_step,
        keep,
    )
    if keep is not None:
        editor = Editor(painter, canvas, picture_of(inversion), prompts, inversion, asked.seed)
        inversion = keep.finished(editor, method, layers)
    record = {
        "command": "invert",
        **as_record(asked),
        "method": None if method is None else method.name,
        **inversion.settings,
        **photo_record(image),
        **painter.record(),
    }
    return dataclasses.replace(inversion, record=record)


def inversion_settings(method: Method) -> dict[str, Any]:
    """How a method inverts."""
    return {
        "steps": method.steps,
        "guidance": method.inversion_guidance,
        "nudge": method.nudge,
        "solver": method.inversion,
    }


def encoded(painter: Painter, image: Picture, canvas: Canvas) -> Float[np.ndarray, "s c"]:
    """Clean latents of a picture, on this host."""
    return np.asarray(on_this_host(painter.encode_image(image, canvas)))[0]


def invert_latents(
    painter: Painter,
    picture: Float[np.ndarray, "s c"],
    prompt: str,
    conditioning: Conditioning,
    canvas: Canvas,
    wanted: dict[str, Any],
    seed: int,
    progress: Progress,
    branches: Branches | None = None,
    on_step: OnStep | None = None,
    keep: Recorder | None = None,
) -> Inversion:
    """The path to noise of clean latents. wanted: steps, guidance, nudge and solver. keep: what is to see it."""
    solver, branches = find_solver(wanted["solver"]), branches or Branches.of(painter, 1)
    settings = {
        "prompt": prompt,
        "steps": wanted["steps"],
        "guidance": wanted["guidance"],
        "nudge": wanted["nudge"],
        "height": canvas.height,
        "width": canvas.width,
        "solver": solver.name,
        # Lists, as they are when they are read again.
        **{name: list(x) if isinstance(x, tuple) else x for name, x in branches.record(wanted["steps"]).items()},
    }
    return painter.invert(
        picture[None] * np.float32(wanted["nudge"]),
        conditioning,
        canvas,
        steps=wanted["steps"],
        guidance=np.full(1, wanted["guidance"], np.float32),
        negative=branches.conditioning(painter),
        control=branches.on(LayerControl.none(wanted["steps"], 1, painter.layers)),
        solver=solver,
        noise=draw_noise(seed, *picture.shape) if solver.towards_noise else None,
        settings=settings,
        lent=None if keep is None else keep.lent,
        watch=None if keep is None else keep.see,
        on_step=on_step,
        progress=progress,
    )


def source_of_inversion(
    painter: Painter,
    inversion: Inversion,
    prompt: str,
    method: Method,
    steps: int | None,
    height: int | None,
    width: int | None,
) -> Source:
    """The inversion's picture; SettingError when the caller asks for another size or steps, or it does not fit."""
    settings = inversion.settings
    # A method that follows no inversion takes the picture alone, in as many steps as it likes.
    for name, asked in (("steps", steps if method.inverts else None), ("height", height), ("width", width)):
        if asked is not None and asked != settings[name]:
            raise SettingError(f"the inversion was made with {name}={settings[name]}, not {asked}; invert again")
    if prompt != settings["prompt"]:
        logger.warning("the picture was inverted with another prompt: %r", settings["prompt"])
    canvas = painter.info.canvas(settings["height"], settings["width"])
    expected = (settings["steps"] + 1, canvas.tokens, painter.info.channels)
    if inversion.trajectory.shape != expected:
        raise SettingError(
            f"the inversion is {list(inversion.trajectory.shape)}, not {list(expected)} as here; invert again"
        )
    return Source(canvas, picture_of(inversion), inversion)


def picture_of(inversion: Inversion) -> Float[np.ndarray, "s c"]:
    """Its clean latents."""
    return inversion.trajectory[0] / np.float32(inversion.settings["nudge"])


def painted_source(
    painter: Painter,
    conditioning: Conditioning,
    canvas: Canvas,
    noise: Float[AnyArray, "s c"],
    progress: Progress,
    branches: Branches,
) -> Source:
    """A picture of the source prompt, as edits of generated pictures have it. conditioning, branches: one row."""
    latents = painter.denoise(
        np.asarray(noise)[None],
        conditioning,
        branches.on(LayerControl.none(painter.defaults.edit_steps, 1, painter.layers)),
        canvas,
        guidance=np.full(1, painter.defaults.guidance, np.float32),
        negative=branches.conditioning(painter),
        progress=progress,
        what="painting the source",
    )
    return Source(canvas, np.asarray(latents)[0])
