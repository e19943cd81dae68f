"""One compilation per batch shape, size and group size, counted at the backend."""

import jax


def test_changing_what_is_bypassed_asked_or_drawn_compiles_nothing(flow, compilations):
    flow.generate(["a red cat", "a dog"], steps=3, progress=False)
    before = compilations()
    for layer in range(flow.layers):
        flow.generate(["a red cat", "a dog"], steps=3, bypass=[layer], progress=False)
    flow.generate(["snow", "a blue hat"], steps=3, seed=9, guidance=[1.0, 7.0], progress=False)
    flow.generate(["snow", "a blue hat"], steps=5, guidance=2.0, progress=False)
    assert compilations() == before


def test_changing_where_edits_inject_compiles_nothing(flow, compilations, photo):
    first = dict(steps=3, progress=False)
    inversion = flow.invert(photo, "a cat", **first)
    flow.edit("a cat", ["a dog", "a hat"], **first)
    flow.edit("a cat", ["a dog", "a hat"], inversion=inversion, progress=False)
    before = compilations()
    for layers in ("all", "none", [1], [0, 4]):
        flow.edit("a dog", ["a cat", "snow"], layers=layers, seed=4, guidance=2.5, **first)
        flow.edit("a dog", ["a cat", "snow"], inversion=inversion, layers=layers, progress=False)
    flow.edit("a cat", ["a dog", "a hat"], inversion=inversion, replay="residual", progress=False)
    flow.invert(photo.rotate(90), "a dog", nudge=1.3, **first)
    assert compilations() == before


def test_the_counter_sees_compilations(compilations):
    jax.jit(lambda x: x * 3.25 + 1)(1.0)
    assert compilations() >= 1
