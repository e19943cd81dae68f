"""SD3 and SD3.5 in float32 against diffusers: networks, generation, edits, inversion, skip-layer guidance."""

import dataclasses
import functools
import logging
import re
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import published_sd3 as published
import pytest
import torch
from conftest import relative, with_step_cache
from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline
from reference import attention_weights
from reference_sd3 import Reference, injecting, packed, unpacked
from sflow_convert.job import convert
from sflow_convert.layouts import open_source

from sflow_jax.errors import SettingError
from sflow_jax.families.sd3 import SCHEDULER, SD3
from sflow_jax.models.layout import ATTENTION, CAPTURES, Layout
from sflow_jax.models.sd3 import Sd3Conditioning
from sflow_jax.pictures.canvas import Canvas
from sflow_jax.pictures.files import fit_picture, to_network
from sflow_jax.pipeline import StableFlow
from sflow_jax.sampling.control import LayerControl

NETWORK_LIMIT = 1e-5
METHOD_LIMIT = 1e-3
EFFECT_LIMIT = 2e-2
STEPS, HEIGHT, WIDTH = 8, 48, 64
ROWS, COLUMNS, CHANNELS = 3, 4, 16
T5_WORDS = 13
PROMPTS = ["a red cat sits", "a red cat lies in snow", "a blue dog"]
NEGATIVE = "a hat on the beach"
SIZE = {"height": HEIGHT, "width": WIDTH, "progress": False}


@dataclasses.dataclass
class Case:
    """One architecture: ours, diffusers' pipeline, and the oracle of what that does not do."""

    architecture: str
    flow: StableFlow
    pipe: StableDiffusion3Pipeline
    oracle: Reference

    @property
    def layers(self) -> int:
        return len(self.pipe.transformer.transformer_blocks)

    @torch.no_grad()
    def features(self, prompts):
        """diffusers' own conditioning."""
        text, _, pooled, _ = self.pipe.encode_prompt(
            prompts, None, None, do_classifier_free_guidance=False, max_sequence_length=T5_WORDS
        )
        return text, pooled

    def painted(self, noise, guidance, **options) -> torch.Tensor:
        """Packed latents of diffusers' pipeline."""
        latents = unpacked(torch.tensor(noise)[None], ROWS, COLUMNS)
        made = self.pipe(
            PROMPTS[1], height=HEIGHT, width=WIDTH, num_inference_steps=STEPS, guidance_scale=guidance,
            negative_prompt=NEGATIVE, latents=latents, max_sequence_length=T5_WORDS, output_type="latent",
            **options,
        )  # fmt: skip
        return packed(made.images)


def made(architecture, folder, **options) -> tuple[StableFlow, StableDiffusion3Pipeline]:
    """A random model, converted, and its pipeline."""
    pipe = published.pipeline(architecture, **options)
    source = open_source(published.write_diffusers(pipe, folder / "source"))
    convert(source, folder / "made", vital_layers=(0, 2), progress=False)
    return StableFlow.load(folder / "made"), pipe


@pytest.fixture(scope="module", params=published.ARCHITECTURES)
def case(request, tmp_path_factory) -> Case:
    flow, pipe = made(request.param, tmp_path_factory.mktemp("sd3"))
    scheduler = FlowMatchEulerDiscreteScheduler(**published.SCHEDULER)
    scheduler.set_timesteps(STEPS)
    return Case(request.param, flow, pipe, Reference(pipe.transformer, ROWS, COLUMNS, scheduler.sigmas.tolist()))


@pytest.fixture(scope="module")
def noise() -> np.ndarray:
    return np.random.default_rng(0).standard_normal((ROWS * COLUMNS, CHANNELS)).astype(np.float32)


def repeated(noise, batch):
    return torch.tensor(noise).repeat(batch, 1, 1)


@functools.partial(jax.jit, static_argnames="layout")
def evaluate(transformer, latents, conditioning, sigma, interventions, layout=Layout(capture=CAPTURES)):
    return transformer(
        latents, conditioning, sigma=sigma, canvas=Canvas.of(HEIGHT, WIDTH, 16), interventions=interventions,
        layout=layout,
    )  # fmt: skip


