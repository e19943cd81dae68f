"""Float32 parity of the method with diffusers; that of each network is in test_networks.py."""

import jax
import jax.numpy as jnp
import numpy as np
import published
import pytest
import torch
from conftest import relative
from reference import Reference
from sflow_convert.job import convert
from sflow_convert.layouts import open_source
from transformers.models.t5.modeling_t5 import T5Attention

from sflow_jax.models.flux1 import FluxConditioning, position_ids
from sflow_jax.models.t5 import position_buckets
from sflow_jax.pictures.canvas import Canvas
from sflow_jax.pictures.files import fit_picture, to_network
from sflow_jax.pipeline import StableFlow

NETWORK_LIMIT = 1e-4
METHOD_LIMIT = 1e-3
EFFECT_LIMIT = 2e-2
STEPS = 8
HEIGHT, WIDTH = 48, 64
PROMPTS = ["a red cat sits in snow", "a red cat lies in snow", "a blue dog"]


@pytest.fixture(scope="module")
def oracle() -> Reference:
    """The diffusers transformer at this file's size and steps."""
    model = published.transformer()
    from diffusers import FlowMatchEulerDiscreteScheduler
    from diffusers.pipelines.flux.pipeline_flux import calculate_shift

    scheduler = FlowMatchEulerDiscreteScheduler(**published.SCHEDULERS["dev"])
    tokens = HEIGHT * WIDTH // 256
    shift = calculate_shift(tokens, 256, 4096, 0.5, 1.15)
    scheduler.set_timesteps(sigmas=np.linspace(1, 1 / STEPS, STEPS), mu=shift)
    ids = torch.tensor(position_ids(Canvas.of(HEIGHT, WIDTH, 16)))
    return Reference(model, ids, scheduler.sigmas.tolist())


