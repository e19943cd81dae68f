"""Float32 parity of each network with diffusers and transformers, by what these said of the same inputs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import relative

from sflow_jax.models.flux1 import FluxConditioning
from sflow_jax.pictures.canvas import Canvas

LIMIT = 1e-4
pytestmark = pytest.mark.quick


@pytest.fixture(scope="module")
def answers(published_folder) -> dict[str, np.ndarray]:
    return dict(np.load(published_folder / "answers.npz"))


def test_t5_agrees_with_transformers(flow, answers):
    ours = jax.jit(lambda m, i: m(i))(flow.prompts.fetch_t5(), answers["t5.ids"])
    assert relative(ours, answers["t5.states"]) <= LIMIT


def test_clip_agrees_with_transformers(flow, answers):
    states, pooled = jax.jit(lambda m, i: m(i))(flow.prompts.clip, answers["clip.ids"])
    assert relative(states, answers["clip.states"]) <= LIMIT
    assert relative(pooled, answers["clip.pooled"]) <= LIMIT


def test_autoencoder_agrees_with_diffusers(flow, answers):
    mean, log_variance = jax.jit(lambda m, x: m.encode(x))(flow.autoencoder, answers["autoencoder.pictures"])
    assert relative(mean, answers["autoencoder.mean"]) <= LIMIT
    assert relative(log_variance, answers["autoencoder.log_variance"]) <= LIMIT
    decoded = jax.jit(lambda m, x: m.decode(x))(flow.autoencoder, mean)
    assert relative(decoded, answers["autoencoder.decoded"]) <= LIMIT


def test_transformer_agrees_with_diffusers(flow, answers):
    def velocity(transformer, latents, text, pooled, guidance):
        conditioning, canvas = FluxConditioning(text, pooled), Canvas.of(48, 64, 16)
        sigma = jnp.full(2, 0.7)
        return transformer(latents, conditioning, sigma=sigma, guidance=guidance, canvas=canvas).velocity

    inputs = (answers[f"transformer.{name}"] for name in ("latents", "text", "pooled", "guidance"))
    ours = jax.jit(velocity)(flow.transformer, *inputs)
    assert relative(ours, answers["transformer.velocity"]) <= LIMIT
