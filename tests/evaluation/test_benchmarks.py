"""PIE-Bench's layout and the COCO protocol, against numpy, torch and transformers."""

import csv
import functools
import json

import numpy as np
import pytest
import torch
import transformers
from commandline import run
from PIL import Image
from safetensors.numpy import save_file
from test_edit_measures import random_weights, torch_lpips, torch_structure_distance
from test_metrics import reference_ssim

from sflow_jax.catalogue import ASSETS
from sflow_jax.errors import SettingError
from sflow_jax.evaluation.captions import CaptionBench, read_captions
from sflow_jax.evaluation.drawn_pie import draw_pie
from sflow_jax.evaluation.known import scene_edits
from sflow_jax.evaluation.networks import Networks, load_networks
from sflow_jax.evaluation.pie import PieBench, decode_mask, encode_mask, read_mapping
from sflow_jax.evaluation.run import evaluate
from sflow_jax.settings import EvaluationSettings

JUDGES = {"features": "toyworld", "clip": "toyworld-clip", "clip_tokenizer": str(ASSETS / "tokenizer")}


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """A set of one scene in PIE-Bench's layout."""
    folder = tmp_path_factory.mktemp("pie") / "drawn"
    assert draw_pie(folder, 1, seed=4) == 6
    return folder


@pytest.fixture(scope="module")
def judges(flow, tmp_path_factory) -> Networks:
    """Every network, LPIPS with random weights."""
    file = tmp_path_factory.mktemp("lpips") / "lpips.safetensors"
    save_file(random_weights(), file)
    return load_networks(EvaluationSettings(**JUDGES, lpips=str(file)), "tiny", flow.info)


@functools.cache
def clip() -> tuple:
    """The embedded CLIP as transformers has it."""
    return (
        transformers.CLIPModel.from_pretrained(ASSETS / "clip", dtype=torch.float32).eval(),
        transformers.AutoImageProcessor.from_pretrained(ASSETS / "clip", backend="pil"),
        transformers.AutoTokenizer.from_pretrained(ASSETS / "tokenizer"),
    )


