"""The one step rule behind generation, inversion and editing, as data.

    point = z + a·p + offset                 a: how far to look ahead along p, the velocity before
    v     = u(point, σ)
    w     ← w·(1 + κ·(cos(v, ±drift) − 1))   κ: whether agreement with the source's stored way counts
    r     ← r + b·(v − v_source)             r: a second path, which begins at the picture
    z     ← z + k·offset + (1 − w)·drift − ζ·(z − z_source) + μ·(z − r) + c·w·(v − ρ·v_source)
    p     ← v

Knows no network: a velocity is any function of latents and sigma. Nearly every published solver and editor is a
choice of these numbers. Axes: b batch = g groups × m members (member 0 the source), s image tokens, c channels.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple, Protocol, runtime_checkable

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from sflow_jax.arrays import AnyArray
from sflow_jax.errors import SettingError
from sflow_jax.models.interventions import Interventions
from sflow_jax.models.lending import Lent
from sflow_jax.models.reuse import Reuse
from sflow_jax.sampling.control import LayerControl
from sflow_jax.sampling.solvers import EULER, REFERENCE_INVERSION, Evaluation, Solver
from sflow_jax.settings import REPLAYS

Velocity = Callable[[Array, Array], AnyArray]


class State(NamedTuple):
    """What a step hands to the next.

    latents: z. velocity: the one before, p (zeros at first). reference: r; None where no step is drawn to it.
    reuse: of what layers added; None where step caching is off.
    """

    latents: Float[AnyArray, "b s c"]
    velocity: Float[AnyArray, "b s c"]
    reference: Float[AnyArray, "b s c"] | None = None
    reuse: Reuse | None = None


class Step(NamedTuple):
    """All that distinguishes one step from another: data, never a reason to compile.

    sigma: the time given to the velocity. look_ahead: a. scale: c. coupling: ρ. pull: ζ. keep_offset: k. agreement:
    κ. reference_scale: b. reference_pull: μ. offset: of a group's point. drift: of what is not weighted. weight: w
    of each token, 0…1. source: what member 0 of each group becomes after the step, where `replay` is true.

    lent: what sources lend to the layers of others, or that it is to be recorded. source_velocity: of sources that
    are not in the batch, whose `replay` and `pull` are then left out. least_change: of step caching, see
    `models.reuse.Asked`.
    """

    sigma: AnyArray
    look_ahead: AnyArray
    scale: AnyArray
    coupling: AnyArray
    pull: AnyArray
    keep_offset: AnyArray
    agreement: AnyArray
    reference_scale: AnyArray
    reference_pull: AnyArray
    offset: Float[AnyArray, "g s c"]
    drift: Float[AnyArray, "g s c"]
    weight: Float[AnyArray, "b s 1"]
    source: Float[AnyArray, "g s c"]
    replay: AnyArray
    interventions: Interventions
    lent: Lent | None = None
    source_velocity: Float[AnyArray, "g s c"] | None = None
    least_change: AnyArray = np.float32(0)


# Terms of the rule that plain steps do not have.
OPTIONAL = ("coupling", "pull", "keep_offset", "agreement", "reference_scale", "reference_pull")
# Lengths below it have no direction.
TINY = 1e-8


class Blank(NamedTuple):
    """Arrays for steps without them. groups: zeros. weight: ones."""

    groups: Float[AnyArray, "g s c"]
    weight: Float[AnyArray, "b s 1"]

    @classmethod
    def of(cls, groups: int, batch: int, tokens: int, channels: int) -> "Blank":
        """On the host."""
        return cls(np.zeros((groups, tokens, channels), np.float32), np.ones((batch, tokens, 1), np.float32))

    def step(self, evaluation: Evaluation, interventions: Interventions, **changes) -> Step:
        """A step of a solver, and what else it does (fields of `Step`)."""
        plain = {
            **dict.fromkeys(OPTIONAL, 0.0),
            "offset": self.groups,
            "drift": self.groups,
            "weight": self.weight,
            "source": self.groups,
            "replay": False,
        }
        numbers = evaluation._asdict() | plain | changes
        numbers |= {name: np.float32(numbers[name]) for name in (*Evaluation._fields, *OPTIONAL)}
        return Step(**numbers | {"replay": np.asarray(numbers["replay"]), "interventions": interventions})


def advance(velocity: Velocity, state: State, step: Step) -> tuple[State, Float[Array, "b s c"]]:
    """One step, float32, then the source's replay; and the point where the velocity was evaluated."""
    batch, groups = state.latents.shape[0], step.offset.shape[0]
    members = batch // groups

    absent = step.source_velocity is not None

    def sources(x: AnyArray) -> Array:
        """Each element's member 0; grouped, so that no element leaves its device."""
        grouped = x.reshape(groups, members, *x.shape[1:])
        return jnp.broadcast_to(grouped[:, :1], grouped.shape).reshape(x.shape)

    def spread(x: AnyArray) -> Array:
        """A group's array for each of its members."""
        return jnp.repeat(x, members, axis=0)

    latents, drift = state.latents, spread(step.drift)
    point = latents + step.look_ahead * state.velocity + spread(step.offset)
    v = velocity(point, step.sigma)
    v_source = spread(step.source_velocity) if absent else sources(v)
    weight = step.weight * (1 + step.agreement * (_agreement(v, jnp.sign(step.scale) * drift) - 1))
    moved = latents + (1 - weight) * drift
    if not absent:
        moved = moved - step.pull * (latents - sources(latents))
    moved = moved + step.scale * weight * (v - step.coupling * v_source)
    moved = moved + step.keep_offset * spread(step.offset)
    reference = state.reference
    if reference is not None:
        reference = reference + step.reference_scale * (v - v_source)
        moved = moved + step.reference_pull * (latents - reference)
    if absent:
        return State(moved, v, reference), point
    replayed = (step.replay & (jnp.arange(batch) % members == 0))[:, None, None]
    return State(jnp.where(replayed, spread(step.source), moved), v, reference), point


