"""What is asked of the branches beside the prompt's: negative prompts, and skip-layer guidance."""

import dataclasses
from typing import Any

from sflow_jax.errors import SettingError
from sflow_jax.models.conditioning import Conditioning
from sflow_jax.painter import Painter
from sflow_jax.sampling.control import LayerControl, default_window
from sflow_jax.settings import ATTENTIONS, GuidedSettings, check_prompts


@dataclasses.dataclass(frozen=True)
class Branches:
    """What was asked for, resolved.

    negative: what the second branch of classifier-free guidance shows, one text a row; None for families without
    one. layers, scale, window: of skip-layer guidance; no layers is none of it.
    """

    negative: tuple[str, ...] | None
    layers: tuple[int, ...] = ()
    scale: float = GuidedSettings.skip_scale
    window: tuple[int, ...] | None = None

    @classmethod
    def of(cls, painter: Painter, batch: int, asked: GuidedSettings | None = None) -> "Branches":
        """Of so many rows, by default nothing special; SettingError for what the model does not have."""
        asked = asked or GuidedSettings()
        painter.info.check_branches(asked.negative, getattr(asked, "attentions", ATTENTIONS[0]))
        layers = painter.info.resolve_layers(asked.skip_layers)
        window = None if asked.skip_window is None else tuple(asked.skip_window)
        negative = None
        if painter.family.guidance == "branches":
            negative = _one_a_row(asked.negative, batch)
        return cls(negative, layers, asked.skip_scale, window)

    def conditioning(self, painter: Painter) -> Conditioning | None:
        """Of the second branch, one row a text; equal texts are encoded once."""
        if self.negative is None:
            return None
        different = list(dict.fromkeys(self.negative))
        return painter.encode_prompts(different).rows([different.index(text) for text in self.negative])

    def on(self, control: LayerControl) -> LayerControl:
        """A control with skip-layer guidance where it was asked for."""
        return control.skipping(self.layers, self.scale, self.window) if self.layers else control

    def row(self, number: int) -> "Branches":
        """Of one row alone."""
        return dataclasses.replace(self, negative=None if self.negative is None else (self.negative[number],))

    def record(self, steps: int) -> dict[str, Any]:
        """The settings with every default filled in."""
        texts = self.negative
        window = self.window if self.window or not self.layers else default_window(steps)
        return {
            "negative": texts[0] if texts and len(set(texts)) == 1 else texts,
            "skip_layers": self.layers,
            "skip_scale": self.scale,
            "skip_window": window,
        }


def _one_a_row(negative: Any, batch: int) -> tuple[str, ...]:
    texts = [negative or ""] * batch if negative is None or isinstance(negative, str) else list(negative)
    if len(texts) != batch:
        raise SettingError(f"`negative` must be one text or {batch}, one a row, found {len(texts)}")
    return tuple(check_prompts(texts))
