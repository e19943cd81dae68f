"""Every intervention against hooks on the model of diffusers, one evaluation each; then what they share."""

import contextlib
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import published
import pytest
import reference
import torch
from conftest import relative

from sflow_jax.models.flux1 import FluxConditioning, position_ids
from sflow_jax.models.interventions import NOTHING, Interventions, LayerInterventions, inject_source
from sflow_jax.models.layout import ATTENTION, CAPTURES, Layout
from sflow_jax.pictures.canvas import Canvas
from sflow_jax.sampling.control import LayerControl

VELOCITY_LIMIT = 1e-4
EFFECT_LIMIT = 2e-2
# What is left of rounding when the same numbers are added up in another order.
ROUNDING = 1e-6
# Share of the velocity that an effect must reach to be worth a comparison.
TINY = 1e-3
LAYERS, HEADS, HEAD_DIM = 5, 3, 16
MEMBERS, WORDS = 3, 11
CANVAS = Canvas.of(80, 112, 16)
SIGMA = 0.7
EDITS = (1, 2)
ALL = (0, 1, 2)
every_layer = pytest.mark.parametrize("layer", range(LAYERS))
one_of_each = pytest.mark.parametrize("layer", [1, 3])


@functools.partial(jax.jit, static_argnames=["layout"])
def evaluate(model, latents, text, pooled, guidance, interventions, layout):
    """One evaluation of the transformer."""
    return model(
        latents,
        FluxConditioning(text, pooled),
        sigma=jnp.full(len(latents), SIGMA),
        guidance=guidance,
        canvas=CANVAS,
        interventions=interventions,
        layout=layout,
    )


@dataclasses.dataclass(frozen=True)
class Inputs:
    """Of one call: latents, text, pooled text and guidance."""

    latents: np.ndarray
    text: np.ndarray
    pooled: np.ndarray
    guidance: np.ndarray

    @classmethod
    def random(cls, seed: int) -> "Inputs":
        """Other numbers for every element."""
        generator = np.random.default_rng(seed)
        draw = lambda *shape: generator.standard_normal((MEMBERS, *shape)).astype(np.float32)
        return cls(
            draw(CANVAS.tokens, 16), draw(WORDS, 24), draw(20), np.linspace(1, 4.5, MEMBERS, dtype=np.float32)
        )

    def rows(self, *rows: int) -> "Inputs":
        """These elements, in that order."""
        return Inputs(*(array[list(rows)] for array in self.arrays))

    @property
    def arrays(self) -> tuple[np.ndarray, ...]:
        """In the order of a call."""
        return self.latents, self.text, self.pooled, self.guidance


@dataclasses.dataclass(frozen=True)
class Pair:
    """Our transformer and diffusers', on the same inputs: one group, whose element 0 is the source."""

    transformer: object
    oracle: reference.Reference
    inputs: Inputs

    def call(self, interventions: Interventions, inputs: Inputs | None = None, **layout):
        """Ours."""
        arrays = (inputs or self.inputs).arrays
        return evaluate(self.transformer, *arrays, interventions, Layout(**{"members": MEMBERS, **layout}))

    def ours(self, control: LayerControl) -> np.ndarray:
        """Velocity under a control; what it leaves out is made neutral, so that all tests share one program."""
        return np.asarray(self.call(filled(control).interventions(0)).velocity)

    def theirs(self, *contexts) -> np.ndarray:
        """Velocity of diffusers' model within these contexts."""
        latents, text, pooled, guidance = map(torch.tensor, self.inputs.arrays)
        with contextlib.ExitStack() as stack:
            for context in contexts:
                stack.enter_context(context)
            return self.oracle.velocity(latents, text, pooled, SIGMA, guidance).numpy()

    @functools.cached_property
    def plain(self) -> tuple[np.ndarray, np.ndarray]:
        """Velocities without any intervention, ours and theirs."""
        return self.ours(nothing()), self.theirs()

    def assert_agree(self, control: LayerControl, *contexts, changes=ALL) -> None:
        """The velocity and its difference to the plain one; whom nothing was done to keeps theirs."""
        ours, theirs = self.ours(control), self.theirs(*contexts)
        assert relative(ours, theirs) <= VELOCITY_LIMIT
        for member in range(MEMBERS):
            plain_ours, plain_theirs = (velocity[member] for velocity in self.plain)
            if member not in changes:
                assert relative(ours[member], plain_ours) <= ROUNDING
                continue
            effect = theirs[member] - plain_theirs
            assert np.linalg.norm(effect) >= TINY * np.linalg.norm(plain_theirs)
            assert relative(ours[member] - plain_ours, effect) <= EFFECT_LIMIT


