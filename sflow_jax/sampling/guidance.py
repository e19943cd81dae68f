"""Guidance: a number that the network takes as an input, or two branches of which one does not see the prompt.

Branches are a second set of groups, so that "member 0 lends its keys and values" stays right by itself: rows are
ordered [group, branch, member], and a group's branches stay on one device.
"""

from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from sflow_jax.arrays import AnyArray
from sflow_jax.models.conditioning import Conditioning
from sflow_jax.models.interventions import Interventions

Tree = TypeVar("Tree")
BRANCHES = 2


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


def guided_by_branches(
    evaluate: Callable[[Array, Interventions], Float[Array, "two_b s c"]],
    point: Float[Array, "b s c"],
    guidance: Float[AnyArray, " b"],
    interventions: Interventions,
    groups: int,
) -> Float[Array, "b s c"]:
    """v = v₋ + g·(v₊ − v₋) of one evaluation of both branches (classifier-free guidance)."""
    velocity = evaluate(*both_branches((point, interventions), groups))
    split = velocity.reshape(groups, BRANCHES, -1, *point.shape[1:])
    prompted, negative = (split[:, i].reshape(point.shape) for i in range(BRANCHES))
    return negative + guidance[:, None, None] * (prompted - negative)
