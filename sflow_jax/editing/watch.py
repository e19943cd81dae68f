"""Looking at where tokens of one picture attend, while it is painted.

Axes: t steps, n layers, q tokens, w text tokens, s image tokens.
"""

import dataclasses

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from sflow_jax.errors import SettingError
from sflow_jax.machine.meshes import on_this_host
from sflow_jax.models.layout import ATTENTION
from sflow_jax.sampling.control import LayerControl
from sflow_jax.sampling.solve import Reached


@dataclasses.dataclass
class Watch:
    """Who is looked at, and what was seen.

    tokens: joint numbers, text first. row: the picture, of a batch of one group. seen: [n, q, w + 2 s] a step, see
    `Layout.watch`.
    """

    tokens: tuple[int, ...]
    row: int
    seen: list[Float[Array, "n q keys"]] = dataclasses.field(default_factory=list)

    def on(self, control: LayerControl) -> LayerControl:
        """A control that hands out what is watched."""
        return control.watching(self.tokens)

    def see(self, reached: Reached) -> None:
        """Keep what a step handed out; it stays on the device."""
        if ATTENTION not in reached.captured:
            raise SettingError("this family's layers do not hand out their attention")
        self.seen.append(reached.captured[ATTENTION][:, self.row])

    def together(self) -> Float[np.ndarray, "t n q keys"]:
        """Every step, on this host."""
        return np.asarray(on_this_host(jnp.stack(self.seen)))