def random_inputs():
    generator = np.random.default_rng(4)
    draw = lambda *shape: generator.standard_normal((2, *shape)).astype(np.float32)
    return draw(ROWS * COLUMNS, CHANNELS), draw(11, 40), draw(22)


def test_the_model_is_recognised(case):
    info = case.flow.info
    assert (info.family.name, info.variant, info.picture_size) == ("sd3", case.architecture, 64)
    dual = (("dual", 2), ("joint", 2)) if case.architecture == "3.5-medium" else (("joint", 3),)
    assert info.layer_kinds == dual and info.layers == case.layers


def test_prompts_become_what_diffusers_makes_of_them(case):
    ours, (text, pooled) = case.flow.encode_prompts(PROMPTS), case.features(PROMPTS)
    assert relative(ours.text, text) <= NETWORK_LIMIT and relative(ours.pooled, pooled) <= NETWORK_LIMIT
    assert case.flow.prompts.words == text.shape[1]


def test_transformer_agrees_and_skips_every_layer(case):
    latents, text, pooled = random_inputs()
    arrays = torch.tensor(latents), torch.tensor(text), torch.tensor(pooled)
    sigma = jnp.full(2, 0.7)
    for skipped in (None, *range(case.layers)):
        theirs = case.oracle.velocity(*arrays, 0.7, skip_layers=None if skipped is None else [skipped])
        control = LayerControl.none(1, 2, case.layers).bypassing([] if skipped is None else [skipped])
        ours = evaluate(
            case.flow.transformer, latents, Sd3Conditioning(text, pooled), sigma, control.interventions(0)
        )
        assert relative(ours.velocity, theirs) <= NETWORK_LIMIT, skipped
    assert {name: x.shape[0] for name, x in ours.captured.items()} == dict.fromkeys(CAPTURES, case.layers)


def test_step_caching_covers_both_branches(case, noise, caplog):
    """Nothing changes where no change is allowed; else layers are left out in all but the first step."""
    caplog.set_level(logging.INFO, logger="sflow_jax")
    options = {"steps": 3, "guidance": 4.0, "noise": noise, **SIZE}
    latents = [case.flow.generate(PROMPTS[:1], **options).latents]
    for least in (1e-6, 0.999):
        latents.append(with_step_cache(case.flow, least).generate(PROMPTS[:1], **options).latents)
    plain, strict, loose = latents
    assert relative(strict, plain) <= NETWORK_LIMIT < relative(loose, plain) < 1
    assert re.findall(r"(\d) of 3 evaluations left layers out", caplog.text) in (["0", "1"], ["0", "2"])


def test_attention_is_that_of_diffusers(case):
    """Of text and image tokens, the picture 1 with all keys and values of picture 0."""
    latents, text, pooled = random_inputs()
    watched, words, attend = [0, 7, 11, 22], text.shape[1], torch.nn.functional.scaled_dot_product_attention
    theirs = []

    def watch(query, key, value, **options):
        # The image's own attention is not looked at.
        if query.shape[2] == words + ROWS * COLUMNS:
            theirs.append(attention_weights(query, key))
        return attend(query, key, value, **options)

    patched = mock.patch.object(torch.nn.functional, "scaled_dot_product_attention", watch)
    with patched, injecting(case.pipe.transformer, range(case.layers), 1):
        case.oracle.velocity(torch.tensor(latents), torch.tensor(text), torch.tensor(pooled), 0.7)
    control = LayerControl.none(1, 2, case.layers).injecting(range(case.layers)).watching(watched)
    ours = evaluate(
        case.flow.transformer, latents, Sd3Conditioning(text, pooled), jnp.full(2, 0.7), control.interventions(0),
        Layout(members=2, capture=(ATTENTION,)),
    ).captured[ATTENTION]  # fmt: skip
    seen, own, source = np.split(np.asarray(ours), [words, words + ROWS * COLUMNS], axis=-1)
    assert not own[:, 1].any() and not source[:, 0].any()
    # diffusers has the image first.
    expected = torch.stack(theirs).roll(words, dims=(2,)).roll(words, dims=(3,))[:, :, watched]
    assert np.abs(np.concatenate([seen, own + source], axis=-1) - expected.numpy()).max() <= 1e-4


