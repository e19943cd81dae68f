"""The converter: every tensor exactly once, faults named, whole checkpoints or none."""

import json
import shutil
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import published
import pytest
import torch
from conftest import relative
from safetensors.numpy import load_file, save_file
from sflow_convert import autoencoder, flux, text_encoders
from sflow_convert.engine import ConversionError, check, export, plan_reads, source_shapes
from sflow_convert.job import convert
from sflow_convert.layouts import open_source
from sflow_convert.parts import rename_clip, rename_t5

from sflow_jax.families.flux1 import FLUX1, FLUX_DEV_CODE
from sflow_jax.models.autoencoder import AutoencoderConfig
from sflow_jax.models.clip import ClipTextConfig
from sflow_jax.models.flux1 import FluxConfig
from sflow_jax.models.layers import parameter_count, parameters
from sflow_jax.models.t5 import T5Config
from sflow_jax.pipeline import StableFlow
from sflow_jax.settings import Placement
from sflow_jax.storage.checkpoint import CheckpointError, abstract, load_info, load_network

WEIGHTS = Path("transformer") / "diffusion_pytorch_model.safetensors"


def shapes_of(network: str, config) -> dict[str, tuple[int, ...]]:
    return {path: leaf.shape for path, leaf in parameters(abstract(FLUX1.networks[network].build, config)).items()}


def published_shapes(build, rename=lambda name: name) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a torch model built without memory."""
    with torch.device("meta"):
        state = build().state_dict()
    return {rename(name): tuple(tensor.shape) for name, tensor in state.items() if rename(name)}


def full_size_models():
    from diffusers import AutoencoderKL, FluxTransformer2DModel
    from transformers import CLIPTextConfig as TheirClip
    from transformers import CLIPTextModel, T5EncoderModel
    from transformers import T5Config as TheirT5

    vae = {**published.VAE, "latent_channels": 16, "block_out_channels": (128, 256, 512, 512)}
    vae |= {"layers_per_block": 2, "norm_num_groups": 32}
    t5 = TheirT5(d_model=4096, d_kv=64, d_ff=10240, num_layers=24, num_heads=64, feed_forward_proj="gated-gelu")
    clip = TheirClip(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12)
    same = lambda name: name
    return [
        ("transformer", FluxConfig.dev(), flux.diffusers_table, 11_901_408_320,
         lambda: FluxTransformer2DModel(guidance_embeds=True), same),
        ("transformer", FluxConfig.schnell(), flux.diffusers_table, 11_891_178_560, FluxTransformer2DModel, same),
        ("autoencoder", AutoencoderConfig.flux(), autoencoder.diffusers_table, 83_819_683,
         lambda: AutoencoderKL(**vae), same),
        ("t5", T5Config.xxl(), text_encoders.t5_table, 4_762_310_656, lambda: T5EncoderModel(t5), rename_t5),
        ("clip", ClipTextConfig.large(), text_encoders.clip_text_table, 123_060_480,
         lambda: CLIPTextModel(clip), rename_clip),
    ]  # fmt: skip


@pytest.mark.parametrize("model", full_size_models(), ids=["dev", "schnell", "autoencoder", "t5", "clip"])
def test_full_size_models_map_one_to_one(model):
    network, config, table, count, build, rename = model
    targets = shapes_of(network, config)
    check(plan_reads(table(config), targets), published_shapes(build, rename), targets)
    assert parameter_count(abstract(FLUX1.networks[network].build, config)) == count


@pytest.mark.parametrize("config", [FluxConfig.dev(), FluxConfig.schnell()], ids=["dev", "schnell"])
def test_full_size_single_files_map_one_to_one(config):
    """Against diffusers' own reading of the single-file layout, on torch's meta device."""
    from diffusers import FluxTransformer2DModel
    from diffusers.loaders.single_file_utils import convert_flux_transformer_checkpoint_to_diffusers as theirs

    targets = shapes_of("transformer", config)
    reads = plan_reads(flux.single_file_table(config), targets)
    names = source_shapes(reads)
    check(reads, names, targets)
    assert flux.config_from_single_file(names) == config
    converted = theirs({name: torch.empty(shape, device="meta") for name, shape in names.items()})
    expected = published_shapes(lambda: FluxTransformer2DModel(guidance_embeds=config.guidance))
    assert {name: tuple(tensor.shape) for name, tensor in converted.items()} == expected


def test_full_size_single_file_autoencoder_maps_one_to_one():
    from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint

    config = AutoencoderConfig.flux()
    targets = shapes_of("autoencoder", config)
    reads = plan_reads(autoencoder.single_file_table(config), targets)
    names = source_shapes(reads)
    check(reads, names, targets)
    assert autoencoder.config_from_single_file(names) == config
    their_config = {**published.VAE, "block_out_channels": (128, 256, 512, 512), "layers_per_block": 2}
    converted = convert_ldm_vae_checkpoint(
        {name: torch.empty(shape, device="meta") for name, shape in names.items()}, their_config
    )
    ours = source_shapes(plan_reads(autoencoder.diffusers_table(config), targets))
    assert {name: tuple(tensor.shape) for name, tensor in converted.items()} == ours


def test_export_is_the_inverse_of_conversion(checkpoint, source_folder):
    info = load_info(checkpoint)
    config = info.configs["transformer"]
    module = load_network(checkpoint, info, "transformer", Placement())
    reads = plan_reads(flux.diffusers_table(config), shapes_of("transformer", config))
    made = export(reads, {path: np.asarray(leaf) for path, leaf in parameters(module).items()})
    stored = load_file(source_folder / WEIGHTS)
    assert made.keys() == stored.keys()
    for name, tensor in stored.items():
        np.testing.assert_array_equal(made[name], tensor)


@pytest.fixture(scope="module")
def wide_vae_checkpoint(tmp_path_factory) -> Path:
    """Converted from diffusers' layout, with the autoencoder's published 32 norm groups."""
    folder = tmp_path_factory.mktemp("wide-vae")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(published.VAE, "block_out_channels", (32, 32, 64, 64))
        patch.setitem(published.VAE, "norm_num_groups", 32)
        published.write_diffusers(folder / "source")
    convert(open_source(folder / "source"), folder / "made", progress=False)
    return folder / "made"


@pytest.fixture(scope="module")
def single_files(wide_vae_checkpoint, source_folder, tmp_path_factory) -> Path:
    """The same weights under Black Forest Labs' names (written by our exporter), with a prefix some tools add."""
    checkpoint = wide_vae_checkpoint
    folder = tmp_path_factory.mktemp("single")
    info = load_info(checkpoint)
    for network, table, file, prefix in (
        ("transformer", flux.single_file_table, "flux1-tiny.safetensors", "model.diffusion_model."),
        ("autoencoder", autoencoder.single_file_table, "ae.safetensors", ""),
    ):
        config = info.configs[network]
        module = load_network(checkpoint, info, network, Placement())
        reads = plan_reads(table(config), shapes_of(network, config))
        tensors = export(reads, {path: np.asarray(leaf) for path, leaf in parameters(module).items()})
        save_file({prefix + name: np.ascontiguousarray(x) for name, x in tensors.items()}, folder / file)
    for name in ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"):
        shutil.copytree(source_folder / name, folder / name)
    return folder


