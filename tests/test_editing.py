"""Methods against their authors' rules written out plainly, regions against a plain computation, and the
pipeline."""

import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import pytest
from commandline import run as run_command
from conftest import relative
from PIL import Image

from sflow_jax.editing.choosing import Candidate, choose
from sflow_jax.editing.editor import REGION_NOISES
from sflow_jax.editing.methods import METHODS, Method, find_method, passes
from sflow_jax.editing.paths import Start, StraightPath, injection, method_steps
from sflow_jax.editing.regions import (
    REGIONS,
    DrawnRegion,
    RegionRecipe,
    otsu_threshold,
    paste,
    read_region,
    region_of_differences,
    shape_region,
)
from sflow_jax.errors import SettingError
from sflow_jax.pictures.canvas import Canvas
from sflow_jax.pictures.files import fit_picture, to_unit
from sflow_jax.pictures.latents import draw_numbered_noise
from sflow_jax.results import Inversion, Turn
from sflow_jax.sampling.control import LayerControl
from sflow_jax.sampling.schedule import Schedule
from sflow_jax.sampling.solvers import find_solver
from sflow_jax.sampling.steps import Blank, State, advance, inversion_steps

TOKENS, CHANNELS, STEPS = 5, 3, 8
SIGMAS = Schedule().sigmas(STEPS, 64)
LIMIT = 1e-4
RNG = np.random.default_rng(4)
PICTURE, NOISE = (np.float32(RNG.standard_normal((TOKENS, CHANNELS))) for _ in range(2))
NOISES = np.float32(RNG.standard_normal((STEPS, TOKENS, CHANNELS)))
REGION = np.float32([0, 1, 0.5, 1, 0])
FAST = {"progress": False}


def u(z, sigma, prompt):
    """A velocity that is not linear, another one for each prompt (0 the source, 1 the edit)."""
    return np.cos((2 + prompt) * z + prompt) + sigma * z * (0.7 - 0.3 * prompt)


def batch_velocity(z, sigma):
    """As the step rule takes it: row 0 the source, row 1 the edit."""
    z, sigma = np.asarray(z, np.float64), float(sigma)
    return np.float32(np.stack([u(row, sigma, prompt) for prompt, row in enumerate(z)]))


def run(method: Method, path=None, region=None) -> np.ndarray:
    """The edit's latents [s, c] by the step rule."""
    start = Start(PICTURE, path, lambda number: NOISES[number])
    both = lambda x: np.repeat(x[None], 2, axis=0)
    regions = None if region is None else both(region)
    control = LayerControl.none(STEPS, 2, 1)
    state = State(both(start.latents(method)), np.zeros((2, TOKENS, CHANNELS), np.float32), both(PICTURE))
    blank = Blank.of(1, 2, TOKENS, CHANNELS)
    for interval in method_steps(method, start, SIGMAS, control, blank, regions):
        for step in interval:
            state, _ = advance(batch_velocity, state, step)
    return np.asarray(state.latents)[1]


def inverted(solver: str) -> Inversion:
    """The picture's path to noise by the step rule."""
    rule, blank = find_solver(solver), Blank.of(1, 1, TOKENS, CHANNELS)
    heading = (NOISE - PICTURE)[None] if rule.towards_noise else np.zeros((1, TOKENS, CHANNELS), np.float32)
    state, states, points, evaluated = State(PICTURE[None], heading), [PICTURE], [], []
    velocity = lambda z, sigma: np.float32(u(np.asarray(z, np.float64), float(sigma), 0))
    for interval in inversion_steps(SIGMAS, LayerControl.none(STEPS, 1, 1), blank, solver=rule):
        for step in interval:
            state, point = advance(velocity, state, step)
        states.append(np.asarray(state.latents)[0])
        points.append(np.asarray(point)[0])
        evaluated.append(interval[-1].sigma)
    return Inversion(np.stack(states), SIGMAS[::-1].copy(), {}, np.stack(points), np.float32(evaluated))


def settings(name: str, **changes) -> Method:
    """A method in eight steps."""
    return METHODS[name].changed(steps=STEPS, **changes)


# ---- the authors' rules, in float64
# -------------------------------------------------------------------------------


def flowedit(first: int, last_free: int = 0, region=None, lock: int = 0) -> np.ndarray:
    """FlowEdit's loop; last_free: its n_min. With a region, the edit moves only inside it in the first `lock`
    steps."""
    x = PICTURE.astype(np.float64)
    z, free = x.copy(), None
    for i in range(first, STEPS):
        sigma, following = float(SIGMAS[i]), float(SIGMAS[i + 1])
        if i < STEPS - last_free:
            source = (1 - sigma) * x + sigma * NOISES[i]
            edit = z + source - x
            difference = u(edit, sigma, 1) - u(source, sigma, 0)
            share = region[:, None] if region is not None and i < lock else 1.0
            z = z + (following - sigma) * share * difference
        else:
            if free is None:
                free = z + ((1 - sigma) * x + sigma * NOISES[i]) - x
            free = free + (following - sigma) * u(free, sigma, 1)
    return z if free is None else free


