"""The embedded model means what it paints: prompts, edits and layer sets, read off its pictures."""

import dataclasses

import numpy as np
import pytest
import torch
from conftest import embedded_flow, relative
from diffusers import FluxPipeline

from sflow_jax.catalogue import ASSETS
from sflow_jax.measures.metrics import cosine_similarity, psnr
from sflow_jax.pictures.files import to_unit
from sflow_jax.pictures.latents import draw_noise
from sflow_jax.pipeline import StableFlow
from sflow_jax.toyworld.reader import AttributeReader
from sflow_jax.toyworld.scenes import Scene, sample_scene

WORDING = 3
EDITS = ({"pose": "sitting"}, {"place": "snow"}, {"hat": "none"}, {"species": "rabbit"})


@pytest.fixture(scope="module")
def toy(tmp_path_factory) -> StableFlow:
    return embedded_flow("toyworld", tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def reader() -> AttributeReader:
    return AttributeReader()


@pytest.fixture(scope="module")
def source() -> Scene:
    return Scene(species="dog", colour="orange", hat="blue", object="ball", object_colour="red", pose="standing")


@pytest.fixture(scope="module")
def edits(toy, source) -> dict:
    """The same four edits with each layer set, all of one shape."""
    captions = [source.edited(**change).caption(WORDING) for change in EDITS]
    options = {"seed": 1, "edits_at_once": 4, "progress": False}
    return {
        layers: toy.edit(source.caption(WORDING), captions, layers=layers, **options)
        for layers in ("vital", "none", "all")
    }


def test_drawings_are_read_right(reader):
    rng = np.random.default_rng(3)
    scenes = [sample_scene(rng, "held-out") for _ in range(192)]
    named = reader(to_unit(np.stack([scene.draw(64) for scene in scenes]))).named
    truth = [scene.attributes() for scene in scenes]
    for name in truth[0]:
        assert np.mean([row[name] == true[name] for row, true in zip(named, truth)]) >= 0.97, name


def test_pictures_show_their_captions(toy, reader):
    rng = np.random.default_rng(4)
    scenes = [sample_scene(rng, "held-out") for _ in range(32)]
    pictures = toy.generate([scene.caption(i) for i, scene in enumerate(scenes)], steps=15, progress=False)
    named = reader(pictures.images).named
    for name in scenes[0].attributes():
        right = np.mean([row[name] == scene.attributes()[name] for row, scene in zip(named, scenes)])
        assert right >= 0.85, f"{name} right in {right:.0%}"


def test_edits_happen_unless_every_layer_injects(edits, reader, source):
    """The change is read off every edit without injection, and off none with injection everywhere."""
    for layers, happens in (("none", True), ("all", False)):
        for change, named in zip(EDITS, reader(edits[layers].images[1:]).named):
            ((name, value),) = change.items()
            assert (named[name] == value) == happens, f"{name} → {value} with {layers}"


def test_a_pose_changes_and_the_scene_stays(edits, reader, source):
    """The paper's first example: non-rigid, by injection in the vital layers."""
    named = reader(edits["vital"].images[1:2]).named[0]
    assert named["pose"] == "sitting"
    unchanged = ("species", "colour", "hat", "object", "object_colour", "side", "place")
    assert {name: named[name] for name in unchanged} == {name: source.attributes()[name] for name in unchanged}


def test_injecting_everywhere_forbids_edits_and_nowhere_forgets_the_source(edits, reader):
    """The paper's ablation in small: all layers copy the source, no layers keep least of it."""
    closeness = {
        layers: np.mean([psnr(image, edit.images[0]) for image in edit.images[1:]])
        for layers, edit in edits.items()
    }
    assert closeness["all"] > closeness["vital"] > closeness["none"]


def test_a_drawing_survives_inversion(toy, reader):
    scene = dataclasses.replace(Scene(), species="bear", colour="purple", place="beach")
    drawing = scene.draw(64)
    inversion = toy.invert(drawing, scene.caption(WORDING), steps=20, progress=False)
    again = toy.edit(
        scene.caption(WORDING),
        [scene.caption(WORDING)],
        inversion=inversion,
        replay="residual",
        guidance=1.0,
        layers="none",
        unnudge=True,
        progress=False,
    )
    truth = to_unit(drawing)
    assert psnr(again.images[1], truth) > 25
    features = reader(np.stack([again.images[1], truth])).features
    assert cosine_similarity(features[:1], features[1:])[0] > 0.9


def test_diffusers_paints_the_same_picture_from_the_embedded_folder(toy):
    """Tokenizers, text encoders, schedule, transformer and autoencoder at once, in the published pipeline."""
    prompt, steps = "a red cat is sitting in snow", 4
    noise = draw_noise(0, 64, 64)
    ours = toy.generate([prompt], steps=steps, guidance=3.5, noise=noise, progress=False)
    pipeline = FluxPipeline.from_pretrained(ASSETS, torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    theirs = pipeline(
        prompt,
        height=64,
        width=64,
        num_inference_steps=steps,
        guidance_scale=3.5,
        latents=torch.tensor(noise[None]),
        max_sequence_length=toy.prompts.t5_length,
        output_type="np",
    ).images
    assert relative(ours.images, theirs) <= 1e-3


def test_the_embedded_folder_is_small():
    assert sum(path.stat().st_size for path in ASSETS.rglob("*") if path.is_file()) <= 32 * 2**20
