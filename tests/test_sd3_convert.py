"""SD3's converter: the published sizes on the meta device, both layouts, and what a checkpoint is used for."""

import shutil
from pathlib import Path

import numpy as np
import published_sd3
import pytest
import torch
from commandline import run
from conftest import relative
from diffusers import SD3Transformer2DModel
from diffusers.loaders.single_file_utils import convert_sd3_transformer_checkpoint_to_diffusers as theirs_of
from safetensors.numpy import load_file, save_file
from sflow_convert import autoencoder, sd3, text_encoders
from sflow_convert.engine import ConversionError, check, export, plan_reads, source_shapes
from sflow_convert.job import convert
from sflow_convert.layouts import open_source
from sflow_convert.parts import rename_clip
from transformers import CLIPTextConfig, CLIPTextModelWithProjection

from sflow_jax.families.sd3 import SD3
from sflow_jax.models.autoencoder import AutoencoderConfig
from sflow_jax.models.clip import ClipTextConfig
from sflow_jax.models.layers import parameter_count, parameters
from sflow_jax.models.sd3 import Sd3Config
from sflow_jax.pipeline import StableFlow
from sflow_jax.settings import Placement
from sflow_jax.storage.checkpoint import abstract, load_info, load_network

SIZES = {"sample_size": 128, "attention_head_dim": 64, "joint_attention_dim": 4096, "pooled_projection_dim": 2048}
MEDIUM = {**SIZES, "num_layers": 24, "num_attention_heads": 24, "caption_projection_dim": 1536}
PUBLISHED = {
    "sd3-medium": (Sd3Config.medium(), 2_028_328_000, 683, {**MEDIUM, "pos_embed_max_size": 192}),
    "sd35-medium": (
        Sd3Config.medium_35(), 2_243_171_520, 909,
        {**MEDIUM, "pos_embed_max_size": 384, "dual_attention_layers": tuple(range(13)), "qk_norm": "rms_norm"},
    ),
    "sd35-large": (
        Sd3Config.large_35(), 8_056_627_520, 1_227,
        {**SIZES, "num_layers": 38, "num_attention_heads": 38, "caption_projection_dim": 2432,
         "pos_embed_max_size": 192, "qk_norm": "rms_norm"},
    ),
}  # fmt: skip
QUIET = {"steps": 2, "height": 48, "width": 64, "progress": False}
every_model = pytest.mark.parametrize("name", PUBLISHED)


def shapes_of(network: str, config) -> dict[str, tuple[int, ...]]:
    return {path: leaf.shape for path, leaf in parameters(abstract(SD3.networks[network].build, config)).items()}


def meta_state(build) -> dict[str, torch.Tensor]:
    with torch.device("meta"):
        return build().state_dict()


@every_model
def test_full_size_transformers_map_one_to_one(name):
    config, count, tensors, sizes = PUBLISHED[name]
    with torch.device("meta"):
        model = SD3Transformer2DModel(**sizes)
    state = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
    assert sum(tensor.numel() for tensor in model.parameters()) == count and len(state) == tensors
    targets = shapes_of("transformer", config)
    check(plan_reads(sd3.diffusers_table(config), targets), state, targets)
    assert parameter_count(abstract(SD3.networks["transformer"].build, config)) == count
    assert Sd3Config.from_hf(dict(model.config)) == config == SD3.published[name].configs["transformer"]


@every_model
def test_full_size_single_files_map_one_to_one(name):
    """Against diffusers' own reading of the single-file layout."""
    config, _, _, sizes = PUBLISHED[name]
    targets = shapes_of("transformer", config)
    reads = plan_reads(sd3.single_file_table(config), targets)
    names = source_shapes(reads)
    check(reads, names, targets)
    assert sd3.config_from_single_file(names) == config
    converted = theirs_of({name: torch.empty(shape, device="meta") for name, shape in names.items()})
    expected = meta_state(lambda: SD3Transformer2DModel(**sizes))
    assert {k: v.shape for k, v in converted.items()} == {k: v.shape for k, v in expected.items()}