def test_our_single_file_names_mean_what_diffusers_thinks(single_files):
    """diffusers reads the file that our table describes, and finds its own weights again."""
    from diffusers.loaders.single_file_utils import convert_flux_transformer_checkpoint_to_diffusers as theirs

    tensors = {k: torch.tensor(v) for k, v in load_file(single_files / "flux1-tiny.safetensors").items()}
    # diffusers splits single blocks at FLUX.1's published width, so their fused layers are left out here.
    fused = {k: v for k, v in tensors.items() if "linear1" in k}
    tensors |= {k: torch.zeros(21_504, *v.shape[1:]) for k, v in fused.items()}
    expected = published.transformer().state_dict()
    for name, tensor in theirs(tensors).items():
        if "proj_mlp" not in name and not (name.startswith("single") and "attn.to_" in name):
            torch.testing.assert_close(tensor, expected[name], rtol=0, atol=0)
    for name, tensor in fused.items():
        *_, number, _, suffix = name.split(".")
        block = f"single_transformer_blocks.{number}"
        parts = [expected[f"{block}.attn.to_{x}.{suffix}"] for x in "qkv"] + [
            expected[f"{block}.proj_mlp.{suffix}"]
        ]
        torch.testing.assert_close(tensor, torch.cat(parts), rtol=0, atol=0)


def test_single_files_convert_to_the_same_model(single_files, wide_vae_checkpoint, tmp_path):
    convert(open_source(single_files), tmp_path / "made", progress=False)
    again, expected = StableFlow.load(tmp_path / "made"), StableFlow.load(wide_vae_checkpoint)
    for network in ("transformer", "autoencoder"):
        ours, theirs = parameters(getattr(again, network)), parameters(getattr(expected, network))
        for path, leaf in theirs.items():
            np.testing.assert_array_equal(ours[path], leaf)


