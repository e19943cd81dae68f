"""The training code at tiny sizes, and the weights that it made."""

import dataclasses
import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from flax import nnx
from safetensors.numpy import load_file
from sflow_convert import engine, vision
from transformers import AutoTokenizer

from sflow_jax.catalogue import ASSETS
from sflow_jax.families.sd3 import SD3
from sflow_jax.measures.metrics import psnr
from sflow_jax.models.autoencoder import Autoencoder, AutoencoderConfig
from sflow_jax.models.clip import ClipText
from sflow_jax.models.clip_vision import Clip, ClipConfig
from sflow_jax.models.dinov2 import Dinov2, Dinov2Config
from sflow_jax.models.flux1 import FluxConditioning, FluxConfig
from sflow_jax.models.layers import parameters
from sflow_jax.models.t5 import T5Config, T5Encoder
from sflow_jax.painter import decode_latents
from sflow_jax.pictures.canvas import Canvas
from sflow_jax.pictures.files import to_network, to_unit
from sflow_jax.pictures.latents import unpack
from sflow_jax.sampling.schedule import Schedule
from sflow_jax.toyworld.attributes import ATTRIBUTES
from sflow_jax.toyworld.captions import words
from sflow_jax.toyworld.scenes import sample_scene
from sflow_jax.toyworld.train.export import write_network
from sflow_jax.toyworld.train.flow import (
    SIGMA_MEAN,
    SIGMA_SPREAD,
    Teacher,
    World,
    distill_stage,
    encode,
    initial_flux,
    noised,
    preview_captions,
    sample,
    sample_sigmas,
    without_captions,
)
from sflow_jax.toyworld.train.hf import SCHEDULER, clip_config, dinov2_config
from sflow_jax.toyworld.train.loop import Checkpoints, Recipe, Run, Stage, initial_state, train
from sflow_jax.toyworld.train.optimizer import matrices, named_leaves, update_rule
from sflow_jax.toyworld.train.plan import Plan
from sflow_jax.toyworld.train.pool import load_pool
from sflow_jax.toyworld.train.sd3 import Sd3World, initial_sd3, sd3_stage, started_from_flux
from sflow_jax.toyworld.train.tokenizers import TEXT_TOKENS, save_tokenizers
from sflow_jax.toyworld.train.vae import Whitening, save_reconstructions


class Killed(Exception):
    """Stands for a kill signal."""


def line_stage(dies_at: int | None = None) -> Stage:
    """Fit a line to noisy points, 12 steps; optionally dies while it makes a batch."""
    batches = itertools.count()

    def batch(rng: np.random.Generator) -> dict[str, np.ndarray]:
        if next(batches) == dies_at:
            raise Killed
        return {"x": rng.normal(size=(8, 3)).astype(np.float32)}

    def loss(model, frozen, batch, key):
        target = batch["x"].sum(axis=1, keepdims=True) + 0.1 * jax.random.normal(key, (len(batch["x"]), 1))
        return jnp.mean((model(batch["x"]) - target) ** 2), {}

    return Stage(
        "line",
        Recipe(12, 8, 0.05, warmup=2, average=0.9),
        lambda seed: nnx.Linear(3, 1, rngs=nnx.Rngs(seed)),
        loss,
        batch,
    )


def test_a_killed_run_ends_as_an_uninterrupted_one(tmp_path):
    run = Run(tmp_path / "uninterrupted", seed=3, progress=False)
    expected = train(line_stage(), run)
    killed = Run(tmp_path / "killed", seed=3, save_minutes=0.0, progress=False)
    with pytest.raises(Killed):
        train(line_stage(dies_at=5), killed)
    assert Checkpoints(killed.folder / "line").newest().name == "step_5"
    resumed = train(line_stage(), killed)
    jax.tree.map(np.testing.assert_array_equal, expected, resumed)
    logs = [(folder / "line" / "log.jsonl").read_text() for folder in (run.folder, killed.folder)]
    assert logs[0] == logs[1]


def test_training_improves_and_a_time_limit_only_pauses(tmp_path):
    run = Run(tmp_path, minutes=0.0, progress=False)
    assert int(train(line_stage(), run).step) == 0
    state = train(line_stage(), Run(tmp_path, progress=False))
    before = initial_state(line_stage(), 0).params
    truth = np.ones((3, 1))
    assert np.abs(state.params.kernel[...] - truth).sum() < np.abs(before.kernel[...] - truth).sum()