def uni_inversion(first_velocity=None) -> tuple[list, list, list]:
    """Uni-Inv: look ahead along the velocity before. States, points and velocities."""
    x, v, states, points, velocities = PICTURE.astype(np.float64), first_velocity, [PICTURE], [], []
    rising = SIGMAS[::-1]
    for now, following in zip(rising[:-1], rising[1:]):
        step = float(following) - float(now)
        v = u(x, float(now), 0) if v is None else v
        point = x + step * v
        v = u(point, float(following), 0)
        x = x + step * v
        states.append(x)
        points.append(point)
        velocities.append(v)
    return states, points, velocities


def euler(z, first: int = 0, prompt: int = 1) -> np.ndarray:
    for i in range(first, STEPS):
        z = z + (float(SIGMAS[i + 1]) - float(SIGMAS[i])) * u(z, float(SIGMAS[i]), prompt)
    return z


def rf_solver(z, sigmas, prompt: int) -> np.ndarray:
    """RF-Solver's second order, by its finite difference of the velocity (as published)."""
    for now, following in zip(sigmas[:-1], sigmas[1:]):
        step = float(following) - float(now)
        v = u(z, float(now), prompt)
        middle = u(z + step / 2 * v, float(now) + step / 2, prompt)
        change = (middle - v) / (step / 2)
        z = z + step * v + step**2 / 2 * change
    return z


def fireflow(z, sigmas, prompt: int) -> np.ndarray:
    """FireFlow: the midpoint's velocity serves the next step's start."""
    v = u(z, float(sigmas[0]), prompt)
    for now, following in zip(sigmas[:-1], sigmas[1:]):
        step = float(following) - float(now)
        v = u(z + step / 2 * v, float(now) + step / 2, prompt)
        z = z + step * v
    return z


def steerflow(alpha: float, mask) -> np.ndarray:
    """SteerFlow's trajectory interpolation, with the mask from outside."""
    states = uni_inversion()[0][::-1]
    z = np.asarray(states[0], np.float64)
    for i in range(STEPS):
        step = float(SIGMAS[i + 1]) - float(SIGMAS[i])
        source = (states[i + 1] - states[i]) / step
        target = u(z, float(SIGMAS[i]), 1)
        cosine = (target * source).sum(-1) / np.linalg.norm(target, axis=-1) / np.linalg.norm(source, axis=-1)
        share = mask[:, None] * (1 - float(SIGMAS[i + 1]) ** alpha) * cosine.mean()
        z = z + step * (source + share * (target - source))
    return z


def dnaedit(first: int, ratio: float) -> np.ndarray:
    """DNAEdit's direct noise alignment by its own variables, and its mobile velocity guidance."""
    x, noise, rising = PICTURE.astype(np.float64), NOISE.astype(np.float64), SIGMAS[::-1].astype(np.float64)
    states, shifts, velocities = [], [], []
    for now, following in zip(rising[:-1], rising[1:]):
        guess = x + (following - now) / (1 - now) * (noise - x)
        v = u(guess, following, 0)
        error = (guess - x) / (following - now) - v
        shift = error * (following - now)
        x, noise = guess - shift, noise - error * (1 - now)
        states.append(x)
        shifts.append(shift)
        velocities.append(v)
    states, shifts, velocities = states[::-1], shifts[::-1], velocities[::-1]
    z, carried = states[first], PICTURE.astype(np.float64)
    for i in range(first, STEPS):
        sigma, step = float(SIGMAS[i]), float(SIGMAS[i + 1]) - float(SIGMAS[i])
        v = u(z + shifts[i], sigma, 1)
        carried = carried + step * (v - velocities[i])
        z = z + step * (ratio * v + (1 - ratio) * (z - carried) / sigma)
    return z


@pytest.mark.parametrize("last_free", [0, 2])
def test_flowedit_is_its_authors_rule(last_free):
    method = settings("flowedit", begin=2 / STEPS, free=last_free / STEPS)
    assert relative(run(method), flowedit(2, last_free)) < LIMIT