@pytest.fixture(scope="module")
def pair(flow) -> Pair:
    """Both models on random inputs."""
    ids = torch.tensor(position_ids(CANVAS))
    return Pair(flow.transformer, reference.Reference(published.transformer(), ids, []), Inputs.random(0))


@pytest.fixture(scope="module")
def model(pair):
    """diffusers' transformer."""
    return pair.oracle.model


@pytest.fixture(scope="module")
def region() -> np.ndarray:
    """A random soft mask over image tokens, another for every member."""
    return np.random.default_rng(1).uniform(size=(MEMBERS, CANVAS.tokens)).astype(np.float32)


def nothing() -> LayerControl:
    """A control of this model that does nothing."""
    return LayerControl.none(1, MEMBERS, LAYERS)


def filled(control: LayerControl) -> LayerControl:
    """The same, with everything that is absent at its neutral value."""
    shape = control.inject.shape
    neutral = {name: np.ones(shape, np.float32) for name in ("keys", "values", "attention", "mlp", "text")}
    neutral["heads"] = np.ones((*shape, HEADS), np.float32)
    neutral["key_shift"] = np.zeros((*shape, 2), np.float32)
    neutral["extend"] = np.zeros(shape, np.float32)
    neutral["attentions"] = np.ones((*shape, 2), np.float32)
    neutral["region"] = np.ones((shape[1], CANVAS.tokens), np.float32)
    absent = {name: value for name, value in neutral.items() if getattr(control, name) is None}
    return dataclasses.replace(control, **absent)


@every_layer
def test_bypass_leaves_both_streams_as_they_are(layer, pair, model):
    pair.assert_agree(nothing().bypassing([layer]), reference.bypassing(model, [layer]))


@every_layer
@pytest.mark.parametrize(
    "scales",
    [{"attention": 0.0}, {"mlp": 0.0}, {"attention": 0.5}, {"mlp": 0.5}, {"attention": 0.25, "mlp": 0.75}],
    ids=str,
)
def test_updates_of_attention_and_mlp_are_scaled(layer, scales, pair, model):
    pair.assert_agree(nothing().scaling([layer], **scales), reference.scaling(model, layer, **scales))


@every_layer
def test_neither_attention_nor_mlp_is_exactly_bypass(layer, pair):
    neither = pair.ours(nothing().scaling([layer], attention=0.0, mlp=0.0))
    np.testing.assert_array_equal(neither, pair.ours(nothing().bypassing([layer])))


@every_layer
def test_half_of_both_is_half_of_the_update(layer, pair):
    half = dataclasses.replace(
        filled(nothing()).interventions(0).layers, gate=np.ones((MEMBERS, LAYERS), np.float32)
    )
    half.gate[:, layer] = 0.5
    both = pair.ours(nothing().scaling([layer], attention=0.5, mlp=0.5))
    gated = pair.call(Interventions(half, filled(nothing()).region)).velocity
    assert relative(both, gated) <= ROUNDING


@every_layer
def test_whole_injection_is_the_published_replacement(layer, pair, model):
    theirs = reference.injecting(model, [layer], WORDS)
    pair.assert_agree(nothing().injecting([layer]), theirs, changes=EDITS)


