"""The Learn page: a drawn scene, an edit of it, and the answer that would have been right."""

import html
from collections.abc import Iterator
from typing import Any

import gradio as gr

from sflow_jax.editing.methods import METHODS, PHOTO_METHOD
from sflow_jax.studio.known import Outcome, answer, draw_edit
from sflow_jax.studio.parts import AT_ONCE, Outputs, in_line, shown, status, watched
from sflow_jax.studio.studio import Studio
from sflow_jax.toyworld.edits import EDIT_FAMILIES

MOST_SCENES = 10_000
OWN_LAYERS = "the method's own"


class LearnTab:
    """The page's parts and what they do."""

    def __init__(self, studio: Studio):
        self.studio = studio
        gr.Markdown(
            "A scene that the model never saw is drawn, and edited. Scenes are drawn from attributes, so the right "
            "answer can be drawn too, and a reader of attributes sees whether the edit happened and what was lost."
        )
        with gr.Row():
            self.scene = gr.Number(
                1, label="Scene", precision=0, minimum=0, maximum=MOST_SCENES, min_width=80, elem_id="scene"
            )
            self.family = gr.Dropdown(
                EDIT_FAMILIES, value="recolour", label="Edit", min_width=160, elem_id="family"
            )
            self.method = gr.Dropdown(list(METHODS), value=PHOTO_METHOD, label="Method", min_width=160)
            self.layers = gr.Dropdown(
                [OWN_LAYERS, "vital", "all", "none"], value=OWN_LAYERS, label="Layers", min_width=200
            )
        self.captions = gr.HTML(elem_id="learn-captions")
        with gr.Row():
            self.edit = gr.Button("Edit the drawing", variant="primary", elem_id="learn")
            self.stop = gr.Button("Stop", min_width=80)
        self.line = gr.HTML(status("ready"), elem_id="learn-status")
        self.preview = gr.Image(label="So far", visible=False, height=220, buttons=[])
        with gr.Row():
            self.source = self._picture("The drawing")
            self.painted = self._picture("The model's edit")
            self.right = self._picture("The right answer", "third")
        self.outcome = gr.HTML(elem_id="outcome")
        self._connect()

    def _picture(self, label: str, *classes: str) -> gr.Image:
        return gr.Image(label=label, min_width=140, interactive=False, buttons=[], elem_classes=list(classes))

    def _connect(self) -> None:
        for choice in (self.scene, self.family):
            choice.change(self.draw, [self.scene, self.family], self.drawn, **AT_ONCE)
        outputs = [self.line, self.preview, self.painted, self.right, self.outcome]
        inputs = [self.scene, self.family, self.method, self.layers]
        in_line(self.studio.desk, self.edit, self.stop, self._answer, inputs, outputs)

    @property
    def drawn(self) -> list[Any]:
        """What a drawn scene changes."""
        return [self.captions, self.source, self.painted, self.right, self.outcome]

    def draw(self, scene: int | None, family: str) -> Outputs:
        """The scene; its right answer is not shown before an edit."""
        edit = draw_edit(_number(scene), family)
        pairs = (("it shows", edit.source_caption), ("edit", edit.edit_caption))
        lines = "<br>".join(f"<b>{name}:</b> {html.escape(text)}" for name, text in pairs)
        source = shown(edit.source.draw(self.studio.flow.info.canvas().height))
        return {
            self.captions: lines, self.source: source, self.painted: None, self.right: None, self.outcome: "",
        }  # fmt: skip

    def _answer(self, visitor: str, scene: int | None, family: str, method: str, layers: str) -> Iterator[Outputs]:
        settings = {"method": method, "layers": None if layers == OWN_LAYERS else layers}

        def work(watch):
            edit = draw_edit(_number(scene), family)
            return answer(self.studio.flow, self.studio.reader, edit, settings, watch)

        yield from watched(self.studio.desk, visitor, work, self.line, self.preview, self._finished)

    def _finished(self, outcome: Outcome) -> Outputs:
        size = len(outcome.picture)
        return {
            self.painted: shown(outcome.picture),
            self.right: shown(outcome.edit.target.draw(size)),
            self.outcome: described(outcome),
        }


def described(outcome: Outcome) -> str:
    """Whether the edit happened and what was lost, as HTML."""
    edit = outcome.edit
    wanted, name = edit.target.attributes()[edit.attribute], edit.attribute.replace("_", " ")
    happened = "The edit happened" if outcome.happened else "The edit did not happen"
    lost = "; ".join(f"{key.replace('_', ' ')}: {was} → {now}" for key, (was, now) in outcome.lost.items())
    return (
        f"<p><b>{happened}</b>: {name} should be {wanted}, and {outcome.seen} is seen. "
        f"<b>Lost:</b> {lost or 'nothing'}. {outcome.decibels:.1f} dB to the right answer.</p>"
    )


def _number(scene: int | None) -> int:
    return min(max(scene or 0, 0), MOST_SCENES)
