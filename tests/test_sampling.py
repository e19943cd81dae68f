"""Schedules and the Euler step, against diffusers and against theory."""

import numpy as np
import published
import pytest
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.flux.pipeline_flux import calculate_shift

from sflow_jax.sampling.control import LayerControl
from sflow_jax.sampling.schedule import Schedule
from sflow_jax.sampling.steps import advance, denoising_steps, inversion_steps

CONTROL = LayerControl.none(64, 1, 5)


def solve(velocity, latents, steps):
    states = [latents]
    for step in steps:
        states.append(np.asarray(advance(velocity, states[-1], step)))
    return states


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
    *_, end = solve(lambda z, sigma: velocity, start, denoising_steps(sigmas, CONTROL, np.zeros_like(start)))
    np.testing.assert_allclose(end, start - velocity, rtol=1e-6)


def test_euler_converges_with_order_one():
    """u = z has the solution z(σ) = z(1)·exp(σ − 1)."""
    start = np.ones((1, 1, 1), np.float32)
    errors = []
    for steps in (16, 32, 64):
        sigmas = np.linspace(1, 0, steps + 1, dtype=np.float32)
        *_, end = solve(lambda z, sigma: z, start, denoising_steps(sigmas, CONTROL, np.zeros_like(start)))
        errors.append(abs(end.item() - np.exp(-1)))
    orders = np.log2(np.array(errors[:-1]) / errors[1:])
    np.testing.assert_allclose(orders, 1, atol=0.06)


def test_inversion_evaluates_at_the_destination_sigma():
    sigmas = Schedule().sigmas(5, 64)
    seen = []
    start = np.zeros((1, 1, 1), np.float32)
    solve(lambda z, sigma: seen.append(float(sigma)) or z, start, inversion_steps(sigmas, CONTROL, start))
    np.testing.assert_array_equal(seen, sigmas[-2::-1])


def test_inversion_undoes_denoising_when_the_velocity_only_depends_on_sigma():
    sigmas = Schedule().sigmas(9, 64)
    start = np.float32([[[0.5, 2.0]]])
    velocity = lambda z, sigma: np.float32(1 + sigma) * np.ones_like(start)
    states = solve(velocity, start, denoising_steps(sigmas, CONTROL, np.zeros_like(start)))
    back = solve(velocity, states[-1], inversion_steps(sigmas, CONTROL, np.zeros_like(start)))
    np.testing.assert_allclose(np.stack(back), np.stack(states[::-1]), atol=1e-5)


def nonlinear(z, sigma):
    return np.float32(np.cos(3 * z) + sigma * z)


def inverted(picture, sigmas):
    nothing = np.zeros((1, *picture.shape), np.float32)
    return np.concatenate(solve(nonlinear, picture[None], inversion_steps(sigmas, CONTROL, nothing)))


@pytest.mark.parametrize("replay", ["aligned", "residual"])
def test_the_source_follows_its_inversion_exactly(replay):
    sigmas = Schedule().sigmas(6, 64)
    picture = np.float32([[0.3, -0.7], [1.1, 0.2]])
    stored = inverted(picture, sigmas)
    nothing = np.zeros((1, *picture.shape), np.float32)
    start = np.repeat(stored[-1:], 3, axis=0)
    states = solve(nonlinear, start, denoising_steps(sigmas, CONTROL, nothing, stored, replay))
    np.testing.assert_array_equal(np.stack(states)[:, 0], stored[::-1])


def test_residual_replay_reconstructs_and_aligned_replay_leaves_edits_to_euler():
    sigmas = Schedule().sigmas(6, 64)
    picture = np.float32([[0.3, -0.7], [1.1, 0.2]])
    stored = inverted(picture, sigmas)
    nothing = np.zeros((1, *picture.shape), np.float32)
    start = np.repeat(stored[-1:], 2, axis=0)
    ends = {
        replay: solve(nonlinear, start, denoising_steps(sigmas, CONTROL, nothing, stored, replay))[-1]
        for replay in ("aligned", "residual", "none")
    }
    np.testing.assert_allclose(ends["residual"][1], picture, atol=1e-5)
    np.testing.assert_allclose(ends["aligned"][1], ends["none"][1])
    assert np.abs(ends["none"][1] - picture).max() > 1e-2


def test_unknown_replay_is_refused():
    with pytest.raises(ValueError, match="replay"):
        list(denoising_steps(np.float32([1, 0]), CONTROL, np.zeros((1, 1, 1), np.float32), replay="lagging"))