@every_layer
@pytest.mark.parametrize("strengths", [{"values": 0.0}, {"keys": 0.0}, {"keys": 0.3, "values": 0.7}], ids=str)
def test_keys_and_values_move_as_far_as_asked(layer, strengths, pair, model):
    theirs = reference.moving(model, layer, WORDS, **strengths)
    pair.assert_agree(nothing().injecting([layer], **strengths), theirs, changes=EDITS)


@every_layer
def test_a_region_takes_less(layer, pair, model, region):
    share = torch.tensor(1 - 0.75 * region)
    theirs = reference.moving(model, layer, WORDS, keys=share, values=0.5 * share)
    control = nothing().injecting([layer], values=0.5).within(region, inside=0.25)
    pair.assert_agree(control, theirs, changes=EDITS)


@every_layer
@pytest.mark.parametrize("scales", [[1.0, 0.0, 1.0], [0.5, 1.5, -1.0]], ids=str)
def test_heads_are_scaled(layer, scales, pair, model):
    pair.assert_agree(nothing().scaling_heads([layer], scales), reference.scaling_heads(model, layer, scales))


@every_layer
@pytest.mark.parametrize("scale", [0.0, 2.0])
def test_text_is_scaled_as_it_enters(layer, scale, pair, model):
    # Layers normalise what enters: no picture sees how long the text is in the last of them.
    changes = () if scale and layer == LAYERS - 1 else ALL
    theirs = reference.scaling_text(model, layer, scale)
    pair.assert_agree(nothing().scaling([layer], text=scale), theirs, changes=changes)


@every_layer
@pytest.mark.parametrize("shift", [(3.0, -2.0), (0.0, 1.5)], ids=str)
def test_keys_are_shifted(layer, shift, pair, model):
    theirs = reference.shifting_keys(model, layer, WORDS, *shift)
    pair.assert_agree(nothing().shifting_keys([layer], *shift), theirs)


@every_layer
def test_shifted_keys_are_moved_to_the_shifted_source(layer, pair, model):
    theirs = [
        reference.shifting_keys(model, layer, WORDS, 1, 2, [0]),
        reference.shifting_keys(model, layer, WORDS, -1, 1, [1]),
        reference.moving(model, layer, WORDS, keys=0.4),
    ]
    control = (
        nothing().shifting_keys([layer], 1.0, 2.0, elements=[0]).shifting_keys([layer], -1.0, 1.0, elements=[1])
    )
    pair.assert_agree(control.injecting([layer], keys=0.4), *theirs)


def test_members_and_layers_have_their_own(pair, model, region):
    control = (
        nothing()
        .scaling([0], attention=0.5, text=1.5, elements=[0])
        .shifting_keys([1], 3.0, -2.0, elements=[1])
        .injecting([0, 3], keys=0.3, values=0.7, elements=[1])
        .injecting([4], keys=0.0, elements=[2])
        .within(region, inside=0.25)
        .bypassing([1], elements=[2])
        .scaling_heads([2], [0.0, 2.0, 1.0], elements=[2])
        .scaling([3], mlp=0.0, elements=[2])
    )
    share = torch.tensor(1 - 0.75 * region)
    weak, strong = 0.3 * share, 0.7 * share
    pair.assert_agree(
        control,
        reference.scaling(model, 0, attention=0.5, elements=[0]),
        reference.scaling_text(model, 0, 1.5, [0]),
        reference.shifting_keys(model, 1, WORDS, 3, -2, [1]),
        reference.moving(model, 0, WORDS, keys=weak, values=strong, elements=[1]),
        reference.moving(model, 3, WORDS, keys=weak, values=strong, elements=[1]),
        reference.moving(model, 4, WORDS, keys=0.0, values=share, elements=[2]),
        reference.bypassing(model, [1], [2]),
        reference.scaling_heads(model, 2, [0.0, 2.0, 1.0], [2]),
        reference.scaling(model, 3, mlp=0.0, elements=[2]),
    )


