"""Feature networks the whole way: published folder → converted folder → features of uint8 pictures."""

import json
import math
import shutil
from pathlib import Path

import jax
import numpy as np
import published
import pytest
import torch
import transformers
from commandline import run_convert
from safetensors.numpy import load_file, save_file
from sflow_convert.engine import ConversionError, check, plan_reads, source_shapes
from sflow_convert.features import MODEL_TYPES, convert_features, import_features, open_features

from sflow_jax.catalogue import ASSETS, load_features
from sflow_jax.machine.meshes import make_mesh
from sflow_jax.measures.features import NETWORKS
from sflow_jax.models.layers import parameters
from sflow_jax.storage.checkpoint import CheckpointError, abstract

DINOV2 = {
    "hidden_size": 24,
    "num_attention_heads": 3,
    "num_hidden_layers": 2,
    "mlp_ratio": 3,
    "image_size": 28,
    "patch_size": 4,
}
CLIP = {
    "text_config": {**published.CLIP, "eos_token_id": 59},
    "vision_config": {
        "hidden_size": 28,
        "num_attention_heads": 2,
        "intermediate_size": 44,
        "num_hidden_layers": 3,
        "image_size": 20,
        "patch_size": 5,
    },
    "projection_dim": 17,
}
KINDS = ("plain", "swiglu", "registers", "registers-swiglu", "clip")


@torch.no_grad()
def network(kind: str) -> torch.nn.Module:
    """A random network of transformers in which everything matters."""
    if kind == "clip":
        made = transformers.CLIPModel(transformers.CLIPConfig(**CLIP))
    elif kind.startswith("registers"):
        config = transformers.Dinov2WithRegistersConfig(
            **DINOV2, num_register_tokens=3, use_swiglu_ffn="swiglu" in kind
        )
        made = transformers.Dinov2WithRegistersModel(config)
    else:
        made = transformers.Dinov2Model(transformers.Dinov2Config(**DINOV2, use_swiglu_ffn=kind == "swiglu"))
    published.randomise(made, len(kind))
    for name, parameter in made.named_parameters():
        if any(part in name for part in ("token", "position", "lambda", "class_embedding")):
            parameter.mul_(4)
    return made


def write(folder: Path, kind: str) -> Path:
    """A published folder. DINOv2's crop differs from the size of its position embedding, as the real ones do."""
    network(kind).save_pretrained(folder)
    processor = transformers.CLIPImageProcessorPil if kind == "clip" else transformers.BitImageProcessorPil
    processor(size={"shortest_edge": 24}, crop_size={"height": 20, "width": 20}).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """Kind → published folder."""
    return {kind: write(tmp_path_factory.mktemp("features") / kind, kind) for kind in KINDS}


@pytest.fixture(scope="module")
def converted(folders, tmp_path_factory) -> dict[str, Path]:
    """Kind → converted folder."""
    place = tmp_path_factory.mktemp("converted")
    for kind, folder in folders.items():
        convert_features(open_features(folder), place / kind, progress=False)
    return {kind: place / kind for kind in KINDS}


def pictures(height: int = 37, width: int = 51, count: int = 3) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, height, width, 3), dtype=np.uint8)


@torch.no_grad()
def expected(folder: Path, kind: str, given: np.ndarray) -> np.ndarray:
    """What transformers says of the pictures, from files to features."""
    processor = transformers.AutoImageProcessor.from_pretrained(folder, backend="pil")
    inputs = processor(list(given), return_tensors="pt")
    if kind == "clip":
        model = transformers.CLIPModel.from_pretrained(folder, dtype=torch.float32).eval()
        return model(input_ids=torch.tensor([[0, 1]]), **inputs).image_embeds.numpy()
    model = transformers.AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    return model(**inputs).last_hidden_state[:, 0].numpy()


