"""The attention atlas: what is looked at, what it adds up to, what it costs, and what the command writes."""

import json
import re

import numpy as np
import pytest
from commandline import run
from PIL import Image

from sflow_jax.atlas.atlas import parse_point
from sflow_jax.errors import SettingError

SOURCE, EDIT = "a red cat sits in snow", "a red dog sits on the beach"
LOOKED = {"points": [(20, 40), (0.5, 1.0)], "words": ["dog", "sits on"]}
QUICK = {"steps": 3, "progress": False}


@pytest.fixture(scope="module")
def atlas(flow):
    """Of an edit of a painted picture; layers 0, 2 and 3 inject."""
    return flow.attention_atlas(SOURCE, EDIT, **LOOKED, **QUICK)


def test_tokens_are_those_of_points_and_words(atlas, flow):
    words = flow.prompts.words
    assert [query.name for query in atlas.queries] == ["point 20,40", "point 0.5,1.0", "word dog", "word sits on"]
    # Four by four tokens of 16 pixels, behind the text; the prompt's third word, its fourth and its fifth.
    assert [query.tokens for query in atlas.queries] == [(words + 6,), (words + 11,), (2,), (3, 4)]
    assert (atlas.queries[1].row, atlas.queries[1].column, atlas.queries[2].row) == (2, 3, None)


def test_attention_is_shared_among_source_own_and_text(atlas, flow):
    assert atlas.text.shape == (3, 5, 4, flow.prompts.words) and atlas.own.shape == (3, 5, 4, 4, 4)
    np.testing.assert_allclose(atlas.shares.sum(axis=-1), 1, atol=1e-5)
    injecting = np.isin(range(5), (0, 2, 3))
    assert not atlas.own[:, injecting].any() and (atlas.source[:, injecting] > 0).all()
    assert not atlas.source[:, ~injecting].any() and (atlas.own[:, ~injecting] > 0).all()
    np.testing.assert_allclose(atlas.mean().shares[0], atlas.shares.mean(axis=0), atol=1e-6)
    assert atlas.layer_names == ["0 double", "1 double", "2 single", "3 single", "4 single"]


def test_looking_changes_no_picture(atlas, flow):
    edit = flow.edit(SOURCE, [EDIT], **QUICK)
    np.testing.assert_allclose(atlas.image, edit.images[1], atol=1e-5)
    generated = flow.generate([SOURCE], **QUICK)
    looked = flow.attention_atlas(SOURCE, words=["cat"], **QUICK)
    np.testing.assert_allclose(looked.image, generated.images[0], atol=1e-5)
    assert not looked.source.any() and looked.first_step == 0


def test_photos_are_looked_at_by_any_method(flow, photo):
    options = {"image": photo, "method": "coupled", "layers": "all", "words": ["dog"], "progress": False}
    numbers = {"begin": 0.5, "until": 0.75, "extended": 0.0}
    atlas = flow.attention_atlas(SOURCE, EDIT, steps=4, method_options=numbers, **options)
    assert len(atlas.text) == 2 and atlas.first_step == 2
    # Beside the own tokens in the third step, not at all in the fourth.
    assert (atlas.source[0] > 0).all() and (atlas.own[0] > 0).all() and not atlas.source[1].any()


def test_other_points_words_and_layers_compile_nothing(atlas, flow, compilations):
    flow.edit(SOURCE, [EDIT], **QUICK)
    before = compilations()
    flow.attention_atlas(SOURCE, EDIT, points=[(0, 0)], words=["red", "beach", "sits"], layers=[1], **QUICK)
    # What looks at nothing has the program that it had.
    flow.edit(SOURCE, [EDIT], **QUICK)
    assert compilations() == before