def everything(layers, elements=None) -> LayerControl:
    """Something of each kind in these layers."""
    return (
        nothing()
        .injecting(layers, keys=0.4, values=0.8, elements=elements)
        .scaling(layers, attention=0.5, mlp=0.75, text=0.75, elements=elements)
        .scaling_heads(layers, [0.5, 1.0, 2.0], elements=elements)
        .shifting_keys(layers, 1.0, -1.0, elements=elements)
    )


@one_of_each
@pytest.mark.parametrize("member", EDITS)
def test_what_one_edit_gets_touches_no_other(layer, member, pair, model):
    theirs = [
        reference.scaling(model, layer, attention=0.5, mlp=0.75, elements=[member]),
        reference.scaling_text(model, layer, 0.75, [member]),
        reference.scaling_heads(model, layer, [0.5, 1.0, 2.0], [member]),
        reference.shifting_keys(model, layer, WORDS, 1, -1, [member]),
        reference.moving(model, layer, WORDS, keys=0.4, values=0.8, elements=[member]),
    ]
    pair.assert_agree(everything([layer], [member]), *theirs, changes=[member])


PART_OF_ALL = {
    "attention, region": lambda control: (
        control.scaling([1, 3], attention=0.0)
        .injecting([0, 4])
        .within(np.eye(MEMBERS, CANVAS.tokens, dtype=np.float32))
    ),
    "mlp, key_shift": lambda control: control.scaling([1, 3], mlp=0.0).shifting_keys([0, 4], 3.0, -2.0),
    "text, heads": lambda control: control.scaling([1, 3], text=2.0).scaling_heads([0, 4], [0.0, 1.0, 2.0]),
}


@pytest.mark.parametrize("names", PART_OF_ALL)
def test_some_interventions_alone_are_the_same_as_among_neutral_ones(names, pair):
    control = PART_OF_ALL[names](nothing())
    assert all(getattr(control, name) is not None for name in names.split(", "))
    assert relative(pair.call(control.interventions(0)).velocity, pair.ours(control)) <= ROUNDING


def test_absent_interventions_equal_neutral_ones(pair):
    neutral = filled(nothing()).interventions(0)
    leaves = jax.tree.leaves(neutral)
    assert len(leaves) == len(dataclasses.fields(LayerInterventions)) + 1
    assert relative(pair.call(neutral).velocity, pair.call(NOTHING).velocity) <= ROUNDING
    assert relative(pair.call(NOTHING).velocity, pair.plain[1]) <= VELOCITY_LIMIT


def test_whole_injection_takes_the_sources_numbers_bit_for_bit():
    generator = np.random.default_rng(2)
    x = np.float32(generator.standard_normal((6, 7, 2, 4)) * 10.0 ** generator.integers(-8, 8, (6, 7, 2, 4)))
    strength = np.float32([1, 1, 0, 0, 1, 0])
    moved = jax.jit(inject_source, static_argnums=3)(x, strength, None, 3)
    np.testing.assert_array_equal(moved, x[[0, 0, 2, 3, 3, 5]])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("strength", [0.3, 0.5, 0.9])
def test_the_source_keeps_its_own_numbers(strength, dtype):
    x = jnp.asarray(np.random.default_rng(2).standard_normal((6, 7, 2, 4)), dtype)
    moved = jax.jit(inject_source, static_argnums=3)(x, np.full(6, strength, np.float32), None, 3)
    assert relative(moved[::3].astype(jnp.float32), x[::3].astype(jnp.float32)) <= ROUNDING