@torch.no_grad()
def clip_features(pictures: list, captions: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """Unit vectors of pictures and captions."""
    model, processor, tokenizer = clip()
    words = tokenizer(captions, padding=True, return_tensors="pt")
    out = model(**words, **processor(pictures, return_tensors="pt"))
    return out.image_embeds.numpy(), out.text_embeds.numpy()


def test_masks_are_runs_with_their_border():
    mask = decode_mask([513, 2, 5 * 512 + 510, 4, 512 * 512 - 1, 99])
    expected = np.zeros((512, 512), bool)
    expected[1, 1:3] = expected[5, 510:] = expected[6, :2] = True
    expected[0] = expected[-1] = expected[:, 0] = expected[:, -1] = True
    np.testing.assert_array_equal(mask, expected)
    np.testing.assert_array_equal(decode_mask(encode_mask(mask)), mask)
    assert encode_mask(np.zeros((512, 512), bool)) == [] and not decode_mask([])[1:-1, 1:-1].any()
    inner = np.zeros((512, 512), bool)
    inner[3, 5:9] = True
    assert encode_mask(inner) == [3 * 512 + 5, 4]


def test_a_drawn_set_is_in_the_layout(drawn):
    told = json.loads((drawn / "mapping_file.json").read_text())
    assert {entry["editing_type_id"] for entry in told.values()} == {"1", "2", "3", "5", "6", "8"}
    for (key, entry), edit in zip(told.items(), scene_edits(4, 0)):
        picture = Image.open(drawn / "annotation_images" / entry["image_path"])
        np.testing.assert_array_equal(np.asarray(picture), edit.source.draw(512))
        assert "[" in entry["original_prompt"] + entry["editing_prompt"]
        annotation = next(x for x in read_mapping(drawn) if x.key == key)
        assert (annotation.source, annotation.edit) == (edit.source_caption, edit.edit_caption)
        np.testing.assert_array_equal(annotation.mask[1:-1, 1:-1], edit.mask(512)[1:-1, 1:-1])
    recolour = next(entry for entry in told.values() if entry["editing_type_id"] == "6")
    before, after = recolour["blended_word"].split()
    assert f"[{before}]" in recolour["original_prompt"] and f"[{after}]" in recolour["editing_prompt"]
    with pytest.raises(SettingError, match="is there already"):
        draw_pie(drawn, 1)


def test_every_column_agrees_with_an_independent_one(drawn, judges):
    bench = PieBench(drawn, read_mapping(drawn)[:2], judges)
    case, annotation = bench.cases[1], bench.annotations[bench.cases[1].name]
    source = np.asarray(Image.open(case.picture))
    noise = np.random.default_rng(0).normal(scale=12, size=source.shape)
    picture = np.uint8(np.clip(source + noise, 0, 255))
    (scores,), _ = bench.score(case, picture[None])
    keep = ~annotation.mask[..., None]
    black = [x.astype(np.float64) * keep for x in (source, picture)]
    error = np.mean((black[0] - black[1]) ** 2) / 255**2
    seen, texts = clip_features(
        [Image.fromarray(x) for x in (source, picture, np.uint8(picture * ~keep))], [case.prompt, case.edits[0]]
    )
    whole = [x[None].astype(np.float32) for x in (source, picture)]
    expected = {
        "psnr_unedit_part": -10 * np.log10(error),
        "mse_unedit_part": error,
        "ssim_unedit_part": np.mean([reference_ssim(black[0][..., c], black[1][..., c]) for c in range(3)]),
        "lpips_unedit_part": torch_lpips(random_weights(), *(np.float32(x)[None] for x in black))[0],
        "structure_distance": torch_structure_distance(*(np.uint8(x) for x in whole))[0],
        "clip_similarity_source_image": 100 * seen[0] @ texts[0],
        "clip_similarity_target_image": 100 * seen[1] @ texts[1],
        "clip_similarity_target_image_edit_part": 100 * seen[2] @ texts[1],
    }
    assert scores.keys() == expected.keys() == {column.name for column in bench.columns}
    for name, value in expected.items():
        # Similarities are told times 100; PSNR and they are held to 1e-4 of themselves.
        assert scores[name] == pytest.approx(max(value, 0) if "clip" in name else value, rel=1e-4, abs=1e-4), name
    assert scores["lpips_unedit_part"] > 0.01 and scores["clip_similarity_target_image"] > 5


def test_the_edited_pictures_are_where_the_published_evaluator_looks(flow, drawn, judges, tmp_path):
    told = json.loads((drawn / "mapping_file.json").read_text())
    # One picture as the real set has them.
    first = next(iter(told))
    told[first]["image_path"] = told[first]["image_path"].replace(".png", ".jpg")
    folder = tmp_path / "pie"
    for entry, before in zip(told.values(), json.loads((drawn / "mapping_file.json").read_text()).values()):
        file = folder / "annotation_images" / entry["image_path"]
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.open(drawn / "annotation_images" / before["image_path"]).save(file)
    (folder / "mapping_file.json").write_text(json.dumps(told))
    settings = EvaluationSettings(steps=1, methods="none:steps=2,reference")
    summary = evaluate(
        flow, PieBench(folder, read_mapping(folder)[:2], judges), settings, tmp_path / "run", progress=False
    )
    with (tmp_path / "run" / "scores.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["method"] for row in rows] == ["none:steps=2"] * 2 + ["reference"] * 2
    for row in rows:
        place = told[row["case"]]["image_path"]
        written = tmp_path / "run" / "edited" / row["method"].replace(":", "-") / "annotation_images" / place
        picture, source = (np.asarray(Image.open(x)) / 255 for x in (written, folder / "annotation_images" / place))
        assert picture.shape == (512, 512, 3)
        keep = ~decode_mask(told[row["case"]]["mask"])[..., None]
        assert float(row["mse_unedit_part"]) == pytest.approx(np.mean(((picture - source) * keep) ** 2), rel=1e-4)
        assert row["group"] == told[row["case"]]["editing_type_id"]
    assert (
        Image.open(
            tmp_path / "run" / "edited" / "reference" / "annotation_images" / told[first]["image_path"]
        ).format
        == "JPEG"
    )
    assert "published figures use DINO ViT-B/8" in (tmp_path / "run" / "summary.md").read_text()
    assert [method.passes for method in summary.methods] == [6, 3]


def test_columns_without_a_network_are_empty_and_said(flow, drawn):
    bench = PieBench(drawn, read_mapping(drawn), load_networks(EvaluationSettings(), "tiny", flow.info))
    case = bench.cases[0]
    bench.annotations[case.name].mask[:] = True
    (scores,), _ = bench.score(case, np.asarray(Image.open(case.picture))[None])
    assert np.isnan(list(scores.values())).all()
    notes = " ".join(bench.notes)
    assert all(part in notes for part in ("--features", "--clip", "--lpips"))


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda entry: entry.pop("mask"), "entry 000000000000: does not say 'mask'"),
        (lambda entry: entry.update(original_prompt=3), "entry 000000000000: original_prompt: Expected str"),
        (lambda entry: entry.update(mask=[1, 2, 3]), "entry 000000000000: a mask is a list of pairs"),
        (lambda entry: entry.update(mask=[1, 2.5]), "mask.*: Expected int"),
        (lambda entry: entry.update(mask=[512 * 512, 1]), "is outside 512×512"),
        (lambda entry: entry.update(image_path="../../secret.png"), "outside its folder"),
        (lambda entry: entry.update(image_path="nothing.png"), "no picture at .*nothing.png"),
        (lambda entry: entry.clear(), "does not say 'image_path'"),
    ],
)  # fmt: skip
def test_bad_entries_are_named(damage, message, drawn, tmp_path):
    told = json.loads((drawn / "mapping_file.json").read_text())
    damage(next(iter(told.values())))
    (tmp_path / "mapping_file.json").write_text(json.dumps(told))
    with pytest.raises(ValueError, match=message) as error:
        PieBench(tmp_path, read_mapping(tmp_path)[:1], Networks())
    assert "\n" not in str(error.value)