def test_coupled_and_decflowedit_move_inside_the_region_until_the_lock_opens():
    for name, lock in (("coupled", round(0.8 * STEPS)), ("decflowedit", STEPS)):
        method = settings(name, begin=1 / STEPS)
        assert relative(run(method, region=REGION), flowedit(1, region=REGION, lock=lock)) < LIMIT
    # Locked to the end, the picture outside stays to the bit.
    np.testing.assert_array_equal(run(method, region=REGION)[[0, 4]], PICTURE[[0, 4]])


def test_uniinv_is_its_authors_rule():
    assert relative(run(settings("uniinv"), inverted("uni-inv")), euler(uni_inversion()[0][-1])) < LIMIT


@pytest.mark.parametrize(
    "name, solver, rule", [("rf-solver", "midpoint", rf_solver), ("fireflow", "fireflow", fireflow)]
)
def test_second_order_methods_are_their_authors_rule(name, solver, rule):
    there = rule(PICTURE.astype(np.float64), SIGMAS[::-1], 0)
    path = inverted(solver)
    assert relative(path.trajectory[-1], there) < LIMIT
    assert relative(run(settings(name), path), rule(there, SIGMAS, 1)) < LIMIT


def test_directedit_evaluates_where_the_inversion_did():
    path = inverted("reference")
    z = path.trajectory[-1].astype(np.float64)
    for i in range(STEPS):
        shift = path.trajectory[STEPS - i - 1] - path.trajectory[STEPS - i]
        z = z + (float(SIGMAS[i + 1]) - float(SIGMAS[i])) * u(z + shift, float(SIGMAS[i]), 1)
    assert relative(run(settings("directedit"), path), z) < LIMIT


@pytest.mark.parametrize("ratio", [1.0, 0.85])
def test_dnaedit_is_its_authors_rule(ratio):
    method = settings("dnaedit", begin=2 / STEPS, ratio=ratio)
    assert relative(run(method, inverted("dnaedit")), dnaedit(2, ratio)) < LIMIT


def test_steerflow_is_its_authors_rule():
    method = settings("steerflow", steering=4.5)
    assert relative(run(method, inverted("uni-inv"), REGION), steerflow(4.5, REGION)) < LIMIT
    assert relative(run(method, inverted("uni-inv")), steerflow(4.5, np.ones(TOKENS))) < LIMIT


def test_sdedit_is_the_noised_picture_denoised():
    method = settings("sdedit", begin=3 / STEPS)
    path = StraightPath.of(PICTURE, NOISE, SIGMAS)
    begin = (1 - float(SIGMAS[3])) * PICTURE.astype(np.float64) + float(SIGMAS[3]) * NOISE
    assert relative(run(method, path), euler(begin, 3)) < LIMIT


def test_what_is_outside_a_region_follows_the_inversion():
    path = inverted("uni-inv")
    locked = run(settings("uniinv", lock_until=1.0), path, REGION)
    assert relative(locked[[0, 4]], PICTURE[[0, 4]]) < LIMIT
    assert relative(locked[[1, 3]], PICTURE[[1, 3]]) > 0.1


def test_injection_has_its_window_and_strengths():
    method = settings("rf-solver", inject_from=0.25, until=0.5, keys=0.25, values=0.75)
    control = injection(method, (1, 3), batch=2, of_model=5)
    where = np.zeros((STEPS, 2, 5), bool)
    where[2:4, :, [1, 3]] = True
    np.testing.assert_array_equal(control.inject, where)
    assert set(control.keys[where]) == {np.float32(0.25)} and set(control.values[where]) == {np.float32(0.75)}
    assert not injection(method, (), 2, 5).inject.any()
    assert not injection(method.changed(until=0.1), (1,), 2, 5).inject.any()


# ---- regions
# ------------------------------------------------------------------------------------------------------

CANVAS = Canvas.of(48, 64, 16)


def plain_region(energy, low, high, cut, grow):
    """Quantiles, a threshold and growth, token by token."""
    a, b = np.quantile(energy, [low, high])
    inside = np.clip((energy - a) / (b - a), 0, 1) >= cut
    rows, columns = energy.shape
    grown = np.zeros_like(inside)
    for r in range(rows):
        for q in range(columns):
            grown[r, q] = inside[max(0, r - grow) : r + grow + 1, max(0, q - grow) : q + grow + 1].any()
    return grown.astype(np.float32)


def test_a_region_is_a_plain_computation_of_differences():
    energy = np.float32(np.random.default_rng(0).gamma(0.6, size=(9, 7)))
    recipe = REGIONS["auto"]
    np.testing.assert_array_equal(region_of_differences(energy, recipe), plain_region(energy, 0.1, 0.98, 0.2, 1))
    inverse = region_of_differences(energy, recipe.changed(grow=0, invert=True))
    np.testing.assert_array_equal(inverse, 1 - plain_region(energy, 0.1, 0.98, 0.2, 0))


