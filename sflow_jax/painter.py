"""A loaded model on a canvas: encode, denoise, invert, decode. What pictures mean to a user is the pipeline's."""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Float

from sflow_jax.arrays import AnyArray
from sflow_jax.catalogue import find_model
from sflow_jax.errors import SettingError
from sflow_jax.families.family import Defaults, Family
from sflow_jax.families.text import TextEncoder
from sflow_jax.machine.compilation import naming_compilation
from sflow_jax.machine.meshes import DATA, FSDP, as_mesh, batch_sharding, on_this_host
from sflow_jax.machine.processes import describe_devices, package_versions
from sflow_jax.models.conditioning import Conditioning
from sflow_jax.models.lending import Lent
from sflow_jax.pictures.canvas import Canvas
from sflow_jax.pictures.files import Picture, fit_picture, open_picture, to_network
from sflow_jax.pictures.latents import draw_noise
from sflow_jax.progress import Progress, ignore
from sflow_jax.records import placement_record
from sflow_jax.results import Inversion
from sflow_jax.sampling.control import LayerControl
from sflow_jax.sampling.guidance import interleave
from sflow_jax.sampling.solve import Reached, Solve, take_step
from sflow_jax.sampling.solvers import EULER, REFERENCE_INVERSION, Solver
from sflow_jax.sampling.steps import Blank, Step, denoising_steps, inversion_steps
from sflow_jax.settings import Placement
from sflow_jax.storage.checkpoint import ModelInfo, check_networks, load_network, verify_small
from sflow_jax.storage.placement import computed_dtype, in_host_memory, on_device
from sflow_jax.storage.tokenizers import load_tokenizer

# Pictures that go through the autoencoder at once: about one megapixel.
DECODED_PIXELS = 1024 * 1024
STEP = take_step.__name__


@functools.partial(jax.jit, static_argnames="family")
def encode_pictures(
    autoencoder: nnx.Module, pictures: Float[AnyArray, "b y x 3"], *, family: Family
) -> Float[Array, "b s c"]:
    """Pictures in −1..1 → packed latents."""
    return family.encode(autoencoder, pictures)


@functools.partial(jax.jit, static_argnames=("family", "canvas"))
def decode_latents(
    autoencoder: nnx.Module, latents: Float[AnyArray, "b s c"], *, family: Family, canvas: Canvas
) -> Float[Array, "b y x 3"]:
    """Packed latents → pictures in 0..1."""
    return jnp.clip(family.decode(autoencoder, latents, canvas) / 2 + 0.5, 0.0, 1.0)


OnStep = Callable[[int, Array], Any]
"""Called with a step's number, from 1, and the latents [b, s, c] behind it, still on the device."""


def watching(on_step: OnStep | None) -> Callable[[Reached], None] | None:
    """What `Painter.follow` calls, for somebody who wants to see every step; the latents are theirs to keep.

    Nothing waits for the device unless they look at the numbers.
    """
    if on_step is None:
        return None
    steps = itertools.count(1)
    return lambda reached: on_step(next(steps), jnp.copy(reached.latents))