def test_an_atlas_is_of_the_prompts_branch(case):
    options = {"steps": 2, "words": ["cat"], "points": [(20, 40)], "layers": "all", **SIZE}
    guided, plain = (case.flow.attention_atlas(*PROMPTS[:2], guidance=g, **options) for g in (4.0, 1.0))
    assert guided.text.shape == (2, case.layers, 2, case.flow.prompts.words)
    np.testing.assert_allclose(guided.shares.sum(axis=-1), 1, atol=1e-5)
    assert not guided.own.any() and guided.queries[1].tokens[-1] > case.flow.prompts.clip_length
    # Both begin at the same noise, so that the first step's attention is the same.
    np.testing.assert_allclose(guided.source[0], plain.source[0], atol=1e-5)


@torch.no_grad()
def test_autoencoder_agrees(case, photo):
    pixels = to_network(fit_picture(photo, HEIGHT, WIDTH)[None])
    latents = image_latents(case, photo)
    assert relative(case.flow.encode_image(photo, height=HEIGHT, width=WIDTH), latents) <= NETWORK_LIMIT
    assert pixels.shape[1:3] == (HEIGHT, WIDTH)
    scaled = unpacked(latents, ROWS, COLUMNS) / published.VAE["scaling_factor"] + published.VAE["shift_factor"]
    theirs = (case.pipe.vae.decode(scaled).sample / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1)
    assert relative(case.flow.decode(latents.numpy(), height=HEIGHT, width=WIDTH), theirs) <= NETWORK_LIMIT


def generate(case, noise, **options):
    options = {"guidance": 5.0, "negative": NEGATIVE} | options
    return case.flow.generate(PROMPTS[1:2], steps=STEPS, noise=noise, **SIZE, **options).latents


def test_generation_agrees_with_the_published_pipeline(case, noise):
    assert relative(generate(case, noise), case.painted(noise, 5.0)) <= METHOD_LIMIT
    # Without guidance neither runs a second branch, and what it would have seen makes no difference.
    alone = generate(case, noise, guidance=1.0)
    assert relative(alone, case.painted(noise, 1.0)) <= METHOD_LIMIT
    np.testing.assert_array_equal(alone, generate(case, noise, guidance=1.0, negative=None))


def test_bypass_of_every_layer_agrees_and_matters(case, noise, monkeypatch):
    plain, plain_theirs = generate(case, noise), case.painted(noise, 5.0)
    forward = type(case.pipe.transformer).forward
    for layer in range(case.layers):
        without = lambda self, *args, layer=layer, **given: forward(self, *args, **given, skip_layers=[layer])
        monkeypatch.setattr(type(case.pipe.transformer), "forward", without)
        theirs, ours = case.painted(noise, 5.0), generate(case, noise, bypass=[layer])
        assert relative(ours, theirs) <= METHOD_LIMIT
        assert relative(ours - plain, theirs - plain_theirs) <= EFFECT_LIMIT


@pytest.mark.parametrize("layers, window", [((1,), (0.01, 0.2)), ((0, 2), (0.1, 0.9))])
def test_skip_layer_guidance_agrees_and_matters(layers, window, case, noise):
    theirs = case.painted(
        noise, 5.0, skip_guidance_layers=list(layers), skip_layer_guidance_scale=2.8,
        skip_layer_guidance_start=window[0], skip_layer_guidance_stop=window[1],
    )  # fmt: skip
    inside = [i for i in range(STEPS) if window[0] * STEPS < i < window[1] * STEPS]
    # The first window is the default.
    steps = None if window == (0.01, 0.2) else (inside[0], inside[-1] + 1)
    ours = generate(case, noise, skip_layers=layers, skip_window=steps)
    assert relative(ours, theirs) <= METHOD_LIMIT
    effect = theirs - case.painted(noise, 5.0)
    assert relative(ours - generate(case, noise), effect) <= EFFECT_LIMIT


def choices(case) -> list[tuple]:
    """Layers, and which attentions inject."""
    both = [([0], "both"), (range(case.layers), "both"), ([case.layers - 1], "both")]
    return both + ([([0, 1], "joint"), ([0, 1, 2], "image")] if case.architecture == "3.5-medium" else [])


