"""What the studio's pages share: status lines, work that is watched, and bars of layers that are clicked."""

import html
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import gradio as gr
import numpy as np
from jaxtyping import Float
from PIL import Image

from sflow_jax.pictures.files import to_uint8
from sflow_jax.progress import Stopped
from sflow_jax.studio.desk import Desk, Done, Watch
from sflow_jax.studio.layers import Bar

logger = logging.getLogger(__name__)
# Only one visitor's work computes at a time; the others wait in this line.
LINE = {"concurrency_id": "model", "concurrency_limit": 1, "api_visibility": "private", "show_progress": "hidden"}
AT_ONCE = {"queue": False, "api_visibility": "private", "show_progress": "hidden"}
# Pictures of small models are shown larger, with hard pixels, as their grids are.
LEAST_SHOWN = 320
Outputs = dict[Any, Any]


def status(text: str, share: float | None = None, problem: bool = False) -> str:
    """A line about the work, with a bar where its share is known."""
    bar = "" if share is None else f'<div class="bar"><div style="width:{100 * share:.0f}%"></div></div>'
    kind, role = ("status problem", "alert") if problem else ("status", "status")
    return f'<div class="{kind}" role="{role}">{html.escape(text)}</div>{bar}'


def in_line(
    desk: Desk, start: gr.Button, stop: gr.Button, work: Callable, inputs: list[Any], outputs: list[Any]
) -> None:
    """One button starts a visitor's work, which waits for its turn; the other ends it, waiting or running.

    work: a generator of outputs, given the visitor's name and the inputs.
    """

    def ask(request: gr.Request) -> None:
        desk.ask(request.session_hash)

    def end(request: gr.Request) -> None:
        desk.stop(request.session_hash)

    # gradio asks whether it is a generator, which a type checker's wrapper around a `def` would hide.
    go = lambda request, *values: (yield from work(request.session_hash, *values))
    go.__annotations__["request"] = gr.Request
    start.click(ask, **AT_ONCE).then(go, inputs, outputs, **LINE)
    stop.click(end, **AT_ONCE)


def watched(
    desk: Desk,
    visitor: str,
    work: Callable[[Watch], Any],
    line: gr.HTML,
    preview: gr.Image,
    finished: Callable[[Any], Outputs],
) -> Iterator[Outputs]:
    """A page's outputs while work is done: progress, previews, then what it `finished` with or why it did not."""
    yield {line: status("waiting for its turn"), preview: gr.update(value=None, visible=False)}
    over = {preview: gr.update(value=None, visible=False)}
    try:
        for moment in desk.run(visitor, work):
            if isinstance(moment, Done):
                yield {line: status("done"), **over, **finished(moment.result)}
                return
            share = moment.done / moment.total if moment.total else None
            counted = f" {moment.done}/{moment.total}" if moment.total else ""
            outputs = {line: status(f"{moment.what}{counted}", share)}
            if moment.pictures is not None:
                outputs[preview] = gr.update(value=row_of(moment.pictures), visible=True)
            yield outputs
    except Stopped:
        yield {line: status("stopped"), **over}
    except (ValueError, OSError) as error:
        yield {line: status(str(error), problem=True), **over}
    except Exception as error:  # a fault of the program, or of the device
        logger.exception("the studio's work failed")
        said = (str(error).splitlines() or [""])[0]
        yield {line: status(f"this failed: {type(error).__name__}: {said:.200}", problem=True), **over}


def guarded(line: gr.HTML, work: Callable[[], Outputs]) -> Outputs:
    """What quick work changes on the page; for bad input the line that says why, and nothing else."""
    try:
        return work()
    except (ValueError, OSError) as error:
        return {line: status(str(error), problem=True)}


def row_of(pictures: Float[np.ndarray, "b y x 3"]) -> Image.Image:
    """Pictures side by side."""
    return shown(np.concatenate(list(to_uint8(pictures)), axis=1), len(pictures))


def shown(picture: np.ndarray, across: int = 1) -> Image.Image:
    """A picture for the page, small ones enlarged with hard pixels. across: how many it holds side by side."""
    height, width = picture.shape[:2]
    scale = max(1, -(-LEAST_SHOWN * across // width))
    return Image.fromarray(picture).resize((width * scale, height * scale), Image.Resampling.NEAREST)


def bars_style(element: str, bars: Sequence[Bar]) -> str:
    """The style that makes a group of choices, one a layer, a chart: heights are vitality, vital ones are dark."""
    top = max([bar.vitality for bar in bars if bar.vitality is not None], default=1.0) or 1.0
    rules = []
    for bar in bars:
        share = 1.0 if bar.vitality is None else max(0.0, bar.vitality) / top
        colour = "var(--vital)" if bar.vital else "var(--pale)"
        rules.append(
            f"#{element} label:nth-of-type({bar.layer + 1})"
            f"{{background:linear-gradient(to top,{colour} {100 * share:.1f}%,transparent {100 * share:.1f}%)}}"
        )
    return f"<style>{''.join(rules)}</style>"


def bars_note(bars: Sequence[Bar]) -> str:
    """What the chart shows, in words."""
    vital = ", ".join(str(bar.layer) for bar in bars if bar.vital) or "not known"
    heights = "bars: vitality" if any(bar.vitality is not None for bar in bars) else "vitality not measured yet"
    return f"{heights}; vital: {vital}"