def test_soft_regions_are_their_authors_sigmoids():
    energy = np.float32(np.random.default_rng(1).gamma(0.6, size=(12, 12)))
    padded = np.pad(energy, 2, mode="edge")
    smooth = np.mean([padded[i : i + 12, j : j + 12] for i in range(5) for j in range(5)], axis=0)
    a, b = np.quantile(smooth, [0.1, 0.9])
    expected = 1 / (1 + np.exp(-(np.clip((smooth - a) / (b - a), 0, 1) - 0.55) / 0.08))
    assert relative(region_of_differences(energy, REGIONS["decflowedit"]), expected) < 1e-5
    a, b = np.quantile(energy, [0.02, 0.98])
    expected = 1 / (1 + np.exp(-13 * (np.clip((energy - a) / (b - a), 0, 1) - 0.5)))
    unclosed = REGIONS["steerflow"].changed(close=0)
    assert relative(region_of_differences(energy, unclosed), expected) < 1e-5


def test_otsu_parts_two_heaps():
    values = np.concatenate([np.full(30, 0.2), np.full(10, 0.8)]) + np.random.default_rng(2).normal(0, 0.01, 40)
    assert 0.25 < otsu_threshold(values.reshape(8, 5)) < 0.75


def test_equal_velocities_have_no_region():
    assert region_of_differences(np.zeros((4, 4), np.float32), REGIONS["auto"]).sum() == 0


def test_masks_are_read_from_pictures_and_arrays(tmp_path):
    pixels = np.zeros((48, 64), np.uint8)
    pixels[20:24, 36:40] = 255
    expected = np.zeros((3, 4), np.float32)
    expected[1, 2] = 1
    Image.fromarray(pixels).save(tmp_path / "mask.png")
    for mask in (pixels, pixels > 0, pixels / 255, expected, tmp_path / "mask.png", Image.fromarray(pixels)):
        np.testing.assert_array_equal(read_region(mask, CANVAS), expected)
    np.testing.assert_array_equal(read_region(DrawnRegion(pixels, invert=True), CANVAS), 1 - expected)
    grown = read_region(DrawnRegion(pixels, grow=1), CANVAS)
    np.testing.assert_array_equal(grown[:, 1:], 1) and np.testing.assert_array_equal(grown[:, 0], 0)


def test_shapes_grow_close_and_soften():
    dot = np.zeros((7, 7), np.float32)
    dot[3, 3] = 1
    assert shape_region(dot, grow=2).sum() == 25
    ring = shape_region(dot, grow=1) - dot
    assert shape_region(ring, close=3)[3, 3] == 1
    soft = shape_region(shape_region(dot, grow=2), soften=1.0)
    assert 0.9 < soft[3, 3] <= 1 and 0.2 < soft[3, 1] < 0.8


@pytest.mark.parametrize(
    "mask, message",
    [
        (np.zeros((5, 5)), r"tokens \[3, 4\] or of pixels \[48, 64\], found \[5, 5\]"),
        (np.full((3, 4), 1.5), "numbers from 0 to 1"),
        (np.full((3, 4), np.nan), "numbers from 0 to 1"),
        ("missing.png", "no picture at missing.png"),
    ],
)
def test_bad_masks_are_refused(mask, message):
    with pytest.raises(ValueError, match=message):
        read_region(mask, CANVAS)


def test_pasted_pixels_are_the_photos_own():
    photo, edits = np.zeros((48, 64, 3), np.float32), np.ones((2, 48, 64, 3), np.float32)
    regions = np.zeros((2, 3, 4), np.float32)
    regions[0, :, :2], regions[1] = 1, 1
    pasted = paste(edits, photo, regions)
    np.testing.assert_array_equal(pasted[0, :, 32:], 0)
    np.testing.assert_array_equal(pasted[0, :, :16], 1)
    np.testing.assert_array_equal(pasted[1], 1)


# ---- the pipeline
# -------------------------------------------------------------------------------------------------

SHORT = {"steps": 4, "method_options": {"begin": 0.25}, **FAST}
INVERTING = [name for name, method in METHODS.items() if method.inverts]


@pytest.fixture(scope="module")
def photo(photo):
    """Square, so that it is painted in the model's own size."""
    return photo.crop((8, 0, 56, 48))


@pytest.fixture(scope="module")
def inversions(flow, photo):
    """Solver → an inversion, made once."""
    made = {}

    def of(name: str) -> Inversion:
        method = METHODS[name]
        if method.inversion not in made:
            made[method.inversion] = flow.invert(
                photo, "a cat", method=name, nudge=1.0, guidance=1.0, steps=4, **FAST
            )
        return made[method.inversion]

    return of


