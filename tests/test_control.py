"""Masks say what their constructors were asked."""

import dataclasses

import numpy as np
import pytest

from sflow_jax.families.flux1 import FLUX_DEV_CODE, FLUX_DEV_PAPER
from sflow_jax.sampling.control import LayerControl, check_layers, parse_layers

STEPS, BATCH, LAYERS = 4, 3, 5
SHAPE = (STEPS, BATCH, LAYERS)
WHERE = {"layers": [1, 3], "steps": [0, 2], "elements": [2]}
# Field → who sets it, its arguments, and the values at `WHERE` and elsewhere.
SETTERS = {
    "keys": (LayerControl.injecting, {"keys": 0.3}, 0.3, 1.0),
    "values": (LayerControl.injecting, {"values": 0.7}, 0.7, 1.0),
    "attention": (LayerControl.scaling, {"attention": 0.0}, 0.0, 1.0),
    "mlp": (LayerControl.scaling, {"mlp": 0.5}, 0.5, 1.0),
    "text": (LayerControl.scaling, {"text": 2.0}, 2.0, 1.0),
    "heads": (LayerControl.scaling_heads, {"scales": [0.0, 1.5]}, [0.0, 1.5], [1.0, 1.0]),
    "extend": (LayerControl.extending, {"weight": 0.4}, 0.4, 0.0),
    "key_shift": (LayerControl.shifting_keys, {"rows": 3.0, "columns": -2.0}, [3.0, -2.0], [0.0, 0.0]),
}
CONSTRUCTORS = {
    "injecting": lambda control, **where: control.injecting(**where),
    "bypassing": lambda control, **where: control.bypassing(**where),
    "scaling": lambda control, **where: control.scaling(**where, attention=0.5),
    "scaling_heads": lambda control, **where: control.scaling_heads(**where, scales=[0.5, 1.0]),
    "shifting_keys": lambda control, **where: control.shifting_keys(**where, rows=1.0, columns=2.0),
}


def marked() -> np.ndarray:
    """What `WHERE` names."""
    mask = np.zeros(SHAPE, bool)
    mask[np.ix_(WHERE["steps"], WHERE["elements"], WHERE["layers"])] = True
    return mask


def fields(control: LayerControl) -> dict:
    """Copies of all arrays, by name."""
    return {field.name: np.copy(getattr(control, field.name)) for field in dataclasses.fields(control)}


def test_marks_exactly_what_was_asked():
    control = LayerControl.none(5, 3, 7).injecting([1, 6], steps=[0, 4]).bypassing([2], elements=[1])
    assert {tuple(i) for i in np.argwhere(control.inject)} == {
        (step, element, layer) for step in (0, 4) for element in range(3) for layer in (1, 6)
    }
    assert {tuple(i) for i in np.argwhere(control.bypass)} == {(step, 1, 2) for step in range(5)}


def test_marks_add_up_and_leave_the_original_alone():
    first = LayerControl.none(2, 2, 3).injecting([0])
    second = first.injecting([2], steps=slice(1, None))
    assert first.inject.sum() == 4 and second.inject.sum() == 6


@pytest.mark.parametrize("name", SETTERS)
def test_numbers_stand_where_they_were_asked(name):
    setter, arguments, there, elsewhere = SETTERS[name]
    array = getattr(setter(LayerControl.none(*SHAPE), **WHERE, **arguments), name)
    assert array.dtype == np.float32
    assert array.shape == (*SHAPE, *np.shape(there))
    np.testing.assert_array_equal(array[marked()], np.broadcast_to(np.float32(there), array[marked()].shape))
    np.testing.assert_array_equal(array[~marked()], np.broadcast_to(np.float32(elsewhere), array[~marked()].shape))


@pytest.mark.parametrize("name", SETTERS)
def test_what_was_not_asked_stays_absent(name):
    setter, arguments, *_ = SETTERS[name]
    before = LayerControl.none(*SHAPE)
    after = setter(before, **WHERE, **arguments)
    group = {"keys", "values"} if name in ("keys", "values") else {name}
    given = {n for n in SETTERS if getattr(after, n) is not None}
    assert given == group and after.region is None
    np.testing.assert_array_equal(after.inject, marked() if "keys" in group else before.inject)
    assert not after.bypass.any()


@pytest.mark.parametrize("name", SETTERS)
def test_numbers_add_up_and_the_last_one_counts(name):
    setter, arguments, there, _ = SETTERS[name]
    other = {key: 0.25 if np.isscalar(value) else [0.25, 0.25] for key, value in arguments.items()}
    first = setter(LayerControl.none(*SHAPE), [0, 1], **other)
    kept = fields(first)
    second = getattr(setter(first, [1, 2], **arguments), name)
    np.testing.assert_array_equal(second[:, :, 0], np.full_like(second[:, :, 0], 0.25))
    np.testing.assert_array_equal(second[:, :, 1:3], np.broadcast_to(np.float32(there), second[:, :, 1:3].shape))
    for field, array in fields(first).items():
        np.testing.assert_array_equal(array, kept[field])