def test_another_seed_gives_other_weights(tmp_path):
    states = [train(line_stage(), Run(tmp_path / str(seed), seed=seed, progress=False)) for seed in (0, 1)]
    assert not np.array_equal(*(state.params.kernel[...] for state in states))


def test_pool_agrees_with_scenes_and_is_kept(tmp_path):
    pool = load_pool(tmp_path, 7, seed=5, size=16)
    assert pool.pictures.shape == (7, 16, 16, 3)
    assert (pool.named.max(axis=0) < [len(values) for values in ATTRIBUTES.values()]).all()
    before = (tmp_path / "pictures.npy").stat().st_mtime_ns
    again = load_pool(tmp_path, 7, seed=5, size=16)
    assert (tmp_path / "pictures.npy").stat().st_mtime_ns == before
    np.testing.assert_array_equal(pool.t5_ids, again.t5_ids)
    assert np.abs(pool.unnamed).max() <= 1


@pytest.mark.parametrize("folder, start, end, pad", [("tokenizer", True, None, None), ("tokenizer_2", False, 1, 0)])
def test_tokenizers_say_every_caption(tmp_path, folder, start, end, pad):
    save_tokenizers(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / folder)
    rng = np.random.default_rng(0)
    captions = [sample_scene(rng).caption(rng) for _ in range(200)]
    ids = np.asarray(tokenizer(captions, padding="max_length", truncation=True)["input_ids"])
    assert ids.shape == (200, TEXT_TOKENS)
    assert tokenizer.model_max_length == TEXT_TOKENS
    assert tokenizer.unk_token_id not in ids
    assert (ids == tokenizer.eos_token_id).any(axis=1).all()
    assert tokenizer.decode(ids[0], skip_special_tokens=True).split() == words(captions[0])
    if end is not None:
        assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == (end, pad)
    else:
        # CLIP's end must not be the legacy number, which would change where the model looks.
        assert tokenizer.pad_token_id == tokenizer.eos_token_id == Plan.embedded().clip.text.end_of_text != 2


def test_sigmas_are_logit_normal():
    sigmas = np.concatenate([np.asarray(sample_sigmas(jax.random.key(i), 64)) for i in range(40)])
    logits = np.log(sigmas / (1 - sigmas))
    assert abs(logits.mean() - SIGMA_MEAN) < 0.02
    assert abs(logits.std() - SIGMA_SPREAD) < 0.03


def test_noising_ends_at_picture_and_noise():
    picture, noise = jnp.ones((2, 3, 5)), jnp.full((2, 3, 5), 7.0)
    ends = noised(picture, jnp.array([0.0, 1.0]), noise)
    np.testing.assert_array_equal(ends, np.stack([picture[0], noise[0]]))


def test_whitening_goes_into_the_autoencoder():
    plan, rng = Plan.tiny(), np.random.default_rng(0)
    model = Autoencoder(plan.vae, rngs=nnx.Rngs(0))
    pictures = jnp.asarray(rng.uniform(-1, 1, (6, 16, 16, 3)), jnp.float32)
    means, _ = model.encode(pictures)
    whitening = Whitening.measured(np.asarray(means))
    latents = whitening(np.asarray(means))
    assert abs(latents.mean()) < 1e-5 and abs(latents.std() - 1) < 1e-5
    before, after = (np.linalg.eigvalsh(np.cov(np.asarray(x).reshape(-1, x.shape[-1]).T)) for x in (means, latents))
    assert after.max() / after.min() < 0.5 * before.max() / before.min()
    whitened = whitening.autoencoder(model)
    mixed, log_variance = whitened.encode(pictures)
    np.testing.assert_allclose((mixed - whitening.shift) * whitening.scale, latents, atol=1e-4)
    assert len(np.unique(log_variance)) == 1
    np.testing.assert_allclose(whitened.decode(mixed), model.decode(means), atol=1e-4)


