"""`sflow generate`: pictures of prompts."""

import time

import click

from sflow_jax.commands.console import Command, say
from sflow_jax.commands.options import Chosen, model_options, out_option, settings_options
from sflow_jax.commands.repeat import from_option
from sflow_jax.settings import GenerationSettings, as_record, check_prompts
from sflow_jax.storage.folders import output_folder


@click.command(
    cls=Command,
    epilog="""
    sflow generate -m checkpoints/flux-dev --prompt "A photo of a dog in the park" --seed 42 --out dog

    sflow generate -m checkpoints/flux-dev --prompt "A dog" --seed 1,2,3 --out dogs

    sflow generate --from dogs/picture-2.png --steps 30 --out more-steps

    sflow generate -m checkpoints/flux-dev --prompt "A cat" --bypass 18,25 --steps 15 --out cat-without-18-25
    """,
)
@model_options()
@from_option("generate")
@click.option(
    "--prompt", "-p", "prompts", multiple=True, required=True, help="What to paint; repeat for more pictures."
)
@settings_options(GenerationSettings)
@out_option
def generate(chosen: Chosen, prompts: tuple[str, ...], settings: GenerationSettings, out: str) -> None:
    """Generate one picture a prompt (or, of one prompt, a seed): picture-1.png …, grid.png, generate.json."""
    check_prompts(list(prompts))
    reports = chosen.join()
    chosen.check(settings)
    with output_folder(out if reports else None, "generate.json") as folder:
        flow, loading = chosen.load()
        start = time.perf_counter()
        result = flow.generate(list(prompts), **as_record(settings), progress=reports)
        seconds = {"load": loading, "generate": time.perf_counter() - start}
        result.write(folder, seconds)
    if reports:
        say(f"{len(result.images)} pictures in {out}")
