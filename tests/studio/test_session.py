"""The studio without its page: who paints when, what the form asks for, and results that are opened again."""

import functools
import json
import queue
import threading
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from sflow_jax.editing.methods import METHODS
from sflow_jax.errors import SettingError
from sflow_jax.pictures.files import to_unit
from sflow_jax.pipeline import StableFlow
from sflow_jax.progress import Stopped
from sflow_jax.results import Edit, Inversion, Turn
from sflow_jax.settings import EditSettings
from sflow_jax.studio.desk import Desk, Done, Watch
from sflow_jax.studio.edits import MOST_INVERSIONS, Inversions, difference, paint_edit
from sflow_jax.studio.form import BRUSHED, MOST_EDITS, MOST_STEPS, Form, open_result, read_numbers
from sflow_jax.studio.known import answer, draw_edit
from sflow_jax.studio.layers import bars, open_run, paint_without, pictures_without, sweep
from sflow_jax.studio.studio import Studio
from sflow_jax.toyworld.reader import AttributeReader

EDITS = "a dog\n\n  a cat in snow "


@pytest.fixture
def studio(flow, tmp_path):
    return Studio(flow, tmp_path / "studio")


@pytest.fixture
def photo_file(photo, tmp_path):
    photo.save(tmp_path / "photo.png")
    return str(tmp_path / "photo.png")


class Seen:
    """A watch that nobody stops, and what was told to it."""

    def __init__(self):
        self.watch = Watch(queue.SimpleQueue(), threading.Event())

    def words(self) -> set[str]:
        moments = [self.watch.moments.get() for _ in range(self.watch.moments.qsize())]
        return {moment.what for moment in moments}


def paint(studio: Studio, form: Form) -> tuple[Edit, Path, set[str]]:
    """An edit, its folder, and what was done for it."""
    seen = Seen()
    edit, folder = studio.save(paint_edit(studio.flow, form, studio.inversions, seen.watch))
    return edit, folder, seen.words()


def reopened(studio: Studio, path: Path) -> Form:
    return open_result(str(path), studio.flow.info.digest, studio.store.brought)[0]


# ---- the desk


def steps(count: int, each=lambda: None):
    """Work of so many steps."""

    def work(watch):
        for step in range(count):
            watch.progress(step, count, "editing")
            each()
        return "painted"

    return work


def test_work_tells_its_progress_and_ends_with_its_result():
    *moments, done = Desk().run("one", steps(3))
    assert done == Done("painted") and all(moment.total in (0, 3) for moment in moments)


def test_what_work_raises_reaches_the_visitor():
    def work(watch):
        raise SettingError("`steps` is wrong")

    with pytest.raises(SettingError, match="steps is wrong"):
        list(Desk().run("one", work))


def test_one_works_while_others_wait_and_each_stops_only_its_own():
    desk, begun, go_on, second = Desk(), threading.Event(), threading.Event(), []

    def slow(watch):
        begun.set()
        go_on.wait(10)
        watch.progress(1, 2, "editing")

    first = desk.run("one", slow)
    next(first)
    assert begun.wait(10)
    desk.ask("two")
    waiting = threading.Thread(target=lambda: second.extend(desk.run("two", steps(1))))
    waiting.start()
    assert second == []
    assert desk.stop("one") and not desk.stop("nobody")
    go_on.set()
    with pytest.raises(Stopped):
        list(first)
    waiting.join(10)
    assert second[-1] == Done("painted")


def test_work_that_is_stopped_while_it_waits_never_begins():
    desk = Desk()
    desk.ask("one")
    desk.stop("one")
    with pytest.raises(Stopped):
        list(desk.run("one", lambda watch: pytest.fail("it began")))
    assert list(desk.run("one", steps(1)))[-1] == Done("painted")


def test_whoever_leaves_stops_the_work():
    desk, ended = Desk(), threading.Event()

    def endless(watch):
        try:
            while True:
                watch.progress(0, 1, "editing")
        except Stopped:
            ended.set()
            raise

    leaving = desk.run("one", endless)
    next(leaving)
    leaving.close()
    assert ended.wait(10)


# ---- the form

GOOD = {"prompt": "a cat", "edits": "a dog"}


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"edits": "a dog"}, "source prompt is empty"),
        ({"prompt": "a cat", "edits": " \n"}, "no edit yet"),
        ({"prompt": "a cat", "edits": "a dog\n" * (MOST_EDITS + 1)}, f"at most {MOST_EDITS} edits"),
        ({**GOOD, "prompt": "cat " * 1000}, "more than 1,000 characters"),
        ({**GOOD, "steps": MOST_STEPS + 1}, f"at most {MOST_STEPS}"),
        ({**GOOD, "steps": 0}, "steps must be at least 1"),
        ({**GOOD, "region": BRUSHED}, "nothing is brushed"),
        ({**GOOD, "method": "magic"}, "unknown method"),
        ({**GOOD, "layers": "chosen", "chosen": (99,)}, "no layer 99"),
        ({**GOOD, "strength": 2.0}, "share from 0 to 1"),
        ({**GOOD, "region": "auto"}, "needs a picture to keep"),
        ({**GOOD, "seed": -1}, "seed must be"),
    ],
)
def test_bad_forms_say_what_is_wrong(studio, fields, message):
    with pytest.raises(ValueError, match=message):
        paint_edit(studio.flow, Form(**fields), Inversions(), Seen().watch)