def test_reconstructions_are_shown_and_measured(tmp_path):
    model = Autoencoder(Plan.tiny().vae, rngs=nnx.Rngs(0))
    drawings = np.stack([sample_scene(np.random.default_rng(i)).draw(16) for i in range(3)])
    save_reconstructions(model, drawings, tmp_path, 7)
    decoded = np.clip(model.decode(model.encode(jnp.asarray(to_network(drawings)))[0]) / 2 + 0.5, 0, 1)
    expected = np.mean([psnr(*pair) for pair in zip(decoded, to_unit(drawings))])
    step, decibel = (tmp_path / "psnr.txt").read_text().split()
    assert step == "7" and abs(float(decibel) - expected) < 0.01
    assert (tmp_path / "grid_7.png").exists()


def test_an_untrained_transformer_predicts_zero():
    config = Plan.tiny().flux
    model = initial_flux(config, 0)
    ones = jnp.ones((2,))
    output = model(
        jnp.ones((2, 4, config.in_channels)),
        FluxConditioning(jnp.ones((2, 3, config.text_width)), jnp.ones((2, config.pooled_width))),
        sigma=ones,
        guidance=ones,
        canvas=Canvas.of(16, 16, 8),
    )
    np.testing.assert_array_equal(output.velocity, 0)


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> World:
    """A few scenes and random networks."""
    plan = Plan.tiny()
    pool = load_pool(tmp_path_factory.mktemp("pool"), 8, seed=0, size=plan.size)
    latents = np.random.default_rng(0).normal(size=(8, 4, 4, plan.vae.latent_channels)).astype(np.float16)
    whitening = Whitening.measured(latents)
    autoencoder = whitening.autoencoder(Autoencoder(plan.vae, rngs=nnx.Rngs(0)))
    clip, t5 = ClipText(plan.clip.text, rngs=nnx.Rngs(1)), T5Encoder(plan.t5, rngs=nnx.Rngs(2))
    return World(pool, latents, whitening, pool, autoencoder, clip, t5)


def test_a_teacher_is_guided_by_a_branch_without_captions(world):
    """Its pictures, against Euler steps written out."""
    model = spread(initial_flux(Plan.tiny().flux, 0))
    captions = preview_captions(world.held_out, 3)[0]
    canvas, ones = world.canvas, jnp.ones(3)
    branches = encode(world.encoders, captions), without_captions(world.encoders, 3)
    latents = jax.random.normal(jax.random.key(0), (3, canvas.tokens, model.config.in_channels))
    sigmas = Schedule.from_hf(SCHEDULER).sigmas(4, canvas.tokens)
    velocity = jax.jit(lambda x, row, sigma: model(x, row, sigma=sigma, guidance=ones, canvas=canvas).velocity)
    for sigma, following in itertools.pairwise(sigmas):
        prompted, negative = (velocity(latents, branch, sigma * ones) for branch in branches)
        latents = latents + (following - sigma) * (negative + 2.5 * (prompted - negative))
    whitened = unpack(latents, canvas.rows, canvas.columns) / world.whitening.scale + world.whitening.shift
    expected = jnp.clip(world.autoencoder.decode(whitened) / 2 + 0.5, 0, 1)
    np.testing.assert_allclose(sample(Teacher(model), world, captions, 2.5, steps=4), expected, atol=1e-4)


def test_a_student_learns_on_all_devices_and_shows_what_it_paints_on_the_first(world, tmp_path):
    teacher = spread(initial_flux(Plan.tiny().flux, 0))
    state = train(distill_stage(teacher, Recipe(1, 8, 1e-2), world, tmp_path), Run(tmp_path, progress=False))
    assert len(state.params.image_in.kernel[...].devices()) == 8
    assert 0 < json.loads((tmp_path / "distill" / "log.jsonl").read_text())["loss"] < 10
    assert (tmp_path / "distill" / "grid_1.png").exists()