@pytest.mark.parametrize(
    "config, count",
    [(ClipTextConfig.large(projected=True), 123_650_304), (ClipTextConfig.giant(), 694_659_840)],
    ids=["clip_l", "clip_g"],
)
def test_full_size_text_encoders_map_one_to_one(config, count):
    stated = CLIPTextConfig(
        hidden_size=config.width, intermediate_size=config.mlp_width, num_hidden_layers=config.layers,
        num_attention_heads=config.heads, projection_dim=config.projection, hidden_act=config.activation,
        eos_token_id=config.end_of_text,
    )  # fmt: skip
    state = meta_state(lambda: CLIPTextModelWithProjection(stated))
    shapes = {rename_clip(name): tuple(tensor.shape) for name, tensor in state.items()}
    targets = shapes_of("clip_l", config)
    check(plan_reads(text_encoders.clip_text_table(config), targets), shapes, targets)
    assert parameter_count(abstract(SD3.networks["clip_l"].build, config)) == count
    assert ClipTextConfig.from_hf(stated.to_dict(), projected=True) == config


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """A small random SD3.5-medium in the diffusers layout, eight heads, the autoencoder's published norm groups."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(published_sd3.ARCHITECTURES["3.5-medium"], "num_attention_heads", 8)
        patch.setitem(published_sd3.ARCHITECTURES["3.5-medium"], "caption_projection_dim", 64)
        patch.setitem(published_sd3.VAE, "block_out_channels", (32, 32, 32, 32))
        patch.setitem(published_sd3.VAE, "norm_num_groups", 32)
        # A single file does not say how wide heads are: published ones are 64.
        for clip in (published_sd3.CLIP_L, published_sd3.CLIP_G):
            patch.setitem(clip, "hidden_size", 64)
            patch.setitem(clip, "num_attention_heads", 1)
        patch.setitem(published_sd3.CLIP_L, "projection_dim", 64)
        patch.setitem(published_sd3.CLIP_G, "projection_dim", 16)
        patch.setitem(published_sd3.COMMON, "pooled_projection_dim", 64 + 16)
        patch.setitem(published_sd3.COMMON, "joint_attention_dim", 136)
        # Nor does it say how far T5's distances reach.
        for key, value in {
            "d_model": 136,
            "d_ff": 48,
            "num_heads": 8,
            "relative_attention_max_distance": 128,
        }.items():
            patch.setitem(published_sd3.T5, key, value)
        pipe = published_sd3.pipeline("3.5-medium")
        # What diffusers reads where a single file has no such tensor.
        pipe.text_encoder.text_projection.weight.data = torch.eye(64)
        return published_sd3.write_diffusers(pipe, tmp_path_factory.mktemp("sd3") / "source")


@pytest.fixture(scope="module")
def checkpoint(source) -> Path:
    convert(open_source(source), source.parent / "made", vital_layers=(0, 2), progress=False)
    return source.parent / "made"


@pytest.fixture(scope="module")
def flow(checkpoint) -> StableFlow:
    return StableFlow.load(checkpoint)


def exported(checkpoint: Path, network: str, table) -> dict[str, np.ndarray]:
    """One network under a layout's names."""
    info = load_info(checkpoint)
    config, module = info.configs[network], load_network(checkpoint, info, network, Placement())
    reads = plan_reads(table(config), shapes_of(network, config))
    tensors = export(reads, {path: np.asarray(leaf) for path, leaf in parameters(module).items()})
    return {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}


def test_export_is_the_inverse_of_conversion(checkpoint, source):
    stored = load_file(source / "transformer" / "diffusion_pytorch_model.safetensors")
    made = exported(checkpoint, "transformer", sd3.diffusers_table)
    assert made.keys() == stored.keys()
    for name, tensor in stored.items():
        np.testing.assert_array_equal(made[name], tensor)


def test_our_single_file_names_mean_what_diffusers_thinks(checkpoint, source):
    single = exported(checkpoint, "transformer", sd3.single_file_table)
    stored = load_file(source / "transformer" / "diffusion_pytorch_model.safetensors")
    converted = theirs_of({name: torch.tensor(tensor) for name, tensor in single.items()})
    assert converted.keys() == stored.keys()
    for name, tensor in stored.items():
        np.testing.assert_array_equal(converted[name], tensor)


@pytest.fixture(scope="module")
def single_tensors(checkpoint) -> dict[str, np.ndarray]:
    """A whole single file: transformer, autoencoder and all text encoders."""
    parts = {
        "model.diffusion_model.": exported(checkpoint, "transformer", sd3.single_file_table),
        "first_stage_model.": exported(checkpoint, "autoencoder", autoencoder.single_file_table),
        "text_encoders.clip_l.transformer.": exported(checkpoint, "clip_l", text_encoders.clip_text_table),
        "text_encoders.clip_g.transformer.": exported(checkpoint, "clip_g", text_encoders.clip_text_table),
        "text_encoders.t5xxl.transformer.": exported(checkpoint, "t5", text_encoders.t5_table),
    }
    tensors = {prefix + name: tensor for prefix, part in parts.items() for name, tensor in part.items()}
    del tensors["text_encoders.clip_l.transformer.text_projection.weight"]
    return tensors | {"text_encoders.clip_l.logit_scale": np.ones((), np.float32)}


def write_single(tensors, source: Path, folder: Path, *, encoders: bool) -> Path:
    """The file, with folders beside it of what it does not hold."""
    folder.mkdir()
    held = {k: v for k, v in tensors.items() if encoders or not k.startswith("text_encoders.")}
    save_file(held, folder / "sd3.5_tiny.safetensors")
    for place in source.iterdir():
        if place.name.startswith("tokenizer") or (not encoders and place.name.startswith("text_encoder")):
            shutil.copytree(place, folder / place.name)
    return folder