def test_sizes_of_an_opened_record_hold_for_its_method_and_are_bounded(studio):
    carried = {"method": METHODS["coupled"], "height": 512, "width": 512, "photo": None}
    assert Form(**GOOD, method="reference", carried=carried).settings().height is None
    form = Form(**GOOD, method="coupled", carried=carried)
    with pytest.raises(SettingError, match="512×512 is too large here"):
        paint_edit(studio.flow, form, studio.inversions, Seen().watch)


def test_numbers_are_read_from_text():
    texts = {"strength": "", "steps": " 12 ", "guidance": "2.5", "nudge": "", "seed": None}
    assert read_numbers(texts) == {"strength": None, "steps": 12, "guidance": 2.5, "nudge": None, "seed": 0}
    with pytest.raises(SettingError, match="steps must be a whole number, or empty, found '2.5'"):
        read_numbers({**texts, "steps": "2.5"})


# ---- painting


def test_a_photo_is_inverted_once_and_painted_as_without_reuse(studio, photo_file):
    form = Form(prompt="a cat", edits=EDITS, photo=photo_file, method="reference", layers="vital", steps=2)
    edit, _, done = paint(studio, form)
    assert "inverting" in done and edit.captions == ["source: a cat", "a dog", "a cat in snow"]
    direct = studio.flow.edit(
        "a cat", ["a dog", "a cat in snow"], image=photo_file, method="reference", layers="vital", steps=2,
        progress=False,
    )  # fmt: skip
    np.testing.assert_array_equal(edit.images, direct.images)
    names = ("source", "image", "image_checksum", "layers", "steps", "nudge", "method", "method_settings")
    assert {name: edit.record[name] for name in names} == {name: direct.record[name] for name in names}
    other = Form(
        prompt="a cat", edits="snow\na red dog", photo=photo_file, method="reference", layers="all", steps=2
    )
    assert "inverting" not in paint(studio, other)[2]
    again = Form(prompt="a red cat", edits=EDITS, photo=photo_file, method="reference", steps=2)
    assert "inverting" in paint(studio, again)[2]


def test_only_the_last_inversions_are_kept():
    inversions, made = Inversions(), []

    def invert(key: int) -> Inversion:
        made.append(key)
        return Inversion(np.zeros((2, 1, 1), np.float32), np.array([0.0, 1.0], np.float32), {})

    for key in [*range(MOST_INVERSIONS + 1), 1, 0]:
        inversions.of(key, functools.partial(invert, key))
    assert made == [*range(MOST_INVERSIONS + 1), 0]


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"layers": "chosen", "chosen": (1, 3), "seed": 4, "guidance": 2.0, "strength": 0.5},
        {"photo": True, "method": "reference", "nudge": 1.1},
        {"photo": True, "method": "coupled", "region": "none"},
    ],
)
def test_an_opened_result_is_painted_again_as_it_was(studio, photo_file, fields):
    fields = {**fields, "photo": photo_file} if "photo" in fields else fields
    edit, folder, _ = paint(studio, Form(prompt="a cat", edits=EDITS, steps=2, **fields))
    for name in ("edit.json", "edit-2.png"):
        form = reopened(studio, folder / name)
        assert (form.prompt, form.edit_prompts) == ("a cat", ["a dog", "a cat in snow"])
        np.testing.assert_array_equal(paint(studio, form)[0].images, edit.images)


def test_a_brushed_mask_bounds_the_edit_and_comes_along(studio, photo_file):
    brushed = np.zeros((96, 128), bool)
    brushed[:, :64] = True
    form = Form(
        prompt="a cat", edits=EDITS, photo=studio.store.photo(photo_file), method="coupled", steps=2,
        region=BRUSHED, mask=studio.store.mask(brushed), paste=True,
    )  # fmt: skip
    edit, folder, _ = paint(studio, form)
    assert edit.region[:, 0].min() == 1 and edit.region[:, -1].max() == 0
    assert {"photo.png", "mask.png", "edit.json"} <= {path.name for path in folder.iterdir()}
    again = reopened(studio, folder / "edit.json")
    assert again.region == BRUSHED and again.paste
    np.testing.assert_array_equal(paint(studio, again)[0].images, edit.images)