@pytest.mark.parametrize("name", METHODS)
def test_every_method_edits_a_photo_in_the_passes_that_it_says(name, flow, photo):
    edit = flow.edit("a cat", ["a dog"], image=photo, method=name, steps=4, **FAST)
    assert edit.images.shape == (2, 64, 64, 3) and np.isfinite(edit.images).all()
    assert edit.evaluations == passes(edit.method)
    assert edit.settings.method == name and edit.method.steps == 4
    assert (edit.region is None) == (METHODS[name].region == "none")
    assert relative(edit.latents[1], edit.latents[0]) > 1e-3


@pytest.mark.parametrize("name", INVERTING)
def test_every_inverting_method_works_from_a_stored_inversion(name, flow, photo, inversions, tmp_path):
    options = {"nudge": 1.0, "kv_cache": "off", **FAST}
    inversions(name).save(tmp_path)
    stored = Inversion.load(tmp_path)
    reused = flow.edit("a cat", ["a dog"], inversion=stored, method=name, **options)
    direct = flow.edit("a cat", ["a dog"], image=photo, method=name, steps=4, **options)
    np.testing.assert_array_equal(reused.latents, direct.latents)
    # The source comes back as it was.
    np.testing.assert_array_equal(reused.latents[0], stored.trajectory[0])


@pytest.mark.parametrize("name", ["coupled", "sdedit", "uniinv"])
def test_painted_sources_are_those_of_the_reference(name, flow):
    reference = flow.edit("a cat", ["a dog"], seed=3, **FAST)
    edit = flow.edit("a cat", ["a dog"], seed=3, method=name, steps=4, **FAST)
    assert relative(edit.latents[0], reference.latents[0]) < 1e-4


@pytest.mark.parametrize("name", ["coupled", "decflowedit", "dnaedit", "steerflow"])
def test_chunks_of_edits_equal_all_at_once(name, flow, photo):
    edits = ["a dog", "a hat", "snow"]
    whole, chunked = (
        flow.edit("a cat", edits, image=photo, method=name, edits_at_once=size, kv_cache="off", **SHORT)
        for size in (3, 2)
    )
    assert relative(chunked.latents, whole.latents) < 1e-4
    assert chunked.regions is None or relative(chunked.regions, whole.regions) < 1e-3
    assert chunked.evaluations > whole.evaluations


def test_one_compilation_for_all_methods_of_a_shape(flow, photo, inversions, compilations):
    stored = {name: inversions(name) for name in INVERTING}
    flow.edit("a cat", ["a dog"], image=photo, method="coupled", **SHORT)
    flow.edit("a cat", ["a dog"], inversion=stored["uniinv"], method="uniinv", replay="residual", **FAST)
    before = compilations()
    for name in METHODS:
        source = {"inversion": stored[name]} if name in stored else {"image": photo, "steps": 5}
        flow.edit("a dog", ["a hat"], method=name, seed=7, guidance=2.5, layers=[1], **source, **FAST)
        flow.edit("a dog", ["a hat"], method=name, region=np.eye(4), method_options={"keys": 0.3}, **source, **FAST)
    assert compilations() == before


def test_a_region_is_found_by_both_prompts(flow, photo):
    region = flow.region(photo, "a cat", "a dog", guidance=2.0, seed=5, **FAST)
    edit = flow.edit("a cat", ["a dog"], image=photo, method="coupled", guidance=2.0, seed=5, **SHORT)
    np.testing.assert_array_equal(region, edit.region)
    assert region.shape == (4, 4) and region.dtype == np.float32 and set(np.unique(region)) <= {0, 1}
    # The same by single evaluations.
    latents = np.asarray(flow.encode_image(photo))[0]
    conditioning = flow.encode_prompts(["a cat", "a dog"])
    total = np.zeros(16)
    for sigma in (0.5, 0.7):
        for number in range(4):
            noise = draw_numbered_noise(5, REGION_NOISES + number, 16, 16)
            at = np.repeat(((1 - sigma) * latents + sigma * noise)[None], 2, axis=0)
            velocity = flow.transformer(
                jnp.asarray(at, jnp.float32), conditioning, sigma=jnp.full(2, sigma), guidance=jnp.full(2, 2.0),
                canvas=flow.info.canvas(),
            ).velocity  # fmt: skip
            total += np.linalg.norm(np.asarray(velocity[1] - velocity[0]), axis=-1)
    np.testing.assert_array_equal(region, plain_region(total.reshape(4, 4), 0.1, 0.98, 0.2, 1))


