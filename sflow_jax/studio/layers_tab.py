"""The Layers page: a sweep's chart, a layer's pictures, and painting without layers."""

import html
from collections.abc import Iterator
from typing import Any

import gradio as gr

from sflow_jax.errors import SettingError
from sflow_jax.settings import EMBEDDED_MODELS
from sflow_jax.studio.layers import (
    MOST_PROMPTS,
    MOST_SWEEP_STEPS,
    Bypassed,
    Opened,
    fits,
    open_run,
    paint_without,
    pictures_without,
    sweep,
)
from sflow_jax.studio.parts import AT_ONCE, Outputs, bars_note, bars_style, guarded, in_line, shown, status, watched
from sflow_jax.studio.studio import Studio
from sflow_jax.vitality.charts import to_inline_svg, vitality_chart

EXAMPLE = "a sitting orange cat in the meadow"


class LayersTab:
    """The page's parts and what they do."""

    def __init__(self, studio: Studio):
        self.studio, self.embedded = studio, studio.flow.painter.checkpoint in EMBEDDED_MODELS
        self.opened = gr.State(None)
        self._draw_sweep()
        self.line = gr.HTML(status("ready"), elem_id="layers-status")
        self.preview = gr.Image(label="So far", visible=False, height=220, buttons=[])
        self.chart = gr.HTML(elem_id="chart")
        self._draw_layer()
        self._draw_bypass()
        self._connect()

    def _draw_sweep(self) -> None:
        with gr.Row():
            self.prompts = gr.Number(
                2,
                label="Prompts",
                precision=0,
                minimum=1,
                maximum=MOST_PROMPTS,
                min_width=80,
                elem_id="sweep-prompts",
            )
            self.steps = gr.Number(4, label="Steps", precision=0, minimum=1, maximum=MOST_SWEEP_STEPS, min_width=80)
            self.features = gr.Textbox(
                label="DINOv2 (a converted folder)", visible=not self.embedded and self.studio.reads_folders
            )
            self.run = gr.Button("Run a small sweep", variant="primary", elem_id="sweep")
            self.stop = gr.Button("Stop", min_width=80)
        with gr.Row(visible=self.studio.reads_folders):
            self.folder = gr.Textbox(
                label="Or the folder of a finished sflow vital run", max_lines=1, elem_id="run-folder"
            )
            self.open = gr.Button("Open", min_width=80, elem_id="open-run")

    def _draw_layer(self) -> None:
        bars = self.studio.bars()
        choices = [(str(bar.layer), bar.layer) for bar in bars]
        self.style = gr.HTML(bars_style("layer", bars) + bars_style("bypass", bars), elem_classes="styling")
        self.layer = gr.Radio(
            choices, label="Click a layer: its pictures in the sweep", elem_id="layer", elem_classes="bars"
        )
        hard = ["hard"] if self.studio.small else []
        self.pictures = gr.Gallery(
            label="Each prompt: with all layers, then without this one", columns=4, height="auto", buttons=[],
            allow_preview=False, elem_id="layer-pictures", elem_classes=hard,
        )  # fmt: skip

    def _draw_bypass(self) -> None:
        bars = self.studio.bars()
        choices = [(str(bar.layer), bar.layer) for bar in bars]
        gr.Markdown("### Paint without layers")
        with gr.Row():
            self.prompt = gr.Textbox(
                EXAMPLE if self.embedded else "", label="Prompt", scale=3, elem_id="bypass-prompt"
            )
            self.seed = gr.Number(0, label="Seed", precision=0, minimum=0, min_width=80)
        self.bypass = gr.CheckboxGroup(
            choices, label=f"Bypassed layers ({bars_note(bars)})", elem_id="bypass", elem_classes="bars"
        )
        self.paint = gr.Button("Paint with and without", elem_id="paint-without")
        with gr.Row():
            self.whole = gr.Image(label="All layers", min_width=140, interactive=False, buttons=[])
            self.without = gr.Image(
                label="Without them", min_width=140, interactive=False, buttons=[], elem_id="without"
            )

    def _connect(self) -> None:
        swept = [self.line, self.preview, self.opened, self.chart, self.style, self.layer, self.pictures]
        asked = [self.prompts, self.steps, self.features]
        in_line(self.studio.desk, self.run, self.stop, self._sweep, asked, swept)
        self.open.click(self._open, self.folder, swept, **AT_ONCE)
        self.layer.input(self._look, [self.opened, self.layer], [self.line, self.pictures], **AT_ONCE)
        painted = [self.line, self.preview, self.whole, self.without]
        bypass = [self.prompt, self.bypass, self.seed]
        in_line(self.studio.desk, self.paint, self.stop, self._paint, bypass, painted)

    def _sweep(self, visitor: str, prompts: int, steps: int, features: str | None) -> Iterator[Outputs]:
        def work(watch):
            self._check_folder(features)
            return sweep(self.studio.flow, self.studio.store.folder, prompts, steps, features or None, watch)

        yield from watched(self.studio.desk, visitor, work, self.line, self.preview, self._swept)

    def _open(self, folder: str) -> Outputs:
        def opened() -> Outputs:
            self._check_folder(folder)
            return {**self._swept(open_run(folder)), self.line: status("opened")}

        return guarded(self.line, opened)

    def _check_folder(self, folder: str | None) -> None:
        """SettingError where a visitor from elsewhere names a folder of this machine."""
        if folder and not self.studio.reads_folders:
            raise SettingError("folders are opened only where the studio serves this machine alone")

    def _swept(self, opened: Opened) -> Outputs:
        """The sweep's chart; its bars are every later page's where it is of this model."""
        if fits(self.studio.flow, opened):
            self.studio.opened = opened
        bars = self.studio.bars()
        return {
            self.opened: opened,
            self.chart: f'<div class="chart">{to_inline_svg(vitality_chart(opened.summary))}</div>',
            self.style: bars_style("layer", bars) + bars_style("bypass", bars) + bars_style("layers", bars),
            self.layer: gr.update(value=None),
            self.pictures: None,
        }

    def _look(self, opened: Opened | None, layer: int) -> Outputs:
        return guarded(self.line, lambda: self._pictures(opened, layer))

    def _pictures(self, opened: Opened | None, layer: int) -> Outputs:
        if opened is None:
            return {self.line: status("run a sweep or open one first: its pictures are shown here")}
        kept = pictures_without(opened, layer)
        if not kept:
            return {self.line: status(f"that run kept no pictures of layer {layer}"), self.pictures: None}
        return {self.pictures: [cell for one in kept for cell in self._cells(one, layer)]}

    def _cells(self, one: Bypassed, layer: int) -> list[tuple[Any, str]]:
        return [(shown(one.reference), one.prompt), (shown(one.picture), f"without layer {layer}")]

    def _paint(self, visitor: str, prompt: str, layers: list[int], seed: int) -> Iterator[Outputs]:
        chosen = tuple(sorted(layers))

        def work(watch):
            return paint_without(self.studio.flow, prompt, chosen, seed, watch)

        def finished(pictures):
            names = ", ".join(map(str, chosen)) or "none"
            without = gr.update(value=shown(pictures[1]), label=f"Without layers: {html.escape(names)}")
            return {self.whole: shown(pictures[0]), self.without: without}

        yield from watched(self.studio.desk, visitor, work, self.line, self.preview, finished)