@pytest.mark.parametrize("regional", [False, True], ids=["everywhere", "in a region"])
@pytest.mark.parametrize("absent", [False, True], ids=["source present", "source absent"])
def test_text_in_front_of_injected_tokens_stays_as_it_is(absent, regional):
    random = np.random.default_rng(0)
    x, lent = (random.standard_normal(shape).astype(np.float32) for shape in ((6, 9, 2, 4), (2, 6, 2, 4)))
    strength = random.random(6).astype(np.float32)
    region = random.random((6, 6)).astype(np.float32) if regional else None
    shared = strength, region, 3, lent if absent else None
    joint = jax.jit(inject_source, static_argnums=(3, 5))(x, *shared, 3)
    np.testing.assert_array_equal(joint[:, :3], x[:, :3])
    alone = jax.jit(inject_source, static_argnums=3)(x[:, 3:], *shared)
    assert relative(joint[:, 3:], alone) <= ROUNDING


def test_injection_among_equal_members_changes_nothing(pair):
    same = pair.inputs.rows(0, 0, 0)
    plain = pair.call(filled(nothing()).interventions(0), same).velocity
    injected = pair.call(filled(nothing().injecting(range(LAYERS))).interventions(0), same).velocity
    np.testing.assert_array_equal(injected, plain)
    np.testing.assert_array_equal(injected, np.broadcast_to(injected[:1], injected.shape))


def test_the_source_keeps_its_own_path(pair, region):
    control = nothing().injecting(range(LAYERS), keys=0.3, values=0.7).within(region, inside=0.4)
    assert relative(pair.ours(control)[0], pair.plain[0][0]) <= ROUNDING


def test_groups_have_their_own_source(pair, region):
    other = Inputs.random(3)
    both = Inputs(*(np.concatenate(arrays) for arrays in zip(pair.inputs.arrays, other.arrays)))
    first = everything([1, 3]).within(region, inside=0.25)
    second = everything([0, 4]).within(region[::-1], inside=0.5)
    joined = jax.tree.map(lambda *leaves: np.concatenate(leaves), first.interventions(0), second.interventions(0))
    ours = pair.call(joined, both).velocity
    apart = [pair.call(one.interventions(0), x).velocity for one, x in ((first, pair.inputs), (second, other))]
    assert relative(ours, np.concatenate(apart)) <= ROUNDING


@pytest.mark.parametrize("layers", [[], [1, 3]], ids=["plain", "bypass"])
def test_captures_are_what_the_layers_hold(layers, pair, model):
    ours = pair.call(filled(nothing().bypassing(layers)).interventions(0), capture=CAPTURES)
    # Hooks run in order: what is recorded last has seen the bypass.
    with reference.bypassing(model, layers), reference.recording(model, WORDS) as theirs:
        pair.theirs()
    sizes = {
        "keys": (CANVAS.tokens, HEADS, HEAD_DIM),
        "values": (CANVAS.tokens, HEADS, HEAD_DIM),
        "image": (CANVAS.tokens, HEADS * HEAD_DIM),
        "text": (WORDS, HEADS * HEAD_DIM),
    }
    assert {name: array.shape for name, array in ours.captured.items()} == {
        name: (LAYERS, MEMBERS, *size) for name, size in sizes.items()
    }
    theirs = {name: torch.stack(arrays) for name, arrays in theirs.items()}
    # The converter brings together the halves of the rotary pairs.
    theirs["keys"] = torch.cat([theirs["keys"][..., 0::2], theirs["keys"][..., 1::2]], dim=-1)
    for name in CAPTURES:
        for layer in range(LAYERS):
            assert relative(ours.captured[name][layer], theirs[name][layer]) <= VELOCITY_LIMIT, (name, layer)


@one_of_each
def test_captured_keys_and_values_are_the_layers_own(layer, pair):
    control = filled(nothing().injecting([layer]).shifting_keys([layer], 3.0, -2.0)).interventions(0)
    plain = pair.call(filled(nothing()).interventions(0), capture=CAPTURES).captured
    moved = pair.call(control, capture=CAPTURES).captured
    for names, untouched in ((("keys", "values"), layer + 1), (("image", "text"), layer)):
        for name in names:
            np.testing.assert_array_equal(moved[name][:untouched], plain[name][:untouched])
            assert relative(moved[name][untouched], plain[name][untouched]) >= TINY