def test_the_model_file_says_what_was_converted(checkpoint, source_folder):
    info = load_info(checkpoint)
    assert (info.variant, info.dtype, info.picture_size, info.vital_layers) == ("dev", "float32", 64, (0, 2, 3))
    shards = {path.name for path in (source_folder / "text_encoder_2").glob("*.safetensors")}
    assert len(shards) > 1 and {f"text_encoder_2/{name}" for name in shards} <= info.source_digests.keys()
    assert all(len(digest) == 64 for digest in info.source_digests.values())


def test_checkpoints_of_the_first_format_are_read(checkpoint, tmp_path):
    """Version 0.1 knew FLUX.1 alone, and called its variant the family."""
    fields = json.loads((checkpoint / "model.json").read_text())
    assert fields["format"] == 2 and (fields["family"], fields.pop("variant")) == ("flux1", "dev")
    del fields["named"], fields["checksum"]
    (tmp_path / "scheduler").mkdir()
    (tmp_path / "model.json").write_text(json.dumps({**fields, "format": 1, "family": "dev"}))
    shutil.copy(checkpoint / "scheduler" / "scheduler_config.json", tmp_path / "scheduler")
    assert load_info(tmp_path) == load_info(checkpoint)


def test_published_vital_layers_are_recorded_for_flux_dev_alone():
    assert FLUX1.known_vital_layers({"transformer": FluxConfig.dev()}).layers == FLUX_DEV_CODE
    assert FLUX1.known_vital_layers({"transformer": FluxConfig.schnell()}) is None


def test_bfloat16_halves_the_weights_and_still_runs(source_folder, flow, tmp_path):
    convert(open_source(source_folder), tmp_path / "half", dtype="bfloat16", progress=False)
    half = StableFlow.load(tmp_path / "half", dtype="bfloat16")
    assert {leaf.dtype for leaf in jax.tree.leaves(half.transformer)} == {np.dtype(ml_dtypes.bfloat16)}
    options = dict(steps=2, seed=3, progress=False)
    ours, exact = (f.generate(["a red cat"], **options).latents for f in (half, flow))
    assert 0 < relative(ours, exact) < 0.1


@pytest.fixture
def broken(source_folder, tmp_path) -> Path:
    """A copy of the source to damage."""
    return shutil.copytree(source_folder, tmp_path / "broken")


def edit_tensors(folder: Path, change) -> None:
    file = folder / WEIGHTS
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


def test_all_tensors_at_fault_are_named_at_once_and_nothing_is_written(broken, tmp_path):
    def change(tensors):
        del tensors["x_embedder.bias"]
        tensors["lora.weight"] = np.zeros((2, 2), np.float32)
        tensors["proj_out.bias"] = np.zeros(3, np.float32)

    edit_tensors(broken, change)
    with pytest.raises(ConversionError) as error:
        convert(open_source(broken), tmp_path / "made", progress=False)
    for name in ("missing: x_embedder.bias", "unexpected: lora.weight", "wrong shape: proj_out.bias"):
        assert name in str(error.value)
    assert not [path for path in tmp_path.iterdir() if path != broken]


def test_a_failure_while_writing_leaves_nothing_behind(broken, tmp_path, monkeypatch):
    monkeypatch.setattr("sflow_convert.job.copy_files", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        convert(open_source(broken), tmp_path / "made", progress=False)
    assert not [path for path in tmp_path.iterdir() if path != broken]


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda f: shutil.rmtree(f / "vae"), "vae.*missing"),
        (lambda f: shutil.rmtree(f / "tokenizer_2"), "tokenizer_2.*missing"),
        (lambda f: (f / "transformer" / "config.json").write_text("{"), "cannot read"),
        (lambda f: (f / WEIGHTS).write_bytes(b"0" * 99), "download it again"),
        (lambda f: (f / WEIGHTS).rename(f / "transformer" / "weights.bin"), "never read"),
        (lambda f: next((f / "text_encoder_2").glob("*00002*")).unlink(), "00002.*missing"),
        (lambda f: shutil.rmtree(f / "transformer"), "known layout"),
    ],
)  # fmt: skip
def test_broken_sources_are_named(damage, message, broken):
    damage(broken)
    with pytest.raises(ConversionError, match=message):
        open_source(broken)