@pytest.mark.parametrize("encoders", [True, False])
def test_single_files_convert_to_the_same_model(encoders, single_tensors, source, flow, tmp_path):
    folder = write_single(single_tensors, source, tmp_path / "single", encoders=encoders)
    convert(open_source(folder), tmp_path / "made", progress=False)
    again = StableFlow.load(tmp_path / "made")
    for network in ("transformer", "autoencoder"):
        ours, theirs = parameters(getattr(again, network)), parameters(getattr(flow, network))
        assert ours.keys() == theirs.keys()
        for path, leaf in theirs.items():
            np.testing.assert_array_equal(ours[path], leaf)
    assert again.info.family.schedule(again.info.scheduler) == flow.schedule
    ours, theirs = (f.encode_prompts(["a red cat"]) for f in (again, flow))
    np.testing.assert_array_equal(ours.text, theirs.text)
    # Nor what CLIP-G's end of text is: the published number, which is not in the small vocabulary.
    known = slice(0, 64 if encoders else None)
    np.testing.assert_array_equal(ours.pooled[:, known], theirs.pooled[:, known])


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda t: t.update({"lora.weight": np.zeros(2, np.float32)}), "does not: lora.weight"),
        (lambda t: t.update({"text_encoders.clip_g.more": np.zeros(2, np.float32)}), "does not: text_encoders"),
        (lambda t: t.pop("model.diffusion_model.x_embedder.proj.weight"), "no tensor 'x_embedder.proj.weight'"),
        (lambda t: t.pop("model.diffusion_model.pos_embed"), "no tensor 'pos_embed'"),
    ],
)  # fmt: skip
def test_broken_single_files_are_named(change, message, single_tensors, source, tmp_path):
    tensors = dict(single_tensors)
    change(tensors)
    with pytest.raises(ConversionError, match=message):
        open_source(write_single(tensors, source, tmp_path / "single", encoders=True))


@pytest.mark.parametrize(
    "key, value, message",
    [
        ("patch_size", 4, "patch_size is 4"),
        ("qk_norm", "layer_norm", "qk_norm is 'layer_norm'"),
        ("dual_attention_layers", [1, 2], "dual_attention_layers"),
        ("dual_attention_layers", [0, 1, 2, 3], "may have two attentions"),
        ("caption_projection_dim", 8, "caption_projection_dim"),
    ],
)  # fmt: skip
def test_other_architectures_are_refused(key, value, message):
    stated = {**published_sd3.COMMON, **published_sd3.ARCHITECTURES["medium"], "num_layers": 4}
    with pytest.raises(ValueError, match=message):
        Sd3Config.from_hf({**stated, key: value})


@every_model
def test_published_models_are_known_without_files(name, capsys):
    assert run("info", name) == 0
    said = capsys.readouterr().out
    assert f"{PUBLISHED[name][1]:,} parameters" in said and SD3.published[name].configs == {
        **SD3.published[name].configs, "autoencoder": AutoencoderConfig.sd3(),
    }  # fmt: skip
    assert ("0, 7, 8, 9" in said) == (name == "sd3-medium")


@pytest.mark.parametrize("mesh", ["data=2,fsdp=2,tensor=2", "tensor=8"])
def test_latents_do_not_depend_on_the_mesh(mesh, checkpoint, flow):
    options = {**QUIET, "guidance": 4.0, "skip_layers": [1], "skip_window": (0, 1), "negative": "a hat"}
    prompts = ["a cat", "a dog", "snow", "a beach"]
    placed = StableFlow.load(checkpoint, mesh=mesh)
    ours, expected = (f.generate(prompts, **options).latents for f in (placed, flow))
    assert relative(ours, expected) <= 1e-5


def test_weights_may_be_in_eight_bits_and_wait_in_host_memory(checkpoint, flow):
    options = {**QUIET, "guidance": 4.0, "skip_layers": [1], "skip_window": (0, 1)}
    placed = StableFlow.load(checkpoint, quantisation="int8", offload=True, text_encoder="host")
    ours, expected = (f.generate(["a cat"], **options).latents for f in (placed, flow))
    assert 1e-4 < relative(ours, expected) < 0.1


def test_every_command_takes_it(checkpoint, photo, tmp_path):
    photo.save(tmp_path / "photo.png")
    shared = ("-m", checkpoint, "--steps", 4, "--negative", "a hat", "--skip-layers", "1", "--skip-window", 1, 3)
    size = ("--height", 48, "--width", 64)
    assert run("generate", *shared, *size, "-p", "a cat", "--skip-scale", 2, "-o", tmp_path / "generated") == 0
    edits = ("-p", "a cat", "-e", "a dog", "--attentions", "joint")
    assert run("edit", *shared, *size, *edits, "-o", tmp_path / "edited") == 0
    photo_of = ("--image", tmp_path / "photo.png", "-p", "a cat", "--guidance", 2)
    assert run("invert", *shared, *size, *photo_of, "-o", tmp_path / "inverted") == 0
