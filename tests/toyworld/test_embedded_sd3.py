"""The embedded SD3: its folder in diffusers, its meaning read off its pictures, and edits."""

import numpy as np
import pytest
import torch
from conftest import embedded_flow, relative
from diffusers import StableDiffusion3Pipeline
from reference_sd3 import unpacked

from sflow_jax.embedded import SD3_ASSETS, write_published
from sflow_jax.pictures.latents import draw_noise
from sflow_jax.pipeline import StableFlow
from sflow_jax.toyworld.reader import AttributeReader
from sflow_jax.toyworld.scenes import Scene, sample_scene

EDITS = {"pose": "sitting", "place": "snow", "colour": "purple", "species": "rabbit"}


@pytest.fixture(scope="module")
def toy(tmp_path_factory) -> StableFlow:
    return embedded_flow("toyworld-sd3", tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def reader() -> AttributeReader:
    return AttributeReader()


def test_its_own_files_are_small():
    assert sum(path.stat().st_size for path in SD3_ASSETS.rglob("*") if path.is_file()) <= 12e6


def test_pictures_show_their_captions(toy, reader):
    """Wholly right: every attribute of a caption at once."""
    rng = np.random.default_rng(4)
    scenes = [sample_scene(rng, "held-out") for _ in range(32)]
    pictures = toy.generate([scene.caption(i) for i, scene in enumerate(scenes)], steps=15, progress=False)
    right = [named == scene.attributes() for named, scene in zip(reader(pictures.images).named, scenes)]
    assert np.mean(right) >= 0.85


def test_drawings_are_edited(toy, reader):
    """Each edit happens, and the rest of what the caption says stays."""
    scene = Scene(species="dog", colour="orange", hat="blue", object="ball", object_colour="red", pose="standing")
    assert toy.info.vital_layers is not None
    captions = [scene.edited(**{name: value}).caption(3) for name, value in EDITS.items()]
    edited = toy.edit(scene.caption(3), captions, image=scene.draw(64), progress=False)
    kept = []
    for (name, value), named in zip(EDITS.items(), reader(edited.images[1:]).named):
        assert named[name] == value, f"{name} → {value}"
        kept += [named[other] == was for other, was in scene.attributes().items() if other != name]
    assert np.mean(kept) >= 0.9


def test_diffusers_paints_the_same_picture_from_the_published_folder(toy, tmp_path):
    """Tokenizers, three text encoders, schedule, both branches, transformer and autoencoder at once."""
    write_published("toyworld-sd3", tmp_path / "toy")
    pipeline = StableDiffusion3Pipeline.from_pretrained(tmp_path / "toy", torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    prompt, steps, guidance = "a red cat is sitting in snow", 4, 5.0
    noise = draw_noise(0, 64, 64)
    ours = toy.generate([prompt], steps=steps, guidance=guidance, noise=noise, progress=False)
    canvas = toy.info.canvas()
    theirs = pipeline(
        prompt,
        height=64,
        width=64,
        num_inference_steps=steps,
        guidance_scale=guidance,
        latents=unpacked(torch.tensor(noise)[None], canvas.rows, canvas.columns),
        max_sequence_length=toy.prompts.words - pipeline.tokenizer.model_max_length,
        output_type="np",
    ).images
    assert relative(ours.images, theirs) <= 1e-3
