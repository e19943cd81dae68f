"""StableFlow: text and pictures in, pictures out."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath
from flax import nnx
from jax.sharding import Mesh
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from sflow_jax.arrays import AnyArray
from sflow_jax.atlas.atlas import Looked, atlas_of_edit, atlas_of_generation
from sflow_jax.catalogue import find_model
from sflow_jax.editing.bank import bank_at
from sflow_jax.editing.choosing import TRIED, Candidates, Trial, try_edits
from sflow_jax.editing.edit import Request, edit_pictures, find_region
from sflow_jax.editing.generation import generate_pictures
from sflow_jax.editing.methods import AUTO_REGION, Method
from sflow_jax.editing.regions import RegionRecipe, find_recipe
from sflow_jax.editing.sources import canvas_of_photo, invert_picture
from sflow_jax.errors import SettingError
from sflow_jax.families.family import Defaults
from sflow_jax.families.text import TextEncoder
from sflow_jax.machine.meshes import on_this_host
from sflow_jax.models.conditioning import Conditioning
from sflow_jax.painter import OnStep, Painter
from sflow_jax.pictures.files import Picture
from sflow_jax.planning.meshes import placed
from sflow_jax.progress import Progress, as_progress
from sflow_jax.results import AttentionAtlas, Edit, Generation, Inversion
from sflow_jax.runs.worker import Worker
from sflow_jax.sampling.control import LayerControl
from sflow_jax.sampling.schedule import Schedule
from sflow_jax.settings import (
    AUTOMATIC,
    EditSettings,
    GenerationSettings,
    GuidedSettings,
    InversionSettings,
    Placement,
    SweepSettings,
)
from sflow_jax.storage.checkpoint import ModelInfo
from sflow_jax.vitality.find import find_vital_layers
from sflow_jax.vitality.summary import Summary

Layers = str | Iterable[int]


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
        quantize: str | None = None,
        offload: bool = False,
        text_encoder: str = "device",
        step_cache: float = Placement.step_cache,
        quantisation: str | None = None,
    ) -> "StableFlow":
        """Restore a converted checkpoint, a folder or a name.

        checkpoint: a folder, local or remote; "org/name" or "org/name@revision" of the Hub, fetched and converted
        once; or "toyworld", the embedded model.
        mesh: from `sflow_jax.make_mesh`, or text such as "data=2,tensor=4"; "auto" takes what suits edits on these
        devices, see `planning.meshes.placed`. Each device reads only its slices.
        dtype: of weights and computation, by default float32 on CPU and bfloat16 elsewhere. attention: the kernel,
        by default the one for the platform, see `sflow_jax.models.attention`. quantize: "int8" (weights) or "fp8"
        (products) in the blocks of the transformer and T5; `quantisation` is its earlier name. offload: the
        transformer's blocks wait in host memory, and are copied one ahead of the computation. text_encoder: where
        T5 is between prompts: "device", "host" or "disk". step_cache: layers are left out, and what they added is
        used again, while the output of the first one changes by less than this share; 0: never. Raises
        CheckpointError, and SettingError for unknown names.
        """
        if quantize is not None and quantisation is not None:
            raise SettingError("`quantisation` is the earlier name of `quantize`; give `quantize` alone")
        placement = Placement(
            mesh=mesh,
            dtype=dtype,
            attention=attention,
            quantisation=quantize if quantisation is None else quantisation,
            offload=offload,
            text_encoder=text_encoder,
            step_cache=step_cache,
        )
        # A repository of the Hub is fetched before a mesh is proposed for what is in it.
        find_model(checkpoint)
        return cls(Painter.load(checkpoint, placed(checkpoint, placement, "edit")))

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
        canvas, found = self.info.canvas(height, width), list(np.shape(latents))
        if found[1:] != [canvas.tokens, self.info.channels] or not np.isfinite(on_this_host(latents)).all():
            raise SettingError(
                f"`latents` must be finite numbers [b, {canvas.tokens}, {self.info.channels}] at this size, "
                f"found {found}"
            )
        return self.painter.decode(latents, canvas)

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
        seed: int | Sequence[int] = GenerationSettings.seed,
        noise: Float[AnyArray, "s c"] | None = None,
        bypass: Layers = (),
        negative: str | Sequence[str] | None = None,
        skip_layers: Layers = (),
        skip_scale: float = GuidedSettings.skip_scale,
        skip_window: Sequence[int] | None = None,
        on_step: OnStep | None = None,
        progress: bool | Progress = True,
    ) -> Generation:
        """Pictures of prompts, all from the same noise, or each from its own.

        seed: one for all pictures, or a list: one prompt and n seeds paint n pictures, n prompts and n seeds pair
        up. guidance: one number, or one a picture. noise: packed [s, c], replaces the seed. bypass: layers that
        every step leaves out. negative: what the second branch of classifier-free guidance shows, one text or one a
        picture, by default nothing; where all guidance is 1 there is no second branch. skip_layers, skip_scale,
        skip_window: skip-layer guidance, see `LayerControl.skipping`. on_step: see `painter.watching`.
        """
        asked = GenerationSettings(
            steps=steps, guidance=guidance, seed=seed, height=height, width=width, bypass=bypass, negative=negative,
            skip_layers=skip_layers, skip_scale=skip_scale, skip_window=skip_window,
        )  # fmt: skip
        return generate_pictures(self.painter, prompts, noise, asked, as_progress(progress), on_step=on_step)

    def invert(
        self,
        image: Picture,
        prompt: str,
        *,
        method: str | Method | None = None,
        steps: int | None = None,
        guidance: float | None = None,
        nudge: float | None = None,
        height: int | None = None,
        width: int | None = None,
        solver: str | None = None,
        seed: int = InversionSettings.seed,
        negative: str | Sequence[str] | None = None,
        skip_layers: Layers = (),
        skip_scale: float = GuidedSettings.skip_scale,
        skip_window: Sequence[int] | None = None,
        size: str = InversionSettings.size,
        kv_cache: Any = EditSettings.kv_cache,
        on_step: OnStep | None = None,
        progress: bool | Progress = True,
    ) -> Inversion:
        """The noise that leads to a picture, and the way there (inverse Euler with latent nudging).

        prompt: what the picture shows. method: for edits by this method, whose settings hold where none are given;
        by default the reference's: 50 steps, guidance 1, nudge 1.15. nudge: the latents are multiplied by it first.
        solver: a name of `sampling.solvers.SOLVERS`. seed: of the noise that some solvers head for.
        negative, skip_layers, skip_scale, skip_window: as of `generate`. size: see `edit`. kv_cache: where the
        picture's row is kept for edits by a method that replays exactly, a place as of `edit`. on_step: see
        `painter.watching`.
        """
        asked = InversionSettings(
            method=method, steps=steps, guidance=guidance, nudge=nudge, height=height, width=width, solver=solver,
            seed=seed, negative=negative, skip_layers=skip_layers, skip_scale=skip_scale, skip_window=skip_window,
            size=size,
        )  # fmt: skip
        bank = bank_at(kv_cache, self.painter.placement)
        return invert_picture(self.painter, image, prompt, asked, as_progress(progress), on_step, bank)

    def edit(
        self,
        source_prompt: str,
        edit_prompts: Sequence[str],
        *,
        image: Picture | None = None,
        inversion: Inversion | epath.PathLike | None = None,
        latents: Float[AnyArray, "s c"] | None = None,
        method: str | Method | None = None,
        layers: Layers | None = None,
        steps: int | None = None,
        guidance: float | Sequence[float] | None = None,
        seed: int = EditSettings.seed,
        noise: Float[AnyArray, "s c"] | None = None,
        nudge: float | None = None,
        unnudge: bool = EditSettings.unnudge,
        replay: str | None = None,
        region: Any = None,
        paste: bool = EditSettings.paste,
        edits_at_once: int = EditSettings.edits_at_once,
        method_options: Mapping[str, Any] | None = None,
        height: int | None = None,
        width: int | None = None,
        attentions: str = EditSettings.attentions,
        negative: str | Sequence[str] | None = None,
        skip_layers: Layers = (),
        skip_scale: float = GuidedSettings.skip_scale,
        skip_window: Sequence[int] | None = None,
        size: str = EditSettings.size,
        kv_cache: Any = EditSettings.kv_cache,
        on_step: OnStep | None = None,
        progress: bool | Progress = True,
    ) -> Edit:
        """Edits of a generated picture, or of a real one (`image`, its `inversion`, or its clean `latents`).

        inversion: one, or the folder that holds it. size: of an `image`, where neither height nor width is given:
        "auto" keeps its shape at about the model's number of pixels, "fit" cuts it to the model's default size,
        "48x64" is height and width. latents: packed [s, c], such as a row of an earlier edit's `clean_latents`:
        that edit is the source now.
        method: a name of `editing.methods.METHODS`, or a `Method` of your own; by default what `default_method`
        there says: "reference", but "coupled" for photos. What is None here is the method's. method_options: other
        numbers of it by name, such as {"begin": 0.1}. layers: where the source's image keys and values go into the
        edit's: "vital", "all", "none", "late" or global numbers.
        guidance: one number, or one a row, source first; a single number leaves the source at the method's. region:
        where pictures may change: "none", a preset of `editing.regions.REGIONS` such as "auto", a mask picture, or
        an array of tokens or pixels. paste: outside the region keep the photo's own pixels. unnudge: divide the
        latents by the nudge before decoding (the reference does not). replay: how a real source follows its
        inversion, see `sampling.steps.denoising_steps`. More edits than `edits_at_once` run in chunks beside the
        same source. attentions: where a layer has a joint attention and one of the image alone, whether "both",
        "joint" or "image" injects. negative, skip_layers, skip_scale, skip_window: as of `generate`, source first;
        an `image` is inverted without skip-layer guidance. Every branch of an edit takes from the source's same
        branch. A stored inversion's size, steps and nudge hold. on_step: see `painter.watching`; called for the
        steps of the edits, batch after batch (row 0 the source), not for those of an inversion or a region.
        kv_cache: where what the source lends is kept ("auto", "device", "host", "disk"), so that later batches
        need no row for it, or "off": latents agree to rounding. "auto": where the inversion tells all of it (exact
        replay, replay="residual"), or from three batches on, and at most half of the free memory of the device or
        the host. A `SourceBank` keeps it for later calls too. With skip-layer guidance, or where the source's way
        depends on its edits, every batch has the row.
        """
        asked = EditSettings(
            method=method, layers=layers, steps=steps, guidance=guidance, seed=seed, nudge=nudge, unnudge=unnudge,
            replay=replay, region=region, paste=paste, edits_at_once=edits_at_once, method_options=method_options,
            height=height, width=width, attentions=attentions, negative=negative, skip_layers=skip_layers,
            skip_scale=skip_scale, skip_window=skip_window, size=size, kv_cache=kv_cache,
        )  # fmt: skip
        request = Request(source_prompt, edit_prompts, image, inversion, noise, asked, latents, on_step=on_step)
        return edit_pictures(self.painter, request, as_progress(progress))

    def region(
        self,
        image: Picture,
        source_prompt: str,
        edit_prompt: str,
        *,
        recipe: str | RegionRecipe = AUTO_REGION,
        guidance: float | None = None,
        seed: int = EditSettings.seed,
        height: int | None = None,
        width: int | None = None,
        size: str = EditSettings.size,
        progress: bool | Progress = True,
    ) -> Float[np.ndarray, "rows columns"]:
        """Which of a picture's tokens an edit would change, 0..1: where the velocities of both prompts differ.

        recipe: a preset of `editing.regions.REGIONS`, or a `RegionRecipe`. guidance: of both prompts, by default as
        method "coupled" has it. size: see `edit`.
        """
        canvas = canvas_of_photo(self.painter.info, EditSettings(height=height, width=width, size=size), image)
        return find_region(
            self.painter, image, (source_prompt, edit_prompt), find_recipe(recipe), guidance, seed, canvas,
            as_progress(progress),
        )  # fmt: skip

    def try_edits(
        self,
        source_prompt: str,
        edit_prompt: str,
        *,
        image: Picture | None = None,
        latents: Float[AnyArray, "s c"] | None = None,
        methods: Sequence[str] = TRIED,
        guidances: Sequence[float | None] = (None,),
        strengths: Sequence[float] = (1.0,),
        layers: Layers | None = None,
        seed: int = EditSettings.seed,
        region: Any = None,
        method_options: Mapping[str, Any] | None = None,
        height: int | None = None,
        width: int | None = None,
        size: str = EditSettings.size,
        progress: bool | Progress = True,
    ) -> Candidates:
        """One edit by many settings, and which of them follows the prompt and keeps most: see `editing.choosing`.

        Every method is tried with every guidance (None is its own) and strength of injection; strengths are members
        of one batch beside one source. All else is as `edit` has it.
        """
        asked = EditSettings(
            layers=layers, seed=seed, region=region, method_options=method_options, height=height, width=width,
            size=size,
        )  # fmt: skip
        request = Request(source_prompt, [edit_prompt], image, None, None, asked, latents)
        return try_edits(self.painter, request, Trial(methods, guidances, strengths), as_progress(progress))

    def attention_atlas(
        self,
        prompt: str,
        edit_prompt: str | None = None,
        *,
        points: Sequence[Any] = (),
        words: Sequence[str] = (),
        image: Picture | None = None,
        inversion: Inversion | epath.PathLike | None = None,
        latents: Float[AnyArray, "s c"] | None = None,
        noise: Float[AnyArray, "s c"] | None = None,
        progress: bool | Progress = True,
        **settings: Any,
    ) -> AttentionAtlas:
        """Where points and words of a picture attend in every layer: to text, to its own tokens, to the source's.

        The picture is the edit's, or without an edit prompt the prompt's. points: pairs of row and column, pixels
        if whole numbers, else shares of height and width. words: of that picture's prompt. image, inversion,
        latents, noise, settings: as of `edit`, or without an edit prompt (noise and settings alone) of `generate`.
        """
        looked = Looked(points, words)
        if edit_prompt is None:
            sources = {"image": image, "inversion": inversion, "latents": latents}
            for name in (name for name, value in sources.items() if value is not None):
                raise SettingError(f"`{name}` needs an edit of it; give `edit_prompt`")
            asked = GenerationSettings(**settings)
            return atlas_of_generation(self.painter, prompt, noise, asked, looked, as_progress(progress))
        request = Request(prompt, [edit_prompt], image, inversion, noise, EditSettings(**settings), latents)
        return atlas_of_edit(self.painter, request, looked, as_progress(progress))

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
