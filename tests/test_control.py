"""Masks say what their constructors were asked."""

import numpy as np
import pytest

from sflow_jax.families.flux1 import FLUX_DEV_CODE, FLUX_DEV_PAPER
from sflow_jax.sampling.control import LayerControl, check_layers


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


@pytest.mark.parametrize("layers", [[3], [-1], [0, 99]])
def test_unknown_layers_are_named(layers):
    with pytest.raises(ValueError, match=f"no layer .*{layers[-1]}.*0 to 2"):
        LayerControl.none(2, 2, 3).bypassing(layers)


@pytest.mark.parametrize("options, name", [({"steps": [2]}, "step"), ({"elements": [5]}, "batch element")])
def test_unknown_steps_and_elements_are_named(options, name):
    with pytest.raises(ValueError, match=name):
        LayerControl.none(2, 2, 3).injecting([0], **options)


def test_layers_must_be_whole_numbers():
    with pytest.raises(ValueError, match="whole numbers"):
        check_layers([1.5], 3)


def test_published_sets_differ_by_layer_2_alone():
    assert set(FLUX_DEV_PAPER) - set(FLUX_DEV_CODE) == {2}