@pytest.mark.parametrize("kind", KINDS)
def test_features_are_those_of_transformers(kind, folders, converted):
    features = load_features(converted[kind])
    # Not much higher than wide: such pictures Pillow 13 resizes in another order.
    for size in ((37, 51), (20, 24), (60, 33)):
        given = pictures(*size)
        theirs = expected(folders[kind], kind, given)
        assert np.abs(theirs - theirs[:1])[1:].max() > 0.01
        for ours in (features(given), jax.jit(lambda f, x: f(x))(features, given.astype(np.float32))):
            assert ours.dtype == np.float32
            np.testing.assert_allclose(ours, theirs, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name, folder", [("toyworld", "dinov2"), ("toyworld-clip", "clip")])
def test_the_embedded_networks_have_names(name, folder, tmp_path):
    features, given = load_features(name), pictures(64, 64)
    np.testing.assert_allclose(features(given), expected_embedded(folder, given), atol=1e-4, rtol=0)
    convert_features(open_features(ASSETS / folder), tmp_path / "made", progress=False)
    again = load_features(tmp_path / "made", dtype="float32")
    assert (again.name, again.kind, again.digest) == (features.name, folder, features.digest)
    np.testing.assert_array_equal(again(given), features(given))
    assert load_features(tmp_path / "made", dtype="bfloat16").digest != features.digest


def expected_embedded(folder: str, given: np.ndarray) -> np.ndarray:
    return expected(ASSETS / folder, folder, given)


def test_what_a_folder_says(converted):
    features = load_features(converted["registers"])
    assert (features.name, features.kind) == ("dinov2 24×2 with 3 registers", "dinov2")
    told = json.loads((converted["clip"] / "features.json").read_text())
    assert told.keys() == {"format", "kind", "config", "preprocessing", "dtype", "source_digests", "checksum"}
    assert load_features(converted["clip"]).name == "clip 28×3"
    digests = {load_features(folder).digest for folder in converted.values()}
    assert len(digests) == len(KINDS) and all(len(digest) == 16 for digest in digests)


def test_features_are_an_argument_of_one_compiled_function(converted):
    traces = []

    @jax.jit
    def describe(features, given):
        traces.append(None)
        return features(given)

    features = load_features(converted["plain"])
    doubled = jax.tree.map(lambda x: 2 * x, features)
    assert not np.array_equal(describe(features, pictures()), describe(doubled, pictures()))
    assert len(traces) == 1


def test_every_device_of_a_mesh_gets_a_copy(converted):
    mesh = make_mesh({"data": 4, "tensor": 2})
    features = load_features(converted["plain"], mesh=mesh)
    for leaf in jax.tree.leaves(features):
        assert leaf.sharding.is_fully_replicated and len(leaf.sharding.device_set) == 8
    alone = load_features(converted["plain"])(pictures())
    np.testing.assert_allclose(features(pictures()), alone, atol=1e-5)


def test_bfloat16_is_close(folders, tmp_path):
    convert_features(open_features(folders["swiglu"]), tmp_path / "half", dtype="bfloat16", progress=False)
    half = load_features(tmp_path / "half")
    exact = expected(folders["swiglu"], "swiglu", pictures())
    ours = half(pictures())
    assert ours.dtype == np.float32
    assert 0 < np.linalg.norm(ours - exact) / np.linalg.norm(exact) < 0.05


# Published: hidden_size, heads, layers, SwiGLU.
PUBLISHED = {
    "small": (384, 6, 12, False),
    "base": (768, 12, 12, False),
    "large": (1024, 16, 24, False),
    "giant": (1536, 24, 40, True),
}


def full_size(name: str, registers: bool) -> transformers.PreTrainedModel:
    """A published architecture of transformers on torch's meta device."""
    if name == "clip":
        text = dict(hidden_size=768, intermediate_size=3072, num_attention_heads=12, projection_dim=768)
        seeing = dict(hidden_size=1024, intermediate_size=4096, num_attention_heads=16, num_hidden_layers=24)
        seeing |= dict(patch_size=14, projection_dim=768)
        config = transformers.CLIPConfig(text_config=text, vision_config=seeing, projection_dim=768)
        build = transformers.CLIPModel
    else:
        width, heads, layers, swiglu = PUBLISHED[name]
        sizes = dict(hidden_size=width, num_attention_heads=heads, num_hidden_layers=layers, use_swiglu_ffn=swiglu)
        sizes |= dict(image_size=518, patch_size=14)
        config = (transformers.Dinov2WithRegistersConfig if registers else transformers.Dinov2Config)(**sizes)
        build = transformers.Dinov2WithRegistersModel if registers else transformers.Dinov2Model
    with torch.device("meta"):
        return build(config)


@pytest.mark.parametrize(
    "name, registers, count",
    [
        ("small", False, 22_056_576), ("base", False, 86_580_480),
        ("large", False, 304_368_640), ("giant", False, 1_136_480_768),
        ("small", True, 22_058_112), ("base", True, 86_583_552),
        ("large", True, 304_372_736), ("giant", True, 1_136_486_912),
        ("clip", False, 427_616_513),
    ],
)  # fmt: skip
def test_published_architectures_map_one_to_one(name, registers, count):
    theirs = full_size(name, registers)
    kind, read, table = MODEL_TYPES[theirs.config.model_type]
    config = read(theirs.config.to_dict())
    targets = {path: leaf.shape for path, leaf in parameters(abstract(NETWORKS[kind], config)).items()}
    # transformers renames while it loads, so its names are those of files only in the small networks above.
    reads = plan_reads(table(config), targets)
    check(reads, source_shapes(reads), targets)
    assert sum(map(math.prod, targets.values())) == sum(x.numel() for x in theirs.parameters()) == count


def test_registers_that_a_config_leaves_out_are_four():
    _, read, _ = MODEL_TYPES["dinov2_with_registers"]
    assert read(DINOV2).registers == 4


def test_position_numbers_of_older_files_are_no_weights(folders, tmp_path):
    folder = shutil.copytree(folders["clip"], tmp_path / "clip")
    tensors = load_file(folder / "model.safetensors")
    for half in ("text", "vision"):
        tensors[f"{half}_model.embeddings.position_ids"] = np.arange(17)[None]
    save_file(tensors, folder / "model.safetensors")
    info, _ = import_features(folder)
    assert info.dtype == "float32"


@pytest.fixture
def broken(folders, tmp_path) -> Path:
    """A published DINOv2 folder to damage."""
    return shutil.copytree(folders["plain"], tmp_path / "broken")


def edit(folder: Path, file: str, **changes) -> None:
    told = json.loads((folder / file).read_text())
    kept = {key: value for key, value in (told | changes).items() if value is not None}
    (folder / file).write_text(json.dumps(kept))


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda f: edit(f, "config.json", model_type="vit"), "is no feature network; those are dinov2"),
        (lambda f: edit(f, "config.json", hidden_act="relu"), "config.json: .* hidden_act 'gelu'"),
        (lambda f: edit(f, "config.json", hidden_size=None), "config.json does not say 'hidden_size'"),
        (lambda f: (f / "config.json").write_text("{"), "cannot read .*config.json"),
        (lambda f: (f / "preprocessor_config.json").unlink(), "preprocessor_config.json is missing"),
        (lambda f: edit(f, "preprocessor_config.json", resample=1), "preprocessor_config.json: resample 1"),
        (lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"), "never read"),
        (lambda f: (f / "model.safetensors").write_bytes(b"0" * 99), "download it again"),
    ],
)  # fmt: skip
def test_broken_folders_are_named(damage, message, broken):
    damage(broken)
    with pytest.raises(ConversionError, match=message):
        open_features(broken)


