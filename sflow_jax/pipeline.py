"""StableFlow: text and pictures in, pictures out."""

import dataclasses
import functools
import itertools
import logging
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from flax import nnx
from jax.sharding import Mesh
from jax.typing import DTypeLike
from jaxtyping import Array, Float
from tqdm.auto import tqdm

from sflow_jax.arrays import AnyArray
from sflow_jax.attention import AUTOMATIC
from sflow_jax.checkpoint import ModelInfo, load_info, load_network
from sflow_jax.control import LayerControl, check_layers
from sflow_jax.embedded import resolve
from sflow_jax.latents import Canvas, Picture, draw_noise, fit_picture, open_picture, to_network
from sflow_jax.models.autoencoder import Autoencoder
from sflow_jax.models.flux import Flux
from sflow_jax.placement import in_host_memory, on_device
from sflow_jax.programs import Run, decode, encode
from sflow_jax.prompts import TOKENIZERS, Conditioning, PromptEncoder, load_tokenizer
from sflow_jax.results import Edit, Generation, Inversion
from sflow_jax.sampling import Schedule, check_steps, denoising_steps, inversion_steps
from sflow_jax.sharding import DATA, FSDP, batch_sharding, on_this_host

logger = logging.getLogger(__name__)
Layers = str | Iterable[int]
# Pictures that go through the autoencoder at once: about one megapixel.
DECODED_PIXELS = 1024 * 1024
EDITS_AT_ONCE = 3
TEXT_ENCODER_PLACES = ("device", "host", "disk")


@dataclasses.dataclass(frozen=True)
class Defaults:
    """Settings of a model family where the caller gives none (method: the reference's)."""

    steps: int
    guidance: float
    edit_steps: int
    real_steps: int = 50
    real_source_guidance: float = 1.0
    real_edit_guidance: float = 3.0


FAMILIES = {
    "dev": Defaults(steps=28, guidance=3.5, edit_steps=15),
    "schnell": Defaults(steps=4, guidance=0.0, edit_steps=4, real_steps=8),
}


@dataclasses.dataclass(frozen=True)
class Start:
    """Where an edit begins: noise [s, c], and for a real picture its inversion's trajectory and nudge."""

    canvas: Canvas
    steps: int
    noise: Float[np.ndarray, "s c"]
    trajectory: Float[np.ndarray, "t_plus_1 s c"] | None
    nudge: float


def resolve_layers(info: ModelInfo, layers: Layers) -> tuple[int, ...]:
    """A model's global layer numbers of "vital", "all", "none" or a sequence; ValueError where there are none."""
    total = info.configs["transformer"].layers
    if isinstance(layers, str):
        if layers == "all":
            return tuple(range(total))
        if layers == "none":
            return ()
        if layers != "vital":
            raise ValueError(f"layers must be vital, all, none or numbers, found {layers!r}")
        if info.vital_layers is None:
            raise ValueError(
                "this checkpoint does not say which of its layers are vital; give layer numbers, "
                "or 'all', or convert with --vital-layers"
            )
        layers = info.vital_layers
    return check_layers(layers, total)


