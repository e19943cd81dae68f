"""StableFlow: text and pictures in, pictures out."""

import dataclasses
import logging
from collections.abc import Iterable, Iterator, Sequence

import jax.numpy as jnp
import numpy as np
from etils import epath
from flax import nnx
from jax.sharding import Mesh
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from sflow_jax.arrays import AnyArray
from sflow_jax.errors import SettingError
from sflow_jax.families.family import Defaults
from sflow_jax.families.text import TextEncoder
from sflow_jax.machine.meshes import on_this_host
from sflow_jax.models.conditioning import Conditioning
from sflow_jax.painter import Painter
from sflow_jax.pictures.canvas import Canvas
from sflow_jax.pictures.files import Picture
from sflow_jax.progress import Progress, as_progress
from sflow_jax.results import Edit, Generation, Inversion
from sflow_jax.runs.worker import Worker
from sflow_jax.sampling.control import LayerControl
from sflow_jax.sampling.schedule import Schedule
from sflow_jax.sampling.solvers import find_solver
from sflow_jax.settings import (
    AUTOMATIC,
    NUDGE,
    EditSettings,
    GenerationSettings,
    InversionSettings,
    Placement,
    SweepSettings,
)
from sflow_jax.storage.checkpoint import ModelInfo
from sflow_jax.vitality.find import find_vital_layers
from sflow_jax.vitality.summary import Summary

logger = logging.getLogger(__name__)
Layers = str | Iterable[int]


@dataclasses.dataclass(frozen=True)
class Start:
    """Where an edit begins: noise [s, c], and for a real picture its inversion and nudge."""

    canvas: Canvas
    steps: int
    noise: Float[np.ndarray, "s c"]
    inversion: Inversion | None
    nudge: float


