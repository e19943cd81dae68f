"""Guidance: a number that the network takes as an input, or two branches of which one does not see the prompt.

Branches are a second set of groups, so that "member 0 lends its keys and values" stays right by itself: rows are
ordered [group, branch, member], and a group's branches stay on one device. Skip-layer guidance is a third branch,
evaluated by itself in the steps of its window: the prompt's, some layers bypassed.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from sflow_jax.arrays import AnyArray
from sflow_jax.errors import SettingError
from sflow_jax.models.conditioning import Conditioning
from sflow_jax.models.interventions import Interventions

Tree = TypeVar("Tree")
BRANCHES = 2


def guidance_rows(guidance: float | Sequence[float] | None, default: float, batch: int) -> Float[np.ndarray, " b"]:
    """One float32 a row, a single number for all of them; SettingError for a wrong number of them."""
    values = np.asarray(default if guidance is None else guidance, np.float32)
    if values.ndim > 1 or (values.ndim == 1 and len(values) != batch):
        raise SettingError(f"`guidance` must be one number or {batch}, one a row, found {values.tolist()}")
    return np.broadcast_to(values, (batch,)).copy()


def interleave(conditioning: Conditioning, negative: Conditioning, groups: int) -> Conditioning:
    """Rows [group, member] of both branches → [group, branch, member], the prompt's branch first."""
    batch = len(conditioning)
    numbers = np.arange(BRANCHES * batch).reshape(BRANCHES, groups, -1)
    return Conditioning.concatenate([conditioning, negative]).rows(numbers.swapaxes(0, 1).reshape(-1))


def both_branches(tree: Tree, groups: int) -> Tree:
    """Every array [group·member, …] → [group·branch·member, …], the same for both branches."""

    def doubled(x: Array) -> Array:
        grouped = x.reshape(groups, 1, -1, *x.shape[1:])
        shape = (groups, BRANCHES, *grouped.shape[2:])
        return jnp.broadcast_to(grouped, shape).reshape(BRANCHES * x.shape[0], *x.shape[1:])

    return jax.tree.map(doubled, tree)


def one_branch(tree: Tree, groups: int, branch: int = 0) -> Tree:
    """Every array [group·branch·member, …] → [group·member, …] of one branch, by default the prompt's."""

    def taken(x: Array) -> Array:
        split = x.reshape(groups, BRANCHES, -1, *x.shape[1:])
        return split[:, branch].reshape(x.shape[0] // BRANCHES, *x.shape[1:])

    return jax.tree.map(taken, tree)


def branch_velocities(
    evaluate: Callable[[Array, Interventions], Float[Array, "two_b s c"]],
    point: Float[Array, "b s c"],
    interventions: Interventions,
    groups: int,
) -> tuple[Float[Array, "b s c"], Float[Array, "b s c"]]:
    """v₊ and v₋ of one evaluation of both branches."""
    velocity = evaluate(*both_branches((point, interventions), groups))
    return one_branch(velocity, groups, 0), one_branch(velocity, groups, 1)


def guide(
    prompted: Float[Array, "b s c"], negative: Float[Array, "b s c"], guidance: Float[AnyArray, " b"]
) -> Float[Array, "b s c"]:
    """v = v₋ + g·(v₊ − v₋) (classifier-free guidance)."""
    return negative + guidance[:, None, None] * (prompted - negative)


def guided_by_branches(
    evaluate: Callable[[Array, Interventions], Float[Array, "two_b s c"]],
    point: Float[Array, "b s c"],
    guidance: Float[AnyArray, " b"],
    interventions: Interventions,
    groups: int,
) -> Float[Array, "b s c"]:
    """Both at once: the guided velocity of one evaluation of both branches."""
    return guide(*branch_velocities(evaluate, point, interventions, groups), guidance)


def away_from_skipped(
    evaluate: Callable[[Interventions], Float[Array, "b s c"]],
    prompted: Float[Array, "b s c"],
    interventions: Interventions,
) -> Float[Array, "b s c"]:
    """s·(v₊ − v₊ without the layers that skip-layer guidance leaves out); evaluated only where s is not 0."""
    skip, layers = interventions.skip, interventions.layers
    gate = jnp.broadcast_to(skip.gate[None], (len(prompted), len(skip.gate)))
    without = dataclasses.replace(layers, gate=gate if layers.gate is None else layers.gate * gate)

    def difference() -> Array:
        return skip.scale * (prompted - evaluate(dataclasses.replace(interventions, layers=without, skip=None)))

    return jax.lax.cond(skip.scale != 0, difference, lambda: jnp.zeros_like(prompted))
