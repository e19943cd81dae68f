"""LoRA files merged at conversion: the same weights as fused by hand on torch, whatever names the file uses."""

import functools
import json

import ml_dtypes
import numpy as np
import published
import published_sd3
import pytest
import torch
from commandline import run_convert
from conftest import relative
from safetensors.numpy import load_file, save_file
from sflow_convert import flux, sd3, text_encoders
from sflow_convert.engine import ConversionError, assemble, export, plan_reads, source_shapes
from sflow_convert.job import DTYPES, checked_reads, convert
from sflow_convert.layouts import open_source
from sflow_convert.lora import Lora, plan_changes

from sflow_jax.models.layers import parameters
from sflow_jax.settings import Placement
from sflow_jax.storage.checkpoint import load_info, load_network

RANK = 2
TARGETS = (
    "attn.to_q",
    "attn.to_v",
    "attn.add_k_proj",
    "attn.to_out.0",
    "norm1.linear",
    "norm_out.linear",
    "ff.net.2",
)


def linear_layers(module: torch.nn.Module, ends: tuple[str, ...] = ("",)) -> dict[str, tuple[int, int]]:
    """Name → [out, in] of a torch model's linear layers with such ends of their names."""
    return {
        name: tuple(layer.weight.shape)
        for name, layer in module.named_modules()
        if isinstance(layer, torch.nn.Linear) and name.endswith(ends)
    }


def factors(shapes: dict[str, tuple[int, int]], rank: int = RANK) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Random (down, up) of every layer."""
    random = np.random.default_rng(5)
    draw = lambda *shape: random.normal(0, 0.3, shape).astype(np.float32)
    return {name: (draw(rank, shape[1]), draw(shape[0], rank)) for name, shape in shapes.items()}


def diffusers_file(path, pairs, start="transformer.", metadata=None):
    """As diffusers and PEFT write it."""
    tensors = {}
    for name, (down, up) in pairs.items():
        tensors |= {f"{start}{name}.lora_A.weight": down, f"{start}{name}.lora_B.weight": up}
    save_file(tensors, path, metadata)
    return path


def kohya_file(path, pairs, alpha=None, start="lora_unet_"):
    """As kohya's scripts write it."""
    tensors = {}
    for name, (down, up) in pairs.items():
        flat = start + name.replace(".", "_")
        tensors |= {f"{flat}.lora_down.weight": down, f"{flat}.lora_up.weight": up}
        if alpha is not None:
            tensors[f"{flat}.alpha"] = np.array(alpha, np.float32)
    save_file(tensors, path)
    return path


def fused(pairs, scale=1.0, source=published.transformer) -> dict[str, np.ndarray]:
    """The model's weights with all changes added, by torch in float64."""
    weights = {name: tensor.double() for name, tensor in source().state_dict().items()}
    for name, (down, up) in pairs.items():
        weights[f"{name}.weight"] += scale * (torch.tensor(up).double() @ torch.tensor(down).double())
    return {name: tensor.numpy() for name, tensor in weights.items()}


@functools.cache
def opened(source_folder):
    """A source with its reads and its parameters' shapes; making them takes a while."""
    source = open_source(source_folder)
    return source, checked_reads(source.networks)


def merged(source_folder, *loras, network="transformer", table=flux.diffusers_table, dtype="float32"):
    """The network's weights by published names, as they are converted with LoRA files."""
    source, checked = opened(source_folder)
    changes = plan_changes(source, {name: targets for name, (_, targets) in checked.items()}, loras)
    reads, targets = checked[network]
    added = {"change": changes[network].of} if network in changes else {}
    arrays = dict(assemble(reads, targets, source.networks[network].tensors.read, DTYPES[dtype], **added))
    return export(plan_reads(table(source.configs[network]), targets), arrays)


def assert_equal(ours, theirs, tolerance=1e-6):
    """All weights, each within a relative distance."""
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert relative(ours[name], tensor) <= tolerance, name


def test_all_linear_layers_of_a_diffusers_file(source_folder, tmp_path):
    pairs = factors(linear_layers(published.transformer()))
    assert len(pairs) > 50
    file = diffusers_file(tmp_path / "a.safetensors", pairs)
    assert_equal(merged(source_folder, Lora(file, 0.7)), fused(pairs, 0.7))


