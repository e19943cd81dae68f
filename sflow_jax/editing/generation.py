"""Pictures of prompts: which settings hold, and what comes back."""

import dataclasses
import numbers
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from sflow_jax.arrays import AnyArray
from sflow_jax.editing.branches import Branches
from sflow_jax.editing.edit import checked_noise
from sflow_jax.editing.watch import Watch
from sflow_jax.errors import SettingError
from sflow_jax.painter import OnStep, Painter, watching
from sflow_jax.progress import Progress
from sflow_jax.records import OWN
from sflow_jax.results import Generation
from sflow_jax.sampling.control import LayerControl
from sflow_jax.sampling.guidance import guidance_rows
from sflow_jax.settings import GenerationSettings, as_record, check_prompts


def generate_pictures(
    painter: Painter,
    prompts: Sequence[str],
    noise: Float[AnyArray, "s c"] | None,
    asked: GenerationSettings,
    progress: Progress,
    watch: Watch | None = None,
    on_step: OnStep | None = None,
) -> Generation:
    """Pictures of prompts and seeds; see `StableFlow.generate`. watch: of the only prompt, instead of on_step."""
    canvas, layers = painter.info.canvas(asked.height, asked.width), painter.info.resolve_layers(asked.bypass)
    seeds, texts = paired(asked.seed, check_prompts(prompts))
    start = {one: checked_noise(painter, one, noise, canvas) for one in seeds}
    batch, count = len(texts), asked.steps or painter.defaults.steps
    branches = Branches.of(painter, batch, asked)
    control = branches.on(LayerControl.none(count, batch, painter.layers).bypassing(layers))
    conditioning = painter.encode_prompts(prompts, progress)
    if len(prompts) < batch:
        conditioning = conditioning.rows([0] * batch)
    scale = guidance_rows(asked.guidance, painter.defaults.guidance, batch)
    settings = dataclasses.replace(
        asked,
        steps=count,
        seed=asked.seed if isinstance(asked.seed, numbers.Integral) else tuple(seeds),
        guidance=tuple(scale.tolist()) if np.ndim(asked.guidance) else float(scale[0]),
        height=canvas.height,
        width=canvas.width,
        bypass=layers,
        **branches.record(count),
    )
    latents = painter.denoise(
        np.stack([start[one] for one in seeds]),
        conditioning,
        control if watch is None else watch.on(control),
        canvas,
        guidance=scale,
        negative=branches.conditioning(painter),
        groups=batch,
        watch=watching(on_step) if watch is None else watch.see,
        progress=progress,
        what="generating",
    )
    record = {
        "command": "generate",
        "prompts": list(prompts),
        **as_record(settings),
        "noise": None if noise is None else OWN,
        **painter.record(),
    }
    return Generation(painter.decode(latents, canvas), latents, settings, record)


def paired(seed: int | Sequence[int], prompts: Sequence[str]) -> tuple[list[int], list[str]]:
    """A seed and a prompt for every picture; SettingError where their numbers do not go together."""
    seeds, texts = [seed] if isinstance(seed, numbers.Integral) else list(seed), list(prompts)
    pictures = max(len(seeds), len(texts))
    if not {len(seeds), len(texts)} <= {1, pictures}:
        raise SettingError(
            f"{len(seeds)} numbers in `seed` do not go with {len(texts)} prompts: give one of either, or as many"
        )
    return seeds if len(seeds) > 1 else seeds * pictures, texts if len(texts) > 1 else texts * pictures
