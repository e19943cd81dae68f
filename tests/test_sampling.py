"""Schedules, the step rule and every solver, against diffusers and against theory."""

import numpy as np
import published
import pytest
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.flux.pipeline_flux import calculate_shift

from sflow_jax.models.interventions import NOTHING
from sflow_jax.results import Inversion
from sflow_jax.sampling.control import LayerControl
from sflow_jax.sampling.schedule import Schedule
from sflow_jax.sampling.solvers import SOLVERS, Evaluation, find_solver
from sflow_jax.sampling.steps import Blank, State, advance, denoising_steps, inversion_steps

CONTROL = LayerControl.none(128, 1, 5)


def blank(latents, groups=1):
    return Blank.of(groups, *latents.shape)


def solve(velocity, latents, intervals):
    """States at the ends of all intervals, the first before them, and where each last velocity was evaluated."""
    state, states, points = State(latents, np.zeros_like(latents)), [latents], []
    for steps in intervals:
        for step in steps:
            state, point = advance(velocity, state, step)
        states.append(np.asarray(state.latents))
        points.append(np.asarray(point))
    return states, points


@pytest.mark.parametrize("family", ["dev", "schnell"])
@pytest.mark.parametrize("steps, tokens", [(1, 256), (4, 1024), (28, 4096), (50, 4096), (15, 777)])
def test_sigmas_agree_with_diffusers(family, steps, tokens):
    config = published.SCHEDULERS[family]
    scheduler = FlowMatchEulerDiscreteScheduler(**config)
    mu = calculate_shift(tokens, 256, 4096, 0.5, 1.15)
    scheduler.set_timesteps(sigmas=np.linspace(1, 1 / steps, steps), mu=mu)
    ours = Schedule.from_hf(dict(scheduler.config)).sigmas(steps, tokens)
    np.testing.assert_allclose(ours, scheduler.sigmas.numpy(), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    "option", [{"use_karras_sigmas": True}, {"shift_terminal": 0.1}, {"time_shift_type": "linear"}]
)
def test_schedules_of_other_models_are_refused(option):
    with pytest.raises(ValueError, match=next(iter(option))):
        Schedule.from_hf(option)


def test_no_steps_are_refused():
    with pytest.raises(ValueError, match="steps must be at least 1"):
        Schedule().sigmas(0, 64)


def test_euler_is_exact_for_a_constant_velocity():
    sigmas = Schedule().sigmas(7, 64)
    start = np.float32([[[3.0, -2.0]]])
    velocity = np.float32([[[1.5, 0.25]]])
    states, _ = solve(lambda z, sigma: velocity, start, denoising_steps(sigmas, CONTROL, blank(start)))
    np.testing.assert_allclose(states[-1], start - velocity, rtol=1e-6)


@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize("direction", ["to the picture", "to the noise"])
def test_every_solver_converges_with_its_order(name, direction):
    """u = σ·z has the solution z(σ) = z(1)·exp((σ² − 1)/2); float64, so that rounding does not hide an order."""
    solver, start, errors = find_solver(name), np.ones((1, 1, 1)), []
    for steps in (16, 32, 64):
        sigmas = np.linspace(1, 0, steps + 1)
        way = denoising_steps if direction == "to the picture" else inversion_steps
        states, _ = solve64(start, way(sigmas, CONTROL, blank(start), solver=solver))
        exact = np.exp(-0.5) if direction == "to the picture" else np.exp(0.5)
        errors.append(abs(states[-1].item() - exact))
    orders = np.log2(np.array(errors[:-1]) / errors[1:])
    np.testing.assert_allclose(orders, solver.order, atol=0.12)


def solve64(latents, intervals):
    """The step rule in float64, written out plainly, for one group without a source."""
    z, p, states = latents, np.zeros_like(latents), [latents]
    for steps in intervals:
        for step in steps:
            v = float(step.sigma) * (z + float(step.look_ahead) * p)
            z, p = z + float(step.scale) * v, v
        states.append(z)
    return states, None


@pytest.mark.parametrize(
    "name, calls", [("euler", 5), ("reference", 5), ("midpoint", 10), ("fireflow", 6), ("uni-inv", 6)]
)
def test_solvers_call_the_network_as_often_as_published(name, calls):
    start = np.ones((1, 1, 1), np.float32)
    intervals = denoising_steps(np.linspace(1, 0, 6, dtype=np.float32), CONTROL, blank(start), solver=SOLVERS[name])
    assert sum(map(len, intervals)) == calls


def test_an_unknown_solver_is_refused():
    with pytest.raises(ValueError, match="unknown solver 'heun'; choose one of euler"):
        find_solver("heun")


def test_inversion_evaluates_at_the_destination_sigma():
    sigmas = Schedule().sigmas(5, 64)
    seen = []
    start = np.zeros((1, 1, 1), np.float32)
    solve(lambda z, sigma: seen.append(float(sigma)) or z, start, inversion_steps(sigmas, CONTROL, blank(start)))
    np.testing.assert_array_equal(seen, sigmas[-2::-1])