def test_what_is_outside_the_users_region_stays(flow, photo):
    region = np.zeros((4, 4))
    region[:2] = 1
    options = {"image": photo, "region": region, "method_options": {"lock_until": 1.0}, **FAST}
    for name in ("coupled", "uniinv", "sdedit"):
        edit = flow.edit("a cat", ["a dog"], method=name, steps=4, paste=True, **options)
        latents = np.asarray(edit.latents).reshape(2, 4, 4, 16)
        assert relative(latents[1, 2:], latents[0, 2:]) < 1e-5 < relative(latents[1, :2], latents[0, :2])
        np.testing.assert_array_equal(edit.region, region)
    np.testing.assert_array_equal(edit.images[1][32:], to_unit(fit_picture(photo, 64, 64))[32:])


def test_own_methods_and_numbers_are_taken(flow, photo):
    own = find_method("flowedit").changed(steps=4, begin=0.5, guidance=2.0)
    edit = flow.edit("a cat", ["a dog"], image=photo, method=own, **FAST)
    same = flow.edit(
        "a cat",
        ["a dog"],
        image=photo,
        method="flowedit",
        steps=4,
        guidance=2.0,
        method_options={"begin": 0.5},
        **FAST,
    )
    np.testing.assert_array_equal(edit.latents, same.latents)
    assert same.guidance == (1.5, 2.0)
    equal = flow.edit("a cat", ["a dog"], image=photo, method="coupled", guidance=3.0, **SHORT)
    assert equal.guidance == (3.0, 3.0)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"method": "magic"}, "unknown method 'magic'; choose one of reference, coupled"),
        (
            {"method": "coupled", "method_options": {"colour": 1}},
            "method coupled has no setting colour; it has path",
        ),
        ({"method": "coupled", "method_options": {"begin": 1.5}}, "begin must be a share from 0 to 1"),
        ({"method": "coupled", "steps": 1, "method_options": {"begin": 0.9}}, "leaves none of the 1 steps"),
        ({"method": "coupled", "region": np.zeros((3, 3))}, "region must be"),
        ({"method": "coupled", "region": "missing.png"}, "no picture at missing.png"),
        ({"method": "coupled", "region": "outo"}, "unknown region 'outo'; choose one of none, auto"),
        ({"method": "uniinv", "paste": True}, "paste needs a region"),
        ({"method": "uniinv", "nudge": -1.0}, "nudge must be at least 0.01"),
        ({"method": "uniinv", "replay": "lagging"}, "unknown replay"),
    ],
)
def test_bad_settings_of_methods_are_named(options, message, flow, photo):
    with pytest.raises(ValueError, match=message):
        flow.edit("a cat", ["a dog"], image=photo, **{**FAST, **options})


@pytest.mark.parametrize(
    "options, message",
    [
        ({"region": "auto"}, "region needs a picture to keep"),
        ({"method": "coupled", "paste": True}, "paste needs image"),
    ],
)
def test_what_needs_a_photo_says_so(options, message, flow):
    with pytest.raises(SettingError, match=message):
        flow.edit("a cat", ["a dog"], **{**FAST, **options})


def test_inversions_for_methods_that_have_none_are_refused(flow, photo):
    with pytest.raises(SettingError, match="coupled inverts nothing"):
        flow.invert(photo, "a cat", method="coupled", **FAST)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"path": "sideways"}, "unknown path 'sideways'"),
        ({"solver": "heun"}, "unknown solver 'heun'"),
        ({"keys": 1.5}, "keys must be a share"),
        ({"steps": 0}, "leaves none of the 0 steps"),
    ],
)
def test_bad_methods_are_refused_when_made(settings, message):
    with pytest.raises(SettingError, match=message):
        Method(name="own", **settings)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"sigmas": ()}, "sigmas of a region"),
        ({"low": 0.9, "high": 0.1}, "rising quantiles"),
        ({"noises": 0}, "noises of a region must be at least 1"),
    ],
)
def test_bad_recipes_are_refused_when_made(settings, message):
    with pytest.raises(SettingError, match=message):
        RegionRecipe(**settings)


def test_every_number_of_a_method_can_be_written_as_text():
    method = find_method("steerflow")
    texts = {f.name: str(getattr(method, f.name)).lower() for f in dataclasses.fields(method) if f.name != "paper"}
    assert find_method("flowedit").read(texts) == dataclasses.replace(method, paper="FlowEdit, 2412.08629")


# ---- the command line

PROMPTS = ("--prompt", "a cat", "--edit", "a dog", "--edit", "snow")


