"""Noise schedules and the one Euler step behind generation, inversion and editing.

Knows no network: a velocity is any function of latents and sigma.
Axes: t steps, b batch = g groups × m members (member 0 the source), s image tokens, c channels, n layers.
"""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from sflow_jax.arrays import AnyArray
from sflow_jax.control import LayerControl

Velocity = Callable[[Array, Array], AnyArray]
REPLAYS = ("aligned", "residual", "none")


def check_steps(steps: int) -> int:
    """The number itself; ValueError unless it is at least 1."""
    if steps < 1:
        raise ValueError(f"steps must be at least 1, found {steps}")
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


class Step(NamedTuple):
    """All that distinguishes one Euler step from another: data, never a reason to compile.

    sigma, sigma_next: where the latents are and where they go. sigma_evaluated: the time given to the
    velocity. offset: added to the latents of a group for the velocity alone. source: what member 0 of each
    group becomes after the step, where `replay` is true.
    """

    sigma: Float[np.ndarray, ""]
    sigma_next: Float[np.ndarray, ""]
    sigma_evaluated: Float[np.ndarray, ""]
    inject: Bool[np.ndarray, "b n"]
    bypass: Bool[np.ndarray, "b n"]
    offset: Float[np.ndarray, "g s c"]
    source: Float[np.ndarray, "g s c"]
    replay: Bool[np.ndarray, ""]


def advance(velocity: Velocity, latents: Float[AnyArray, "b s c"], step: Step) -> Float[Array, "b s c"]:
    """One Euler step, float32: z ← z + (σ' − σ)·u(z + offset, σ_evaluated), then the source's replay."""
    batch, groups = latents.shape[0], step.offset.shape[0]
    members = batch // groups
    point = latents + jnp.repeat(step.offset, members, axis=0)
    moved = latents + (step.sigma_next - step.sigma) * velocity(point, step.sigma_evaluated)
    is_source = jnp.arange(batch) % members == 0
    replayed = (step.replay & is_source)[:, None, None]
    return jnp.where(replayed, jnp.repeat(step.source, members, axis=0), moved)


def denoising_steps(
    sigmas: Float[np.ndarray, " t_plus_1"],
    control: LayerControl,
    nothing: Float[np.ndarray, "g s c"],
    trajectory: Float[np.ndarray, "t_plus_1 s c"] | None = None,
    replay: str = "aligned",
) -> Iterator[Step]:
    """Steps from noise to picture (method: Euler), along `sigmas` descending.

    nothing: zeros for steps without offset or replay. trajectory: a picture's inversion, index 0 the picture,
    replayed by member 0. replay: "aligned": after every step the source sits on the stored state of the sigma
    reached; "residual": besides, velocities are evaluated where inversion evaluated them, which makes the
    source's own path exact (DirectEdit); "none": the source runs free.
    """
    if replay not in REPLAYS:
        raise ValueError(f"unknown replay {replay!r}; choose one of {', '.join(REPLAYS)}")
    replays = trajectory is not None and replay != "none"
    last = len(sigmas) - 1
    for i in range(last):
        source = trajectory[last - i - 1][None] if replays else nothing
        offset = source - trajectory[last - i][None] if replays and replay == "residual" else nothing
        yield Step(
            sigma=sigmas[i],
            sigma_next=sigmas[i + 1],
            sigma_evaluated=sigmas[i],
            inject=control.inject[i],
            bypass=control.bypass[i],
            offset=offset,
            source=source,
            replay=np.asarray(replays),
        )


def inversion_steps(
    sigmas: Float[np.ndarray, " t_plus_1"], control: LayerControl, nothing: Float[np.ndarray, "g s c"]
) -> Iterator[Step]:
    """Steps from picture to noise (method: inverse Euler), along `sigmas` descending.

    The velocity is evaluated at the current latents but the destination's sigma: u(z_t) ≈ u(z_{t−1}).
    """
    for i in reversed(range(len(sigmas) - 1)):
        yield Step(
            sigma=sigmas[i + 1],
            sigma_next=sigmas[i],
            sigma_evaluated=sigmas[i],
            inject=control.inject[i],
            bypass=control.bypass[i],
            offset=nothing,
            source=nothing,
            replay=np.asarray(False),
        )
