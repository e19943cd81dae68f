"""Every setting with its default and its help, once: Python's defaults, the command line's options and the records
in results are all made from these dataclasses.

Imports nothing that takes time, so that `--help` and completion are quick.
"""

import dataclasses
import numbers
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from sflow_jax.errors import SettingError

AUTOMATIC = "auto"
DTYPES = ("float32", "bfloat16")
KERNELS = ("xla", "blocks", "cudnn", "splash")
QUANTISATIONS = ("int8", "fp8")
TEXT_ENCODER_PLACES = ("device", "host", "disk")
REPLAYS = ("aligned", "residual", "none")
# In which of two attentions of a layer keys and values are injected; the first is the default.
ATTENTIONS = ("both", "joint", "image")
# Where what a source lends to its edits is kept between batches; the first is the default.
BANK_PLACES = ("off", "auto", "device", "host", "disk")
KEPT_PICTURES = ("thumbnails", "all", "none")
# The paper's latent nudging.
NUDGE = 1.15
# Bounds of what a machine can compute with, far beyond what is sensible.
MOST_STEPS, MOST_GUIDANCE, MOST_NUDGE, SEEDS = 10_000, 1_000.0, 100.0, 2**64
# Below it, latents are gone.
LEAST_NUDGE = 0.01
# Kind of a setting → what its values are, and how to say so.
KINDS = {
    int: (numbers.Integral, "a whole number"),
    float: (numbers.Real, "a number"),
    bool: (bool, "True or False"),
    str: ((str, os.PathLike), "a text or a path"),
}
MOST_PICTURES, LONGEST_PROMPT = 100_000, 100_000
MOST_SCENES, DEFAULT_SCENES = 10_000, 64
# How large a photo is painted: its own shape at the model's number of pixels, or cut to the model's default square.
OWN_SHAPE, MODEL_SHAPE = "auto", "fit"
# Of scenes whose edits are known.
SOURCES = DRAWN, PAINTED = ("drawn", "painted")
# What a sweep scores layers by: pictures without a layer, or edits with its injection alone.
SWEEPS = PICTURES, EDITS = ("pictures", "edits")
EMBEDDED, EMBEDDED_SD3 = "toyworld", "toyworld-sd3"
# Those whose weights are in the package.
EMBEDDED_MODELS = (EMBEDDED, EMBEDDED_SD3)
# Models that are known without files; the families describe them.
PUBLISHED = ("flux-dev", "flux-krea-dev", "flux-schnell", "sd3-medium", "sd35-medium", "sd35-large")


def setting(
    default: Any,
    help: str,
    *,
    kind: type | tuple[type, ...] = str,
    choices: tuple[str, ...] | None = None,
    flag: str | None = None,
    unset: str | None = None,
    several: bool = False,
) -> Any:
    """A field whose command-line option, default and help are these.

    kind: type of the option's value, or of its several; bool makes a switch. choices: the only values. flag: the
    option's name, by default the field's. unset: what a default of None stands for, in words; {steps} is what the
    known models have, see `families.defaults`. several: whether a list of them will do.
    """
    metadata = {
        "help": help, "kind": kind, "choices": choices, "flag": flag, "unset": unset, "several": several,
    }  # fmt: skip
    return dataclasses.field(default=default, metadata=metadata)