def test_capturing_leaves_the_velocity_as_it_is(pair):
    output = pair.call(filled(everything([1, 3])).interventions(0), capture=CAPTURES)
    assert relative(output.velocity, pair.ours(everything([1, 3]))) <= ROUNDING


WATCHED = (0, 4, WORDS, WORDS + 17, WORDS + CANVAS.tokens - 1)


def watched(pair, control) -> np.ndarray:
    """Where `WATCHED` attend, [n, b, q, text and own and source tokens]; rows add up to one."""
    output = pair.call(control.watching(WATCHED).interventions(0), capture=(ATTENTION,))
    weights = np.asarray(output.captured[ATTENTION])
    assert weights.dtype == np.float32
    assert weights.shape == (LAYERS, MEMBERS, len(WATCHED), WORDS + 2 * CANVAS.tokens)
    np.testing.assert_allclose(weights.sum(axis=-1), 1, atol=1e-5)
    assert relative(output.velocity, pair.call(control.interventions(0)).velocity) <= ROUNDING
    return weights


def test_attention_is_that_of_diffusers(pair, model, region):
    """In all layers; of keys that are injected by a share in layers 1 and 3, that share is the source's."""
    share = 0.6 * (1 - 0.75 * region)
    control = nothing().injecting([1, 3], keys=0.6, values=0.2).within(region, inside=0.25)
    ours = watched(pair, control)
    with contextlib.ExitStack() as stack:
        for layer in (1, 3):
            strengths = {"keys": torch.tensor(share), "values": torch.tensor(share / 3)}
            stack.enter_context(reference.moving(model, layer, WORDS, **strengths))
        theirs = stack.enter_context(reference.recording(model, WORDS))
        pair.theirs()
    text, own, source = np.split(ours, [WORDS, WORDS + CANVAS.tokens], axis=-1)
    expected = torch.stack(theirs["attention"])[:, :, list(WATCHED)].numpy()
    assert np.abs(np.concatenate([text, own + source], axis=-1) - expected).max() <= 1e-4
    share[0] = 0
    injected = np.zeros((LAYERS, 1, 1, 1)) + np.isin(np.arange(LAYERS), (1, 3)).reshape(-1, 1, 1, 1)
    np.testing.assert_allclose(source, injected * share[:, None] * expected[..., WORDS:], atol=1e-4)


def test_attention_beside_is_divided(pair, region):
    """The source's tokens take weight from the own ones, in the first layer that sees them."""
    plain, beside = watched(pair, nothing()), watched(pair, nothing().extending([1], 0.4).within(region))
    own, source = np.s_[..., : WORDS + CANVAS.tokens], np.s_[..., WORDS + CANVAS.tokens :]
    assert not plain[source].any() and not beside[source][:, 0].any()
    assert (beside[source][1, EDITS] > 0).all() and not beside[source][[0, 2, 3, 4]].any()
    rest = beside[own].sum(axis=-1, keepdims=True)
    assert (rest[1, EDITS] < 1 - TINY).all() and (beside[own][1, EDITS] <= plain[own][1, EDITS] + 1e-6).all()