@pytest.mark.parametrize(
    "looked, message",
    [
        ({}, "give at least one point or word"),
        ({"words": ["cat"]}, "word 'cat' is not in the prompt"),
        ({"words": ["do"]}, "word 'do' is not in the prompt"),
        ({"words": [" "]}, "word ' ' is not in the prompt"),
        ({"words": "dog"}, "words must be a list of texts"),
        ({"points": [(64, 0)]}, "point 64,0 is outside the picture: rows 0 to 63, columns 0 to 63"),
        ({"points": [(0.5, -0.1)]}, "point 0.5,-0.1 is outside"),
        ({"points": [(0.5, 3)]}, "a point must be a row and a column"),
        ({"points": [(1, 2, 3)]}, "a point must be a row and a column"),
        ({"points": [(float("nan"), 0.5)]}, "outside the picture"),
        ({"points": [(1, 2)] * 65}, "at most 64"),
    ],
)
def test_bad_points_and_words_are_named(looked, message, flow):
    with pytest.raises(SettingError, match=re.escape(message)):
        flow.attention_atlas(SOURCE, EDIT, **looked, **QUICK)


def test_pictures_without_an_edit_are_generated(flow, photo):
    with pytest.raises(SettingError, match="image needs an edit"):
        flow.attention_atlas(SOURCE, image=photo, words=["cat"], **QUICK)


@pytest.mark.parametrize("text", ["", "3", "1,2,3", "a,b", "1;2"])
def test_points_that_cannot_be_read_are_named(text):
    with pytest.raises(SettingError, match="cannot read point"):
        parse_point(text)


def test_points_are_pixels_or_shares():
    assert parse_point("40,52") == (40, 52) and parse_point("0.5,1") == (0.5, 1.0)


def test_the_command_writes_pictures_a_page_and_numbers(checkpoint, tmp_path):
    out = tmp_path / "out"
    command = ["atlas", "-m", checkpoint, "-p", SOURCE, "-o", out, "--steps", 2, "--point", "20,40"]
    assert run(*command, "-e", EDIT, "--word", "dog", "--step-by-step") == 0
    numbered = {f"attention-{i}{end}.png" for i in (1, 2) for end in ("", "-step-00", "-step-01")}
    assert {p.name for p in out.iterdir()} == numbered | {"source.png", "edit-1.png", "atlas.html", "atlas.json"}
    assert Image.open(out / "attention-1.png").size[0] > 6 * 64
    page, told = (out / "atlas.html").read_text(), json.loads((out / "atlas.json").read_text())
    assert "default-src 'none'" in page and page.count("<img") == 2 + 2 * 5
    assert [query["name"] for query in told["queries"]] == ["point 20,40", "word dog"]
    first = told["queries"][0]
    assert np.shape(first["steps"]["source"]) == (2, 5)
    total = sum(np.array(first["mean"][name]) for name in ("source", "own", "text"))
    np.testing.assert_allclose(total, 1, atol=1e-4)
    # Again, of the source alone: what is there is replaced whole.
    assert run(*command) == 0
    assert {p.name for p in out.iterdir()} == {"attention-1.png", "picture-1.png", "atlas.html", "atlas.json"}


@pytest.mark.parametrize(
    "options, message",
    [
        (("--word", "hat"), "--word 'hat' is not in the prompt"),
        (("--point", "99,1"), "--point 99,1 is outside the picture"),
        (("--point", "here"), "cannot read --point 'here'"),
        ((), "give at least one --point or --word"),
        (("--word", "dog", "--image", "{photo}"), "has no effect without --edit"),
        (("--word", "dog", "--layers", "0"), "--layers has no effect without --edit"),
    ],
)
def test_mistakes_end_with_one_line_before_loading(
    options, message, checkpoint, photo, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr("sflow_jax.painter.Painter.load", lambda *_: pytest.fail("loaded"))
    photo.save(tmp_path / "photo.png")
    filled = [option.format(photo=tmp_path / "photo.png") for option in options]
    assert run("atlas", "-m", checkpoint, "-p", EDIT, *filled, "-o", tmp_path / "out") == 2
    assert message in capsys.readouterr().err.strip().splitlines()[-1]
    assert not (tmp_path / "out").exists()
