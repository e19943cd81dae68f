"""`sflow generate`: pictures of prompts."""

import time

import click

from sflow_jax.commands.console import Command, say
from sflow_jax.commands.options import Chosen, model_options, out_option, placement_record, record, settings_options
from sflow_jax.pictures.grids import captioned_grid
from sflow_jax.settings import GenerationSettings, as_record, check_prompts
from sflow_jax.storage.folders import output_folder


@click.command(
    cls=Command,
    epilog="""
    sflow generate -m checkpoints/flux-dev --prompt "A photo of a dog in the park" --seed 42 --out dog

    sflow generate -m checkpoints/flux-dev --prompt "A cat" --bypass 18,25 --steps 15 --out cat-without-18-25
    """,
)
@model_options()
@click.option(
    "--prompt", "-p", "prompts", multiple=True, required=True, help="What to paint; repeat for more pictures."
)
@settings_options(GenerationSettings)
@out_option
def generate(chosen: Chosen, prompts: tuple[str, ...], settings: GenerationSettings, out: str) -> None:
    """Generate one picture a prompt: picture-1.png …, grid.png, generate.json."""
    check_prompts(list(prompts))
    reports = chosen.join()
    chosen.check(settings)
    with output_folder(out if reports else None, "generate.json") as folder:
        flow, loading = chosen.load()
        start = time.perf_counter()
        result = flow.generate(list(prompts), **as_record(settings), progress=reports)
        seconds = {"load": loading, "generate": time.perf_counter() - start}
        for i, image in enumerate(result.images, 1):
            folder.picture(f"picture-{i}.png", image)
        folder.image("grid.png", captioned_grid(result.images, prompts))
        settings_record = {
            "prompts": prompts,
            **as_record(result.settings),
            **placement_record(flow.painter.placement),
        }
        folder.json("generate.json", record(chosen.model, settings_record, seconds))
    if reports:
        say(f"{len(prompts)} pictures in {out}")