def test_edits_of_generated_pictures_agree_and_matter(case, noise):
    guidance, negative = [4.0, 5.0, 6.0], [NEGATIVE, "", "red"]
    start = repeated(noise, 3), case.features(PROMPTS), case.features(negative), guidance
    options = dict(steps=STEPS, guidance=guidance, noise=noise, negative=negative, **SIZE)
    edit = lambda layers, **more: case.flow.edit(PROMPTS[0], PROMPTS[1:], layers=layers, **options, **more).latents
    plain, plain_theirs = edit("none"), case.oracle.denoise(*start)
    for layers, attentions in choices(case):
        theirs = case.oracle.denoise(*start, inject=layers, attentions=attentions)
        ours = edit(tuple(layers), attentions=attentions)
        assert relative(ours, theirs) <= METHOD_LIMIT
        assert relative(ours[1:] - plain[1:], theirs[1:] - plain_theirs[1:]) <= EFFECT_LIMIT
        assert relative(ours[0], plain_theirs[0]) <= METHOD_LIMIT


@pytest.mark.parametrize("case", ["3.5-medium"], indirect=True)
def test_both_branches_and_both_attentions_take_from_a_bank(case, noise):
    asked = dict(layers=(0, 1, 3), guidance=[4.0, 5.0, 6.0], negative=[NEGATIVE, "", "red"], noise=noise, steps=2)
    row, bank = (
        case.flow.edit(PROMPTS[0], PROMPTS[1:], edits_at_once=1, kv_cache=place, **asked, **SIZE)
        for place in ("off", "device")
    )
    assert relative(bank.latents, row.latents) <= 1e-5
    assert (bank.evaluations, row.evaluations) == (12, 16)


@torch.no_grad()
def image_latents(case, photo) -> torch.Tensor:
    """Packed, scaled latents of the photo."""
    pixels = to_network(fit_picture(photo, HEIGHT, WIDTH)[None])
    mean = case.pipe.vae.encode(torch.tensor(pixels).permute(0, 3, 1, 2)).latent_dist.mean
    return packed((mean - published.VAE["shift_factor"]) * published.VAE["scaling_factor"])


def test_inversion_and_edits_of_real_pictures_agree(case, photo):
    features, negative = case.features(PROMPTS), case.features([""] * 3)
    stored = case.oracle.invert(image_latents(case, photo) * 1.15, [x[:1] for x in features])
    inversion = case.flow.invert(photo, PROMPTS[0], steps=STEPS, **SIZE)
    assert relative(inversion.trajectory, stored) <= METHOD_LIMIT
    assert relative(inversion.sigmas, case.oracle.sigmas[::-1]) <= 1e-6
    start = stored[-1].repeat(3, 1, 1), features, negative, [1.0, 5.0, 5.0]
    theirs = case.oracle.denoise(*start, inject=[0, 2], stored=stored)
    plain_theirs = case.oracle.denoise(*start, stored=stored)
    ours, plain = (
        case.flow.edit(
            PROMPTS[0], PROMPTS[1:], inversion=inversion, layers=layers, guidance=5.0, progress=False
        ).latents
        for layers in ("vital", "none")
    )
    assert relative(ours, theirs) <= METHOD_LIMIT
    assert relative(ours[1:] - plain[1:], theirs[1:] - plain_theirs[1:]) <= EFFECT_LIMIT


def test_inversion_with_guidance_has_two_branches(case, photo):
    features, negative = case.features(PROMPTS[:1]), case.features([NEGATIVE])
    theirs = case.oracle.invert(image_latents(case, photo), features, negative, 2.0)
    ours = case.flow.invert(photo, PROMPTS[0], steps=STEPS, guidance=2.0, nudge=1.0, negative=NEGATIVE, **SIZE)
    assert relative(ours.trajectory, theirs) <= METHOD_LIMIT
    skipping = case.flow.invert(
        photo, PROMPTS[0], steps=STEPS, guidance=2.0, nudge=1.0, negative=NEGATIVE, skip_layers=[1], **SIZE
    )
    # Step 1 of the default window is the last but one on the way to noise.
    np.testing.assert_array_equal(skipping.trajectory[: STEPS - 1], ours.trajectory[: STEPS - 1])
    assert relative(skipping.trajectory[STEPS - 1], ours.trajectory[STEPS - 1]) > 1e-3