def test_an_edit_becomes_the_next_source(studio):
    edit, folder, _ = paint(studio, Form(prompt="a cat", edits=EDITS, steps=2))
    form = Form(prompt="a dog", edits=EDITS, before=str(folder / "edit.json"), row=1, method="coupled", steps=2)
    following, onward, _ = paint(studio, form)
    latents = Turn.load(folder).latents[1]
    direct = studio.flow.edit(
        "a dog", form.edit_prompts, latents=latents, method="coupled", steps=2, progress=False
    )
    np.testing.assert_array_equal(following.images, direct.images)
    assert following.record["continue"] == str(folder / "edit.json") and following.record["pick"] == 1
    np.testing.assert_array_equal(paint(studio, reopened(studio, onward / "edit.json"))[0].images, direct.images)


def test_results_that_cannot_be_opened_say_why(studio, photo_file, tmp_path):
    own = studio.store.photo(photo_file)
    _, folder, _ = paint(studio, Form(prompt="a cat", edits=EDITS, photo=own, method="coupled", steps=2))
    record = json.loads((folder / "edit.json").read_text())

    def changed(**values) -> Path:
        (tmp_path / "changed.json").write_text(json.dumps(record | values))
        return tmp_path / "changed.json"

    for values, message in (
        ({"image": photo_file, "image_checksum": "0" * 32}, "has changed since: load that photo"),
        ({"image": str(tmp_path / "nowhere.png"), "image_checksum": "0" * 32}, "is not there"),
        ({"image": "/etc/passwd", "image_checksum": None}, "does not say what its passwd held"),
        ({"image": "gs://somewhere/photo.png", "image_checksum": "0" * 32}, "opened only if you name it"),
        ({"region_shape": {"grow": 1}}, "made elsewhere"),
        ({"command": "magic"}, "holds no record"),
    ):
        with pytest.raises(ValueError, match=message):
            reopened(studio, changed(**values))
    # What was brought is found by its content, wherever it was.
    moved = changed(image=str(tmp_path / "nowhere.png"))
    assert reopened(studio, moved).photo == own
    form, note = open_result(str(folder / "edit.json"), "another", studio.store.brought)
    assert (form.prompt, form.steps, form.photo) == ("a cat", None, own) and "alone are taken" in note


def test_the_difference_is_the_largest_of_three_colours():
    source = np.zeros((2, 2, 3), np.float32)
    edit = source.copy()
    edit[0, 1] = (0.2, 1.0, 0.0)
    np.testing.assert_array_equal(difference(source, edit), [[0, 255], [0, 0]])


# ---- layers


def test_a_small_sweep_gives_bars_and_pictures_and_opens_again(studio, tmp_path):
    assert [bar.vitality for bar in bars(studio.flow)] == [None] * studio.flow.layers
    seen = Seen()
    opened = sweep(studio.flow, tmp_path, 1, 1, "toyworld", seen.watch)
    heights = [bar.vitality for bar in bars(studio.flow, opened)]
    np.testing.assert_allclose(heights, opened.summary.vitality)
    again = open_run(opened.folder)
    (one,) = pictures_without(again, 3)
    assert one.prompt == opened.summary.settings["prompts"][0] and one.picture.shape == one.reference.shape
    with pytest.raises(SettingError, match="1 to 16 prompts"):
        sweep(studio.flow, tmp_path, 17, 1, "toyworld", seen.watch)
    with pytest.raises(SettingError, match="no finished sweep"):
        open_run(str(tmp_path))


def test_painting_without_layers_is_a_generation_that_bypasses_them(studio):
    whole, without = paint_without(studio.flow, "a cat", (0, 2), 1, Seen().watch)
    direct = studio.flow.generate(["a cat"], bypass=(0, 2), seed=1, progress=False)
    np.testing.assert_array_equal(without, np.asarray(direct.pil()[0]))
    assert (whole != without).any()


# ---- right answers


class Answering(StableFlow):
    """Edits by drawing what it is to draw."""

    drawing = None

    def edit(self, source_prompt, edit_prompts, **settings):
        pictures = to_unit(np.stack([settings["image"], self.drawing]))
        return Edit(pictures, jnp.zeros((2, 1, 1)), EditSettings())


def test_right_answers_are_told_from_others(flow):
    edit, reader = draw_edit(3, "recolour"), AttributeReader()
    model = Answering(flow.painter)
    size = flow.info.canvas().height
    model.drawing = edit.target.draw(size)
    right = answer(model, reader, edit, {}, Seen().watch)
    assert right.happened and not right.lost and right.decibels == np.inf
    model.drawing = edit.source.draw(size)
    unchanged = answer(model, reader, edit, {}, Seen().watch)
    assert not unchanged.happened and not unchanged.lost and unchanged.decibels < 60
    assert Image.fromarray(unchanged.picture).size == (size, size)
