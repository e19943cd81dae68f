"""A method's path from noise to picture, as steps of the one rule.

Axes: b batch (member 0 the source), s image tokens, c channels, t steps.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from jaxtyping import Float

from sflow_jax.arrays import AnyArray
from sflow_jax.editing.methods import Method
from sflow_jax.sampling.control import LayerControl
from sflow_jax.sampling.solvers import Evaluation, find_solver
from sflow_jax.sampling.steps import Blank, Path, Step, denoising_steps
from sflow_jax.settings import ATTENTIONS

# Number of a step → its noise [s, c].
Noise = Callable[[int], Float[AnyArray, "s c"]]


@dataclasses.dataclass(frozen=True)
class StraightPath:
    """The straight line from a picture to noise, as a path that replay can follow; see `sampling.steps.Path`."""

    trajectory: Float[np.ndarray, "t_plus_1 s c"]
    evaluated: Float[np.ndarray, " t"]

    @property
    def points(self) -> Float[np.ndarray, "t s c"]:
        """As a reference's inversion has them: the cleaner state."""
        return self.trajectory[:-1]

    @classmethod
    def of(
        cls, picture: Float[AnyArray, "s c"], noise: Float[AnyArray, "s c"], sigmas: Float[np.ndarray, " t_plus_1"]
    ) -> "StraightPath":
        """(1 − σ)·picture + σ·noise at every sigma; sigmas: descending."""
        rising = sigmas[::-1][:, None, None]
        trajectory = (1 - rising) * np.asarray(picture)[None] + rising * np.asarray(noise)[None]
        return cls(np.float32(trajectory), sigmas[::-1][1:])


@dataclasses.dataclass(frozen=True)
class Start:
    """What a method's path begins with.

    picture: clean latents [s, c]; for "painted" paths the noise. path: the picture's way to noise, for methods that
    follow one. noise: of every step.
    """

    picture: Float[np.ndarray, "s c"]
    path: Path | None
    noise: Noise

    def latents(self, method: Method) -> Float[np.ndarray, "s c"]:
        """Where the first step begins."""
        return (
            self.picture if self.path is None else np.asarray(self.path.trajectory[method.steps - method.left_out])
        )


def method_steps(
    method: Method,
    start: Start,
    sigmas: Float[np.ndarray, " t_plus_1"],
    control: LayerControl,
    blank: Blank,
    region: Float[np.ndarray, "b s"] | None = None,
) -> Iterator[list[Step]]:
    """Interval by interval, along `sigmas` descending, from the first one that the method does not leave out.

    region: where pictures may change, 0…1; elsewhere they stay the source until the method's `lock_until`.
    """
    locked = None if region is None else np.float32(region)[..., None]
    if method.path == "coupled":
        yield from _coupled(method, start, sigmas, control, blank, locked)
    else:
        yield from _following(method, start.path, sigmas, control, blank, locked)


def _coupled(method, start, sigmas, control, blank, locked) -> Iterator[list[Step]]:
    """FlowEdit's: the picture, moved by the difference of both velocities at the noised source and edit."""
    free = method.steps - method.steps_of(method.free)
    for i in range(method.left_out, method.steps):
        evaluation = Evaluation(0.0, float(sigmas[i]), float(sigmas[i + 1] - sigmas[i]))
        changes: dict[str, Any] = {}
        if i <= free:
            changes["offset"] = np.float32(sigmas[i] * (np.asarray(start.noise(i)) - start.picture))[None]
        if i < free:
            changes |= {"coupling": 1.0, "weight": _weight(blank, locked, method, i)}
        elif i == free:
            changes["keep_offset"] = 1.0
        yield [blank.step(evaluation, control.interventions(i), **changes)]


def _following(method, path, sigmas, control, blank, locked) -> Iterator[list[Step]]:
    """Along a stored path to noise, back to the picture."""
    intervals = denoising_steps(
        sigmas, control, blank, solver=find_solver(method.solver), path=path, replay=method.replay,
        begin=method.left_out,
    )  # fmt: skip
    for i, (*before, moving) in enumerate(intervals, method.left_out):
        stored, changes = method.steps - i - 1, {}
        weight = _weight(blank, locked, method, i)
        if method.steering is not None:
            # Trust grows towards the picture, and where the edit goes the source's way.
            weight = weight * np.float32(1 - float(sigmas[i + 1]) ** method.steering)
            changes["agreement"] = 1.0
        if weight is not blank.weight:
            drift = np.asarray(path.trajectory[stored]) - np.asarray(path.trajectory[stored + 1])
            changes |= {"weight": weight, "drift": drift[None]}
        if method.ratio != 1:
            step, sigma = float(moving.scale), float(sigmas[i])
            changes |= {
                "scale": np.float32(step * method.ratio),
                "reference_scale": np.float32(step),
                "reference_pull": np.float32(step * (1 - method.ratio) / sigma),
            }
        yield [*before, moving._replace(**changes)]


def _weight(blank, locked, method, i) -> Float[np.ndarray, "b s 1"]:
    """Of every token in a step."""
    return blank.weight if locked is None or i >= method.steps_of(method.lock_until) else locked


def injection(
    method: Method, layers: tuple[int, ...], batch: int, of_model: int, attentions: str = ATTENTIONS[0]
) -> LayerControl:
    """What a method does to which layer. layers: resolved. of_model: number of the model's layers.

    attentions: of two in a layer, those that inject.
    """
    control = LayerControl.none(method.steps, batch, of_model)
    steps = slice(method.steps_of(method.inject_from), method.steps_of(method.until))
    if not layers or steps.start >= steps.stop:
        return control
    if method.extended is not None:
        return control.extending(layers, math.exp(method.extended), steps=steps)
    return control.injecting(layers, steps=steps, keys=method.keys, values=method.values, attentions=attentions)