class StableFlow:
    """A model that generates, inverts and edits pictures, with control over its layers.

    Make one with `StableFlow.load`. Every method raises ValueError with one clear line for bad input. progress:
    True shows a bar, False nothing; or a callable, see `sflow_jax.progress`.
    """

    def __init__(self, painter: Painter):
        self.painter = painter

    @classmethod
    def load(
        cls,
        checkpoint: epath.PathLike,
        *,
        mesh: Mesh | str | None = None,
        dtype: DTypeLike | None = None,
        attention: str = AUTOMATIC,
        quantisation: str | None = None,
        offload: bool = False,
        text_encoder: str = "device",
    ) -> "StableFlow":
        """Restore a converted checkpoint: a folder, local or remote, or "toyworld", the embedded model.

        mesh: from `sflow_jax.make_mesh`, or text such as "data=2,tensor=4"; each device reads only its slices.
        dtype: of weights and computation, by default float32 on CPU and bfloat16 elsewhere. attention: the kernel,
        by default the one for the platform, see `sflow_jax.models.attention`. quantisation: "int8" (weights) or
        "fp8" (products) in the blocks of the transformer and T5. offload: the transformer's blocks wait in host
        memory, and are copied one ahead of the computation. text_encoder: where T5 is between prompts: "device",
        "host" or "disk". Raises CheckpointError, and SettingError for unknown names.
        """
        placement = Placement(
            mesh=mesh,
            dtype=dtype,
            attention=attention,
            quantisation=quantisation,
            offload=offload,
            text_encoder=text_encoder,
        )
        return cls(Painter.load(checkpoint, placement))

    @property
    def info(self) -> ModelInfo:
        """What the checkpoint says of itself."""
        return self.painter.info

    @property
    def defaults(self) -> Defaults:
        """Steps and guidance where the caller gives none."""
        return self.painter.defaults

    @property
    def layers(self) -> int:
        """Number of layers of all kinds."""
        return self.painter.layers

    @property
    def mesh(self) -> Mesh | None:
        """Where the model is placed; None is one device."""
        return self.painter.mesh

    @property
    def schedule(self) -> Schedule:
        """Which sigmas a number of steps visits."""
        return self.painter.schedule

    @property
    def transformer(self) -> nnx.Module:
        """The network that predicts velocities."""
        return self.painter.transformer

    @property
    def autoencoder(self) -> nnx.Module:
        """The network between pictures and latents."""
        return self.painter.autoencoder

    @property
    def prompts(self) -> TextEncoder:
        """What makes conditioning of prompts."""
        return self.painter.prompts

    def encode_prompts(self, prompts: Sequence[str]) -> Conditioning:
        """Conditioning with one row a prompt; on FLUX.1 `.text` [b, w, e] and `.pooled` [b, p]."""
        return self.painter.encode_prompts(prompts)

    def encode_image(
        self, image: Picture, *, height: int | None = None, width: int | None = None
    ) -> Float[Array, "1 s c"]:
        """Packed, scaled latent mean of a picture (path, PIL image or uint8 array), float32.

        A picture of another size is scaled until it covers height × width, and its centre is cut out.
        """
        return self.painter.encode_image(image, self.info.canvas(height, width))

    def decode(
        self, latents: Float[AnyArray, "b s c"], *, height: int | None = None, width: int | None = None
    ) -> Float[np.ndarray, "b y x 3"]:
        """Pictures in 0..1, float32, of packed latents; about one megapixel at a time on every device."""
        return self.painter.decode(latents, self.info.canvas(height, width))

    def resolve_layers(self, layers: Layers) -> tuple[int, ...]:
        """Global numbers of "vital", "all", "none", "0,1,17-18" or a sequence; SettingError if there are none."""
        return self.info.resolve_layers(layers)

    def generate(
        self,
        prompts: Sequence[str],
        *,
        steps: int | None = None,
        guidance: float | Sequence[float] | None = None,
        height: int | None = None,
        width: int | None = None,
        seed: int = GenerationSettings.seed,
        noise: Float[AnyArray, "s c"] | None = None,
        bypass: Layers = (),
        progress: bool | Progress = True,
    ) -> Generation:
        """Pictures of prompts, all from the same noise.

        guidance: one number, or one a prompt. noise: packed [s, c], replaces the seed. bypass: layers that every
        step leaves out.
        """
        asked = GenerationSettings(steps=steps, guidance=guidance, seed=seed)
        canvas, layers = self.info.canvas(height, width), self.resolve_layers(bypass)
        start = self._noise(seed, noise, canvas)
        conditioning = self.encode_prompts(prompts)
        batch = len(conditioning)
        scale = _guidance(guidance, self.defaults.guidance, batch)
        settings = dataclasses.replace(
            asked,
            steps=steps or self.defaults.steps,
            guidance=tuple(scale.tolist()) if np.ndim(guidance) else float(scale[0]),
            height=canvas.height,
            width=canvas.width,
            bypass=layers,
        )
        latents = self.painter.denoise(
            np.repeat(start[None], batch, axis=0),
            conditioning,
            LayerControl.none(settings.steps, batch, self.layers).bypassing(layers),
            canvas,
            guidance=scale,
            negative=self._negative(batch),
            groups=batch,
            progress=as_progress(progress),
            what="generating",
        )
        return Generation(self.painter.decode(latents, canvas), latents, settings)

    def invert(
        self,
        image: Picture,
        prompt: str,
        *,
        steps: int | None = None,
        guidance: float | None = None,
        nudge: float = NUDGE,
        height: int | None = None,
        width: int | None = None,
        solver: str = InversionSettings.solver,
        progress: bool | Progress = True,
    ) -> Inversion:
        """The noise that leads to a picture, and the way there (inverse Euler with latent nudging).

        prompt: what the picture shows. nudge: the latents are multiplied by it first (paper: 1.15). solver: a name
        of `sampling.solvers.SOLVERS`. Defaults: 50 steps, guidance 1.
        """
        asked = InversionSettings(steps=steps, guidance=guidance, nudge=nudge, solver=solver)
        rule, canvas = find_solver(solver), self.info.canvas(height, width)
        settings = {
            "prompt": prompt,
            "steps": asked.steps or self.defaults.real_steps,
            "guidance": self.defaults.real_source_guidance if guidance is None else guidance,
            "nudge": nudge,
            "height": canvas.height,
            "width": canvas.width,
            "solver": rule.name,
        }
        conditioning = self.encode_prompts([prompt])
        encoded = self.painter.encode_image(image, canvas)
        return self.painter.invert(
            np.asarray(on_this_host(encoded)) * np.float32(nudge),
            conditioning,
            canvas,
            steps=settings["steps"],
            guidance=_guidance(settings["guidance"], 1.0, 1),
            negative=self._negative(1),
            solver=rule,
            settings=settings,
            progress=as_progress(progress),
        )

    def edit(
        self,
        source_prompt: str,
        edit_prompts: Sequence[str],
        *,
        image: Picture | None = None,
        inversion: Inversion | None = None,
        layers: Layers = EditSettings.layers,
        steps: int | None = None,
        guidance: float | Sequence[float] | None = None,
        seed: int = EditSettings.seed,
        noise: Float[AnyArray, "s c"] | None = None,
        nudge: float = NUDGE,
        unnudge: bool = EditSettings.unnudge,
        replay: str = EditSettings.replay,
        edits_at_once: int = EditSettings.edits_at_once,
        height: int | None = None,
        width: int | None = None,
        progress: bool | Progress = True,
    ) -> Edit:
        """Edits of a generated picture, or of a real one (`image`, or its `inversion`).

        layers: where the source's image keys and values replace the edit's: "vital", "all", "none" or
        global numbers. guidance: one number, or one a row, source first; a single number leaves the source
        of a real picture at 1. unnudge: divide the latents by the nudge before decoding (the reference does
        not). replay: how a real source follows its inversion, see `sampling.steps.denoising_steps`. More edits
        than `edits_at_once` run in chunks beside the same source. A real picture's size, steps and nudge
        are its inversion's.
        """
        asked = EditSettings(
            steps=steps, seed=seed, nudge=nudge, unnudge=unnudge, replay=replay, edits_at_once=edits_at_once
        )
        chosen, edits, batch = self.resolve_layers(layers), _checked_edits(edit_prompts), 1 + len(edit_prompts)
        if image is not None and inversion is not None:
            raise SettingError("give either `image` or `inversion`, not both")
        shows = as_progress(progress)
        if image is None and inversion is None:
            scale = _guidance(guidance, self.defaults.guidance, batch)
            start = self._generated_start(asked, noise, height, width)
        else:
            scale = self._real_guidance(guidance, batch)
            if image is not None:
                inversion = self.invert(
                    image, source_prompt, steps=steps, nudge=nudge, height=height, width=width, progress=shows
                )
            start = self._real_start(inversion, source_prompt, steps, height, width)
        settings = dataclasses.replace(
            asked,
            layers=chosen,
            steps=start.steps,
            guidance=tuple(scale.tolist()),
            height=start.canvas.height,
            width=start.canvas.width,
            nudge=start.nudge,
        )
        latents = self._edited(start, self.encode_prompts([source_prompt, *edits]), scale, settings, shows)
        decoded = latents / start.nudge if unnudge else latents
        return Edit(self.painter.decode(decoded, start.canvas), latents, settings)

    def find_vital_layers(
        self,
        out: epath.PathLike,
        settings: SweepSettings = SweepSettings(),
        *,
        worker: Worker = Worker(),
        wait: bool = False,
        progress: bool | Progress = True,
    ) -> Summary | None:
        """Bypass every layer for many prompts and see how much the pictures change: see `find_vital_layers`."""
        return find_vital_layers(self.painter, settings, out, worker=worker, wait=wait, progress=progress)

    def denoise(
        self,
        noise: Float[AnyArray, "b s c"],
        conditioning: Conditioning,
        control: LayerControl,
        *,
        guidance: Float[np.ndarray, " b"],
        height: int | None = None,
        width: int | None = None,
        groups: int = 1,
        **options,
    ) -> Float[Array, "b s c"]:
        """Latents of any batch under any control: see `Painter.denoise`."""
        canvas = self.info.canvas(height, width)
        return self.painter.denoise(
            noise, conditioning, control, canvas, guidance=guidance, groups=groups, **options
        )

    def _edited(
        self,
        start: Start,
        conditioning: Conditioning,
        guidance: Float[np.ndarray, " b"],
        settings: EditSettings,
        progress: Progress,
    ) -> Float[Array, "b s c"]:
        """Latents of the source (row 0) and its edits, chunk by chunk."""
        edits = len(conditioning) - 1
        chunks = list(_chunks(edits, min(settings.edits_at_once, edits)))
        control = LayerControl.none(start.steps, 1 + len(chunks[0]), self.layers).injecting(settings.layers)
        rows: list[Array] = []
        for number, chunk in enumerate(chunks):
            members, before = [0, *chunk], number * start.steps

            def shown(done: int, total: int, what: str, before: int = before) -> None:
                progress(before + done, total * len(chunks), what)

            latents = self.painter.denoise(
                np.repeat(start.noise[None], len(members), axis=0),
                conditioning.rows(members),
                control,
                start.canvas,
                guidance=guidance[members],
                negative=self._negative(len(members)),
                inversion=start.inversion,
                replay=settings.replay,
                progress=shown,
                what="editing",
            )
            rows.append(latents if not rows else latents[1:])
        # Filling up the last chunk repeated its last edit.
        return jnp.concatenate(rows)[: 1 + edits]

    def _negative(self, batch: int) -> Conditioning | None:
        """The branch without a prompt, for families whose guidance has one."""
        return self.encode_prompts([""] * batch) if self.painter.family.guidance == "branches" else None

    def _generated_start(self, asked: EditSettings, noise, height, width) -> Start:
        canvas = self.info.canvas(height, width)
        return Start(
            canvas, asked.steps or self.defaults.edit_steps, self._noise(asked.seed, noise, canvas), None, 1.0
        )

    def _real_start(self, inversion: Inversion, prompt: str, steps, height, width) -> Start:
        """The inversion's size and steps; SettingError when the caller asks for others, or it does not fit."""
        settings = inversion.settings
        for name, asked in (("steps", steps), ("height", height), ("width", width)):
            if asked is not None and asked != settings[name]:
                raise SettingError(
                    f"the inversion was made with {name}={settings[name]}, not {asked}; invert again"
                )
        if prompt != settings["prompt"]:
            logger.warning("the picture was inverted with another prompt: %r", settings["prompt"])
        canvas = self.info.canvas(settings["height"], settings["width"])
        expected = (settings["steps"] + 1, canvas.tokens, self.info.channels)
        if inversion.trajectory.shape != expected:
            raise SettingError(
                f"the inversion is {list(inversion.trajectory.shape)}, not {list(expected)} as here; invert again"
            )
        return Start(canvas, settings["steps"], inversion.trajectory[-1], inversion, settings["nudge"])

    def _noise(self, seed: int, noise: Float[AnyArray, "s c"] | None, canvas: Canvas) -> Float[np.ndarray, "s c"]:
        shape = (canvas.tokens, self.info.channels)
        if noise is None:
            return self.painter.noise(canvas, seed)
        if noise.shape != shape:
            raise SettingError(
                f"`noise` must be packed latents {list(shape)} at this size, found {list(noise.shape)}"
            )
        return np.asarray(noise, np.float32)

    def _real_guidance(self, guidance: float | Sequence[float] | None, batch: int) -> Float[np.ndarray, " b"]:
        """Guidance of a real source and its edits: a single number is the edits'."""
        values = _guidance(guidance, self.defaults.real_edit_guidance, batch)
        if guidance is None or np.ndim(guidance) == 0:
            values[0] = self.defaults.real_source_guidance
        return values


def _guidance(guidance: float | Sequence[float] | None, default: float, batch: int) -> Float[np.ndarray, " b"]:
    """One float32 a row; SettingError for a wrong number of them."""
    values = np.asarray(default if guidance is None else guidance, np.float32)
    if values.ndim > 1 or (values.ndim == 1 and len(values) != batch):
        raise SettingError(f"`guidance` must be one number or {batch}, one a row, found {values.tolist()}")
    return np.broadcast_to(values, (batch,)).copy()


def _checked_edits(edit_prompts: Sequence[str]) -> list[str]:
    if isinstance(edit_prompts, str) or not edit_prompts:
        raise SettingError(f"`edit_prompts` must be a list of at least one text, found {edit_prompts!r}")
    return list(edit_prompts)


def _chunks(edits: int, size: int) -> Iterator[list[int]]:
    """Rows 1…edits in chunks of `size`; the last one is filled up with the last row."""
    for start in range(1, edits + 1, size):
        yield [min(row, edits) for row in range(start, start + size)]