def test_an_sd3_starts_from_the_layers_of_a_flux():
    """And sees the same text at the same time, its two pooled vectors being projected."""
    plan, rng = Plan.tiny(), np.random.default_rng(0)
    flux, projection = spread(initial_flux(plan.flux, 0)), rng.normal(size=(16, 16)).astype(np.float32)
    model = started_from_flux(spread(initial_sd3(plan.sd3, 0)), flux, projection)
    vector, sigma = rng.normal(size=(2, 16)).astype(np.float32), jnp.array([0.3, 0.8])
    pooled = jnp.concatenate([vector @ projection] * 2, axis=-1)
    expected = flux.embed(sigma, jnp.ones(2), jnp.asarray(vector))
    np.testing.assert_allclose(model.embed(sigma, pooled), expected, atol=2e-4)
    ours, theirs = parameters(model), parameters(flux)
    for stream in ("image", "text"):
        np.testing.assert_array_equal(
            ours[f"dual_blocks.{stream}.mlp_in.kernel"], theirs[f"double_blocks.{stream}.mlp_in.kernel"]
        )
        np.testing.assert_array_equal(
            ours[f"joint_blocks.{stream}.mlp_out.kernel"], theirs["single_blocks.mlp_out.kernel"]
        )
    # The gate of what a FLUX has no equal of.
    assert not ours["dual_blocks.image.modulation.kernel"][..., -16:].any()


def test_an_sd3_learns_from_latents_that_are_the_drawings(tmp_path):
    pool = load_pool(tmp_path / "pool", 4, seed=0, size=64)
    learnt = Sd3World.embedded(pool, pool, tmp_path / "latents.npy")
    again = decode_latents(learnt.autoencoder, learnt.latents.astype(np.float32), family=SD3, canvas=learnt.canvas)
    assert psnr(np.asarray(again), to_unit(np.asarray(pool.pictures))) > 28


def test_an_untrained_sd3_errs_by_the_whole_velocity(world, tmp_path):
    plan, key = Plan.tiny(), jax.random.key(3)
    text = dataclasses.replace(plan.clip.text, projection=16)
    encoders = {"clip": ClipText(text, rngs=nnx.Rngs(1)), "t5": world.t5}
    latents = np.random.default_rng(0).normal(size=(8, 4, 16)).astype(np.float16)
    sd3_world = Sd3World(world.pool, latents, world.held_out, world.autoencoder, encoders)
    stage = sd3_stage(plan.sd3, Recipe(2, 8, 1e-2), sd3_world, initial_flux(plan.flux, 0), tmp_path)
    batch = stage.batch(np.random.default_rng(1))
    loss, _ = jax.jit(stage.loss)(initial_sd3(plan.sd3, 0), encoders, batch, key)
    noise = jax.random.normal(jax.random.split(key)[1], batch["latents"].shape)
    np.testing.assert_allclose(loss, np.mean((noise - batch["latents"]) ** 2), rtol=1e-5)


def test_positions_are_not_learned():
    params = {"position_table": jnp.ones((4, 4)), "kernel": jnp.ones((4, 4))}
    rule = update_rule(lambda step: 1.0, weight_decay=0.1, clip=1.0, orthogonal=False)
    updates, _ = rule.update(params, rule.init(params), params)
    assert not updates["position_table"].any() and updates["kernel"].all()