def test_edit_by_a_method(checkpoint, photo, tmp_path):
    photo.save(tmp_path / "photo.png")
    model = ("edit", "-m", checkpoint, *PROMPTS, "--image", tmp_path / "photo.png", "--steps", 4)
    asked = ("--method", "coupled", "--begin", 0.25, "--set", "source_guidance=1.5", "--grow", 2)
    assert run_command(*model, *asked, "--layers", "vital", "--strength", 0.5, "--keys-only", "--until", 0.5,
                       "-o", tmp_path / "out") == 0  # fmt: skip
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names >= {"edit-2.png", "region-1.png", "region-2.png", "grid.png", "edit.json"}
    record = json.loads((tmp_path / "out" / "edit.json").read_text())
    assert (record["method"], record["region"], record["layers"]) == ("coupled", "auto", [0, 2, 3])
    numbers = record["method_settings"]
    expected = {"begin": 0.25, "source_guidance": 1.5, "keys": 0.5, "values": 0.0, "until": 0.5, "steps": 4}
    assert {name: numbers[name] for name in expected} == expected
    assert record["evaluations"] == 3 * 8 + 3 * 3
    # A region that was saved is a mask for another edit.
    again = (
        "--method",
        "uniinv",
        "--region",
        tmp_path / "out" / "region-1.png",
        "--paste",
        "-o",
        tmp_path / "again",
    )
    assert run_command(*model, *again) == 0
    first, second = (np.asarray(Image.open(tmp_path / name / "region-1.png")) for name in ("out", "again"))
    np.testing.assert_array_equal(first, second)


def test_methods_are_listed_without_a_model(capsys):
    assert run_command("edit", "--list-methods") == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["method", *METHODS, "passes:"]
    assert "FlowEdit, 2412.08629" in lines[3] and " 48 " in lines[3]


def test_invert_for_a_method_then_edit(checkpoint, photo, tmp_path):
    photo.save(tmp_path / "photo.png")
    model = ("-m", checkpoint, "--prompt", "a cat")
    asked = ("--method", "fireflow", "--image", tmp_path / "photo.png", "--steps", 3)
    assert run_command("invert", *model, *asked, "-o", tmp_path / "inverted") == 0
    record = json.loads((tmp_path / "inverted" / "inversion.json").read_text())
    assert (record["solver"], record["nudge"], record["guidance"]) == ("fireflow", 1.0, 1.0)
    stored = ("--inversion", tmp_path / "inverted", "--method", "fireflow", "-o", tmp_path / "out")
    assert run_command("edit", *model, "--edit", "a dog", *stored) == 0
    assert json.loads((tmp_path / "out" / "edit.json").read_text())["steps"] == 3


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("--method", "magic"), "unknown --method 'magic'; choose one of reference, coupled"),
        (("--set", "begin"), "cannot read --set 'begin'"),
        (("--set", "colour=red"), "has no setting colour; it has path"),
        (("--set", "free=much"), "--set free must be a number, found 'much'"),
        (("--set", "ratio=2"), "--set ratio must be a share from 0 to 1"),
        (("--strength", 2), "--strength must be a share from 0 to 1"),
        (("--keys-only", "--values-only"), "give --keys-only or --values-only, not both"),
        (("--grow", 1), "--region auto or a mask picture is needed for grow"),
        (("--region", "nowhere.png"), "no picture at nowhere.png"),
        (("--region", "auto", "--cut", 0.5), "--region needs a picture to keep"),
    ],
)
def test_mistakes_end_with_one_line_and_leave_nothing(arguments, message, checkpoint, tmp_path, capsys):
    assert run_command("edit", "-m", checkpoint, *PROMPTS, *arguments, "-o", tmp_path / "out") == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert lines[-1].startswith("Error: ") and message in lines[-1]
    assert list(tmp_path.iterdir()) == []


