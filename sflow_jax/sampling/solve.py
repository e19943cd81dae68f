"""The compiled step, and the loop that takes it.

Everything that may change between calls of one shape is an argument, so each shape compiles once.
"""

import dataclasses
import functools
import logging
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, Sharding
from jaxtyping import Array, Float

from sflow_jax.arrays import AnyArray
from sflow_jax.machine.meshes import batch_sharding, on_this_host
from sflow_jax.models.conditioning import Conditioning
from sflow_jax.models.interventions import Interventions
from sflow_jax.models.layers import parameter_dtype
from sflow_jax.models.layout import ATTENTION, Layout
from sflow_jax.models.lending import LENT
from sflow_jax.models.reuse import REUSED, Asked, Reuse
from sflow_jax.pictures.canvas import Canvas
from sflow_jax.sampling.guidance import (
    BRANCHES,
    away_from_skipped,
    both_branches,
    branch_velocities,
    guide,
    one_branch,
)
from sflow_jax.sampling.steps import Blank, State, Step, advance

logger = logging.getLogger(__name__)


@functools.partial(jax.jit, static_argnames=("canvas", "sharding", "kernel", "branches"), donate_argnames="state")
def take_step(
    transformer: nnx.Module,
    conditioning: Conditioning,
    guidance: Float[AnyArray, " b"],
    state: State,
    step: Step,
    *,
    canvas: Canvas,
    sharding: Sharding,
    kernel: str,
    branches: bool = False,
) -> tuple[State, Float[Array, "b s c"], Float[Array, ""], dict[str, Array]]:
    """One step of generation, inversion or editing; the number of groups is `step.offset`'s.

    The state given is used up. Returns the new one, the point where the velocity was evaluated, one number to
    wait for when the state is used up in turn, and what was captured [n, b, …]: where the tokens that the step
    watches attend, in the prompt's branch; nothing if it watches none; and, where the step records it, what sources
    lend in all branches. branches: conditioning has two rows an element, see `sampling.guidance`.
    """
    batch, groups = state.latents.shape[0], step.offset.shape[0]
    layout = Layout(members=batch // groups, kernel=kernel, sharding=sharding)
    asked = {ATTENTION: step.interventions.watched is not None, LENT: step.lent is not None and step.lent.recording}
    watching = dataclasses.replace(layout, capture=tuple(name for name, wanted in asked.items() if wanted))
    captured: dict[str, Array] = {}
    inputs = (conditioning, both_branches(guidance, groups) if branches else guidance)
    prompted_inputs = (one_branch(conditioning, groups), guidance) if branches else inputs
    cache = None if state.reuse is None else Asked(state.reuse, step.least_change)

    def evaluate(
        point: Array,
        interventions: Interventions,
        sigma: Array,
        inputs: tuple = inputs,
        layout: Layout = watching,
        cache: Asked | None = cache,
    ) -> Array:
        output = transformer(
            point,
            inputs[0],
            sigma=jnp.broadcast_to(sigma, (len(point),)),
            guidance=inputs[1],
            canvas=canvas,
            # Both branches have their own part of them already.
            interventions=dataclasses.replace(interventions, lent=step.lent, cache=cache),
            layout=layout,
        )
        captured.update(output.captured)
        return output.velocity

    def velocity(point: Array, sigma: Array) -> Array:
        at_sigma, plain = (
            functools.partial(evaluate, sigma=sigma),
            dataclasses.replace(step.interventions, skip=None),
        )
        if branches:
            prompted, negative = branch_velocities(at_sigma, point, plain, groups)
            guided = guide(prompted, negative, guidance)
        else:
            guided = prompted = at_sigma(point, plain)
        if step.interventions.skip is None:
            return guided
        without = functools.partial(at_sigma, point, inputs=prompted_inputs, layout=layout, cache=None)
        return guided + away_from_skipped(without, prompted, step.interventions)

    moved, point = advance(velocity, state, step)
    moved = moved._replace(reuse=captured.pop(REUSED, state.reuse))
    moved, point = jax.lax.with_sharding_constraint((moved, point), sharding)
    if branches:
        of_prompt = jax.vmap(functools.partial(one_branch, groups=groups))
        captured = {name: x if name == LENT else of_prompt(x) for name, x in captured.items()}
    return moved, point, moved.latents[0, 0, 0], captured


class Reached(NamedTuple):
    """Where a solve is after an interval. point: where the last velocity was evaluated. velocity: that one.

    captured: of the last evaluation, see `take_step`; unlike the rest it is not used up.
    """

    latents: Float[Array, "b s c"]
    point: Float[Array, "b s c"]
    velocity: Float[Array, "b s c"]
    captured: dict[str, Array]


class Solve:
    """A transformer with all that stays the same along one path from noise to picture, or back."""

    def __init__(
        self,
        transformer: nnx.Module,
        canvas: Canvas,
        conditioning: Conditioning,
        guidance: Float[np.ndarray, " b"],
        *,
        channels: int,
        groups: int,
        mesh: Mesh | None,
        kernel: str,
        step_cache: float = 0.0,
        reused_width: int | None = None,
    ):
        """conditioning: one row an element, or two where guidance has branches. step_cache: least change, see
        `models.reuse`; 0 is off. reused_width: of the family, which it needs."""
        batch = len(guidance)
        self.sharding = batch_sharding(mesh, groups)
        # On the host like all arrays of a step: a committed one would compile another program.
        self.blank = Blank.of(groups, batch, canvas.tokens, channels)
        self.step_cache = step_cache
        self.reuse = None
        if step_cache:
            shape = (len(conditioning), canvas.tokens, reused_width)
            self.reuse = functools.partial(Reuse.blank, shape, parameter_dtype(transformer))
        self.step = functools.partial(
            take_step,
            transformer,
            jax.device_put(conditioning, self.sharding),
            guidance,
            canvas=canvas,
            sharding=self.sharding,
            kernel=kernel,
            branches=len(conditioning) == BRANCHES * batch,
        )

    def __call__(
        self,
        latents: Float[AnyArray, "b s c"],
        intervals: Iterable[list[Step]],
        *,
        velocity: Float[AnyArray, "b s c"] | None = None,
        reference: Float[AnyArray, "b s c"] | None = None,
        each: Callable[[Reached], None] | None = None,
    ) -> Iterator[Reached]:
        """Yield where every interval ends; the host prepares one step while the device computes another.

        The next interval uses up what was yielded: copy what is to be kept. velocity, reference: at the start, see
        `State`; zeros by default. each: sees the end of every step, of which an interval may have several.
        """
        zeros = np.zeros(latents.shape, np.float32)
        start = State(latents, *(zeros if x is None else x for x in (velocity, reference)))
        if self.reuse is not None:
            start = start._replace(reuse=self.reuse())
        state, done, before, evaluations = jax.device_put(start, self.sharding, may_alias=False), None, None, 0
        for steps in intervals:
            for step in steps:
                # What layers added under other interventions is of no use.
                if self.step_cache and equal_on_host(before, step.interventions):
                    step = step._replace(least_change=np.float32(self.step_cache))
                before, evaluations = step.interventions, evaluations + 1
                state, point, following, captured = self.step(state, step)
                # Waiting for the step before keeps progress honest without ever idling the device.
                jax.block_until_ready(done)
                done = following
                reached = Reached(state.latents, point, state.velocity, captured)
                if each is not None:
                    each(reached)
            yield reached
        jax.block_until_ready(done)
        if self.step_cache and evaluations:
            count = int(on_this_host(state.reuse.count)[0])
            logger.info("step caching: %d of %d evaluations left layers out", count, evaluations)


def equal_on_host(one: Interventions | None, other: Interventions) -> bool:
    """Whether the same is done in two steps."""
    (leaves, tree), (others, other_tree) = jax.tree.flatten(one), jax.tree.flatten(other)
    return tree == other_tree and all(map(np.array_equal, leaves, others))
