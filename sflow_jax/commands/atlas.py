"""`sflow atlas`: where points of a picture and words of its prompt attend in every layer."""

import dataclasses
import time
from typing import TYPE_CHECKING, Any

import click

from sflow_jax.commands.command import Command
from sflow_jax.commands.edit import refuse_unused_settings
from sflow_jax.commands.methods import METHOD_PARAMETERS, method_options
from sflow_jax.commands.options import Chosen, model_options, out_option, refuse_unused, settings_options
from sflow_jax.commands.output import say, shown
from sflow_jax.commands.sources import ChosenSource, source_options
from sflow_jax.settings import EditSettings, GenerationSettings, as_record, check_prompts

if TYPE_CHECKING:
    from sflow_jax.atlas.atlas import Looked
    from sflow_jax.pipeline import StableFlow
    from sflow_jax.progress import Progress
    from sflow_jax.results import AttentionAtlas

_SHARED = {field.name for field in dataclasses.fields(EditSettings)} & {
    field.name for field in dataclasses.fields(GenerationSettings)
}
# What only edits have.
OF_EDITS = [
    "image", "inversion", "before", "pick", *METHOD_PARAMETERS,
    *(field.name for field in dataclasses.fields(EditSettings) if field.name not in _SHARED),
]  # fmt: skip


@click.command(
    cls=Command,
    epilog="""
    sflow atlas -m toyworld -p "a red cat standing" -e "a red cat sitting" --point 40,30 --word sitting -o atlas

    sflow atlas -m checkpoints/flux-dev -p "A man in a park" --word park --point 0.5,0.5 --step-by-step -o park

    sflow atlas -m checkpoints/flux-dev --image man.jpg -p "A man" -e "A man, hat" --method coupled --word hat -o m
    """,
)
@model_options()
@source_options
@click.option("--edit", "-e", "edit_prompt", help="Look at this edit of the source, instead of the source itself.")
@click.option("--point", "points", multiple=True, help="ROW,COLUMN: pixels, or shares such as 0.5,0.5. Repeat.")
@click.option("--word", "words", multiple=True, help="A word of the looked-at picture's prompt; repeat for more.")
@click.option("--step-by-step", is_flag=True, help="Also every step by itself, not only the mean.")
@settings_options(EditSettings)
@method_options
@out_option
def atlas(
    chosen: Chosen,
    source: ChosenSource,
    edit_prompt: str | None,
    points: tuple[str, ...],
    words: tuple[str, ...],
    step_by_step: bool,
    settings: EditSettings,
    numbers: dict[str, Any],
    out: str,
) -> None:
    """See where points and words attend in every layer: atlas.html, attention-1.png …, atlas.json.

    Of an edit it says how much of the attention goes to image tokens whose keys are the source's, to its own, and
    to text.
    """
    from sflow_jax.atlas.atlas import Looked, canvas_of_edit, parse_point
    from sflow_jax.atlas.report import atlas_record, write_atlas
    from sflow_jax.storage.folders import output_folder

    check_options(source, edit_prompt, settings, numbers)
    prompts = [source.prompt, *([] if edit_prompt is None else [edit_prompt])]
    check_prompts(prompts)
    looked = Looked(list(map(parse_point, points)), words)
    asked = dataclasses.replace(source.sized(settings), method_options=numbers)
    reports = chosen.join()
    info = chosen.check(settings)
    looked.check(prompts[-1], canvas_of_edit(info, asked, source.photo, source.stored))
    with output_folder(out if reports else None, "atlas.json") as folder:
        flow, loading = chosen.load()
        start = time.perf_counter()
        made = look(flow, source, edit_prompt, looked, asked, shown(reports))
        if edit_prompt is not None:
            painted = dataclasses.replace(made.result, record=made.result.record | source.files)
            made = dataclasses.replace(made, result=painted)
        write_atlas(folder, made, by_step=step_by_step)
        seconds = {"load": round(loading, 3), "atlas": round(time.perf_counter() - start, 3)}
        folder.json("atlas.json", atlas_record(made, by_step=step_by_step) | {"seconds": seconds})
    if reports:
        say(f"{len(made.queries)} points and words in {len(made.layer_names)} layers: {out}/atlas.html")


def check_options(
    source: ChosenSource, edit_prompt: str | None, settings: EditSettings, numbers: dict[str, Any]
) -> None:
    """SettingError for options that would change nothing."""
    if edit_prompt is None:
        refuse_unused(OF_EDITS, "without --edit")
    else:
        refuse_unused_settings(source, source.method(settings, numbers), settings)


def look(
    flow: "StableFlow",
    source: ChosenSource,
    edit_prompt: str | None,
    looked: "Looked",
    asked: EditSettings,
    progress: "Progress",
) -> "AttentionAtlas":
    """Paint and look."""
    wanted = as_record(asked)
    if edit_prompt is None:
        wanted = {name: value for name, value in wanted.items() if name in _SHARED}
        sources = {}
    else:
        sources = source.of_edit()
    return flow.attention_atlas(
        source.prompt, edit_prompt, points=looked.points, words=looked.words, progress=progress, **sources, **wanted
    )
