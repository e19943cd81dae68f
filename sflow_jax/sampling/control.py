"""What is done to which layer: when, and for whom.

Everything is an array of fixed shape, so that changing it compiles nothing.
Axes: t steps, b batch elements, n layers (numbered globally), h heads, s image tokens.
"""

import dataclasses
import itertools
import operator
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

from sflow_jax.errors import SettingError
from sflow_jax.models.interventions import Interventions, LayerInterventions, Skip
from sflow_jax.settings import ATTENTIONS

NAMED_LAYERS = ("vital", "all", "none", "late")
LAYERS_FORM = "vital, all, none, late, or numbers and ranges such as 0,1,17-18"
DIGITS = 4
# Unknown layers that a message names.
SHOWN = 8
# A range of millions would fill the memory.
MOST_NUMBERS = 10_000


def _finite(scales: Any) -> np.ndarray:
    """float32; SettingError for what cannot be computed with."""
    numbers = np.asarray(scales, np.float32)
    if not np.isfinite(numbers).all():
        raise SettingError(f"scales of layers must be finite, found {scales}")
    return numbers


def check_layers(numbers: Iterable[Any], layers: int) -> tuple[int, ...]:
    """Sorted, unique layer numbers; SettingError naming those that a model of `layers` layers lacks."""
    try:
        some = [operator.index(number) for number in itertools.islice(numbers, MOST_NUMBERS + 1)]
    except TypeError as error:
        raise SettingError(f"`layers` must be whole numbers, found {numbers!r:.80}") from error
    if len(some) > MOST_NUMBERS:
        raise SettingError(
            f"`layers` has more than {MOST_NUMBERS:,} numbers: this model's layers are 0 to {layers - 1}"
        )
    wanted = sorted(set(some))
    unknown = [number for number in wanted if not 0 <= number < layers]
    if unknown:
        listed = ", ".join(map(str, unknown[:SHOWN])) + (", …" if len(unknown) > SHOWN else "")
        raise SettingError(f"no layer {listed}: this model's layers are 0 to {layers - 1}")
    return tuple(wanted)


def parse_layers(text: str) -> str | tuple[int, ...]:
    """`vital`, `all`, `none` and `late` as they are; `0,1,17-18` as numbers. SettingError for anything else."""
    if text in NAMED_LAYERS:
        return text
    numbers: list[int] = []
    for part in (piece.strip() for piece in text.split(",")):
        first, dash, last = part.partition("-")
        ends = (first, last if dash else first)
        # Few digits: no model has more layers, and a range of millions would fill the memory.
        if not all(end.isdecimal() and end.isascii() and len(end) <= DIGITS for end in ends):
            raise SettingError(f"cannot read layers {_short(text)}: write {LAYERS_FORM}")
        if int(ends[0]) > int(ends[1]):
            raise SettingError(f"cannot read layers {_short(text)}: {part} runs backwards; write {LAYERS_FORM}")
        numbers += range(int(ends[0]), int(ends[1]) + 1)
    return tuple(numbers)


def _short(text: str) -> str:
    return repr(text if len(text) <= 40 else f"{text[:40]}…")


def default_window(steps: int) -> tuple[int, int]:
    """The steps i of 0.01 N < i < 0.2 N, as Stability's SD3.5 and diffusers have it."""
    inside = [step for step in range(steps) if 0.01 * steps < step < 0.2 * steps]
    return (inside[0], inside[-1] + 1) if inside else (1, 1)


