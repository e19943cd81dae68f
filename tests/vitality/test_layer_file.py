"""The layer file: others can read it, diffusers' blocks are the same layers, nothing else is replaced."""

import dataclasses
import json

import msgspec
import numpy as np
import published
import published_sd3
import pytest
import reference
from commandline import run
from diffusers import LayerSkipConfig

from sflow_jax import diffusers_layer_skip, read_layer_file, write_layer_file
from sflow_jax.errors import SettingError
from sflow_jax.families.flux1 import FLUX1, FLUX_DEV_CODE
from sflow_jax.families.registry import FAMILIES, published_models
from sflow_jax.vitality.find import SCORES_FILE
from sflow_jax.vitality.layer_file import place_in_diffusers
from sflow_jax.vitality.scores import Rule, Variant
from sflow_jax.vitality.summary import Summary, Table, summarise

FLUX_KINDS = (("double", 2), ("single", 3))
VITALITY = (0.6, 0.05, 0.1, 0.4, 0.02)
SETTINGS = {
    "model": "checkpoints/tiny",
    "title": "FLUX.1 tiny",
    "checkpoint": "0123456789abcdef",
    "dtype": "float32",
    "layer_kinds": [["double", 2], ["single", 3]],
    "steps": 4,
    "guidance": 3.5,
    "prompts": ["a", "b", "c"],
}


def summary(vitality=VITALITY, rule=Rule("top", 2), **settings) -> Summary:  # noqa: B008
    """A sweep of five layers and three prompts that all say the same."""
    variants = tuple(Variant((layer,), 0, 4) for layer in range(len(vitality)))
    similarities = np.repeat(1 - np.array([vitality]), 3, axis=0)
    values = {"dino": similarities} | {name: similarities for name in ("clip", "psnr", "ssim")}
    return summarise(Table(variants, values), SETTINGS | settings, rule)


def test_it_says_what_was_found(tmp_path):
    write_layer_file(tmp_path / "layers.json", summary())
    content = json.loads((tmp_path / "layers.json").read_text())
    assert content["model"] == {
        "title": "FLUX.1 tiny", "name": "checkpoints/tiny", "digest": "0123456789abcdef", "dtype": "float32",
    }  # fmt: skip
    assert content["sets"] == {"vital": [0, 3], "least": [1, 4]}
    assert content["sweep"] == {
        "steps": 4, "guidance": 3.5, "prompts": 3, "rule": "top 2", "confidence": 1.0,
    }  # fmt: skip
    third = content["layers"][3]
    assert (third["kind"], third["stack"], third["index"]) == ("single", "single_transformer_blocks", 1)
    assert third["vital"] and third["vitality"] == pytest.approx(0.4) and third["low"] <= 0.4 <= third["high"]
    assert content["diffusers_layer_skip"] == [
        {"fqn": "transformer_blocks", "indices": [0], "skip_attention": True, "skip_ff": True},
        {"fqn": "single_transformer_blocks", "indices": [1], "skip_attention": True, "skip_ff": True},
    ]
    assert read_layer_file(tmp_path / "layers.json").sets["vital"] == (0, 3)
    assert [path.name for path in tmp_path.iterdir()] == ["layers.json"]


def test_diffusers_finds_the_same_blocks():
    """Its configs, made from the fields, name the blocks that are those layers in the tests' oracle."""
    model, layers = published.transformer(), (0, 1, 3, 4)
    blocks = reference.blocks(model)
    configs = [LayerSkipConfig(**msgspec.to_builtins(skip)) for skip in diffusers_layer_skip(layers, FLUX_KINDS)]
    named = [getattr(model, config.fqn)[index] for config in configs for index in config.indices]
    assert [id(block) for block in named] == [id(blocks[layer]) for layer in layers]
    assert all(config.skip_attention and config.skip_ff and config.dropout == 1.0 for config in configs)


