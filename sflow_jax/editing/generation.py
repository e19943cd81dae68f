"""Pictures of prompts: which settings hold, and what comes back."""

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from sflow_jax.arrays import AnyArray
from sflow_jax.editing.branches import Branches
from sflow_jax.editing.edit import checked_noise
from sflow_jax.editing.watch import Watch
from sflow_jax.errors import SettingError
from sflow_jax.painter import Painter
from sflow_jax.progress import Progress
from sflow_jax.results import Generation
from sflow_jax.sampling.control import LayerControl
from sflow_jax.settings import GenerationSettings, check_prompts


def generate_pictures(
    painter: Painter,
    prompts: Sequence[str],
    noise: Float[AnyArray, "s c"] | None,
    asked: GenerationSettings,
    progress: Progress,
    watch: Watch | None = None,
) -> Generation:
    """Pictures of prompts, all from the same noise; see `StableFlow.generate`. watch: of the only prompt."""
    canvas, layers = painter.info.canvas(asked.height, asked.width), painter.info.resolve_layers(asked.bypass)
    start = checked_noise(painter, asked.seed, noise, canvas)
    batch, count = len(check_prompts(prompts)), asked.steps or painter.defaults.steps
    branches = Branches.of(painter, batch, asked)
    control = branches.on(LayerControl.none(count, batch, painter.layers).bypassing(layers))
    conditioning = painter.encode_prompts(prompts)
    scale = _guidance(asked.guidance, painter.defaults.guidance, batch)
    settings = dataclasses.replace(
        asked,
        steps=count,
        guidance=tuple(scale.tolist()) if np.ndim(asked.guidance) else float(scale[0]),
        height=canvas.height,
        width=canvas.width,
        bypass=layers,
        **branches.record(count),
    )
    latents = painter.denoise(
        np.repeat(start[None], batch, axis=0),
        conditioning,
        control if watch is None else watch.on(control),
        canvas,
        guidance=scale,
        negative=branches.conditioning(painter),
        groups=batch,
        watch=None if watch is None else watch.see,
        progress=progress,
        what="generating",
    )
    return Generation(painter.decode(latents, canvas), latents, settings)


def _guidance(guidance: float | Sequence[float] | None, default: float, batch: int) -> Float[np.ndarray, " b"]:
    """One float32 a row; SettingError for a wrong number of them."""
    values = np.asarray(default if guidance is None else guidance, np.float32)
    if values.ndim > 1 or (values.ndim == 1 and len(values) != batch):
        raise SettingError(f"`guidance` must be one number or {batch}, one a row, found {values.tolist()}")
    return np.broadcast_to(values, (batch,)).copy()