@dataclasses.dataclass(frozen=True)
class LayerControl:
    """Two masks over steps, batch elements and layers, and what else may be done to a layer.

    inject: image-token keys and values come from the group's source. bypass: the layer leaves its input as it is.
    Begin with `none`, then say what is wanted: `LayerControl.none(15, 4, 57).injecting([0, 1])`. The rest is None
    until it is asked for, float32: keys, values: how far the injected ones move to the source's, 0…1. attention,
    mlp: scale of that part's update. text: scale of the text stream entering the layer. heads: scale of each head's
    output. key_shift: rows and columns by which image keys are moved. extend: how much the source's image tokens
    count in attention beside the own ones. attentions: share of the injection that the joint attention takes, and
    the image's own where a layer has one. skip_gate, skip_scale: of skip-layer guidance, 0 in the layers left out,
    and its scale in every step. region: share of the injection that each image token takes, 0…1, at every step.
    watched: joint tokens (text first) whose attention every layer hands out in every step, int32.
    """

    inject: Bool[np.ndarray, "t b n"]
    bypass: Bool[np.ndarray, "t b n"]
    keys: Float[np.ndarray, "t b n"] | None = None
    values: Float[np.ndarray, "t b n"] | None = None
    attention: Float[np.ndarray, "t b n"] | None = None
    mlp: Float[np.ndarray, "t b n"] | None = None
    text: Float[np.ndarray, "t b n"] | None = None
    heads: Float[np.ndarray, "t b n h"] | None = None
    key_shift: Float[np.ndarray, "t b n 2"] | None = None
    extend: Float[np.ndarray, "t b n"] | None = None
    attentions: Float[np.ndarray, "t b n 2"] | None = None
    skip_gate: Float[np.ndarray, " n"] | None = None
    skip_scale: Float[np.ndarray, " t"] | None = None
    region: Float[np.ndarray, "b s"] | None = None
    watched: Int[np.ndarray, "b q"] | None = None

    @property
    def steps(self) -> int:
        """Number of steps t."""
        return len(self.inject)

    @classmethod
    def none(cls, steps: int, batch: int, layers: int) -> "LayerControl":
        """No injection, no bypass: plain generation. SettingError for counts below 1."""
        for name, count in (("steps", steps), ("batch", batch), ("layers", layers)):
            if count < 1:
                raise SettingError(f"`{name}` must be at least 1, found {count}")
        return cls(*(np.zeros((steps, batch, layers), bool) for _ in range(2)))

    def injecting(
        self,
        layers: Iterable[int],
        *,
        steps: Sequence[int] | slice = slice(None),
        elements: Sequence[int] | None = None,
        keys: float = 1.0,
        values: float = 1.0,
        attentions: str = ATTENTIONS[0],
    ) -> "LayerControl":
        """Also inject at these layers, in these steps (default all) and batch elements (default all).

        keys, values: how far they move to the source's, 0…1. attentions: one of `ATTENTIONS`, in which of two
        attentions, for models whose layers have two. An element that is its group's source takes its own
        keys and values, which changes nothing.
        """
        if not (0 <= keys <= 1 and 0 <= values <= 1):
            raise SettingError(
                f"`keys` and `values` are injected by shares from 0 to 1, found {keys:g}, {values:g}"
            )
        if attentions not in ATTENTIONS:
            raise SettingError(f"unknown `attentions` {attentions!r}; choose one of {', '.join(ATTENTIONS)}")
        where = self._where(layers, steps, elements)
        changed = dataclasses.replace(self, inject=self.inject | where)
        if attentions != ATTENTIONS[0] or self.attentions is not None:
            shares = np.float32([attentions != "image", attentions != "joint"]).reshape(1, 1, 1, 2)
            before = np.ones((*where.shape, 2), np.float32) if self.attentions is None else self.attentions
            changed = dataclasses.replace(changed, attentions=np.where(where[..., None], shares, before))
        if (keys, values) == (1.0, 1.0) and self.keys is None:
            return changed
        return dataclasses.replace(
            changed, keys=self._set(self.keys, where, keys), values=self._set(self.values, where, values)
        )

    def weakened(self, shares: Sequence[float]) -> "LayerControl":
        """Only a share of all injection and extension, one a batch element, 0…1."""
        share = np.float32(shares)[None, :, None]
        whole = np.ones(self.inject.shape, np.float32)
        names = ("keys", "values") if self.extend is None else ("keys", "values", "extend")
        before = {name: getattr(self, name) for name in names}
        return dataclasses.replace(self, **{n: share * (whole if x is None else x) for n, x in before.items()})

    def extending(
        self,
        layers: Iterable[int],
        weight: float,
        *,
        steps: Sequence[int] | slice = slice(None),
        elements: Sequence[int] | None = None,
    ) -> "LayerControl":
        """Let image and text tokens see the source's image tokens beside the own ones, `weight` times as much."""
        if not 0 <= weight < np.inf:
            raise SettingError(f"the `weight` of the source's tokens must be at least 0, found {weight:g}")
        where = self._where(layers, steps, elements)
        before = np.zeros(self.inject.shape, np.float32) if self.extend is None else self.extend
        return dataclasses.replace(self, extend=np.where(where, np.float32(weight), before))

    def bypassing(
        self,
        layers: Iterable[int],
        *,
        steps: Sequence[int] | slice = slice(None),
        elements: Sequence[int] | None = None,
    ) -> "LayerControl":
        """Also bypass these layers, in these steps (default all) and batch elements (default all)."""
        return dataclasses.replace(self, bypass=self.bypass | self._where(layers, steps, elements))

    def scaling(
        self,
        layers: Iterable[int],
        *,
        attention: float | None = None,
        mlp: float | None = None,
        text: float | None = None,
        steps: Sequence[int] | slice = slice(None),
        elements: Sequence[int] | None = None,
    ) -> "LayerControl":
        """Scale the update of attention or of the MLP, or the text stream that enters these layers.

        Where both parts share a bias (FLUX's single blocks), it follows the larger of the two scales.
        """
        where = self._where(layers, steps, elements)
        wanted = {"attention": attention, "mlp": mlp, "text": text}
        return dataclasses.replace(
            self,
            **{n: self._set(getattr(self, n), where, v) for n, v in wanted.items() if v is not None},
        )

    def scaling_heads(
        self,
        layers: Iterable[int],
        scales: Sequence[float],
        *,
        steps: Sequence[int] | slice = slice(None),
        elements: Sequence[int] | None = None,
    ) -> "LayerControl":
        """Scale every head's output in these layers: one number a head of the model."""
        where = self._where(layers, steps, elements)[..., None]
        wide = _finite(scales)
        before = np.ones((*self.inject.shape, len(wide)), np.float32) if self.heads is None else self.heads
        return dataclasses.replace(self, heads=np.where(where, wide.reshape(1, 1, 1, -1), before))

    def shifting_keys(
        self,
        layers: Iterable[int],
        rows: float,
        columns: float,
        *,
        steps: Sequence[int] | slice = slice(None),
        elements: Sequence[int] | None = None,
    ) -> "LayerControl":
        """Move the rotary positions of image keys in these layers, in tokens (FreeFlux)."""
        where = self._where(layers, steps, elements)[..., None]
        before = np.zeros((*self.inject.shape, 2), np.float32) if self.key_shift is None else self.key_shift
        moved = _finite([rows, columns]).reshape(1, 1, 1, 2)
        return dataclasses.replace(self, key_shift=np.where(where, moved, before))

    def skipping(self, layers: Iterable[int], scale: float, window: Sequence[int] | None = None) -> "LayerControl":
        """Also skip-layer guidance: v + s·(v₊ − v₊ without these layers) in a window of steps, for all elements.

        v₊: of the prompt's branch. window: its first step and the one behind its last, by default as
        `default_window`. SettingError for a window that holds no step, or one beyond the last.
        """
        gate, scales = np.ones(self.inject.shape[2], np.float32), np.zeros(self.steps, np.float32)
        gate[list(check_layers(layers, len(gate)))] = 0
        first, end = default_window(self.steps) if window is None else window
        if not 0 <= first < end <= self.steps:
            what = "the default `skip_window`" if window is None else "`skip_window`"
            raise SettingError(
                f"{what} {first} {end} must hold some of the steps 0 to {self.steps - 1}, and no other"
            )
        scales[first:end] = scale
        return dataclasses.replace(self, skip_gate=gate, skip_scale=scales)

    def within(self, region: Float[np.ndarray, "b s"], inside: float = 0.0) -> "LayerControl":
        """Inject whole outside a region (1 = to be changed) and only `inside` of it there."""
        return dataclasses.replace(self, region=np.float32(1 - np.asarray(region) * (1 - inside)))

    def watching(self, tokens: Sequence[int]) -> "LayerControl":
        """Also hand out where these joint tokens attend, the same ones of every element.

        tokens: text comes first, then the image row by row; as many others compile nothing.
        """
        rows = np.broadcast_to(np.asarray(tokens, np.int32), (self.inject.shape[1], len(tokens)))
        return dataclasses.replace(self, watched=rows)

    def check(self, batch: int, tokens: int, heads: int) -> None:
        """SettingError unless the arrays are for such a batch and a model and canvas of such sizes."""
        if self.inject.shape[1] != batch:
            raise SettingError(f"the control is for {self.inject.shape[1]} batch elements, not for {batch}")
        if self.heads is not None and self.heads.shape[-1] != heads:
            raise SettingError(f"the model has {heads} heads, but {self.heads.shape[-1]} are scaled")
        if self.region is not None and self.region.shape != (batch, tokens):
            raise SettingError(
                f"a region must be [batch, image tokens] = [{batch}, {tokens}], found {list(self.region.shape)}"
            )

    def interventions(self, step: int) -> Interventions:
        """One step's arrays, as a transformer takes them."""
        strengths = [1.0 if scale is None else scale[step] for scale in (self.keys, self.values)]
        inject = np.stack([self.inject[step] * np.float32(strength) for strength in strengths], axis=-1)
        others = ("attention", "mlp", "text", "heads", "key_shift", "extend")
        own = None
        if self.attentions is not None:
            inject, own = (inject * self.attentions[step][..., i : i + 1] for i in range(2))
        return Interventions(
            LayerInterventions(
                gate=(~self.bypass[step]).astype(np.float32),
                inject=inject,
                own_inject=own,
                **{n: None if getattr(self, n) is None else getattr(self, n)[step] for n in others},
            ),
            self.region,
            None if self.skip_gate is None else Skip(self.skip_gate, self.skip_scale[step]),
            self.watched,
        )

    def _set(self, before: np.ndarray | None, where: np.ndarray, value: float) -> np.ndarray:
        return np.where(where, _finite(value), np.float32(1) if before is None else before)

    def _where(self, layers, steps, elements) -> np.ndarray:
        total_steps, batch, total_layers = self.inject.shape
        numbers = list(check_layers(layers, total_layers))
        chosen = np.zeros(self.inject.shape, bool)
        when = np.arange(total_steps)[steps] if isinstance(steps, slice) else np.asarray(steps, int)
        who = np.arange(batch) if elements is None else np.asarray(elements, int)
        for name, values, size in (("step", when, total_steps), ("batch element", who, batch)):
            if values.size and not 0 <= values.min() <= values.max() < size:
                raise SettingError(f"no {name} {values.min()}..{values.max()}: there are 0 to {size - 1}")
        chosen[np.ix_(when, who, numbers)] = True
        return chosen