def test_pictures_are_those_of_the_fused_pipeline(source_folder, tmp_path):
    """One step of diffusers' own transformer with fused weights."""
    pairs = factors(linear_layers(published.transformer(), TARGETS))
    file = diffusers_file(tmp_path / "a.safetensors", pairs)
    ours = merged(source_folder, Lora(file))
    model, expected = published.transformer(), published.transformer()
    expected.load_state_dict({name: torch.tensor(x).float() for name, x in fused(pairs).items()})
    model.load_state_dict({name: torch.tensor(np.array(x)) for name, x in ours.items()})
    generator = torch.Generator().manual_seed(3)
    inputs = {
        "hidden_states": torch.randn(1, 16, 16, generator=generator),
        "encoder_hidden_states": torch.randn(1, 13, 24, generator=generator),
        "pooled_projections": torch.randn(1, 20, generator=generator),
        "timestep": torch.tensor([0.5]),
        "guidance": torch.tensor([3.5]),
        "img_ids": torch.zeros(16, 3),
        "txt_ids": torch.zeros(13, 3),
    }
    with torch.no_grad():
        assert relative(model(**inputs).sample, expected(**inputs).sample) <= 1e-5


def single_names(source_folder):
    """[out, in] of every layer under Black Forest Labs' names."""
    source, checked = opened(source_folder)
    _, targets = checked["transformer"]
    shapes = source_shapes(plan_reads(flux.single_file_table(source.configs["transformer"]), targets))
    return {
        name.removesuffix(".weight"): s for name, s in shapes.items() if name.endswith(".weight") and len(s) == 2
    }


@pytest.mark.parametrize("names", ["kohya", "bfl", "comfy"])
def test_black_forest_labs_names_change_a_diffusers_folder(names, source_folder, tmp_path):
    pairs = factors(single_names(source_folder))
    assert len(pairs) > 25
    file = tmp_path / "a.safetensors"
    if names == "kohya":
        kohya_file(file, pairs, alpha=1.0)
    else:
        diffusers_file(file, pairs, {"bfl": "", "comfy": "diffusion_model."}[names])
    scale = 1.0 / RANK if names == "kohya" else 1.0
    ours = merged(source_folder, Lora(file), table=flux.single_file_table)
    plain = merged(source_folder, table=flux.single_file_table)
    expected = dict(plain)
    for name, (down, up) in pairs.items():
        expected[f"{name}.weight"] = plain[f"{name}.weight"] + scale * (up.astype(np.float64) @ down)
    assert_equal(ours, expected)


def test_kohya_names_mean_what_diffusers_thinks(source_folder, tmp_path):
    """diffusers' own translation of a file, merged by hand, against ours of the file itself."""
    from diffusers.loaders.lora_conversion_utils import _convert_kohya_flux_lora_to_diffusers as theirs

    # diffusers splits the fused layer of single blocks at FLUX.1's published width.
    shapes = {n: s for n, s in single_names(source_folder).items() if "linear1" not in n and "_blocks" in n}
    # Of odd rank, so that it looks for no zeros in factors.
    pairs = factors(shapes, rank=5)
    file = kohya_file(tmp_path / "a.safetensors", pairs, alpha=2.5)
    translated = theirs({name: torch.tensor(x) for name, x in load_file(file).items()})
    layers = {name.removeprefix("transformer.").rpartition(".lora_")[0] for name in translated}
    theirs_by_layer = {
        name: tuple(translated[f"transformer.{name}.lora_{x}.weight"].numpy() for x in "AB") for name in layers
    }
    assert len(layers) > len(pairs)
    assert_equal(merged(source_folder, Lora(file)), fused(theirs_by_layer))


def test_several_files_add_up_and_are_recorded(source_folder, tmp_path):
    pairs = factors(linear_layers(published.transformer(), TARGETS))
    first = diffusers_file(tmp_path / "a.safetensors", pairs)
    second = kohya_file(tmp_path / "b.safetensors", pairs, alpha=1.0)
    loras = (Lora(first), Lora(second, -0.5), Lora(first, 0.5))
    convert(open_source(source_folder), tmp_path / "made", loras=loras, progress=False)
    info = load_info(tmp_path / "made")
    leaves = parameters(load_network(tmp_path / "made", info, "transformer", Placement()))
    reads = plan_reads(flux.diffusers_table(info.configs["transformer"]), {p: x.shape for p, x in leaves.items()})
    ours = export(reads, {path: np.asarray(leaf) for path, leaf in leaves.items()})
    assert_equal(ours, fused(pairs, 1 - 0.5 / RANK + 0.5))
    assert info.title == "FLUX.1 dev with a.safetensors × 1, b.safetensors × -0.5, a.safetensors × 0.5"
    files = {name for name in info.source_digests if name.startswith("lora-")}
    assert files == {"lora-1/a.safetensors:1", "lora-2/b.safetensors:-0.5", "lora-3/a.safetensors:0.5"}