def test_pictures_of_other_sizes_are_named(drawn, tmp_path):
    told = json.loads((drawn / "mapping_file.json").read_text())
    for entry in told.values():
        entry["image_path"] = "wide.png"
    (tmp_path / "annotation_images").mkdir()
    Image.new("RGB", (512, 500)).save(tmp_path / "annotation_images" / "wide.png")
    (tmp_path / "mapping_file.json").write_text(json.dumps(told))
    with pytest.raises(SettingError, match="wide.png is 512×500; pictures of PIE-Bench are 512×512"):
        PieBench(tmp_path, read_mapping(tmp_path), Networks())
    for text, message in (("[1]", "cannot read .*mapping_file.json: Expected object"), ("{}", "holds no entries")):
        (tmp_path / "mapping_file.json").write_text(text)
        with pytest.raises(SettingError, match=message):
            read_mapping(tmp_path)


def test_networks_of_another_kind_are_named(flow):
    for settings, message in (
        ({"features": "toyworld-clip"}, "toyworld-clip is a clip, where a dinov2 is needed"),
        (
            {"clip": "toyworld-clip", "clip_tokenizer": str(ASSETS / "tokenizer_2")},
            "name its own folder with clip_to",
        ),
        ({"lpips": "nowhere"}, "no file at nowhere"),
    ):
        with pytest.raises(SettingError, match=message):
            load_networks(EvaluationSettings(**settings), "tiny", flow.info)