def test_inversion_undoes_denoising_when_the_velocity_only_depends_on_sigma():
    sigmas = Schedule().sigmas(9, 64)
    start = np.float32([[[0.5, 2.0]]])
    velocity = lambda z, sigma: np.float32(1 + sigma) * np.ones_like(start)
    states, _ = solve(velocity, start, denoising_steps(sigmas, CONTROL, blank(start)))
    back, _ = solve(velocity, states[-1], inversion_steps(sigmas, CONTROL, blank(start)))
    np.testing.assert_allclose(np.stack(back), np.stack(states[::-1]), atol=1e-5)


def nonlinear(z, sigma):
    return np.float32(np.cos(3 * z) + sigma * z)


def inverted(picture, sigmas, solver="reference") -> Inversion:
    intervals = list(inversion_steps(sigmas, CONTROL, blank(picture[None]), solver=SOLVERS[solver]))
    states, points = solve(nonlinear, picture[None], intervals)
    evaluated = np.float32([interval[-1].sigma for interval in intervals])
    return Inversion(np.concatenate(states), sigmas[::-1], {}, np.concatenate(points), evaluated)


PICTURE = np.float32([[0.3, -0.7], [1.1, 0.2]])


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("replay", ["aligned", "residual"])
def test_the_source_follows_its_inversion_exactly(replay, solver):
    sigmas = Schedule().sigmas(6, 64)
    stored = inverted(PICTURE, sigmas, solver)
    start = np.repeat(stored.trajectory[-1:], 3, axis=0)
    states, _ = solve(nonlinear, start, denoising_steps(sigmas, CONTROL, blank(start), path=stored, replay=replay))
    np.testing.assert_array_equal(np.stack(states)[:, 0], stored.trajectory[::-1])


@pytest.mark.parametrize("solver", SOLVERS)
def test_exact_replay_reconstructs_whatever_rule_inverted(solver):
    """Another member with the source's own velocity comes back to the picture; running free it does not."""
    sigmas = Schedule().sigmas(6, 64)
    stored = inverted(PICTURE, sigmas, solver)
    start = np.repeat(stored.trajectory[-1:], 2, axis=0)
    ends = {}
    for replay in ("residual", "aligned", "none"):
        intervals = denoising_steps(sigmas, CONTROL, blank(start), path=stored, replay=replay)
        ends[replay] = solve(nonlinear, start, intervals)[0][-1]
    assert np.linalg.norm(ends["residual"][1] - PICTURE) <= 1e-5 * np.linalg.norm(PICTURE)
    np.testing.assert_allclose(ends["aligned"][1], ends["none"][1])
    assert np.abs(ends["none"][1] - PICTURE).max() > 1e-2


def test_an_inversion_without_points_is_the_references():
    sigmas = Schedule().sigmas(6, 64)
    stored = inverted(PICTURE, sigmas)
    old = Inversion(stored.trajectory, stored.sigmas, {})
    np.testing.assert_array_equal(old.points, stored.points)
    np.testing.assert_array_equal(old.evaluated, stored.evaluated)


def test_unknown_replay_is_refused():
    with pytest.raises(ValueError, match="replay"):
        list(denoising_steps(np.float32([1, 0]), CONTROL, blank(np.zeros((1, 1, 1))), replay="lagging"))


def test_the_whole_rule_is_what_it_says():
    """Every term at once, against the formula written out: two groups of three members."""
    rng = np.random.default_rng(0)
    z, p = (rng.standard_normal((6, 4, 2)).astype(np.float32) for _ in range(2))
    offset, drift, source = (rng.standard_normal((2, 4, 2)).astype(np.float32) for _ in range(3))
    weight = rng.uniform(size=(6, 4, 1)).astype(np.float32)
    a, sigma, c, rho, zeta = 0.3, 0.7, -0.2, 1.0, 0.05
    step = Blank.of(2, *z.shape).step(
        Evaluation(a, sigma, c), NOTHING, coupling=rho, pull=zeta, offset=offset, drift=drift, weight=weight,
        source=source, replay=True,
    )  # fmt: skip
    state, point = advance(nonlinear, State(z, p), step)
    first = np.array([0, 0, 0, 3, 3, 3])
    at = z + a * p + offset[first // 3]
    v = nonlinear(at, sigma)
    moved = z + (1 - weight) * drift[first // 3] - zeta * (z - z[first]) + c * weight * (v - rho * v[first])
    moved[[0, 3]] = source
    np.testing.assert_allclose(point, at, atol=1e-6)
    np.testing.assert_allclose(state.latents, moved, atol=1e-6)
    np.testing.assert_allclose(state.velocity, v, atol=1e-6)