def test_every_layer_of_every_family_has_a_block_in_diffusers():
    for family, model in published_models().values():
        kinds = family.layer_kinds(model.configs)
        places = [place_in_diffusers(layer, kinds) for layer in range(family.layers(model.configs))]
        assert len(set(places)) == len(places)
    assert all(family.diffusers_stacks for family in FAMILIES.values())
    # Both of SD3.5's kinds stand in one stack, in order.
    model = published_sd3.transformer("3.5-medium")
    kinds = (("dual", 2), ("joint", len(model.transformer_blocks) - 2))
    assert place_in_diffusers(2, kinds) == ("transformer_blocks", 2)
    kinds = FLUX1.layer_kinds(FLUX1.published["flux-dev"].configs)
    assert [skip.indices for skip in diffusers_layer_skip(FLUX_DEV_CODE, kinds)] == [
        (0, 1, 17, 18),
        (6, 9, 34, 35, 37),
    ]


@pytest.mark.parametrize("layer", [5, 99, -1])
def test_layers_that_there_are_not_are_refused(layer):
    with pytest.raises(SettingError, match="no such layer: the model has 5 layers"):
        diffusers_layer_skip([layer], FLUX_KINDS)


def test_layers_that_nobody_looked_at_have_no_numbers(tmp_path):
    found = summary()
    unseen = dataclasses.replace(found.layers[4], vitality=float("nan"), low=float("nan"), high=float("nan"))
    write_layer_file(tmp_path / "layers.json", dataclasses.replace(found, layers=(*found.layers[:4], unseen)))
    content = read_layer_file(tmp_path / "layers.json")
    assert content.layers[4].vitality is None and content.layers[4].low is None
    assert content.sets["least"] == (1, 2)
    assert "NaN" not in (tmp_path / "layers.json").read_text()


def test_a_layer_file_is_replaced_and_nothing_else(tmp_path):
    file = tmp_path / "layers.json"
    write_layer_file(file, summary())
    write_layer_file(file, summary(rule=Rule("top", 1)))
    assert read_layer_file(file).sets["vital"] == (0,)
    for text in ("my thesis", "{}", '{"kind": "vital layers of a diffusion transformer"}', ""):
        file.write_text(text)
        with pytest.raises(SettingError, match="`?export`? does not replace it"):
            write_layer_file(file, summary())
        assert file.read_text() == text
    with pytest.raises(SettingError, match="does not replace it"):
        write_layer_file(tmp_path, summary())
    with pytest.raises(SettingError, match="no folder"):
        write_layer_file(tmp_path / "none" / "layers.json", summary())
    with pytest.raises(SettingError, match="write one with"):
        read_layer_file(file)


@pytest.fixture
def finished(tmp_path):
    """A finished run, as far as its findings go."""
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / SCORES_FILE).write_text(summary().to_json())
    return folder


def test_the_command_writes_it_of_a_finished_run(finished, tmp_path, capsys):
    assert run("vital", "--out", finished, "--export", tmp_path / "layers.json") == 0
    assert "layers.json" in capsys.readouterr().out
    assert read_layer_file(tmp_path / "layers.json").model.title == "FLUX.1 tiny"


@pytest.mark.parametrize(
    "options, message",
    [
        (("--out", "run", "--export", "none/layers.json"), "--export is to be written into none"),
        (("--out", "run", "--export", "thesis.txt"), "--export does not replace it"),
        (("--out", "run", "--export", "run"), "--export does not replace it"),
        (("--out", "none", "--export", "layers.json"), "no finished sweep at none"),
        (("--out", "run", "--export", "layers.json", "--steps", 3), "--steps has no effect"),
        (("--export", "layers.json"), "--model and --out are needed"),
        (("--model", "toyworld", "--dry-run", "--export", "layers.json"), "--export has no effect"),
        (("--model", "toyworld", "--out", "new", "--export", "thesis.txt"), "--export does not replace it"),
    ],
)
def test_bad_input(options, message, finished, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "thesis.txt").write_text("…")
    assert run("vital", *options) == 2
    error = capsys.readouterr().err
    assert message in error and len(error.strip().splitlines()) == 1
    assert (tmp_path / "thesis.txt").read_text() == "…"
    assert {path.name for path in tmp_path.iterdir()} == {"run", "thesis.txt"}