def _one_of(name: str, value: Any, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise SettingError(f"unknown `{name}` {value!r}; choose one of {', '.join(allowed)}")


def _at_least(name: str, value: Any, least: int, most: float | int = float("inf")) -> None:
    if value is not None and value < least:
        raise SettingError(f"`{name}` must be at least {least}, found {value}")
    if value is not None and value > most:
        raise SettingError(f"`{name}` must be at most {most:,}, found {value:,}")


def _finite(name: str, value: Any, most: float) -> None:
    """A number or several, none of them beyond what can be computed with."""
    numbers = value if isinstance(value, Iterable) else () if value is None else (value,)
    for number in numbers:
        if not abs(float(number)) <= most:
            raise SettingError(f"`{name}` must be between {-most:g} and {most:g}, found {number}")


def _check_kinds(settings: Any) -> None:
    """SettingError for a value of another kind than its setting's: text for a number, a number for a switch."""
    for field in dataclasses.fields(settings):
        value, kind = getattr(settings, field.name), field.metadata.get("kind")
        if kind not in KINDS or (value is None and field.default is None) or (kind is str and field.type is Any):
            continue
        # Guidance and seeds may be several numbers, one a picture.
        several = field.metadata["several"] and isinstance(value, Iterable) and not isinstance(value, str | Mapping)
        numbers = list(value) if several else [value]
        if not numbers or not all(_is_one(kind, number) for number in numbers):
            raise SettingError(f"`{field.name}` must be {KINDS[kind][1]}, found {value!r:.80}")


def _is_one(kind: type, value: Any) -> bool:
    return isinstance(value, KINDS[kind][0]) and (kind is bool or not isinstance(value, bool))


def check_path(name: str, path: Any) -> None:
    """SettingError, naming the setting, for what is no path."""
    if not isinstance(path, str | os.PathLike):
        raise SettingError(f"`{name}` must be a folder or a name, found {path!r:.80}")
    if "**" in os.fspath(path):
        raise SettingError(f"`{name}` {os.fspath(path)!r:.80} holds **: rename it")


def parse_size(text: Any) -> str | tuple[int, int]:
    """ "auto", "fit", or "48x64" as height and width in pixels; SettingError for anything else."""
    sides = re.fullmatch(r"([0-9]{1,6})[x×]([0-9]{1,6})", text) if isinstance(text, str) else None
    if sides is None and text not in (OWN_SHAPE, MODEL_SHAPE):
        raise SettingError(
            f"`size` must be auto (the photo's own shape), fit (the model's) or HEIGHTxWIDTH, found {text!r:.80}"
        )
    return (int(sides[1]), int(sides[2])) if sides else text


def check_prompts(prompts: Sequence[str]) -> Sequence[str]:
    """The prompts themselves; SettingError unless they are a list of at least one text."""
    if isinstance(prompts, str) or not prompts or not all(isinstance(prompt, str) for prompt in prompts):
        raise SettingError(f"`prompts` must be a list of at least one text, found {str(prompts)[:80]!r}")
    for prompt in prompts:
        # A command line in another encoding arrives with lone surrogates.
        if not prompt.isascii() and any("\ud800" <= c <= "\udfff" for c in prompt):
            raise SettingError(f"a prompt is not text in UTF-8: {prompt[:60]!a}")
        if len(prompt) > LONGEST_PROMPT:
            raise SettingError(f"a prompt has {len(prompt):,} characters; at most {LONGEST_PROMPT:,} make sense")
    return prompts


@dataclasses.dataclass(frozen=True, kw_only=True)
class Placement:
    """In which numbers and where a model runs.

    dtype: a name of `DTYPES` or any numpy dtype; None is float32 on CPUs, else bfloat16. mesh: a
    `jax.sharding.Mesh` or its axes as text, such as "data=2,tensor=4". Raises SettingError for unknown names.
    """

    dtype: Any = setting(None, "Weights and computation.", choices=DTYPES, unset="float32 on CPU, else bfloat16")
    attention: str = setting(
        AUTOMATIC,
        "Attention kernel: cudnn on NVIDIA GPUs, splash on TPUs, blocks on CPUs, else xla.",
        choices=(AUTOMATIC, *KERNELS),
    )
    mesh: Any = setting(None, "Devices as axes data, fsdp and tensor, such as data=2,tensor=4; or auto.")
    quantisation: str | None = setting(
        None,
        "Blocks in 8 bits: int8 weights, or fp8 products where the hardware has them.",
        choices=QUANTISATIONS,
        flag="--quantize",
    )
    offload: bool = setting(False, "Blocks wait in host memory, for devices too small for all.", kind=bool)
    step_cache: float = setting(
        0.0,
        "Leave layers out, and use again what they added, while the first one's output changes by less than this "
        "share; 0: never.",
        kind=float,
    )
    text_encoder: str = setting(
        "device", "Where the large text encoder (T5) waits between prompts.", choices=TEXT_ENCODER_PLACES
    )

    def __post_init__(self) -> None:
        _check_kinds(self)
        _one_of("attention", self.attention, (AUTOMATIC, *KERNELS))
        _one_of("text_encoder", self.text_encoder, TEXT_ENCODER_PLACES)
        if not 0 <= self.step_cache < 1:
            raise SettingError(f"`step_cache` must be at least 0 and less than 1, found {self.step_cache}")
        if self.quantisation is not None:
            _one_of("quantisation", self.quantisation, QUANTISATIONS)


def check_nudge(nudge: float | None) -> None:
    """SettingError for what leaves nothing of the latents."""
    if nudge is not None and not nudge >= LEAST_NUDGE:
        raise SettingError(
            f"`nudge` must be at least {LEAST_NUDGE}, found {nudge} (the paper uses {NUDGE}; 1 means none)"
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class PaintingSettings:
    """What every way of painting shares; None is the model's default."""

    steps: int | None = setting(None, "Steps of the solver.", kind=int, unset="{steps}")
    height: int | None = setting(None, "Height in pixels.", kind=int, unset=f"1024; {EMBEDDED} 64")
    width: int | None = setting(None, "Width in pixels.", kind=int, unset=f"1024; {EMBEDDED} 64")

    def __post_init__(self) -> None:
        _check_kinds(self)
        _at_least("steps", self.steps, 1, MOST_STEPS)
        for name, most in (
            ("guidance", MOST_GUIDANCE),
            ("nudge", MOST_NUDGE),
            ("threshold", MOST_GUIDANCE),
            ("skip_scale", MOST_GUIDANCE),
        ):
            _finite(name, getattr(self, name, None), most)
        seeds = getattr(self, "seed", 0)
        for seed in seeds if isinstance(seeds, Iterable) else [seeds]:
            if not 0 <= seed < SEEDS:
                raise SettingError(f"`seed` must be a whole number from 0 to 2^64 - 1, found {seed}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class GuidedSettings(PaintingSettings):
    """What generations, inversions and edits share: the branches beside the prompt's.

    negative: one text, or one a row. skip_layers: those that skip-layer guidance leaves out. skip_window: its first
    step, and the one behind its last.
    """

    negative: Any = setting(None, "What the second branch shows, of models that have one.", unset="nothing")
    skip_layers: Any = setting("none", "Layers that skip-layer guidance leaves out, such as 7,8,9.")
    skip_scale: float = setting(2.8, "Scale of skip-layer guidance.", kind=float)
    skip_window: Any = setting(
        None,
        "Steps of skip-layer guidance: the first, and the one behind the last.",
        kind=(int, int),
        unset="the first fifth, but for the very first steps",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        window = self.skip_window
        if window is not None and not (
            isinstance(window, Sequence) and len(window) == 2 and all(isinstance(x, int) for x in window)
        ):
            raise SettingError(f"`skip_window` must be two whole numbers, first and end, found {window!r}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class GenerationSettings(GuidedSettings):
    """Of `generate`. guidance: one number, or one a picture. seed: one, shared by all pictures, or one a picture.

    bypass: layers that every step leaves out.
    """

    guidance: Any = setting(None, "Guidance scale.", kind=float, unset="{guidance}", several=True)
    seed: Any = setting(
        0, "Seed of the noise, shared by all pictures; or several, such as 1,2,3.", kind=int, several=True
    )
    bypass: Any = setting("none", "Layers to leave out, such as 18,25 or 19-56.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class PhotoSettings(GuidedSettings):
    """What inversions and edits share. size: of a photo, "auto", "fit" or "48x64"; height and width win over it."""

    size: Any = setting(
        OWN_SHAPE,
        "A photo's size: auto (its own shape at the model's number of pixels), fit (cut to the model's), or HxW.",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        parse_size(self.size)


@dataclasses.dataclass(frozen=True, kw_only=True)
class InversionSettings(PhotoSettings):
    """Of `invert`. solver: a name of `sampling.solvers.SOLVERS`. nudge: the latents are multiplied by it first.

    method: what is not set, is as this editing method inverts; its name, or a `Method`. seed: of the noise that
    some solvers head for.
    """

    method: Any = setting(None, "For edits by this method (see sflow edit --list-methods).", unset="reference")
    steps: int | None = setting(
        None, "Steps of the solver.", kind=int, unset="the method's; reference: {real_steps}"
    )
    guidance: float | None = setting(
        None,
        "Guidance scale of the inversion.",
        kind=float,
        unset="the method's; reference: {real_source_guidance}",
    )
    nudge: float | None = setting(None, "Latent nudging; 1 is none.", kind=float, unset=f"{NUDGE}, or the method's")
    solver: str | None = setting(None, "Rule of the inversion, such as uni-inv.", unset="the method's")
    seed: int = setting(0, "Seed of the noise that some solvers head for.", kind=int)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_nudge(self.nudge)


def check_bank(place: Any, placement: Placement) -> None:
    """SettingError where a model is placed so that the bank asked for, a name of `BANK_PLACES`, keeps nothing."""
    if placement.step_cache and place not in BANK_PLACES[:2]:
        raise SettingError(
            "`kv_cache` and `step_cache` do not go together, since layers that are left out lend nothing: "
            "leave one of them out"
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class EditSettings(PhotoSettings):
    """Of `edit`. None is the method's.

    method: a name of `editing.methods.METHODS`, or a `Method`. layers: "vital", "all", "none", "late" or numbers.
    guidance: one number, or one a row, source first. region: "none", a preset of `editing.regions.REGIONS`, a mask
    picture's file, or from Python an array or a `RegionRecipe`. method_options: other numbers of the method by
    name. attentions: a name of `ATTENTIONS`; models whose layers have one attention know "both" alone. kv_cache: a
    name of `BANK_PLACES`, or from Python a `SourceBank`.
    """

    method: Any = setting(None, "How to edit; see --list-methods.", unset="reference; photos: coupled")
    steps: int | None = setting(
        None, "Steps of the solver.", kind=int,
        unset="the method's; reference: {edit_steps} (of photos {real_steps})",
    )  # fmt: skip
    layers: Any = setting(
        None, "vital, all, none, late, or numbers such as 0,1,17-18.", unset="the method's; reference: vital"
    )
    guidance: Any = setting(
        None,
        "Guidance of the edits; or several, source first.",
        kind=float,
        unset="the method's; reference: {guidance} (of photos {real_edit_guidance}; their source 1)",
        several=True,
    )
    seed: int = setting(0, "Seed of the noise of a generated source.", kind=int)
    nudge: float | None = setting(
        None, "Latent nudging of a photo; 1 is none.", kind=float, unset=f"the method's; reference: {NUDGE}"
    )
    unnudge: bool = setting(False, "Undo the nudge when decoding; the reference does not.", kind=bool)
    replay: str | None = setting(
        None, "How a photo's own path is kept.", choices=REPLAYS, unset="the method's; reference: aligned"
    )
    region: Any = setting(
        None, "Where pictures may change: auto, none, or a mask picture (white changes).", unset="the method's"
    )
    paste: bool = setting(False, "Outside the region keep the photo's own pixels.", kind=bool)
    edits_at_once: int = setting(3, "Edits in one batch; fewer need less memory.", kind=int)
    attentions: str = setting(
        ATTENTIONS[0], "Where layers with two attentions inject: both, joint or image.", choices=ATTENTIONS
    )
    kv_cache: Any = setting(
        AUTOMATIC,
        "Where the source's keys and values wait for batches of edits, which then leave its row out.",
        choices=BANK_PLACES,
    )
    method_options: Any = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.kv_cache, str):
            _one_of("kv_cache", self.kv_cache, BANK_PLACES)
        _at_least("edits_at_once", self.edits_at_once, 1, MOST_PICTURES)
        _one_of("attentions", self.attentions, ATTENTIONS)
        if self.replay is not None:
            _one_of("replay", self.replay, REPLAYS)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SweepSettings(PaintingSettings):
    """Of `find_vital_layers`: what is painted, what is bypassed, and how the vital set is chosen.

    Raises SettingError for settings that do not go together.
    """

    prompts: str | None = setting(
        None, "builtin, toyworld, or a text file with a prompt a line.", unset="what fits the model"
    )
    limit: int | None = setting(None, "Only the first so many prompts.", kind=int)
    seeds: int = setting(1, "Pictures of each prompt.", kind=int)
    steps: int | None = setting(None, "Steps of the solver.", kind=int, unset="{sweep_steps}")
    guidance: float | None = setting(None, "Guidance scale.", kind=float, unset="{sweep_guidance}")
    batch: int = setting(8, "Pictures painted at once.", kind=int)
    layers: Any = setting("all", "Layers to measure, such as 0-18,25.")
    windows: int = setting(1, "Also bypass in each of so many parts.", kind=int)
    pairs: Any = setting("none", "Also bypass every two of these layers.")
    features: str | None = setting(
        None,
        "DINOv2 that compares the pictures: a converted folder, or the Hub's ORG/NAME.",
        unset="the embedded model has its own",
    )
    clip: str | None = setting(
        None, "CLIP for a second opinion, named alike.", unset="the embedded model has its own"
    )
    top: int | None = setting(None, "The vital set is the so many most vital layers.", kind=int)
    threshold: float | None = setting(None, "The vital set is the layers of at least this vitality.", kind=float)
    adaptive: bool = setting(False, "Stop measuring a layer once its place is clear.", kind=bool)
    error: float = setting(0.05, "Of --adaptive: chance of another set.", kind=float)
    keep_images: str = setting("thumbnails", "Which pictures the run's folder keeps.", choices=KEPT_PICTURES)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("seeds", "batch", "windows", "limit", "top"):
            _at_least(name, getattr(self, name), 1, MOST_PICTURES)
        _one_of("keep_images", self.keep_images, KEPT_PICTURES)
        if self.top is not None and self.threshold is not None:
            raise SettingError("give `top` or `threshold`, not both")
        if not 0 < self.error < 1:
            raise SettingError(f"`error` must be between 0 and 1, found {self.error:g}")
        if self.adaptive and (self.windows > 1 or self.pairs not in ("none", ())):
            raise SettingError("`adaptive` measures layers alone; leave out `windows` and `pairs`")


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluationSettings(PaintingSettings):
    """Of `evaluate`: which methods edit what, and which networks judge.

    methods: names as `evaluation.methods.parse_methods` reads them. layers_alone: each of them without injection,
    and with each layer's alone, see `evaluation.layers`. features, clip, lpips: None leaves the columns
    empty that need them, but for the embedded model, which has its own DINOv2 and CLIP.
    """

    methods: str = setting("reference,none", "Methods to compare, such as reference,none,reference:layers=all.")
    layers_alone: bool = setting(
        False,
        "Each method without injection, and with that of each layer alone: what is gained and lost.",
        kind=bool,
    )
    scenes: int = setting(
        DEFAULT_SCENES, "Of --known-answers and --draw-pie: scenes, each edited once a family.", kind=int
    )
    turns: int = setting(1, "Of --known-answers: edits in a row, each of the last one's result.", kind=int)
    sources: str = setting(
        DRAWN, "Of --known-answers: drawings, or what the model paints from their captions.", choices=SOURCES
    )
    limit: int | None = setting(None, "Only the first so many pictures.", kind=int, unset="all")
    seed: int = setting(0, "Seed of the scenes, and of every method's noise.", kind=int)
    steps: int | None = setting(None, "Steps of the solver.", kind=int, unset="each method's own")
    guidance: float | None = setting(None, "Guidance of the edits.", kind=float, unset="each method's own")
    edits_at_once: int = setting(8, "Edits of one picture in one batch.", kind=int)
    features: str | None = setting(
        None,
        "DINOv2, for structure distance: a converted folder, or the Hub's ORG/NAME.",
        unset="the embedded model has its own",
    )
    clip: str | None = setting(None, "CLIP, named alike.", unset="the embedded model has its own")
    clip_tokenizer: str | None = setting(None, "Folder of CLIP's tokenizer.", unset="the model's own")
    lpips: str | None = setting(None, "Safetensors file of LPIPS with SqueezeNet.", unset="no LPIPS")

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("turns", "limit", "edits_at_once"):
            _at_least(name, getattr(self, name), 1)
        _at_least("scenes", self.scenes, 1, MOST_SCENES)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerEditSettings(PaintingSettings):
    """Of `find_layers_by_edits`: which pictures are edited how, and how the set is chosen.

    photos: lines of image, source and edit; or scenes and sources, where the model paints the embedded world, whose
    right answers are known. methods: one, as an evaluation takes them. Settings that `SweepSettings` has too mean
    the same; batch: edits of one picture at once.
    """

    photos: str | None = setting(
        None,
        "Of --by edits: photos to edit, a CSV or JSON lines of image, source, edit; CLIP says whether they are.",
    )
    scenes: int | None = setting(
        None,
        "Of --by edits: or scenes of the embedded world, each edited once a family.",
        kind=int,
        unset=f"{DEFAULT_SCENES} on the embedded models",
    )
    sources: str = setting(
        DRAWN,
        "Of --by edits: scenes as drawings, or as the model paints them from their captions.",
        choices=SOURCES,
    )
    methods: str | None = setting(
        None,
        "Of --by edits: the method that edits, as of sflow evaluate.",
        unset="coupled:region=none; reference on painted scenes",
    )
    seed: int = setting(0, "Of --by edits: seed of the scenes and of the noise.", kind=int)
    limit: int | None = setting(None, "Only the first so many pictures.", kind=int)
    guidance: float | None = setting(None, "Guidance of the edits.", kind=float)
    batch: int = setting(8, "Edits of one picture in one batch.", kind=int)
    layers: Any = setting("all", "Layers to measure, such as 0-18,25.")
    clip: str | None = setting(None, "CLIP that says whether photos are edited.")
    clip_tokenizer: str | None = setting(
        None, "Of --by edits: folder of CLIP's tokenizer.", unset="the model's own"
    )
    top: int | None = setting(None, "The set is the so many layers of most worth.", kind=int)
    threshold: float | None = setting(None, "The set is the layers of at least this worth.", kind=float)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("limit", "batch", "top"):
            _at_least(name, getattr(self, name), 1, MOST_PICTURES)
        _at_least("scenes", self.scenes, 1, MOST_SCENES)
        _one_of("sources", self.sources, SOURCES)
        if self.top is not None and self.threshold is not None:
            raise SettingError("give `top` or `threshold`, not both")
        if self.photos is not None and (self.scenes is not None or self.sources != DRAWN):
            raise SettingError("give `photos`, or `scenes` and `sources`, not both")


def as_record(settings: Any) -> dict[str, Any]:
    """Every setting of a dataclass as JSON may hold it."""
    return {field.name: getattr(settings, field.name) for field in dataclasses.fields(settings)}