def test_changes_are_added_before_the_dtype_is_narrowed(source_folder, tmp_path):
    pairs = factors(linear_layers(published.transformer(), TARGETS))
    file = diffusers_file(tmp_path / "a.safetensors", pairs)
    ours = merged(source_folder, Lora(file), dtype="bfloat16")
    exact = merged(source_folder, Lora(file))
    for name, tensor in exact.items():
        np.testing.assert_array_equal(ours[name], tensor.astype(ml_dtypes.bfloat16))


CONFIG = {"r": 2, "lora_alpha": 5, "alpha_pattern": {"to_v": 8}, "use_rslora": False}


@pytest.mark.parametrize("where", ["diffusers", "peft"])
@pytest.mark.parametrize("stable", [False, True])
def test_alpha_of_the_metadata_counts(where, stable, source_folder, tmp_path):
    pairs = factors(linear_layers(published.transformer(), TARGETS))
    config = {**CONFIG, "use_rslora": stable}
    if where == "diffusers":
        packed = {f"transformer.{key}": value for key, value in config.items()}
        metadata = {"lora_adapter_metadata": json.dumps(packed)}
        file = diffusers_file(tmp_path / "a.safetensors", pairs, metadata=metadata)
    else:
        file = diffusers_file(tmp_path / "adapter_model.safetensors", pairs, start="base_model.model.")
        (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    rank = RANK**0.5 if stable else RANK
    scaled = {name: (down, up * (8 if name.endswith("to_v") else 5) / rank) for name, (down, up) in pairs.items()}
    assert_equal(merged(source_folder, Lora(file)), fused(scaled))


@pytest.mark.parametrize(
    "network, build, table, ends, start",
    [
        ("clip", published.clip, text_encoders.clip_text_table, ("q_proj", "out_proj", "fc1"), "text_encoder."),
        ("clip", published.clip, text_encoders.clip_text_table, ("v_proj", "fc2"), "lora_te1_"),
        ("t5", published.t5, text_encoders.t5_table, ("SelfAttention.q", "wi_0"), "lora_te3_"),
        ("t5", published.t5, text_encoders.t5_table, ("SelfAttention.o", "wo"), "text_encoder_2."),
    ],
)
def test_text_encoders_are_changed_too(network, build, table, ends, start, source_folder, tmp_path):
    plain = merged(source_folder, network=network, table=table)
    full = {name.removesuffix(".weight"): x.shape for name, x in plain.items() if name.endswith(".weight")}
    pairs = factors({name: shape for name, shape in full.items() if name.endswith(ends)})
    assert len(pairs) >= 4
    write = diffusers_file if start.endswith(".") else kohya_file
    file = write(tmp_path / "a.safetensors", pairs, start=start)
    ours = merged(source_folder, Lora(file), network=network, table=table)
    expected = {
        name: x + pairs[name[:-7]][1] @ pairs[name[:-7]][0] if name[:-7] in pairs else x
        for name, x in plain.items()
    }
    assert_equal(ours, expected)


def test_sd3_layers_have_both_names(tmp_path):
    folder = published_sd3.write_diffusers(published_sd3.pipeline("3.5-medium", with_t5=False), tmp_path / "source")
    for table, start, write in (
        (sd3.diffusers_table, "transformer.", diffusers_file),
        (sd3.single_file_table, "lora_unet_", kohya_file),
    ):
        plain = merged(folder, table=table)
        layers = {
            n.removesuffix(".weight"): x.shape for n, x in plain.items() if n.endswith(".weight") and x.ndim == 2
        }
        pairs = factors(layers)
        ours = merged(folder, Lora(write(tmp_path / "a.safetensors", pairs, start=start)), table=table)
        expected = {f"{name}.weight": plain[f"{name}.weight"] + up @ down for name, (down, up) in pairs.items()}
        assert_equal(ours, plain | expected)


def test_the_command_takes_files_with_scales(source_folder, tmp_path, capsys):
    pairs = factors(linear_layers(published.transformer(), TARGETS))
    file = diffusers_file(tmp_path / "a.safetensors", pairs)
    assert run_convert(source_folder, tmp_path / "made", "--lora", f"{file}:0.5") == 0
    assert "FLUX.1 dev with a.safetensors × 0.5" in capsys.readouterr().out
    assert run_convert(file, tmp_path / "other") == 2
    assert (
        "are a LoRA, not a model: convert the model it was made for, with this file in --lora"
        in capsys.readouterr().err
    )


SQUARE = np.ones((2, 2), np.float32)
LAYER = "transformer.transformer_blocks.0.attn.to_q"


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda t: t.pop(f"{LAYER}.lora_B.weight"), f"half: {LAYER}.lora_A.weight"),
        (lambda t: t.update({f"{LAYER}.lora_A.weight": np.ones((2, 5), np.float32)}), "wrong shape: .*to_q"),
        (lambda t: t.update({f"{LAYER}.lora_B.weight": np.ones((48, 3), np.float32)}), "wrong shape: .*to_q"),
        (lambda t: t.update({f"{LAYER}.lora_magnitude_vector": np.ones(3, np.float32)}), "unknown: .*magnitude"),
        (lambda t: t.update({f"{LAYER}.lora_B.bias": np.ones(48, np.float32)}), "unknown: .*lora_B.bias"),
        (lambda t: t.update({"other.alpha": np.ones(1, np.float32)}), "unknown: other.alpha"),
        (lambda t: t.update({f"{LAYER}.alpha": np.ones(2, np.float32)}), "no finite number"),
        (lambda t: t.update({f"{LAYER}.alpha": np.array(np.nan, np.float32)}), "no finite number"),
        (lambda t: t.update({f"{LAYER}.lora_A.weight": np.full((2, 48), np.nan, np.float32)}), "not finite"),
        (
            lambda t: t.update({f"transformer.blocks.9.to_q.lora_{x}.weight": SQUARE for x in "AB"}),
            "unknown: transformer.blocks.9.to_q, no layer",
        ),
        (
            lambda t: t.update({f"text_encoder.nowhere.lora_{x}.weight": SQUARE for x in "AB"}),
            "unknown: text_encoder.nowhere",
        ),
    ],
)  # fmt: skip
def test_every_tensor_is_used_or_named(change, message, source_folder, tmp_path):
    pairs = factors(linear_layers(published.transformer(), ("attn.to_q",)))
    file = diffusers_file(tmp_path / "a.safetensors", pairs)
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)
    with pytest.raises(ConversionError, match=message):
        convert(opened(source_folder)[0], tmp_path / "made", loras=[Lora(file)], progress=False)
    assert {path.name for path in tmp_path.iterdir()} == {"a.safetensors"}