def test_whole_injection_needs_no_strengths_and_replaces_them():
    assert LayerControl.none(*SHAPE).injecting([1]).keys is None
    control = LayerControl.none(*SHAPE).injecting([1, 2], keys=0.3, values=0.7).injecting([2])
    inject = control.interventions(0).layers.inject
    np.testing.assert_array_equal(inject[0], np.float32([[0, 0], [0.3, 0.7], [1, 1], [0, 0], [0, 0]]))


def test_a_region_takes_the_rest_whole():
    region = np.random.default_rng(0).uniform(size=(BATCH, 7))
    before = LayerControl.none(*SHAPE)
    after = before.within(region, inside=0.25)
    assert before.region is None and after.region.dtype == np.float32
    np.testing.assert_allclose(after.region, 1 - 0.75 * region, rtol=1e-6)
    np.testing.assert_allclose(before.within(region).region, 1 - region, rtol=1e-5)


def everything() -> LayerControl:
    """Something in every field, at some step, element and layer."""
    control = LayerControl.none(*SHAPE).bypassing([0], steps=[1], elements=[0])
    control = control.within(np.eye(BATCH, 7), inside=0.5)
    for setter, arguments, *_ in SETTERS.values():
        control = setter(control, **WHERE, **arguments)
    return control


@pytest.mark.parametrize("step", range(STEPS))
def test_every_step_has_its_own_interventions(step):
    control = everything()
    made = control.interventions(step)
    layers = {name: getattr(made.layers, name) for name in ("attention", "mlp", "text", "heads", "key_shift")}
    for name, array in layers.items():
        np.testing.assert_array_equal(array, getattr(control, name)[step])
    np.testing.assert_array_equal(made.layers.gate, np.float32(~control.bypass[step]))
    inject = np.where(control.inject[step][..., None], [control.keys[0, 2, 1], control.values[0, 2, 1]], 0)
    np.testing.assert_array_equal(made.layers.inject, np.float32(inject))
    np.testing.assert_array_equal(made.region, control.region)
    arrays = [*layers.values(), made.layers.gate, made.layers.inject, made.region]
    assert {array.dtype for array in arrays} == {np.dtype(np.float32)}


def test_a_control_that_does_nothing_gives_no_more_than_gates_and_no_injection():
    made = LayerControl.none(*SHAPE).interventions(0)
    given = {n for n, array in vars(made.layers).items() if array is not None}
    assert given == {"gate", "inject"} and made.region is None
    assert (made.layers.gate == 1).all() and made.layers.gate.shape == SHAPE[1:]
    assert (made.layers.inject == 0).all() and made.layers.inject.shape == (*SHAPE[1:], 2)


@pytest.mark.parametrize("build", CONSTRUCTORS)
@pytest.mark.parametrize("layers", [[5], [-1], [0, 99]])
def test_unknown_layers_are_named(build, layers):
    with pytest.raises(ValueError, match=f"no layer .*{layers[-1]}.*0 to 4"):
        CONSTRUCTORS[build](LayerControl.none(*SHAPE), layers=layers)


@pytest.mark.parametrize("build", CONSTRUCTORS)
@pytest.mark.parametrize("options, name", [({"steps": [4]}, "step"), ({"elements": [5]}, "batch element")])
def test_unknown_steps_and_elements_are_named(build, options, name):
    with pytest.raises(ValueError, match=name):
        CONSTRUCTORS[build](LayerControl.none(*SHAPE), layers=[0], **options)


@pytest.mark.parametrize(
    "text, layers", [("0,2,3-5", (0, 2, 3, 4, 5)), (" 1 , 1-2", (1, 1, 2)), ("vital", "vital")]
)
def test_layers_are_read_from_text(text, layers):
    assert parse_layers(text) == layers


@pytest.mark.parametrize("text", ["a", "1.5", "1-2-3"])
def test_text_that_names_no_layers_is_refused(text):
    with pytest.raises(ValueError, match="cannot read layers"):
        parse_layers(text)


def test_layers_must_be_whole_numbers():
    with pytest.raises(ValueError, match="whole numbers"):
        check_layers([1.5], 3)


def test_published_sets_differ_by_layer_2_alone():
    assert set(FLUX_DEV_PAPER) - set(FLUX_DEV_CODE) == {2}


@pytest.mark.parametrize("shares", [{"keys": -0.1}, {"values": 1.5}, {"keys": float("nan")}])
def test_shares_beyond_the_sources_are_refused(shares):
    with pytest.raises(ValueError, match="shares from 0 to 1"):
        LayerControl.none(2, 2, 3).injecting([0], **shares)