def test_an_edit_becomes_the_next_source(flow, checkpoint, photo, tmp_path):
    first = flow.edit("a cat", ["a dog", "snow"], image=photo, method="coupled", **SHORT)
    second = flow.edit("snow", ["a hat"], latents=first.clean_latents[2], method="coupled", **SHORT)
    np.testing.assert_array_equal(second.latents[0], first.latents[2])
    np.testing.assert_allclose(second.images[0], first.images[2], atol=1e-5)
    photo.save(tmp_path / "photo.png")
    common = ("-m", checkpoint, "--method", "coupled", "--steps", 4, "--begin", 0.25)
    source = ("--image", tmp_path / "photo.png")
    assert run_command("edit", *common, *PROMPTS, *source, "-o", tmp_path / "first") == 0
    again = ("--continue", tmp_path / "first" / "edit.json", "--pick", 2, "--edit", "a hat")
    assert run_command("edit", *common, *again, "-o", tmp_path / "second") == 0
    assert json.loads((tmp_path / "second" / "edit.json").read_text())["prompt"] == "snow"
    before, after = (np.asarray(Image.open(tmp_path / name)) for name in ("first/edit-2.png", "second/source.png"))
    np.testing.assert_allclose(np.int16(before), after, atol=1)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("--edit", "a dog"), "--prompt is missing"),
        (("--edit", "a dog", "--continue", "nowhere/edit.json"), "no nowhere/latents.safetensors"),
        (("--edit", "a dog", "--continue", "{first}", "--pick", 7), "--pick must be from 0 to 1"),
        (("--edit", "a dog", "--continue", "{first}", "--image", "photo.png"), "give --continue, or --image"),
        ((*PROMPTS, "--try", "coupled"), "--try takes one --edit, found 2"),
        (("-p", "a cat", "-e", "a dog", "--try", "magic"), "unknown --method 'magic'"),
        (
            ("-p", "a cat", "-e", "a dog", "--try", "coupled", "--method", "uniinv"),
            "give --method or --try, not both",
        ),
        (("-p", "a cat", "-e", "a dog", "--try-guidances", "much"), "--try-guidances must be numbers"),
        (("-p", "a cat", "-e", "a dog", "--choose"), "--choose picks among candidates"),
    ],
)
def test_mistakes_in_turns_and_trials_end_with_one_line(arguments, message, checkpoint, tmp_path, capsys):
    Turn(np.zeros((2, 16, 16), np.float32), ["a cat", "a dog"], 64, 64).save(tmp_path)
    filled = [str(part).format(first=tmp_path / "edit.json") for part in arguments]
    assert run_command("edit", "-m", checkpoint, *filled, "-o", tmp_path / "out") == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert lines[-1].startswith("Error: ") and message in lines[-1]
    assert [path.name for path in tmp_path.iterdir()] == ["latents.safetensors"]


def test_settings_are_tried_and_one_is_chosen(flow, photo):
    tried = flow.try_edits(
        "a cat", "a dog", image=photo, methods=["coupled", "rf-solver"], guidances=[1.5, 3.0], strengths=[0.5, 1.0],
        **FAST,
    )  # fmt: skip
    assert [candidate.name for candidate in tried.candidates] == [
        "coupled, guidance 1.5", "coupled, guidance 3",
        "rf-solver, guidance 1.5, strength 0.5", "rf-solver, guidance 1.5, strength 1",
        "rf-solver, guidance 3, strength 0.5", "rf-solver, guidance 3, strength 1",
    ]  # fmt: skip
    one = flow.edit(
        "a cat", ["a dog"], image=photo, method="rf-solver", guidance=1.5, method_options={"values": 0.5}, **FAST
    )
    assert relative(tried.candidates[2].latents, one.latents[1]) < 1e-4
    assert tried.chosen == choose(tried.candidates) and tried.evaluations > 0


def candidate(follows: float, inside: float, outside: float) -> Candidate:
    return Candidate("", np.zeros((4, 4, 3), np.float32), np.zeros((2, 2), np.float32), follows, inside, outside)


def test_what_follows_well_enough_and_keeps_most_is_chosen():
    some = [candidate(0.4, 15.0, 20.0), candidate(0.3, 18.0, 31.0), candidate(0.01, 60.0, 60.0)]
    assert choose(some) == 1
    assert [one.remark for one in (*some, candidate(0.4, 5.0, 10.0))] == [
        "", "", "nothing changed", "everything changed",
    ]  # fmt: skip
    # Nothing follows: the least bad one.
    assert choose([candidate(-0.3, 40.0, 50.0), candidate(-0.1, 40.0, 40.0)]) == 1


def test_trials_on_the_command_line(checkpoint, photo, tmp_path, capsys):
    photo.save(tmp_path / "photo.png")
    asked = ("--image", tmp_path / "photo.png", "--try", "coupled,sdedit", "--choose", "-o", tmp_path / "out")
    assert run_command("edit", "-m", checkpoint, "-p", "a cat", "-e", "a dog", *asked) == 0
    record = json.loads((tmp_path / "out" / "edit.json").read_text())
    assert [one["name"].split(",")[0] for one in record["candidates"]] == ["coupled", "sdedit"]
    (chosen,) = [i for i, one in enumerate(record["candidates"], 1) if one["chosen"]]
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {
        "candidate-1.png",
        "candidate-2.png",
        "candidates.png",
        "source.png",
        "edit-1.png",
        "edit.json",
    }
    first, second = (tmp_path / "out" / name for name in (f"candidate-{chosen}.png", "edit-1.png"))
    assert first.read_bytes() == second.read_bytes()
    assert "follows" in capsys.readouterr().out