def test_any_layers_windows_scales_and_texts_are_one_program(case, noise, compilations):
    options = dict(skip_layers=[1], skip_window=(0, 3))
    generate(case, noise, **options)
    before = compilations()
    generate(case, noise, skip_layers=[0, 2], skip_scale=1.5, skip_window=(4, 8), negative="red", bypass=[1])
    assert compilations() == before


@pytest.mark.parametrize("steps", [1, 2, 8, 28, 50])
@pytest.mark.parametrize("dynamic", [False, True])
def test_the_schedule_is_diffusers(steps, dynamic):
    config = {**SCHEDULER, "use_dynamic_shifting": dynamic}
    scheduler = FlowMatchEulerDiscreteScheduler(**config)
    scheduler.set_timesteps(steps, mu=1.15 if dynamic else None)
    np.testing.assert_allclose(SD3.schedule(config).sigmas(steps, 4096), scheduler.sigmas.numpy(), atol=1e-7)


def test_t5_may_be_absent(tmp_path, noise):
    flow, pipe = made("medium", tmp_path, with_t5=False)
    assert "t5" not in flow.info.configs and flow.prompts.words == 23 + 256
    with torch.no_grad():
        text, _, _, _ = pipe.encode_prompt(PROMPTS, None, None, do_classifier_free_guidance=False)
    ours = flow.encode_prompts(PROMPTS)
    # Channels that are zero for every token are left out.
    assert relative(ours.text, text[..., :34]) <= NETWORK_LIMIT and not text[..., 34:].any()
    case = Case("medium", flow, pipe, Reference(pipe.transformer, ROWS, COLUMNS, []))
    theirs = packed(
        pipe(
            PROMPTS[1], height=HEIGHT, width=WIDTH, num_inference_steps=STEPS, guidance_scale=5.0,
            negative_prompt=NEGATIVE, latents=unpacked(torch.tensor(noise)[None], ROWS, COLUMNS),
            output_type="latent",
        ).images
    )  # fmt: skip
    assert relative(generate(case, noise), theirs) <= METHOD_LIMIT


@pytest.mark.parametrize(
    "ask, message",
    [
        (lambda flow: flow.generate(["a"], height=16, width=16 * 11), "width of this model are at most"),
        (lambda flow: flow.generate(["a"], negative=["b", "c"]), "negative must be one text or 1"),
        (lambda flow: flow.generate(["a"], steps=3, skip_layers=[1]), "default skip_window 1 1 must hold"),
        (lambda flow: flow.generate(["a"], steps=3, skip_layers=[1], skip_window=(2, 4)), "skip_window 2 4"),
        (lambda flow: flow.generate(["a"], skip_layers=[1], skip_window=[1]), "two whole numbers"),
        (lambda flow: flow.generate(["a"], skip_layers=[9]), "no layer 9"),
        (lambda flow: flow.generate(["a"], skip_layers=[1], skip_scale=float("nan")), "skip_scale must be"),
        (lambda flow: flow.edit("a", ["b"], attentions="some"), "unknown attentions"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_in_one_line(ask, message, case):
    with pytest.raises(SettingError, match=message):
        ask(case.flow)


def test_settings_of_other_models_are_refused(case, flow, noise):
    for ask in (lambda: flow.generate(["a"], negative="b"), lambda: flow.edit("a", ["b"], negative="b")):
        with pytest.raises(SettingError, match="takes no negative prompts"):
            ask()
    with pytest.raises(SettingError, match="have one attention"):
        flow.edit("a", ["b"], attentions="joint")
    shifting = LayerControl.none(1, 1, case.layers).shifting_keys([0], 1.0, 0.0)
    with pytest.raises(SettingError, match="no rotary positions"):
        case.flow.denoise(
            noise[None], case.flow.encode_prompts(["a"]), shifting, guidance=np.ones(1, np.float32),
            height=HEIGHT, width=WIDTH,
        )  # fmt: skip