@pytest.mark.parametrize(
    "file, key, value, message",
    [
        ("transformer/config.json", "patch_size", 2, "patch_size"),
        ("transformer/config.json", "axes_dims_rope", [2, 2, 2], "axes_dims_rope"),
        ("vae/config.json", "use_quant_conv", True, "use_quant_conv"),
        ("text_encoder_2/config.json", "feed_forward_proj", "relu", "version 1.1"),
        ("text_encoder/config.json", "hidden_act", "relu", "activation"),
    ],
)
def test_other_architectures_are_refused(file, key, value, message, broken):
    config = json.loads((broken / file).read_text())
    (broken / file).write_text(json.dumps({**config, key: value}))
    with pytest.raises(ValueError, match=message):
        open_source(broken)


def test_existing_destinations_are_kept_unless_told_otherwise(source_folder, tmp_path):
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "thesis.txt").write_text("…")
    for overwrite, message in ((False, "exists"), (True, "not a checkpoint")):
        with pytest.raises(ConversionError, match=message):
            convert(open_source(source_folder), tmp_path / "precious", overwrite=overwrite, progress=False)
    assert (tmp_path / "precious" / "thesis.txt").exists()
    for overwrite in (False, True):
        convert(open_source(source_folder), tmp_path / "made", overwrite=overwrite, progress=False)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda model: model["configs"]["clip"].pop("epsilon"), "does not say 'epsilon'"),
        (lambda model: model["configs"]["transformer"].pop("mlp_ratio"), "does not say 'mlp_ratio'"),
        (lambda model: model.update(variant="pro"), "variant 'pro' is none of dev, schnell"),
    ],
)
def test_what_a_checkpoint_does_not_say_is_not_guessed(change, message, checkpoint, tmp_path):
    """Nor where it holds no checksum of itself, as older ones do not."""
    shutil.copytree(checkpoint / "scheduler", tmp_path / "scheduler")
    model = json.loads((checkpoint / "model.json").read_text())
    del model["checksum"]
    change(model)
    (tmp_path / "model.json").write_text(json.dumps(model))
    with pytest.raises(CheckpointError, match=message):
        load_info(tmp_path)


def test_arrays_of_another_size_are_named(checkpoint, tmp_path):
    shutil.copytree(checkpoint, tmp_path / "copy")
    model = json.loads((checkpoint / "model.json").read_text())
    del model["checksum"]
    model["configs"]["t5"]["heads"] += 1
    (tmp_path / "copy" / "model.json").write_text(json.dumps(model))
    with pytest.raises(CheckpointError, match=r"cannot restore t5 .* by its config"):
        load_network(tmp_path / "copy", load_info(tmp_path / "copy"), "t5", Placement(dtype="float32"))


@pytest.mark.parametrize(
    "text, message", [("{", "cannot read"), ('{"format": 99}', "format 99"), ('{"format": 1}', "cannot read")]
)
def test_broken_checkpoints_are_named(text, message, tmp_path):
    (tmp_path / "model.json").write_text(text)
    (tmp_path / "scheduler").mkdir()
    (tmp_path / "scheduler" / "scheduler_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=message):
        load_info(tmp_path)


def test_a_checkpoint_without_its_scheduler_is_named(checkpoint, tmp_path):
    copy = shutil.copytree(checkpoint, tmp_path / "copy")
    shutil.rmtree(copy / "scheduler")
    with pytest.raises(CheckpointError, match="scheduler_config.json"):
        load_info(copy)


def test_damaged_weights_are_named(checkpoint, tmp_path):
    copy = shutil.copytree(checkpoint, tmp_path / "copy")
    files = [path for path in (copy / "transformer").rglob("*") if path.is_file()]
    largest = max(files, key=lambda path: path.stat().st_size)
    largest.write_bytes(largest.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match="transformer.* is damaged"):
        StableFlow.load(copy)


def test_a_second_copy_of_the_text_embedding_must_be_the_same(broken):
    file = broken / "text_encoder_2" / "extra.safetensors"
    index = broken / "text_encoder_2" / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    shared = load_file(broken / "text_encoder_2" / weight_map["shared.weight"])["shared.weight"]
    told = {"metadata": {}, "weight_map": {**weight_map, "encoder.embed_tokens.weight": file.name}}
    index.write_text(json.dumps(told))
    save_file({"encoder.embed_tokens.weight": shared}, file)
    open_source(broken)
    save_file({"encoder.embed_tokens.weight": shared + 1}, file)
    with pytest.raises(ConversionError, match="differs from shared.weight"):
        open_source(broken)


def test_missing_networks_are_named(checkpoint, tmp_path):
    copy = shutil.copytree(checkpoint, tmp_path / "copy")
    shutil.rmtree(copy / "t5")
    with pytest.raises(CheckpointError, match="has no t5"):
        StableFlow.load(copy)
