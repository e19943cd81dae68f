"""Which layers inject the source's keys and values, and which are bypassed: when, and for whom.

Everything is an array of fixed shape, so that changing it compiles nothing.
Axes: t steps, b batch elements, n layers (numbered globally: double blocks first, then single blocks).
"""

import dataclasses
import operator
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool

# FLUX.1-dev: the paper's vital layers (figure 4), and the set that the authors' code injects in.
FLUX_DEV_PAPER = (0, 1, 2, 17, 18, 25, 28, 53, 54, 56)
FLUX_DEV_CODE = (0, 1, 17, 18, 25, 28, 53, 54, 56)


def check_layers(numbers: Iterable[Any], layers: int) -> tuple[int, ...]:
    """Sorted, unique layer numbers; ValueError naming those that a model of `layers` layers lacks."""
    try:
        found = sorted({operator.index(number) for number in numbers})
    except TypeError as error:
        raise ValueError(f"layers must be whole numbers, found {numbers!r}") from error
    unknown = [number for number in found if not 0 <= number < layers]
    if unknown:
        listed = ", ".join(map(str, unknown))
        raise ValueError(f"no layer {listed}: this model's layers are 0 to {layers - 1}")
    return tuple(found)


@dataclasses.dataclass(frozen=True)
class LayerControl:
    """Two masks over steps, batch elements and layers.

    inject: image-token keys and values come from the group's source. bypass: the layer leaves its input
    as it is. Begin with `none`, then say what is wanted: `LayerControl.none(15, 4, 57).injecting([0, 1])`.
    """

    inject: Bool[np.ndarray, "t b n"]
    bypass: Bool[np.ndarray, "t b n"]

    @property
    def steps(self) -> int:
        """Number of steps t."""
        return len(self.inject)

    @classmethod
    def none(cls, steps: int, batch: int, layers: int) -> "LayerControl":
        """No injection, no bypass: plain generation."""
        return cls(*(np.zeros((steps, batch, layers), bool) for _ in range(2)))

    def injecting(
        self,
        layers: Iterable[int],
        *,
        steps: Sequence[int] | slice = slice(None),
        elements: Sequence[int] | None = None,
    ) -> "LayerControl":
        """Also inject at these layers, in these steps (default all) and batch elements (default all).

        An element that is its group's source takes its own keys and values, which changes nothing.
        """
        return dataclasses.replace(self, inject=self._marked(self.inject, layers, steps, elements))

    def bypassing(
        self,
        layers: Iterable[int],
        *,
        steps: Sequence[int] | slice = slice(None),
        elements: Sequence[int] | None = None,
    ) -> "LayerControl":
        """Also bypass these layers, in these steps (default all) and batch elements (default all)."""
        return dataclasses.replace(self, bypass=self._marked(self.bypass, layers, steps, elements))

    def _marked(self, mask: np.ndarray, layers, steps, elements) -> np.ndarray:
        total_steps, batch, total_layers = mask.shape
        numbers = list(check_layers(layers, total_layers))
        chosen = np.zeros(mask.shape, bool)
        when = np.arange(total_steps)[steps] if isinstance(steps, slice) else np.asarray(steps, int)
        who = np.arange(batch) if elements is None else np.asarray(elements, int)
        for name, values, size in (("step", when, total_steps), ("batch element", who, batch)):
            if values.size and not 0 <= values.min() <= values.max() < size:
                raise ValueError(f"no {name} {values.min()}..{values.max()}: there are 0 to {size - 1}")
        chosen[np.ix_(when, who, numbers)] = True
        return mask | chosen