class StableFlow:
    """A FLUX model that generates, inverts and edits pictures, with control over its layers.

    Make one with `StableFlow.load`. Every method raises ValueError with one clear line for bad input.
    """

    def __init__(
        self,
        info: ModelInfo,
        transformer: Flux,
        autoencoder: Autoencoder,
        prompts: PromptEncoder,
        *,
        mesh: Mesh | None = None,
        attention: str = AUTOMATIC,
    ):
        self.info, self.transformer, self.autoencoder, self.prompts = info, transformer, autoencoder, prompts
        self.mesh = mesh
        self.kernel = attention
        self.schedule = Schedule.from_hf(info.scheduler)
        self.defaults = FAMILIES[info.family]

    @classmethod
    def load(
        cls,
        checkpoint: epath.PathLike,
        *,
        mesh: Mesh | None = None,
        dtype: DTypeLike | None = None,
        attention: str = AUTOMATIC,
        quantisation: str | None = None,
        offload: bool = False,
        text_encoder: str = "device",
    ) -> "StableFlow":
        """Restore a converted checkpoint: a folder, local or remote, or "toyworld", the embedded model.

        mesh: from `sflow_jax.sharding.make_mesh`; each device reads only its slices. dtype: of weights and
        computation, by default float32 on CPU and bfloat16 elsewhere. attention: the kernel, by default the one for
        the platform, see `sflow_jax.attention`. quantisation: "int8" (weights) or "fp8" (products) in the blocks of
        the transformer and T5. offload: the transformer's blocks wait in host memory, and are copied one ahead of
        the computation. text_encoder: where T5 is between prompts: "device", "host" or "disk".
        Raises CheckpointError, and ValueError for unknown names.
        """
        if text_encoder not in TEXT_ENCODER_PLACES:
            raise ValueError(
                f"no place {text_encoder!r} for the text encoder; choose one of {', '.join(TEXT_ENCODER_PLACES)}"
            )
        folder = resolve(checkpoint)
        info = load_info(folder)
        if dtype is None:
            dtype = jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16

        def restore(name: str, **changes: Any) -> nnx.Module:
            return load_network(folder, name, info.configs[name], dtype=dtype, mesh=mesh, **changes)

        # First, since moving it off the device again needs room there.
        fetch_t5 = functools.partial(restore, "t5", quantisation=quantisation)
        if text_encoder == "device":
            t5 = fetch_t5()
            fetch_t5 = lambda: t5
        elif text_encoder == "host":
            fetch_t5 = functools.partial(on_device, in_host_memory(fetch_t5()))
        transformer = restore("transformer", quantisation=quantisation, offload=offload)
        tokenizers = [load_tokenizer(folder / TOKENIZERS[name]) for name in ("clip", "t5")]
        prompts = PromptEncoder(restore("clip"), fetch_t5, *tokenizers)
        return cls(info, transformer, restore("autoencoder"), prompts, mesh=mesh, attention=attention)

    @property
    def layers(self) -> int:
        """Number of layers, double and single blocks together."""
        return self.transformer.config.layers

    def encode_prompts(self, prompts: Sequence[str]) -> Conditioning:
        """Text [b, w, e] and pooled [b, p] features, one row a prompt."""
        return self.prompts.encode(prompts)

    def encode_image(
        self, image: Picture, *, height: int | None = None, width: int | None = None
    ) -> Float[Array, "1 s c"]:
        """Packed, scaled latent mean of a picture (path, PIL image or uint8 array), float32.

        A picture of another size is scaled until it covers height × width, and its centre is cut out.
        """
        canvas = self._canvas(height, width)
        pixels = fit_picture(open_picture(image), canvas.height, canvas.width)
        return encode(self.autoencoder, to_network(pixels[None]))

    def decode(self, latents: Float[AnyArray, "b s c"], *, height: int, width: int) -> Float[np.ndarray, "b y x 3"]:
        """Pictures in 0..1, float32, of packed latents; about one megapixel at a time on every device."""
        canvas = self._canvas(height, width)
        batch = len(latents)
        chunk = max(1, DECODED_PIXELS // (height * width))
        chunk = min(batch, chunk * (1 if self.mesh is None else self.mesh.shape[DATA] * self.mesh.shape[FSDP]))
        placed = batch_sharding(self.mesh, chunk)
        images = []
        for start in range(0, batch, chunk):
            # The last chunk is filled up with its first row, so that it compiles nothing.
            rows = np.minimum(np.arange(start, start + chunk), batch - 1)
            decoded = decode(
                self.autoencoder, jax.device_put(latents[rows], placed), rows=canvas.rows, columns=canvas.columns
            )
            images.append(np.asarray(on_this_host(decoded))[: batch - start])
        return np.concatenate(images)

    def generate(
        self,
        prompts: Sequence[str],
        *,
        steps: int | None = None,
        guidance: float | Sequence[float] | None = None,
        height: int | None = None,
        width: int | None = None,
        seed: int = 0,
        noise: Float[AnyArray, "s c"] | None = None,
        bypass: Iterable[int] = (),
        progress: bool = True,
    ) -> Generation:
        """Pictures of prompts, all from the same noise.

        guidance: one number, or one a prompt. noise: packed [s, c], replaces the seed. bypass: global
        numbers of layers that every step leaves out.
        """
        canvas = self._canvas(height, width)
        conditioning = self.encode_prompts(prompts)
        batch = len(conditioning)
        steps = check_steps(self.defaults.steps if steps is None else steps)
        control = LayerControl.none(steps, batch, self.layers).bypassing(bypass)
        start = self._noise(seed, noise, canvas)
        with tqdm(total=steps, desc="generating", unit="step", disable=not progress) as bar:
            latents = self.denoise(
                np.repeat(start[None], batch, axis=0),
                conditioning,
                control,
                guidance=self._guidance(guidance, self.defaults.guidance, batch),
                height=canvas.height,
                width=canvas.width,
                groups=batch,
                bar=bar,
            )
        return Generation(self.decode(latents, height=canvas.height, width=canvas.width), latents)

    def invert(
        self,
        image: Picture,
        prompt: str,
        *,
        steps: int | None = None,
        guidance: float | None = None,
        nudge: float = 1.15,
        height: int | None = None,
        width: int | None = None,
        progress: bool = True,
    ) -> Inversion:
        """The noise that leads to a picture, and the way there (inverse Euler with latent nudging).

        prompt: what the picture shows. nudge: the latents are multiplied by it first (paper: 1.15).
        Defaults: 50 steps, guidance 1.
        """
        if not nudge > 0:
            raise ValueError(f"nudge must be above 0, found {nudge} (the paper uses 1.15; 1 means none)")
        canvas = self._canvas(height, width)
        steps = check_steps(self.defaults.real_steps if steps is None else steps)
        guidance = self.defaults.real_source_guidance if guidance is None else guidance
        sigmas = self.schedule.sigmas(steps, canvas.tokens)
        conditioning = self.encode_prompts([prompt])
        encoded = self.encode_image(image, height=canvas.height, width=canvas.width)
        nudged = np.asarray(on_this_host(encoded)) * np.float32(nudge)
        control = LayerControl.none(steps, 1, self.layers)
        run = self._run(canvas, conditioning, self._guidance(guidance, 1.0, 1), groups=1)
        with tqdm(total=steps, desc="inverting", unit="step", disable=not progress) as bar:
            path = inversion_steps(sigmas, control, run.nothing)
            states = [nudged, *map(jnp.copy, run(nudged, path, bar))]
        settings = {"prompt": prompt, "steps": steps, "guidance": guidance, "nudge": nudge}
        settings |= {"height": canvas.height, "width": canvas.width}
        states = [np.asarray(on_this_host(state)) for state in states]
        return Inversion(np.concatenate(states), sigmas[::-1].copy(), settings)

    def edit(
        self,
        source_prompt: str,
        edit_prompts: Sequence[str],
        *,
        image: Picture | None = None,
        inversion: Inversion | None = None,
        layers: Layers = "vital",
        steps: int | None = None,
        guidance: float | Sequence[float] | None = None,
        seed: int = 0,
        noise: Float[AnyArray, "s c"] | None = None,
        nudge: float = 1.15,
        unnudge: bool = False,
        replay: str = "aligned",
        edits_at_once: int = EDITS_AT_ONCE,
        height: int | None = None,
        width: int | None = None,
        progress: bool = True,
    ) -> Edit:
        """Edits of a generated picture, or of a real one (`image`, or its `inversion`).

        layers: where the source's image keys and values replace the edit's: "vital", "all", "none" or
        global numbers. guidance: one number, or one a row, source first; a single number leaves the source
        of a real picture at 1. unnudge: divide the latents by the nudge before decoding (the reference does
        not). replay: how a real source follows its inversion, see `sampling.denoising_steps`. More edits
        than `edits_at_once` run in chunks beside the same source. A real picture's size, steps and nudge
        are its inversion's.
        """
        edits = self._checked_edits(edit_prompts, edits_at_once)
        chosen = self.resolve_layers(layers)
        batch = 1 + len(edits)
        if image is not None and inversion is not None:
            raise ValueError("give either image or inversion, not both")
        if image is None and inversion is None:
            guidance = self._guidance(guidance, self.defaults.guidance, batch)
            start = self._generated_start(steps, seed, noise, height, width)
        else:
            guidance = self._real_guidance(guidance, batch)
            if image is not None:
                inversion = self.invert(
                    image, source_prompt, steps=steps, nudge=nudge, height=height, width=width, progress=progress
                )
            start = self._real_start(inversion, source_prompt, steps, height, width)
        conditioning = self.encode_prompts([source_prompt, *edits])
        latents = self._edited(start, conditioning, guidance, chosen, edits_at_once, replay, progress)
        images = self.decode(
            latents / start.nudge if unnudge else latents, height=start.canvas.height, width=start.canvas.width
        )
        return Edit(images, latents, chosen, start.steps, tuple(guidance.tolist()), start.nudge)

    def _edited(
        self,
        start: Start,
        conditioning: Conditioning,
        guidance: Float[np.ndarray, " b"],
        layers: tuple[int, ...],
        edits_at_once: int,
        replay: str,
        progress: bool,
    ) -> Float[Array, "b s c"]:
        """Latents of the source (row 0) and its edits, chunk by chunk."""
        edits = len(conditioning) - 1
        chunks = list(_chunks(edits, min(edits_at_once, edits)))
        control = LayerControl.none(start.steps, 1 + len(chunks[0]), self.layers).injecting(layers)
        rows: list[Array] = []
        with tqdm(total=start.steps * len(chunks), desc="editing", unit="step", disable=not progress) as bar:
            for chunk in chunks:
                members = [0, *chunk]
                latents = self.denoise(
                    np.repeat(start.noise[None], len(members), axis=0),
                    conditioning.rows(members),
                    control,
                    guidance=guidance[members],
                    height=start.canvas.height,
                    width=start.canvas.width,
                    trajectory=start.trajectory,
                    replay=replay,
                    bar=bar,
                )
                rows.append(latents if not rows else latents[1:])
        # Filling up the last chunk repeated its last edit.
        return jnp.concatenate(rows)[: 1 + edits]

    def denoise(
        self,
        noise: Float[AnyArray, "b s c"],
        conditioning: Conditioning,
        control: LayerControl,
        *,
        guidance: Float[np.ndarray, " b"],
        height: int,
        width: int,
        groups: int = 1,
        trajectory: Float[np.ndarray, "t_plus_1 s c"] | None = None,
        replay: str = "aligned",
        between: tuple[int, int] | None = None,
        bar: tqdm | None = None,
    ) -> Float[Array, "b s c"]:
        """Latents of any batch under any control: what `generate` and `edit` are made of.

        The batch is `groups` × members, member 0 of each group the source; the control says how many steps.
        trajectory: the inversion that the only group's source replays. between: only these steps, first to
        before last, with `noise` the latents before the first. bar: a progress bar to advance.
        """
        canvas = self._canvas(height, width)
        run = self._run(canvas, conditioning, guidance, groups=groups)
        sigmas = self.schedule.sigmas(control.steps, canvas.tokens)
        path = denoising_steps(sigmas, control, run.nothing, trajectory, replay)
        if between is not None:
            path = itertools.islice(path, *between)
        *_, latents = run(noise, path, bar or tqdm(disable=True))
        return on_this_host(latents)

    def resolve_layers(self, layers: Layers) -> tuple[int, ...]:
        """Global layer numbers of "vital", "all", "none" or a sequence; ValueError where there are none."""
        return resolve_layers(self.info, layers)

    def _run(self, canvas: Canvas, conditioning: Conditioning, guidance: np.ndarray, *, groups: int) -> Run:
        return Run(
            self.transformer, canvas, conditioning, guidance, groups=groups, mesh=self.mesh, kernel=self.kernel
        )

    def _canvas(self, height: int | None, width: int | None) -> Canvas:
        """A size, with the checkpoint's default for the sides not given; ValueError if it does not fit."""
        default = self.info.picture_size
        return Canvas.of(
            default if height is None else height,
            default if width is None else width,
            self.autoencoder.config.downsampling,
        )

    def _generated_start(self, steps, seed, noise, height, width) -> Start:
        canvas = self._canvas(height, width)
        steps = check_steps(self.defaults.edit_steps if steps is None else steps)
        return Start(canvas, steps, self._noise(seed, noise, canvas), None, 1.0)

    def _real_start(self, inversion: Inversion, prompt: str, steps, height, width) -> Start:
        """The inversion's size and steps; ValueError when the caller asks for others, or it does not fit."""
        settings = inversion.settings
        for name, asked in (("steps", steps), ("height", height), ("width", width)):
            if asked is not None and asked != settings[name]:
                raise ValueError(f"the inversion was made with {name}={settings[name]}, not {asked}; invert again")
        if prompt != settings["prompt"]:
            logger.warning("the picture was inverted with another prompt: %r", settings["prompt"])
        canvas = self._canvas(settings["height"], settings["width"])
        expected = (settings["steps"] + 1, canvas.tokens, self.transformer.config.in_channels)
        if inversion.trajectory.shape != expected:
            raise ValueError(
                f"the inversion is {list(inversion.trajectory.shape)}, not {list(expected)} as here; invert again"
            )
        return Start(canvas, settings["steps"], inversion.trajectory[-1], inversion.trajectory, settings["nudge"])

    def _noise(self, seed: int, noise: Float[AnyArray, "s c"] | None, canvas: Canvas) -> Float[np.ndarray, "s c"]:
        shape = (canvas.tokens, self.transformer.config.in_channels)
        if noise is None:
            return draw_noise(seed, *shape)
        if noise.shape != shape:
            raise ValueError(f"noise must be packed latents {list(shape)} at this size, found {list(noise.shape)}")
        return np.asarray(noise, np.float32)

    def _guidance(self, guidance: float | Sequence[float] | None, default: float, batch: int) -> np.ndarray:
        """One float32 a row; ValueError for a wrong number of them."""
        values = np.asarray(default if guidance is None else guidance, np.float32)
        if values.ndim > 1 or (values.ndim == 1 and len(values) != batch):
            raise ValueError(f"guidance must be one number or {batch}, one a row, found {values.tolist()}")
        return np.broadcast_to(values, (batch,)).copy()

    def _real_guidance(self, guidance: float | Sequence[float] | None, batch: int) -> np.ndarray:
        """Guidance of a real source and its edits: a single number is the edits'."""
        values = self._guidance(guidance, self.defaults.real_edit_guidance, batch)
        if guidance is None or np.ndim(guidance) == 0:
            values[0] = self.defaults.real_source_guidance
        return values

    @staticmethod
    def _checked_edits(edit_prompts: Sequence[str], edits_at_once: int) -> list[str]:
        if isinstance(edit_prompts, str) or not edit_prompts:
            raise ValueError(f"edit_prompts must be a list of at least one text, found {edit_prompts!r}")
        if edits_at_once < 1:
            raise ValueError(f"edits_at_once must be at least 1, found {edits_at_once}")
        return list(edit_prompts)


def _chunks(edits: int, size: int) -> Iterator[list[int]]:
    """Rows 1…edits in chunks of `size`; the last one is filled up with the last row."""
    for start in range(1, edits + 1, size):
        yield [min(row, edits) for row in range(start, start + size)]