@pytest.mark.parametrize(
    "value, message",
    [
        ("nowhere.safetensors", "nowhere.safetensors is missing"),
        ("a.safetensors:much", "a.safetensors:much is missing"),
        ("a.safetensors:0", "not 0"),
        ("a.safetensors:nan", "not 0"),
        ("a.safetensors:1e9", "from -100 to 100"),
        (".", "is no file"),
        ("", "is no file"),
        ("model.safetensors", "holds no LoRA"),
        ("text.safetensors", "download it again"),
    ],
)
def test_bad_files_and_scales_are_refused(value, message, source_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    diffusers_file(tmp_path / "a.safetensors", factors(linear_layers(published.transformer(), ("attn.to_q",))))
    save_file({"weight": np.ones(3, np.float32)}, tmp_path / "model.safetensors")
    (tmp_path / "text.safetensors").write_text("not weights at all")
    assert run_convert(source_folder, tmp_path / "made", "--lora", value) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert message in error and len(error) < 400 and not (tmp_path / "made").exists()


@pytest.mark.parametrize(
    "text", ['{"transformer.lora_alpha": "many"}', "[1]", "{", '{"transformer.use_dora": true}']
)
def test_metadata_that_cannot_be_followed_is_named(text, source_folder, tmp_path):
    pairs = factors(linear_layers(published.transformer(), ("attn.to_q",)))
    file = diffusers_file(tmp_path / "a.safetensors", pairs, metadata={"lora_adapter_metadata": text})
    with pytest.raises(ConversionError, match="a.safetensors"):
        convert(open_source(source_folder), tmp_path / "made", loras=[Lora(file)], progress=False)
