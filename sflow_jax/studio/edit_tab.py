"""The Edit page."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np
from PIL import Image

from sflow_jax.editing.methods import METHODS, PHOTO_METHOD, describe_methods
from sflow_jax.errors import SettingError
from sflow_jax.pictures.files import open_picture
from sflow_jax.results import Edit
from sflow_jax.settings import EMBEDDED_MODELS
from sflow_jax.studio.edits import difference, paint_edit, picture_files
from sflow_jax.studio.form import (
    AUTOMATIC,
    BRUSHED,
    CHOSEN_LAYERS,
    LAYER_SETS,
    MOST_EDITS,
    MOST_STEPS,
    NUMBERS,
    REGIONS,
    Form,
    open_result,
    read_numbers,
)
from sflow_jax.studio.parts import AT_ONCE, Outputs, bars_note, bars_style, guarded, in_line, shown, status, watched
from sflow_jax.studio.studio import Studio

EXAMPLE = ("a sitting orange cat in the meadow", "a sitting orange cat with a red hat in the meadow")
ABOUT_AUTOMATIC = f"reference; {PHOTO_METHOD} for photos where nothing of the reference's is set"
ABOUT = {name: f"{paper}; {passes} passes; needs {wants}" for name, paper, passes, wants in describe_methods()}
# The brush: what it covers may change.
BRUSH = gr.Brush(default_size=40, colors=["#ff3b30"], default_color="#ff3b30", color_mode="fixed")
# Fields of `Form` in the order of the page's inputs.
FIELDS = (
    "prompt", "edits", "photo", "method", "layers", "chosen", "strength", "steps", "guidance", "nudge", "seed",
    "region", "paste",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Shown:
    """What the page shows of the last result: its files, source first, captions, and which edit is looked at."""

    folder: str
    files: list[str]
    captions: list[str]
    picked: int = 1


class EditTab:
    """The page's parts and what they do."""

    def __init__(self, studio: Studio):
        self.studio = studio
        # What goes on from: (folder of an edit, row). What an opened record brought. The last result.
        self.before, self.carried, self.last = gr.State(None), gr.State({}), gr.State(None)
        with gr.Row():
            with gr.Column(scale=4, min_width=320):
                self._draw_source()
                self._draw_layers()
                self._draw_settings()
                self._draw_region()
            with gr.Column(scale=5, min_width=320):
                self._draw_results()
        self.fields = {name: getattr(self, name) for name in FIELDS}
        self._connect()

    def _draw_source(self) -> None:
        example = EXAMPLE if self.studio.flow.painter.checkpoint in EMBEDDED_MODELS else ("", "")
        self.photo = gr.Image(
            type="filepath", image_mode=None, sources=["upload", "clipboard"], height=180,
            label="Photo (or none: it is painted)", elem_id="photo", buttons=[],
        )  # fmt: skip
        self.source_note = gr.HTML("", visible=False)
        self.forget = gr.Button("Back to photo or prompt", size="sm", visible=False)
        self.prompt = gr.Textbox(example[0], label="What the source shows", lines=2, elem_id="prompt")
        self.edits = gr.Textbox(
            example[1], label=f"Edits, one a line (at most {MOST_EDITS})", lines=3, elem_id="edits"
        )
        with gr.Row():
            self.paint = gr.Button("Edit", variant="primary", elem_id="paint")
            self.stop = gr.Button("Stop", elem_id="stop", min_width=80)
            self.open = gr.UploadButton(
                "Open a result", file_types=[".png", ".json"], elem_id="open", min_width=150
            )
        self.line = gr.HTML(status("ready"), elem_id="status")

    def _draw_layers(self) -> None:
        bars = self.studio.bars()
        with gr.Accordion("Layers that take the source's keys and values", open=True):
            self.layers = gr.Radio(LAYER_SETS, value=LAYER_SETS[0], label="Which layers", elem_id="layer-set")
            self.style = gr.HTML(bars_style("layers", bars), elem_classes="styling")
            self.chosen = gr.CheckboxGroup(
                [(str(bar.layer), bar.layer) for bar in bars], label=f"Layers ({bars_note(bars)})",
                elem_id="layers", elem_classes="bars",
            )  # fmt: skip

    def _draw_settings(self) -> None:
        with gr.Accordion("Method and numbers (empty: the method's own)", open=False):
            self.method = gr.Dropdown(
                [AUTOMATIC, *METHODS], value=AUTOMATIC, label="Method", elem_id="method",
                info=ABOUT_AUTOMATIC,
            )  # fmt: skip
            with gr.Row():
                self.strength = self._number("Strength", "0 to 1")
                self.steps = self._number("Steps", f"to {MOST_STEPS}")
                self.guidance = self._number("Guidance")
                self.nudge = self._number("Nudge", "photos")
                self.seed = self._number("Seed", "0")

    def _number(self, label: str, hint: str = "") -> gr.Textbox:
        return gr.Textbox(label=label, placeholder=hint, min_width=84, elem_id=label.lower(), max_lines=1)

    def _draw_region(self) -> None:
        with gr.Accordion("Where it may change", open=False, elem_id="where"):
            self.region = gr.Radio(REGIONS, value=AUTOMATIC, label="Region", elem_id="region")
            self.load = gr.Button("Load the source to brush on it", size="sm", elem_id="load-brush")
            self.brush = gr.ImageEditor(
                type="numpy", sources=[], transforms=[], layers=False, brush=BRUSH, label="Brush",
                canvas_size=(512, 512), height=420, buttons=[], elem_id="brush",
            )  # fmt: skip
            self.paste = gr.Checkbox(False, label="Outside it keep the photo's own pixels")

    def _draw_results(self) -> None:
        hard = ["hard"] if self.studio.small else []
        self.preview = gr.Image(label="So far", visible=False, height=220, buttons=[], elem_id="preview")
        self.slider = gr.ImageSlider(
            type="filepath",
            label="Source | edit",
            buttons=["fullscreen"],
            elem_id="slider",
            elem_classes=hard,
            interactive=False,
        )
        self.gallery = gr.Gallery(
            label="Source and edits: click one", columns=3, height="auto", allow_preview=False, buttons=[],
            elem_id="gallery", elem_classes=hard, object_fit="contain",
        )  # fmt: skip
        with gr.Row():
            self.onward = gr.Button("Go on from this edit", interactive=False, elem_id="onward")
            self.download = gr.DownloadButton("Download all (ZIP)", interactive=False, elem_id="download")
        self.picture = gr.DownloadButton(
            "Download this picture (its record inside)", interactive=False, elem_id="picture"
        )
        with gr.Accordion("Difference to the source", open=False, elem_id="difference-part"):
            self.difference = gr.Image(label="White: changed most", height=260, buttons=[], elem_id="difference")

    def _connect(self) -> None:
        inputs = [*self.fields.values(), self.before, self.carried, self.brush]
        results = [self.line, self.preview, self.slider, self.gallery, self.difference, self.last, self.onward,
                   self.download, self.picture]  # fmt: skip
        source = [self.before, self.source_note, self.forget]
        in_line(self.studio.desk, self.paint, self.stop, self._paint, inputs, results)
        self.gallery.select(self._pick, self.last, results, **AT_ONCE)
        self.onward.click(self._go_on, self.last, [self.prompt, *source], **AT_ONCE)
        self.forget.click(self._forget, None, source, **AT_ONCE)
        self.photo.upload(lambda: {**self._forget(), self.brush: None}, None, [*source, self.brush], **AT_ONCE)
        opened = [self.line, *self.fields.values(), *source, self.carried]
        self.open.upload(self._open, [self.open, self.photo], opened, **AT_ONCE)
        self.load.click(
            self._load, [self.photo, self.before, self.last], [self.line, self.brush, self.region], **AT_ONCE
        )
        self.layers.input(self._preset, self.layers, [self.line, self.chosen], **AT_ONCE)
        self.chosen.input(lambda: CHOSEN_LAYERS, None, self.layers, **AT_ONCE)
        self.method.change(self._describe, self.method, self.method, **AT_ONCE)

    def _paint(self, visitor: str, *values: Any) -> Iterator[Outputs]:
        *fields, before, carried, brushed = values
        try:
            form = self._form(dict(zip(FIELDS, fields)), before, carried, brushed)
            form.check()
        except (ValueError, OSError) as error:
            yield {self.line: status(str(error), problem=True)}
            return

        def work(watch):
            return self.studio.save(paint_edit(self.studio.flow, form, self.studio.inversions, watch))

        yield from watched(self.studio.desk, visitor, work, self.line, self.preview, self._finished)

    def _form(self, fields: dict[str, Any], before: Any, carried: dict[str, Any], brushed: Any) -> Form:
        """The page's fields as a form; files that were brought are kept under their checksums."""
        fields |= read_numbers(fields)
        photo = None if before else fields["photo"]
        fields["photo"] = None if photo is None else self.studio.store.photo(photo)
        fields["chosen"] = tuple(sorted(fields["chosen"]))
        mask = _mask(brushed)
        kept = self.studio.store.mask(mask) if mask is not None else carried.get("mask")
        carried = {name: value for name, value in carried.items() if name != "mask"}
        folder, row = before or (None, 0)
        return Form(**fields, before=folder, row=row, mask=kept, carried=carried)

    def _finished(self, saved: tuple[Edit, Path]) -> Outputs:
        edit, folder = saved
        last = Shown(str(folder), picture_files(folder, len(edit.images) - 1), edit.captions)
        archive = self.studio.store.archive(folder)
        layers = ", ".join(map(str, edit.layers)) or "none"
        about = f"done: {edit.settings.method}, {edit.settings.steps} steps, layers: {layers}"
        return {
            **self._look(last),
            self.line: status(about),
            self.gallery: list(zip(last.files, last.captions)),
            self.onward: gr.update(interactive=True),
            self.download: gr.update(value=archive, interactive=True),
        }

    def _look(self, last: Shown) -> Outputs:
        """The picked picture beside the source."""
        source, picked = last.files[0], last.files[last.picked]
        pictures = (np.float32(open_picture(file)) / 255 for file in (source, picked))
        return {
            self.last: last,
            self.slider: gr.update(value=(source, picked), label=f"Source | {last.captions[last.picked]}"[:120]),
            self.difference: shown(difference(*pictures)),
            self.picture: gr.update(value=picked, interactive=True),
        }

    def _pick(self, last: Shown | None, event: gr.SelectData) -> Outputs:
        return self._look(dataclasses.replace(last, picked=event.index)) if last else {self.last: None}

    def _go_on(self, last: Shown | None) -> Outputs:
        """The picked picture is the source now."""
        if last is None:
            return {self.before: None}
        caption = last.captions[last.picked].removeprefix("source: ")
        record = str(Path(last.folder) / "edit.json")
        return {self.prompt: caption, **self._set_source((record, last.picked), f"the source is now: {caption}")}

    def _forget(self) -> Outputs:
        return self._set_source(None, "")

    def _set_source(self, before: tuple[str, int] | None, note: str) -> Outputs:
        there = before is not None
        return {
            self.before: before,
            self.source_note: gr.update(value=status(note), visible=there),
            self.forget: gr.update(visible=there),
        }

    def _open(self, path: str, photo: str | None) -> Outputs:
        if photo is not None:
            self.studio.store.photo(photo)
        digest, brought = self.studio.flow.info.digest, self.studio.store.brought
        return guarded(self.line, lambda: self._opened(*open_result(path, digest, brought)))

    def _opened(self, form: Form, note: str) -> Outputs:
        photo = None if form.photo is None else self.studio.store.photo(form.photo)
        values = {name: getattr(form, name) for name in FIELDS} | {"chosen": list(form.chosen), "photo": photo}
        values |= {name: "" if values[name] is None else str(values[name]) for name in NUMBERS}
        before = None if form.before is None else (form.before, form.row)
        carried = {**form.carried, "mask": form.mask} if form.carried else {}
        return {
            **{self.fields[name]: value for name, value in values.items()},
            **self._set_source(before, f"the source is picture {form.row} of an earlier edit"),
            self.carried: carried,
            self.line: status(note or "opened: edit it again, or change something first"),
        }

    def _load(self, photo: str | None, before: Any, last: Shown | None) -> Outputs:
        """The source, to be brushed on."""
        return guarded(self.line, lambda: self._loaded(_source_picture(photo, before, last)))

    def _loaded(self, path: str) -> Outputs:
        return {self.brush: shown(np.asarray(_smaller(open_picture(path)))), self.region: BRUSHED}

    def _preset(self, name: str) -> Outputs:
        if name not in LAYER_SETS[1:-1]:
            return {self.chosen: gr.update()}
        return guarded(self.line, lambda: {self.chosen: list(self.studio.flow.resolve_layers(name))})

    def _describe(self, method: str) -> Outputs:
        return {self.method: gr.update(info=ABOUT.get(method, ABOUT_AUTOMATIC))}


def _mask(brushed: dict[str, Any] | None) -> Any:
    """Where the brush was, bool [y, x]; None where it was nowhere."""
    layers = [layer[..., 3] > 0 for layer in (brushed or {}).get("layers", ())]
    covered = np.any(layers, axis=0) if layers else np.zeros(())
    return covered if covered.any() else None


def _source_picture(photo: str | None, before: Any, last: Shown | None) -> str:
    """The file of the source as it is known now."""
    if before is not None:
        folder, row = before
        return str(Path(folder).parent / ("source.png" if row == 0 else f"edit-{row}.png"))
    if photo is not None:
        return photo
    if last is not None:
        return last.files[0]
    raise SettingError("there is no source yet: give a photo, or paint one edit first")


def _smaller(picture: Image.Image) -> Image.Image:
    """A large photo at a size that a page can brush on."""
    picture = picture.copy()
    picture.thumbnail((1024, 1024))
    return picture