class Painter:
    """A model of any family, and where it runs. Make one with `Painter.load`.

    info: what the checkpoint says. transformer, autoencoder: networks. prompts: the text encoder. placement: in
    which numbers and where. checkpoint: the name that it was loaded by.
    """

    def __init__(
        self,
        info: ModelInfo,
        transformer: nnx.Module,
        autoencoder: nnx.Module,
        prompts: TextEncoder,
        placement: Placement = Placement(),
        checkpoint: str = "",
    ):
        self.info, self.transformer, self.autoencoder, self.prompts = info, transformer, autoencoder, prompts
        self.placement, self.checkpoint = placement, checkpoint
        self.schedule = info.family.schedule(info.scheduler)

    @classmethod
    def load(
        cls, checkpoint: epath.PathLike, placement: Placement = Placement(), progress: Progress = ignore
    ) -> "Painter":
        """Restore a converted checkpoint by its folder or name. Raises CheckpointError."""
        placement = dataclasses.replace(placement, mesh=as_mesh(placement.mesh))
        computed_dtype(placement.dtype)
        folder, info = find_model(checkpoint)
        if placement.step_cache and info.family.reused_width(info.configs) is None:
            raise SettingError(f"{info.title} has no `step_cache`: its layers cannot be left out; leave it at 0")
        # What can be wrong is looked for before anything large is read.
        check_networks(folder, info.configs)
        tokenizers = {key: load_tokenizer(folder / place) for key, place in info.tokenizers.items()}
        verify_small(folder)
        fetch, read = {}, itertools.count()

        def restore(name: str) -> nnx.Module:
            progress(min(next(read), len(fetch)), len(info.networks), f"loading: {name}")
            return load_network(folder, info, name, placement)

        for name, spec in info.networks.items():
            # What waits elsewhere comes first, since moving it off the device again needs room there.
            once = functools.partial(restore, name)
            fetch[name] = _fetched(once, placement.text_encoder) if spec.may_wait else once
        transformer = fetch["transformer"]()
        prompts = info.family.text_encoder(fetch, tokenizers)
        painter = cls(info, transformer, fetch["autoencoder"](), prompts, placement, str(checkpoint))
        progress(len(fetch), len(fetch), "loading")
        return painter

    def record(self) -> dict[str, Any]:
        """Which model computes, where and how, as results say it."""
        dtype = computed_dtype(self.placement.dtype).name
        return {
            "model": self.checkpoint,
            "model_name": self.info.title,
            "model_digest": self.info.digest,
            **placement_record(self.placement, dtype),
            "device": describe_devices(),
            "versions": package_versions(),
        }

    @property
    def family(self) -> Family:
        """What the model is one of."""
        return self.info.family

    @property
    def mesh(self) -> Mesh | None:
        """Where the model is placed; None is one device."""
        return self.placement.mesh

    @property
    def layers(self) -> int:
        """Number of layers of all kinds."""
        return self.info.layers

    @property
    def defaults(self) -> Defaults:
        """Steps and guidance where the caller gives none."""
        return self.info.defaults

    def noise(self, canvas: Canvas, seed: int) -> Float[np.ndarray, "s c"]:
        """Standard normal packed noise of a seed."""
        return draw_noise(seed, canvas.tokens, self.info.channels)

    def encode_prompts(self, prompts: Sequence[str], progress: Progress = ignore) -> Conditioning:
        """One row a prompt."""
        progress(0, 1, "encoding")
        rows = self.prompts.encode(prompts)
        progress(1, 1, "encoding")
        return rows

    def encode_image(self, image: Picture, canvas: Canvas) -> Float[Array, "1 s c"]:
        """Packed, scaled latent mean of a picture (path, PIL image or uint8 array), float32."""
        pixels = fit_picture(open_picture(image), canvas.height, canvas.width)
        return encode_pictures(self.autoencoder, to_network(pixels[None]), family=self.family)

    def decode(self, latents: Float[AnyArray, "b s c"], canvas: Canvas) -> Float[np.ndarray, "b y x 3"]:
        """Pictures in 0..1, float32; about one megapixel at a time on every device."""
        batch, devices = len(latents), 1 if self.mesh is None else self.mesh.shape[DATA] * self.mesh.shape[FSDP]
        chunk = min(batch, devices * max(1, DECODED_PIXELS // (canvas.height * canvas.width)))
        placed = batch_sharding(self.mesh, chunk)
        images = []
        for start in range(0, batch, chunk):
            # The last chunk is filled up with its last row, so that it compiles nothing.
            rows = np.minimum(np.arange(start, start + chunk), batch - 1)
            decoded = decode_latents(
                self.autoencoder, jax.device_put(latents[rows], placed), family=self.family, canvas=canvas
            )
            images.append(np.asarray(on_this_host(decoded))[: batch - start])
        return np.concatenate(images)

    def denoise(
        self,
        noise: Float[AnyArray, "b s c"],
        conditioning: Conditioning,
        control: LayerControl,
        canvas: Canvas,
        *,
        guidance: Float[np.ndarray, " b"],
        negative: Conditioning | None = None,
        groups: int = 1,
        solver: Solver = EULER,
        inversion: Inversion | None = None,
        replay: str = "aligned",
        between: tuple[int, int] | None = None,
        watch: Callable[[Reached], None] | None = None,
        progress: Progress = ignore,
        what: str = "painting",
    ) -> Float[Array, "b s c"]:
        """Latents of any batch under any control: what generations, edits and sweeps are made of.

        The batch is `groups` × members, member 0 of each group the source; the control says how many steps.
        negative: conditioning of the second branch, for families whose guidance has one; not computed where all
        guidance is 1. inversion: what the only group's source replays. between: only these steps, first to before
        last, with `noise` the latents before the first. watch: see `follow`.
        """
        self._check(control, len(noise), canvas)
        first, last = between or (0, control.steps)
        sigmas = self.schedule.sigmas(control.steps, canvas.tokens)

        def path(blank: Blank) -> Iterator[list[Step]]:
            intervals = denoising_steps(sigmas, control, blank, solver=solver, path=inversion, replay=replay)
            return itertools.islice(intervals, first, last)

        return self.follow(
            noise,
            conditioning,
            path,
            canvas,
            intervals=last - first,
            guidance=guidance,
            negative=negative,
            groups=groups,
            watch=watch,
            progress=progress,
            what=what,
        )

    def follow(
        self,
        latents: Float[AnyArray, "b s c"],
        conditioning: Conditioning,
        path: Callable[[Blank], Iterable[list[Step]]],
        canvas: Canvas,
        *,
        intervals: int,
        guidance: Float[np.ndarray, " b"],
        negative: Conditioning | None = None,
        groups: int = 1,
        reference: Float[AnyArray, "b s c"] | None = None,
        watch: Callable[[Reached], None] | None = None,
        each: Callable[[Reached], None] | None = None,
        progress: Progress = ignore,
        what: str = "painting",
    ) -> Float[Array, "b s c"]:
        """Latents at the end of any path of steps; one compilation for all paths of a batch's shape.

        path: from blank steps to those of `intervals` intervals. negative: see `denoise`. reference: the second
        path's start, see `sampling.steps`. watch: sees every interval's end before the next one uses it up; each:
        every step's.
        """
        solve = self._solve(canvas, conditioning, guidance, negative, groups)
        with naming_compilation(progress, STEP) as progress:
            progress(0, intervals, what)
            for done, reached in enumerate(solve(latents, path(solve.blank), reference=reference, each=each), 1):
                latents = reached.latents
                if watch is not None:
                    watch(reached)
                progress(done, intervals, what)
        latents = on_this_host(latents)
        if not _all_finite(latents):
            raise SettingError(
                f"{what} gave numbers that are not finite: lower `guidance`, or convert the checkpoint again "
                "(its weights may be damaged)"
            )
        return latents

    def invert(
        self,
        latents: Float[AnyArray, "1 s c"],
        conditioning: Conditioning,
        canvas: Canvas,
        *,
        steps: int,
        guidance: Float[np.ndarray, " 1"],
        negative: Conditioning | None = None,
        control: LayerControl | None = None,
        solver: Solver = REFERENCE_INVERSION,
        noise: Float[AnyArray, "s c"] | None = None,
        settings: dict | None = None,
        lent: Lent | None = None,
        watch: Callable[[Reached], None] | None = None,
        on_step: OnStep | None = None,
        progress: Progress = ignore,
    ) -> Inversion:
        """A picture's path to noise, with all that exact replay needs.

        control: by default none. noise: what the path first heads for, for solvers that do (`towards_noise`).
        settings: to be kept with it. lent: what every step hands out to `watch`, which sees every interval's end;
        see `follow`. on_step: see `watching`.
        """
        heading = None
        if solver.towards_noise:
            if noise is None:
                raise SettingError(f"`solver` {solver.name} needs `noise`")
            heading = noise[None] - latents
        sigmas = self.schedule.sigmas(steps, canvas.tokens)
        control = LayerControl.none(steps, 1, self.layers) if control is None else control
        self._check(control, 1, canvas)
        solve = self._solve(canvas, conditioning, guidance, negative, groups=1)
        intervals = [
            [step._replace(lent=lent) for step in interval]
            for interval in inversion_steps(sigmas, control, solve.blank, solver=solver)
        ]
        evaluated = np.array([interval[-1].sigma for interval in intervals], np.float32)
        looks_ahead = any(interval[-1].look_ahead for interval in intervals)
        states, points = [np.asarray(latents)], []
        with naming_compilation(progress, STEP) as progress:
            progress(0, steps, "inverting")
            for done, reached in enumerate(solve(latents, intervals, velocity=heading), 1):
                states.append(jnp.copy(reached.latents))
                if looks_ahead:
                    points.append(jnp.copy(reached.point))
                if watch is not None:
                    watch(reached)
                if on_step is not None:
                    on_step(done, states[-1])
                progress(done, steps, "inverting")
        trajectory, at = (_together(parts) if parts else None for parts in (states, points))
        if not np.isfinite(trajectory).all():
            raise SettingError(
                "inverting gave numbers that are not finite: lower `guidance` or `nudge`, or convert the "
                "checkpoint again (its weights may be damaged)"
            )
        return Inversion(trajectory, sigmas[::-1].copy(), settings or {}, at, evaluated)

    def _check(self, control: LayerControl, batch: int, canvas: Canvas) -> None:
        """SettingError for a control of other sizes, or of what the model's layers do not have."""
        control.check(batch, canvas.tokens, self.info.configs["transformer"].heads)
        if control.key_shift is not None and not self.family.rotary:
            raise SettingError(f"keys of {self.info.title} have no rotary positions that could be shifted")
        if control.attentions is not None:
            self.info.check_branches(None, "one")

    def _solve(
        self,
        canvas: Canvas,
        conditioning: Conditioning,
        guidance: Float[np.ndarray, " b"],
        negative: Conditioning | None,
        groups: int,
    ) -> Solve:
        if negative is not None and self.family.guidance != "branches":
            raise SettingError(f"{self.info.title} takes no `negative` prompts")
        if negative is not None and np.any(guidance != 1):
            conditioning = interleave(conditioning, negative, groups)
        return Solve(
            self.transformer,
            canvas,
            conditioning,
            guidance,
            channels=self.info.channels,
            groups=groups,
            mesh=self.mesh,
            kernel=self.placement.attention,
            step_cache=self.placement.step_cache,
            reused_width=self.family.reused_width(self.info.configs),
        )


@jax.jit
def _all_finite(latents: Float[AnyArray, "*any"]) -> jax.Array:
    return jnp.isfinite(latents).all()


def _together(states: Sequence[AnyArray]) -> np.ndarray:
    return np.concatenate([np.asarray(on_this_host(state)) for state in states])


def _fetched(restore: Callable[[], nnx.Module], place: str) -> Callable[[], nnx.Module]:
    """What gives a network where it computes: it stays there, waits on the host, or is read again each time."""
    if place == "disk":
        return restore
    network = restore()
    if place == "device":
        return lambda: network
    return functools.partial(on_device, in_host_memory(network))
