"""Solvers: at which points of an interval the velocity is evaluated, and what each evaluation moves.

All are settings of the one step rule (`sampling.steps`) and know no network.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

from sflow_jax.errors import SettingError


class Evaluation(NamedTuple):
    """One evaluation of the velocity. look_ahead: along the velocity before, in sigma. sigma: the time it is told.
    scale: how far the latents move along what it says, in sigma."""

    look_ahead: float
    sigma: float
    scale: float


@dataclasses.dataclass(frozen=True)
class Solver:
    """How an interval from one sigma to the next is crossed.

    evaluations: of the interval, the last of which moves the latents. warm_up: whether a velocity at the first
    point is needed before. towards_noise: whether a path from a picture takes drawn noise minus the picture for the
    velocity before the first one. order: of convergence.
    """

    name: str
    evaluations: Callable[[float, float], tuple[Evaluation, ...]]
    warm_up: bool = False
    towards_noise: bool = False
    order: int = 1

    def crossing(self, sigma: float, sigma_next: float, first: bool) -> tuple[Evaluation, ...]:
        """Evaluations of one interval; the first one of a path may have one more."""
        before = (Evaluation(0.0, sigma, 0.0),) if first and self.warm_up else ()
        return (*before, *self.evaluations(sigma, sigma_next))


def _euler(sigma: float, sigma_next: float) -> tuple[Evaluation, ...]:
    return (Evaluation(0.0, sigma, sigma_next - sigma),)


def _destination(sigma: float, sigma_next: float) -> tuple[Evaluation, ...]:
    """The current latents, told the time of the destination: u(z_t) ≈ u(z_{t−1})."""
    return (Evaluation(0.0, sigma_next, sigma_next - sigma),)


def _midpoint(sigma: float, sigma_next: float) -> tuple[Evaluation, ...]:
    half = (sigma_next - sigma) / 2
    return Evaluation(0.0, sigma, 0.0), Evaluation(half, sigma + half, 2 * half)


def _reused_midpoint(sigma: float, sigma_next: float) -> tuple[Evaluation, ...]:
    half = (sigma_next - sigma) / 2
    return (Evaluation(half, sigma + half, 2 * half),)


def _ahead(sigma: float, sigma_next: float) -> tuple[Evaluation, ...]:
    return (Evaluation(sigma_next - sigma, sigma_next, sigma_next - sigma),)


SOLVERS: dict[str, Solver] = {
    solver.name: solver
    for solver in (
        Solver("euler", _euler),
        # Stable Flow's inverse Euler.
        Solver("reference", _destination),
        # RF-Solver's, 2 N calls.
        Solver("midpoint", _midpoint, order=2),
        # The velocity of the midpoint before stands in for the one at the start: N + 1 calls.
        Solver("fireflow", _reused_midpoint, warm_up=True, order=2),
        # Looks ahead to the destination along the velocity before: N + 1 calls.
        Solver("uni-inv", _ahead, warm_up=True),
        # DNAEdit's inversion: the same, but the first look ahead is along the straight line to drawn noise.
        Solver("dnaedit", _ahead, towards_noise=True),
    )
}
EULER, REFERENCE_INVERSION = SOLVERS["euler"], SOLVERS["reference"]


def find_solver(name: str) -> Solver:
    """By name; SettingError for an unknown one."""
    if name not in SOLVERS:
        raise SettingError(f"unknown `solver` {name!r}; choose one of {', '.join(SOLVERS)}")
    return SOLVERS[name]