def _agreement(v: AnyArray, other: AnyArray) -> Float[Array, "b 1 1"]:
    """Cosine of both velocities at every token, its mean over the tokens."""
    lengths = [jnp.maximum(jnp.linalg.norm(x, axis=-1), TINY) for x in (v, other)]
    return ((v * other).sum(axis=-1) / (lengths[0] * lengths[1])).mean(axis=-1)[:, None, None]


@runtime_checkable
class Path(Protocol):
    """What replay needs of an inversion; index 0 the picture, the last the noise.

    trajectory: states [t + 1, s, c]. points, evaluated: where, and at which sigma, the velocity was evaluated
    that led from each state to the next [t, s, c], [t].
    """

    trajectory: Float[np.ndarray, "t_plus_1 s c"]
    points: Float[np.ndarray, "t s c"]
    evaluated: Float[np.ndarray, " t"]


def denoising_steps(
    sigmas: Float[np.ndarray, " t_plus_1"],
    control: LayerControl,
    blank: Blank,
    *,
    solver: Solver = EULER,
    path: Path | None = None,
    replay: str = "aligned",
    begin: int = 0,
) -> Iterator[list[Step]]:
    """Interval by interval from noise to picture, along `sigmas` descending: the steps of each.

    begin: intervals left out at the noise's end.

    path: a picture's inversion, replayed by member 0. replay: "aligned": after every interval the source sits on
    the stored state of the sigma reached; "residual": besides, velocities are evaluated where inversion evaluated
    them, which makes the source's own path exact whatever rule inverted it (DirectEdit); "none": the source runs
    free. SettingError for another replay.
    """
    if replay not in REPLAYS:
        raise SettingError(f"unknown `replay` {replay!r}; choose one of {', '.join(REPLAYS)}")
    replays, last = path is not None and replay != "none", len(sigmas) - 1
    for i in range(begin, last):
        interventions, sigma, sigma_next = control.interventions(i), float(sigmas[i]), float(sigmas[i + 1])
        evaluations, changes, stored = solver.crossing(sigma, sigma_next, first=i == begin), {}, last - i - 1
        if replays:
            changes = {"source": path.trajectory[stored][None], "replay": True}
        if replays and replay == "residual":
            # The float32 difference, as inversion took it.
            scale = float(sigmas[i + 1] - sigmas[i])
            evaluations = (Evaluation(0.0, path.evaluated[stored], scale),)
            changes["offset"] = (path.points[stored] - path.trajectory[stored + 1])[None]
        *before, moving = evaluations
        yield [
            *(blank.step(evaluation, interventions) for evaluation in before),
            blank.step(moving, interventions, **changes),
        ]


def inversion_steps(
    sigmas: Float[np.ndarray, " t_plus_1"],
    control: LayerControl,
    blank: Blank,
    *,
    solver: Solver = REFERENCE_INVERSION,
) -> Iterator[list[Step]]:
    """Interval by interval from picture to noise, along `sigmas` descending: the steps of each."""
    last = len(sigmas) - 1
    for i in reversed(range(last)):
        crossing = solver.crossing(float(sigmas[i + 1]), float(sigmas[i]), first=i == last - 1)
        yield [blank.step(evaluation, control.interventions(i)) for evaluation in crossing]