def pictures(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(0).normal(size=(2, height, width, 3)).astype(np.float32)


def spread(network: nnx.Module) -> nnx.Module:
    """The network with noise on every parameter, so that none can hide as zero or one."""
    rng = np.random.default_rng(9)

    def moved(x: jax.Array) -> jax.Array:
        # Through half precision, in which the folder stores it.
        return jnp.asarray((np.asarray(x) + 0.1 * rng.normal(size=x.shape)).astype(np.float16), jnp.float32)

    return jax.tree.map(moved, network)


@pytest.mark.parametrize("swiglu", [False, True])
@pytest.mark.parametrize("registers", [0, 3])
def test_exported_dinov2_agrees_with_transformers(tmp_path, swiglu, registers):
    config = Dinov2Config(
        width=24, heads=2, layers=2, picture_size=16, patch_size=4, swiglu=swiglu, registers=registers
    )
    network = spread(Dinov2(config, rngs=nnx.Rngs(0)))
    written = dinov2_config(config)
    if registers:
        written |= {"num_register_tokens": registers, "model_type": "dinov2_with_registers"}
    write_network(tmp_path / "model.safetensors", network, vision.dinov2_table(config), written)
    assert Dinov2Config.from_hf(json.loads((tmp_path / "config.json").read_text())) == config
    kind = transformers.Dinov2WithRegistersModel if registers else transformers.Dinov2Model
    theirs = kind.from_pretrained(tmp_path, dtype=torch.float32).eval()
    for size in ((16, 16), (20, 28)):  # the second resizes the position embedding
        with torch.no_grad():
            expected = theirs(torch.tensor(pictures(*size)).permute(0, 3, 1, 2)).last_hidden_state.numpy()
        np.testing.assert_allclose(network(jnp.asarray(pictures(*size))), expected, atol=2e-5, rtol=1e-4)


def test_exported_clip_agrees_with_transformers(tmp_path):
    plan = Plan.tiny()
    network = spread(Clip(plan.clip, rngs=nnx.Rngs(0)))
    write_network(tmp_path / "model.safetensors", network, vision.clip_table(plan.clip), clip_config(plan.clip))
    assert ClipConfig.from_hf(json.loads((tmp_path / "config.json").read_text())) == plan.clip
    theirs = transformers.CLIPModel.from_pretrained(tmp_path, dtype=torch.float32).eval()
    end = plan.clip.text.end_of_text
    ids = np.array([[end - 1, 4, 11, end, end], [end - 1, 7, end, end, end]])
    images = pictures(16, 16)
    with torch.no_grad():
        expected = theirs(input_ids=torch.tensor(ids), pixel_values=torch.tensor(images).permute(0, 3, 1, 2))
    texts, seen = network.text_features(jnp.asarray(ids)), network.picture_features(jnp.asarray(images))
    np.testing.assert_allclose(texts, expected.text_embeds.numpy(), atol=1e-5)
    np.testing.assert_allclose(seen, expected.image_embeds.numpy(), atol=1e-5)


@pytest.mark.parametrize(
    "network, table, config",
    [
        (Dinov2, vision.dinov2_table, Dinov2Config.giant()),
        (Dinov2, vision.dinov2_table, Dinov2Config(registers=4)),
        (Clip, vision.clip_table, ClipConfig.large()),
    ],
)
def test_published_sizes_fit_the_tables(network, table, config):
    abstract = nnx.eval_shape(lambda: network(config, rngs=nnx.Rngs(0)))
    shapes = {path: leaf.shape for path, leaf in parameters(abstract).items()}
    reads = engine.plan_reads(table(config), shapes)
    engine.check(reads, engine.source_shapes(reads), shapes)


def test_muon_turns_block_kernels_and_leaves_the_rest():
    params = {"flux": initial_flux(Plan.tiny().flux, 0)}
    chosen = {name for name, axes in matrices(named_leaves(params)).items() if axes is not None}
    assert chosen and all("blocks" in name and name.endswith("kernel.value") for name in chosen)
    assert not any("modulation" in name for name in chosen)
    kernels = {"blocks": {"mlp_in": {"kernel": jnp.asarray(np.random.default_rng(0).normal(size=(2, 8, 16)))}}}
    rule = update_rule(lambda step: 1.0, weight_decay=0.0, clip=1.0, orthogonal=True)
    updates, _ = jax.jit(rule.update)(kernels, rule.init(kernels), kernels)
    before, after = (
        np.linalg.svd(np.asarray(tree["blocks"]["mlp_in"]["kernel"][0]), compute_uv=False)
        for tree in (kernels, updates)
    )
    assert after.max() / after.min() < 2 < before.max() / before.min()


def test_the_shipped_folder_is_small_and_in_half_precision():
    files = [path for path in ASSETS.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 32 * 2**20
    weights = [path for path in files if path.suffix == ".safetensors"]
    assert {path.parent.name for path in weights} == {
        "transformer", "vae", "text_encoder", "text_encoder_2", "clip", "dinov2", "reader",
    }  # fmt: skip
    for path in weights:
        assert {tensor.dtype for tensor in load_file(path).values()} == {np.dtype(np.float16)}, path


def test_the_shipped_configs_are_the_plan():
    plan, read = Plan.embedded(), lambda name: json.loads((ASSETS / name / "config.json").read_text())
    assert FluxConfig.from_hf(read("transformer")) == plan.flux
    assert T5Config.from_hf(read("text_encoder_2")) == plan.t5
    assert ClipConfig.from_hf(read("clip")) == plan.clip
    assert Dinov2Config.from_hf(read("dinov2")) == plan.dino
    shipped = AutoencoderConfig.from_hf(read("vae"))
    assert dataclasses.replace(plan.vae, scaling_factor=1.0, shift_factor=0.0) == dataclasses.replace(
        shipped, scaling_factor=1.0, shift_factor=0.0
    )