def test_a_source_beside_counts_as_often_as_it_weighs():
    """Against plain softmax over the concatenated keys, for two groups of two."""
    generator = np.random.default_rng(6)
    query, key = (jnp.asarray(generator.standard_normal((4, 9, 2, 8)), jnp.float32) for _ in range(2))
    weight, tokens = np.float32([0.3, 0.7, 0.5, 0.2]), np.array([[1, 3, 8]] * 4)
    layer = LayerInterventions(extend=weight)
    ours = Layout(members=2, capture=(ATTENTION,)).watch(query, key, 2, layer, None, tokens)
    for row in range(4):
        keys = np.concatenate([key[row], key[2 * (row // 2), 2:]])
        scores = np.einsum("lhk,mhk->hlm", query[row], keys)[:, tokens[row]] / np.sqrt(8)
        counted = np.exp(scores) * np.repeat([1.0, weight[row] * (row % 2)], [9, 7])
        assert relative(ours[row], (counted / counted.sum(-1, keepdims=True)).mean(axis=0)) <= 1e-5


def test_other_values_compile_nothing(pair, region, compilations):
    pair.ours(nothing())
    before = compilations()
    for layer in range(LAYERS):
        pair.ours(everything([layer], [layer % MEMBERS]).bypassing([(layer + 1) % LAYERS]))
    pair.ours(nothing().within(region, inside=0.1))
    pair.ours(nothing().injecting(range(LAYERS)).within(1 - region))
    assert compilations() == before


def test_bfloat16_stays_near_float32(pair, region):
    control = everything([1, 3]).within(region, inside=0.25)
    narrow = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), pair.transformer)
    ours = dataclasses.replace(pair, transformer=narrow).ours(control)
    assert relative(ours, pair.ours(control)) <= 5e-2


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda control: control.scaling_heads([3], [0.5]), "the model has 3 heads, but 1 are scaled"),
        (lambda control: control.within(np.ones((3, 4), np.float32)), r"a region must be \[batch, image tokens\]"),
        (lambda control: LayerControl.none(1, 2, 5), "for 2 batch elements, not for 3"),
    ],
)
def test_other_numbers_of_heads_or_tokens_are_named(change, message, flow):
    control = change(LayerControl.none(1, 3, flow.layers).injecting([0]))
    with pytest.raises(ValueError, match=message):
        flow.denoise(
            np.zeros((3, 16, 16), np.float32), flow.encode_prompts(["a", "b", "c"]), control,
            guidance=np.ones(3, np.float32),
        )  # fmt: skip


def test_the_source_is_seen_beside_the_own_tokens(pair, region):
    layers = [1, 3]
    plain, seen = pair.ours(nothing()), pair.ours(nothing().extending(layers, 0.4))
    assert relative(seen[0], plain[0]) <= ROUNDING
    assert all(relative(seen[edit], plain[edit]) >= TINY for edit in EDITS)
    assert relative(pair.ours(nothing().extending(layers, 0.0)), plain) <= ROUNDING
    # One element, and of each element only some tokens.
    alone = pair.ours(nothing().extending(layers, 0.4, elements=[1]))
    assert relative(alone[2], plain[2]) <= ROUNDING < relative(alone[1], plain[1])
    nowhere = nothing().extending(layers, 0.4).within(np.ones_like(region))
    assert TINY < relative(pair.ours(nowhere)[1:], seen[1:]) < relative(plain[1:], seen[1:])


def test_a_layer_attends_to_the_sources_keys_and_values():
    """Against plain attention over the concatenated keys and values, for two groups of three."""
    generator = np.random.default_rng(5)
    query, key, value = (jnp.asarray(generator.standard_normal((6, 9, 2, 8)), jnp.float32) for _ in range(3))
    share = np.float32(generator.uniform(size=(6, 7)))
    weight = np.float32([0.3, 0.3, 0.7, 0.5, 0.5, 0.2])
    ours = Layout(members=3).attend_beside(query, key, value, 2, weight, share)
    for row in range(6):
        source = 3 * (row // 3)
        keys = np.concatenate([key[row], key[source, 2:]])
        values = np.concatenate([value[row], value[source, 2:]])
        scores = np.einsum("lhk,mhk->hlm", query[row], keys) / np.sqrt(8)
        counted = weight[row] * np.concatenate([np.ones(2), share[row]]) * (row != source)
        weights = np.exp(scores) * np.concatenate([np.ones((9, 9)), np.repeat(counted[:, None], 7, 1)], axis=1)
        expected = np.einsum("hlm,mhk->lhk", weights / weights.sum(-1, keepdims=True), values)
        assert relative(ours[row], expected) <= 1e-5


def test_weights_below_zero_are_refused():
    with pytest.raises(ValueError, match="weight of the source's tokens must be at least 0"):
        nothing().extending([0], -1.0)
