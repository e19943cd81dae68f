"""Noise schedules: which sigmas a number of steps visits."""

import dataclasses
from typing import Any

import numpy as np
from jaxtyping import Float

from sflow_jax.errors import SettingError


def check_steps(steps: int) -> int:
    """The number itself; SettingError unless it is at least 1."""
    if steps < 1:
        raise SettingError(f"`steps` must be at least 1, found {steps}")
    return steps


@dataclasses.dataclass(frozen=True)
class Schedule:
    """Sigmas of a flow-matching model; defaults are FLUX.1-dev's, `shift=1, dynamic=False` schnell's.

    dynamic: shift by the picture's size, mu linear in the tokens from (base_tokens, base_shift) to
    (max_tokens, max_shift). Otherwise a constant `shift`.
    """

    dynamic: bool = True
    shift: float = 3.0
    base_shift: float = 0.5
    max_shift: float = 1.15
    base_tokens: int = 256
    max_tokens: int = 4096

    @classmethod
    def from_hf(cls, config: dict[str, Any]) -> "Schedule":
        """From diffusers' `scheduler_config.json`; ValueError for options that FLUX.1 does not use."""
        unsupported = ("shift_terminal", "invert_sigmas", "use_karras_sigmas", "use_exponential_sigmas",
                       "use_beta_sigmas", "stochastic_sampling")  # fmt: skip
        for name in unsupported:
            if config.get(name):
                raise ValueError(f"scheduler option {name}={config[name]!r} is not supported")
        if config.get("time_shift_type", "exponential") != "exponential":
            raise ValueError(f"time_shift_type {config['time_shift_type']!r} is not supported, only 'exponential'")
        return cls(
            dynamic=config.get("use_dynamic_shifting", False),
            shift=config.get("shift", 1.0),
            base_shift=config.get("base_shift", 0.5),
            max_shift=config.get("max_shift", 1.15),
            base_tokens=config.get("base_image_seq_len", 256),
            max_tokens=config.get("max_image_seq_len", 4096),
        )

    def sigmas(self, steps: int, tokens: int) -> Float[np.ndarray, " t_plus_1"]:
        """Descending from 1 (noise) to 0 (picture), float32, for a picture of `tokens` image tokens.

        ValueError for steps < 1.
        """
        sigmas = np.linspace(1.0, 1.0 / check_steps(steps), steps)
        if self.dynamic:
            slope = (self.max_shift - self.base_shift) / (self.max_tokens - self.base_tokens)
            shift = np.exp(self.base_shift + slope * (tokens - self.base_tokens))
        else:
            shift = self.shift
        sigmas = shift * sigmas / (1 + (shift - 1) * sigmas)
        return np.append(sigmas, 0.0).astype(np.float32)