def test_tensors_at_fault_are_named_and_nothing_is_written(broken, tmp_path):
    tensors = load_file(broken / "model.safetensors")
    del tensors["embeddings.cls_token"]
    tensors["classifier.weight"] = np.zeros((2, 2), np.float32)
    save_file(tensors, broken / "model.safetensors")
    with pytest.raises(ConversionError) as error:
        convert_features(open_features(broken), tmp_path / "made", progress=False)
    for name in ("missing: embeddings.cls_token", "unexpected: classifier.weight"):
        assert name in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["broken"]


def test_clip_needs_its_own_size(folders, tmp_path):
    folder = shutil.copytree(folders["clip"], tmp_path / "clip")
    edit(folder, "preprocessor_config.json", crop_size={"height": 15, "width": 15})
    with pytest.raises(ValueError, match="sees pictures of 20×20"):
        convert_features(open_features(folder), tmp_path / "made", progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["clip"]


def test_folders_that_are_no_features_are_named(converted, checkpoint, tmp_path):
    with pytest.raises(CheckpointError, match="no features at .*sflow-convert SOURCE"):
        load_features(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="no features.json"):
        load_features(checkpoint)
    copy = shutil.copytree(converted["plain"], tmp_path / "copy")
    shutil.rmtree(copy / "network")
    with pytest.raises(CheckpointError, match="has no network"):
        load_features(copy)
    for text, message in (("{", "cannot read"), ('{"format": 9}', "features format 9"), ('{"format": 1}', "kind")):
        (copy / "features.json").write_text(text)
        with pytest.raises(CheckpointError, match=message):
            load_features(copy)


def test_the_command_recognises_feature_folders(folders, checkpoint, tmp_path, capsys):
    source, made = folders["swiglu"], tmp_path / "made"
    assert run_convert(source, made, "--dtype", "bfloat16") == 0
    assert "dinov2 24×2, bfloat16" in capsys.readouterr().out
    for arguments, message in [
        ((source, made), "exists; choose another place"),
        ((source, checkpoint, "--overwrite"), "is not a features folder"),
        ((source, tmp_path / "other", "--vital-layers", "1"), "are for FLUX checkpoints"),
    ]:
        assert run_convert(*arguments) == 2
        assert message in capsys.readouterr().err
    assert run_convert(source, made, "--overwrite") == 0
    assert load_features(made).network.class_token[...].dtype == np.float32
    assert [path.name for path in tmp_path.iterdir()] == ["made"]


def test_help_teaches(capsys):
    assert run_convert("--help") == 0
    assert "sflow-convert facebook/dinov2-giant checkpoints/dinov2-giant" in capsys.readouterr().out
