"""`sflow generate`: pictures of prompts."""

import time

import click

from sflow_jax.commands.command import Command
from sflow_jax.commands.options import Chosen, model_options, out_option, settings_options
from sflow_jax.commands.output import say, shown
from sflow_jax.commands.repeat import explicit, from_option
from sflow_jax.errors import SettingError
from sflow_jax.settings import GenerationSettings, as_record, check_prompts


@click.command(
    cls=Command,
    epilog="""
    sflow generate -m checkpoints/flux-dev --prompt "A photo of a dog in the park" --seed 42 --out dog

    sflow generate -m checkpoints/flux-dev --prompt "A dog" --seed 1,2,3 --out dogs

    sflow generate -m checkpoints/flux-dev --prompt-file prompts.txt --out many

    sflow generate --from dogs/picture-2.png --steps 30 --out more-steps

    sflow generate -m checkpoints/flux-dev --prompt "A cat" --bypass 18,25 --steps 15 --out cat-without-18-25
    """,
)
@model_options()
@from_option("generate")
@click.option("--prompt", "-p", "prompts", multiple=True, help="What to paint; repeat for more pictures.")
@click.option("--prompt-file", help="A text file instead, with a prompt a line; lines that begin with # are not.")
@settings_options(GenerationSettings)
@out_option
def generate(
    chosen: Chosen, prompts: tuple[str, ...], prompt_file: str | None, settings: GenerationSettings, out: str
) -> None:
    """Generate one picture a prompt (or, of one prompt, a seed): picture-1.png …, grid.png, generate.json."""
    from sflow_jax.storage.folders import output_folder

    texts = prompts_of(prompts, prompt_file)
    check_prompts(texts)
    reports = chosen.join()
    chosen.check(settings)
    with output_folder(out if reports else None, "generate.json") as folder:
        flow, loading = chosen.load()
        start = time.perf_counter()
        result = flow.generate(texts, **as_record(settings), progress=shown(reports))
        seconds = {"load": loading, "generate": time.perf_counter() - start}
        result.write(folder, seconds)
    if reports:
        say(f"{len(result.images)} pictures in {out}")


def prompts_of(prompts: tuple[str, ...], file: str | None) -> list[str]:
    """What to paint, from options (or a record) or from a file; SettingError for both or neither."""
    if file is None and not prompts:
        raise SettingError("`prompt` is missing: say what to paint, or give a `prompt_file`")
    if file is None:
        return list(prompts)
    if explicit("prompts"):
        raise SettingError("give `prompt` or `prompt_file`, not both")
    from sflow_jax.vitality.prompts import load_prompts

    return load_prompts(file)
