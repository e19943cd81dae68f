"""What a sweep paints: units of work in batches of one shape."""

import dataclasses
import itertools
from collections.abc import Iterable, Sequence

import numpy as np
from jaxtyping import Int

from sflow_jax.errors import SettingError
from sflow_jax.pictures.canvas import Canvas
from sflow_jax.sampling.control import check_layers
from sflow_jax.settings import EMBEDDED_MODELS, LayerEditSettings, SweepSettings
from sflow_jax.storage.checkpoint import ModelInfo
from sflow_jax.vitality.adaptive import Elimination
from sflow_jax.vitality.prompts import BUILTIN, TOYWORLD, load_prompts
from sflow_jax.vitality.scores import Rule, Variant

# (reference, variant) of every unit of work, by their numbers.
Units = Int[np.ndarray, "u 2"]


@dataclasses.dataclass(frozen=True)
class SweepPlan:
    """What is painted: everything that the scores depend on beside the networks.

    seeds: pictures a prompt. batch: pictures at once. variants: what is bypassed, and when. Reference i is of
    prompt i // seeds, and its noise has seed i.
    """

    prompts: tuple[str, ...]
    seeds: int
    steps: int
    guidance: float
    canvas: Canvas
    batch: int
    variants: tuple[Variant, ...]

    def __post_init__(self) -> None:
        for name in ("seeds", "steps", "batch"):
            if getattr(self, name) < 1:
                raise SettingError(f"`{name}` must be at least 1, found {getattr(self, name)}")

    def is_layer(self, variant: Variant) -> bool:
        """Whether it is one layer bypassed in all steps."""
        return len(variant.layers) == 1 and self.spans_all_steps(variant)

    def spans_all_steps(self, variant: Variant) -> bool:
        """Whether its layers are bypassed from the first step to the last."""
        return (variant.first, variant.last) == (0, self.steps)

    def prompt(self, reference: int) -> str:
        """What a reference shows."""
        return self.prompts[reference // self.seeds]

    @property
    def edges(self) -> list[int]:
        """Steps at which windows begin, but for the very first: up to there their pictures are the reference's."""
        return sorted({variant.first for variant in self.variants} - {0})

    def units(self, prompts: Iterable[int], variants: Iterable[int]) -> Units:
        """(reference, variant) of every combination: as many references as a batch has, variant by variant.

        So most batches have one variant, and begin where its window begins.
        """
        references = [prompt * self.seeds + seed for prompt in prompts for seed in range(self.seeds)]
        blocks = [references[start : start + self.batch] for start in range(0, len(references), self.batch)]
        variants = list(variants)
        units = [pair[::-1] for block in blocks for pair in itertools.product(variants, block)]
        return np.array(units, int).reshape(-1, 2)

    def batches(self, units: Units) -> list[np.ndarray]:
        """Of one size, but for the last."""
        return [units[start : start + self.batch] for start in range(0, len(units), self.batch)]

    def first_step(self, units: Units) -> int:
        """Where a batch begins: before it nothing is bypassed in any of its pictures."""
        return min(self.variants[variant].first for variant in units[:, 1])


def make_variants(
    layers: Sequence[int], steps: int, *, windows: int = 1, pairs: Sequence[int] = ()
) -> tuple[Variant, ...]:
    """Every layer bypassed in all steps; in each of `windows` parts of them; every two of `pairs` together.

    SettingError for more windows than steps, or paired layers that are not among the layers.
    """
    if not 1 <= windows <= steps:
        raise SettingError(f"`windows` must be 1 to {steps}, the number of steps, found {windows}")
    missing = [layer for layer in pairs if layer not in layers]
    if missing:
        raise SettingError(
            f"`pairs` needs layers that `layers` measures too; missing: {', '.join(map(str, missing))}"
        )
    edges = [round(i * steps / windows) for i in range(windows + 1)]
    parts = list(itertools.pairwise(edges)) if windows > 1 else []
    return (
        *(Variant((layer,), 0, steps) for layer in layers),
        *(Variant((layer,), first, last) for layer in layers for first, last in parts),
        *(Variant(pair, 0, steps) for pair in itertools.combinations(check_layers(pairs, max(layers) + 1), 2)),
    )


def plan_sweep(settings: SweepSettings, info: ModelInfo, checkpoint: str) -> SweepPlan:
    """What the settings ask for of a model; SettingError where they do not fit it.

    checkpoint: the name that it is loaded by; the embedded models have prompts of their own.
    """
    canvas, steps = info.canvas(settings.height, settings.width), settings.steps or info.defaults.sweep_steps
    layers = info.resolve_layers(settings.layers)
    if not layers:
        raise SettingError("`layers` names no layer to measure")
    pairs = info.resolve_layers(settings.pairs)
    variants = make_variants(layers, steps, windows=settings.windows, pairs=pairs)
    prompts = load_prompts(settings.prompts or (TOYWORLD if checkpoint in EMBEDDED_MODELS else BUILTIN))
    guidance = info.defaults.sweep_guidance if settings.guidance is None else settings.guidance
    return SweepPlan(
        tuple(prompts[: settings.limit]), settings.seeds, steps, guidance, canvas, settings.batch, variants
    )


def rule_of(settings: SweepSettings | LayerEditSettings) -> Rule:
    """How the vital set is chosen."""
    if settings.top is not None:
        return Rule("top", settings.top)
    return Rule() if settings.threshold is None else Rule("threshold", settings.threshold)


def elimination_of(settings: SweepSettings, plan: SweepPlan) -> Elimination | None:
    """When an adaptive sweep stops, or None for an exhaustive one."""
    return Elimination(rule_of(settings), len(plan.prompts), settings.error) if settings.adaptive else None