@pytest.fixture(scope="module")
def noise() -> np.ndarray:
    return np.random.default_rng(0).standard_normal((HEIGHT * WIDTH // 256, 16)).astype(np.float32)


def features(flow, prompts=PROMPTS):
    """Our conditioning as torch tensors; its own parity is tested below."""
    made = flow.encode_prompts(prompts)
    return torch.tensor(np.asarray(made.text)), torch.tensor(np.asarray(made.pooled))


def repeated(noise, batch):
    return torch.tensor(noise).repeat(batch, 1, 1)


@pytest.mark.parametrize("tokens, buckets, reach", [(512, 32, 128), (77, 12, 18)])
def test_t5_distances_fall_into_the_same_buckets(tokens, buckets, reach):
    """At FLUX's own length too, where one float32 rounding would move a pair into the next bucket."""
    distance = torch.arange(tokens)[None] - torch.arange(tokens)[:, None]
    theirs = T5Attention._relative_position_bucket(distance, True, buckets, reach)
    np.testing.assert_array_equal(position_buckets(tokens, buckets, reach), theirs.numpy())


def test_tokenizers_pad_like_the_published_pipeline(flow):
    from sflow_jax.families.text import tokenize

    tokenizer = published.t5_tokenizer()
    theirs = tokenizer("a red cat", padding="max_length", max_length=13, truncation=True, return_tensors="np")
    assert (tokenize(flow.prompts.t5_tokenizer, "a red cat", 13, "T5") == theirs.input_ids).all()


def test_a_transformer_without_guidance_agrees_with_diffusers(oracle, tmp_path):
    published.write_diffusers(tmp_path / "source", "schnell")
    convert(open_source(tmp_path / "source"), tmp_path / "made", progress=False)
    flow = StableFlow.load(tmp_path / "made")
    oracle = Reference(published.transformer("schnell"), oracle.image_ids, oracle.sigmas)
    generator = np.random.default_rng(4)
    latents = generator.standard_normal((2, *oracle.image_ids.shape[:1], 16)).astype(np.float32)
    text = generator.standard_normal((2, 11, 24)).astype(np.float32)
    pooled = generator.standard_normal((2, 20)).astype(np.float32)
    guidance = np.float32([1.0, 4.5])
    theirs = oracle.velocity(torch.tensor(latents), torch.tensor(text), torch.tensor(pooled), 0.7, guidance)

    def velocity(transformer, latents, text, pooled, guidance):
        sigma = jnp.full(2, 0.7)
        canvas = Canvas.of(HEIGHT, WIDTH, 16)
        conditioning = FluxConditioning(text, pooled)
        return transformer(latents, conditioning, sigma=sigma, guidance=guidance, canvas=canvas).velocity

    ours = jax.jit(velocity)(flow.transformer, latents, text, pooled, guidance)
    assert relative(ours, theirs) <= NETWORK_LIMIT


def generate(flow, noise, **options):
    return flow.generate(
        PROMPTS[:2],
        steps=STEPS,
        guidance=[1.5, 4.0],
        height=HEIGHT,
        width=WIDTH,
        noise=noise,
        progress=False,
        **options,
    ).latents


def test_generation_agrees(flow, oracle, noise):
    theirs = oracle.denoise(repeated(noise, 2), *features(flow, PROMPTS[:2]), [1.5, 4.0])
    assert relative(generate(flow, noise), theirs) <= METHOD_LIMIT


@pytest.mark.parametrize("layer", range(5))
def test_bypass_of_every_layer_agrees_and_matters(layer, flow, oracle, noise):
    plain = oracle.denoise(repeated(noise, 2), *features(flow, PROMPTS[:2]), [1.5, 4.0])
    theirs = oracle.denoise(repeated(noise, 2), *features(flow, PROMPTS[:2]), [1.5, 4.0], bypass=[layer])
    ours = generate(flow, noise, bypass=[layer])
    assert relative(ours, theirs) <= METHOD_LIMIT
    assert relative(ours - generate(flow, noise), theirs - plain) <= EFFECT_LIMIT


@pytest.mark.parametrize("layers", [[0], [1, 4], [2, 3], "all"])
def test_edits_of_generated_pictures_agree_and_matter(layers, flow, oracle, noise):
    options = dict(steps=STEPS, guidance=[1.0, 3.0, 4.0], height=HEIGHT, width=WIDTH, noise=noise, progress=False)
    ours = flow.edit(PROMPTS[0], PROMPTS[1:], layers=layers, **options).latents
    plain_ours = flow.edit(PROMPTS[0], PROMPTS[1:], layers="none", **options).latents
    numbers = range(5) if layers == "all" else layers
    start = repeated(noise, 3), *features(flow), [1.0, 3.0, 4.0]
    theirs, plain = oracle.denoise(*start, inject=numbers), oracle.denoise(*start)
    assert relative(ours, theirs) <= METHOD_LIMIT
    assert relative(ours[1:] - plain_ours[1:], theirs[1:] - plain[1:]) <= EFFECT_LIMIT
    # The source only lends: its own path is the one without injection.
    assert relative(ours[0], plain[0]) <= METHOD_LIMIT


@torch.no_grad()
def image_latents(photo) -> torch.Tensor:
    """Packed, scaled latents of the photo as diffusers' pipeline packs them."""
    from diffusers import FluxPipeline

    pixels = to_network(fit_picture(photo, HEIGHT, WIDTH)[None])
    mean = published.autoencoder().encode(torch.tensor(pixels).permute(0, 3, 1, 2)).latent_dist.mean
    scaled = (mean - published.VAE["shift_factor"]) * published.VAE["scaling_factor"]
    return FluxPipeline._pack_latents(scaled, 1, 4, HEIGHT // 8, WIDTH // 8)


@pytest.mark.parametrize("nudge", [1.0, 1.15])
def test_inversion_agrees(nudge, flow, oracle, photo):
    theirs = oracle.invert(image_latents(photo) * nudge, *features(flow, PROMPTS[:1]))
    made = flow.invert(photo, PROMPTS[0], steps=STEPS, nudge=nudge, height=HEIGHT, width=WIDTH, progress=False)
    assert relative(made.trajectory, theirs) <= METHOD_LIMIT
    assert relative(made.sigmas, oracle.sigmas[::-1]) <= 1e-6


@pytest.mark.parametrize("layers", [[0, 3], "all"])
def test_edits_of_real_pictures_agree_and_matter(layers, flow, oracle, photo):
    text, pooled = features(flow)
    stored = oracle.invert(image_latents(photo) * 1.15, text[:1], pooled[:1])
    start = stored[-1].repeat(3, 1, 1), text, pooled, [1.0, 3.0, 3.0]
    numbers = range(5) if layers == "all" else layers
    theirs = oracle.denoise(*start, inject=numbers, stored=stored)
    plain = oracle.denoise(*start, stored=stored)
    inversion = flow.invert(photo, PROMPTS[0], steps=STEPS, height=HEIGHT, width=WIDTH, progress=False)
    ours, plain_ours = (
        flow.edit(PROMPTS[0], PROMPTS[1:], inversion=inversion, layers=chosen, progress=False).latents
        for chosen in (layers, "none")
    )
    assert relative(ours, theirs) <= METHOD_LIMIT
    assert relative(ours[1:] - plain_ours[1:], theirs[1:] - plain[1:]) <= EFFECT_LIMIT


def test_pictures_agree_with_the_published_decoder(flow, noise):
    from diffusers import FluxPipeline

    latents = noise[None]
    ours = flow.decode(latents, height=HEIGHT, width=WIDTH)
    unpacked = FluxPipeline._unpack_latents(torch.tensor(latents), HEIGHT, WIDTH, 8)
    with torch.no_grad():
        scaled = unpacked / published.VAE["scaling_factor"] + published.VAE["shift_factor"]
        theirs = (published.autoencoder().decode(scaled).sample / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1)
    assert relative(ours, theirs) <= NETWORK_LIMIT