@pytest.fixture
def captioned(photo, tmp_path):
    """A picture, and three lines on two captions of it, as CSV and as JSON lines."""
    photo.save(tmp_path / "photo.png")
    lines = [
        ("photo.png", "a red cat", "a blue cat"),
        ("photo.png", "a red cat", "a red dog"),
        ("photo.png", "a dog", "a cat"),
    ]
    fields = ("image", "source", "edit")
    rows = [",".join(fields), *(",".join(line) for line in lines)]
    (tmp_path / "lines.csv").write_text("\n".join(rows))
    (tmp_path / "lines.jsonl").write_text("\n".join(json.dumps(dict(zip(fields, line))) for line in lines) + "\n\n")
    return tmp_path


def test_lines_of_one_picture_are_edited_together(captioned, flow, judges):
    assert read_captions(captioned / "lines.csv") == read_captions(captioned / "lines.jsonl")
    bench = CaptionBench(file := captioned / "lines.jsonl", read_captions(file), flow.info.canvas(), judges)
    assert [(case.prompt, case.edits) for case in bench.cases] == [
        ("a red cat", ("a blue cat", "a red dog")),
        ("a dog", ("a cat",)),
    ]


def test_the_three_measures_are_those_of_transformers(captioned, photo, flow, judges):
    bench = CaptionBench(file := captioned / "lines.csv", read_captions(file), flow.info.canvas(48, 64), judges)
    case, source = bench.cases[0], np.asarray(photo)
    edited = [source[::-1], np.uint8(255 - source)]
    scores, _ = bench.score(case, np.stack(edited))
    seen, texts = clip_features([Image.fromarray(x) for x in (source, *edited)], [case.prompt, *case.edits])
    unit = lambda x: x / np.linalg.norm(x)
    for i, row in enumerate(scores, 1):
        assert row["clip_text"] == pytest.approx(seen[i] @ texts[i], abs=1e-4)
        assert row["clip_image"] == pytest.approx(seen[i] @ seen[0], abs=1e-4)
        direction = unit(seen[i] - seen[0]) @ unit(texts[i] - texts[0])
        assert row["clip_direction"] == pytest.approx(direction, abs=1e-4)
    assert abs(scores[0]["clip_direction"]) > 1e-3
    unchanged, _ = bench.score(case, np.stack([source, source]))
    assert [row["clip_direction"] for row in unchanged] == [0, 0] and unchanged[0]["clip_image"] > 0.9999


@pytest.mark.parametrize(
    "name, text, message",
    [
        ("a.csv", "image,source\nx.png,a cat\n", "line 2 must say image, source, edit.*edit"),
        ("a.jsonl", '{"image": "x.png", "source": "a cat", "edit": ""}', "line 1 must say image, source, edit"),
        ("a.jsonl", '\n{"image"', "line 2 must say .*no JSON"),
        ("a.jsonl", "3", "line 1 must say"),
        ("a.csv", "image,source,edit\n", "holds no lines"),
        ("a.csv", "image,source,edit\nx.png,a cat,a dog\n", "no picture at .*x.png"),
    ],
)  # fmt: skip
def test_bad_lines_are_named(name, text, message, flow, judges, tmp_path):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message) as error:
        CaptionBench(tmp_path / name, read_captions(tmp_path / name), flow.info.canvas(), judges)
    assert "\n" not in str(error.value)


def test_the_commands(checkpoint, captioned, tmp_path, capsys):
    named = [part for key, value in JUDGES.items() for part in (f"--{key.replace('_', '-')}", value)]
    painted = ("--steps", 1, "--methods", "none", *named)
    assert (
        run("evaluate", "-m", checkpoint, "--captions", captioned / "lines.csv", *painted, "-o", tmp_path / "coco")
        == 0
    )
    told = capsys.readouterr().out
    assert "| none | 3 |" in told and "CLIP direction" in told
    assert run("evaluate", "--draw-pie", tmp_path / "pie", "--scenes", 1) == 0
    assert "6 pictures in" in capsys.readouterr().out
    assert (
        run("evaluate", "-m", checkpoint, "--pie", tmp_path / "pie", "--limit", 1, *painted, "-o", tmp_path / "out")
        == 0
    )
    told = capsys.readouterr().out
    assert "no LPIPS weights were named" in told and "| none | 1 |" in told
