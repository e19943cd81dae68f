"""Settings of the known models where the caller gives none.

Plain numbers that import nothing: `--help` says them too.
"""

import dataclasses
import functools


@dataclasses.dataclass(frozen=True)
class Defaults:
    """Settings of a model where the caller gives none (method: the reference's).

    steps, guidance: of generation. edit_steps: of edits of generated pictures. real_…: of a photo's inversion and
    its edits. sweep_…: of a search for vital layers.
    """

    steps: int
    guidance: float
    edit_steps: int
    sweep_steps: int
    sweep_guidance: float
    real_steps: int = 50
    real_source_guidance: float = 1.0
    real_edit_guidance: float = 3.0


def _of_sd3(steps: int, guidance: float) -> Defaults:
    """With the steps and the guidance that the model's publishers use (SD3-medium: those of diffusers)."""
    return Defaults(
        steps=steps,
        guidance=guidance,
        edit_steps=steps,
        sweep_steps=15,
        sweep_guidance=guidance,
        real_edit_guidance=guidance,
    )


FLUX_DEV = Defaults(steps=28, guidance=3.5, edit_steps=15, sweep_steps=15, sweep_guidance=3.5)
FLUX_SCHNELL = Defaults(steps=4, guidance=0.0, edit_steps=4, sweep_steps=4, sweep_guidance=0.0, real_steps=8)
# Model that is known without files → its settings; the embedded model has FLUX.1-dev's.
DEFAULTS = {
    "flux-dev": FLUX_DEV,
    "flux-krea-dev": FLUX_DEV,
    "flux-schnell": FLUX_SCHNELL,
    "sd3-medium": _of_sd3(28, 7.0),
    "sd35-medium": _of_sd3(50, 5.0),
    "sd35-large": _of_sd3(40, 4.5),
}


@functools.cache
def default_texts() -> dict[str, str]:
    """Setting → its default in words: FLUX.1-dev's, then that of others that differ ("28; flux-schnell 4")."""
    texts = {}
    for field in dataclasses.fields(Defaults):
        values = {name: f"{getattr(known, field.name):g}" for name, known in DEFAULTS.items()}
        usual = values["flux-dev"]
        others = ", ".join(f"{name} {value}" for name, value in values.items() if value != usual)
        texts[field.name] = f"{usual}; {others}" if others else usual
    return texts
