"""Noise schedules: which sigmas a number of steps visits."""

import dataclasses
from typing import Annotated, Any

import msgspec
import numpy as np
from jaxtyping import Float

from sflow_jax.errors import SettingError
from sflow_jax.typed import Positive, Size, typed

# An exponent.
Shift = Annotated[float, msgspec.Meta(ge=-20, le=20)]


def check_steps(steps: int) -> int:
    """The number itself; SettingError unless it is at least 1."""
    if steps < 1:
        raise SettingError(f"`steps` must be at least 1, found {steps}")
    return steps


# Of diffusers' config: flow matching by Euler steps, as FLUX.1 and SD3 have it.
EULER = {
    "class_name": "FlowMatchEulerDiscreteScheduler",
    "num_train_timesteps": 1000,
    "time_shift_type": "exponential",
    "shift_terminal": None,
    "invert_sigmas": False,
    "use_karras_sigmas": False,
    "use_exponential_sigmas": False,
    "use_beta_sigmas": False,
    "stochastic_sampling": False,
}


class DiffusersConfig(msgspec.Struct, frozen=True):
    """What diffusers' `scheduler_config.json` may say, with the defaults of its flow-matching Euler scheduler."""

    class_name: str | None = msgspec.field(name="_class_name", default=None)
    num_train_timesteps: int | None = None
    time_shift_type: str | None = None
    shift_terminal: float | None = None
    invert_sigmas: bool | None = None
    use_karras_sigmas: bool | None = None
    use_exponential_sigmas: bool | None = None
    use_beta_sigmas: bool | None = None
    stochastic_sampling: bool | None = None
    use_dynamic_shifting: bool = False
    shift: Positive = 1.0
    base_shift: Shift = 0.5
    max_shift: Shift = 1.15
    base_image_seq_len: Size = 256
    max_image_seq_len: Size = 4096


@dataclasses.dataclass(frozen=True)
class Schedule:
    """Sigmas of a flow-matching model; defaults are FLUX.1-dev's, `shift=1, dynamic=False` schnell's.

    dynamic: shift by the picture's size, mu linear in the tokens from (base_tokens, base_shift) to
    (max_tokens, max_shift). Otherwise a constant `shift`. least: the last time before the shift; None is 1/N.
    """

    dynamic: bool = True
    shift: float = 3.0
    base_shift: float = 0.5
    max_shift: float = 1.15
    base_tokens: int = 256
    max_tokens: int = 4096
    least: float | None = None

    def __post_init__(self) -> None:
        if self.max_tokens <= self.base_tokens:
            raise ValueError(
                f"max_image_seq_len {self.max_tokens} must be above base_image_seq_len {self.base_tokens}"
            )

    @classmethod
    def from_hf(cls, config: dict[str, Any]) -> "Schedule":
        """From diffusers' `scheduler_config.json`; ValueError for options that FLUX.1 does not use."""
        theirs = typed(config, DiffusersConfig)
        for name, value in EULER.items():
            # Nothing, as well as the value itself.
            if getattr(theirs, name) not in (value, None):
                raise ValueError(
                    f"scheduler option {name}={getattr(theirs, name)!r} is not supported, only {value!r}"
                )
        return cls(
            dynamic=theirs.use_dynamic_shifting,
            shift=theirs.shift,
            base_shift=theirs.base_shift,
            max_shift=theirs.max_shift,
            base_tokens=theirs.base_image_seq_len,
            max_tokens=theirs.max_image_seq_len,
        )

    def sigmas(self, steps: int, tokens: int) -> Float[np.ndarray, " t_plus_1"]:
        """Descending from 1 (noise) to 0 (picture), float32, for a picture of `tokens` image tokens.

        ValueError for steps < 1.
        """
        last = 1.0 / check_steps(steps)
        sigmas = np.linspace(1.0, last if self.least is None else self.least, steps)
        if self.dynamic:
            slope = (self.max_shift - self.base_shift) / (self.max_tokens - self.base_tokens)
            shift = np.exp(self.base_shift + slope * (tokens - self.base_tokens))
        else:
            shift = self.shift
        sigmas = shift * sigmas / (1 + (shift - 1) * sigmas)
        return np.append(sigmas, 0.0).astype(np.float32)
