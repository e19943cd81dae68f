"""`sflow`: generate, edit and invert pictures, and look at checkpoints."""

import time

import click
import numpy as np
from etils import epath

from sflow_jax.checkpoint import abstract_network
from sflow_jax.console import (
    Command,
    one_line_errors,
    parse_layers,
    plain_usage_errors,
    quiet_logs,
    use_compilation_cache,
)
from sflow_jax.costs import describe_plan
from sflow_jax.features import INFO_FILE as FEATURES_FILE
from sflow_jax.features import abstract_features
from sflow_jax.features import load_info as load_features_info
from sflow_jax.hardware import parse_machine
from sflow_jax.latents import fit_picture, open_picture
from sflow_jax.metrics import psnr
from sflow_jax.models.layers import parameter_count
from sflow_jax.options import model_options, out_option, record, size_options
from sflow_jax.output import captioned_grid, output_folder
from sflow_jax.pipeline import EDITS_AT_ONCE
from sflow_jax.placement import QUANTISATIONS
from sflow_jax.planning import find_info
from sflow_jax.results import Inversion
from sflow_jax.sampling import REPLAYS
from sflow_jax.vitality.command import vital


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="sflow_jax")
def group() -> None:
    """Edit pictures with FLUX by injecting keys and values in its vital layers; no training.

    Start with: sflow demo

    Then convert a checkpoint in the published layout: sflow-convert SOURCE DEST
    """


@group.command(cls=Command, epilog="sflow demo")
@click.option("--out", "-o", default="sflow-demo", show_default=True, help="Folder for the results.")
@one_line_errors
def demo(out) -> None:
    """See the method at work on the embedded model, in under a minute: grid.png, demo.json."""
    from sflow_jax.toyworld.demo import CHANGES, run_demo, told  # the other commands need no toy world

    with output_folder(out) as folder:
        made = run_demo()
        folder.image("grid.png", captioned_grid(made.images, made.captions, columns=1 + len(CHANGES)))
        figures = {name: value for name, value in made.figures.items() if name != "seconds"}
        folder.json("demo.json", record("toyworld", figures, made.figures["seconds"]))
    click.echo(told(made, out))


@group.command(
    cls=Command,
    epilog="""
    sflow generate -m checkpoints/flux-dev --prompt "A photo of a dog in the park" --seed 42 --out dog

    sflow generate -m checkpoints/flux-dev --prompt "A cat" --bypass 18,25 --steps 15 --out cat-without-18-25
    """,
)
@model_options
@click.option(
    "--prompt", "-p", "prompts", multiple=True, required=True, help="What to paint; repeat for more pictures."
)
@size_options
@click.option("--guidance", type=float, help="Guidance scale [the model's default].")
@click.option("--seed", type=int, default=0, show_default=True, help="Seed of the noise, shared by all pictures.")
@click.option("--bypass", default="none", help="Layers to leave out, such as 18,25 or 19-56.")
@out_option
@one_line_errors
def generate(chosen, prompts, steps, height, width, guidance, seed, bypass, out) -> None:
    """Generate one picture a prompt: picture-1.png …, grid.png, generate.json."""
    layers = parse_layers(bypass)
    reports = chosen.meet()
    with output_folder(out if reports else None) as folder:
        flow, loading = chosen.load()
        layers = flow.resolve_layers(layers)
        start = time.perf_counter()
        made = flow.generate(
            list(prompts),
            steps=steps,
            guidance=guidance,
            height=height,
            width=width,
            seed=seed,
            bypass=layers,
            progress=reports,
        )
        generating = time.perf_counter() - start
        for i, image in enumerate(made.images, 1):
            folder.picture(f"picture-{i}.png", image)
        folder.image("grid.png", captioned_grid(made.images, prompts))
        settings = {"prompts": prompts, "steps": steps or flow.defaults.steps, "seed": seed, "bypass": layers}
        settings |= {"guidance": flow.defaults.guidance if guidance is None else guidance}
        folder.json("generate.json", record(chosen.model, settings, {"load": loading, "generate": generating}))
    if reports:
        click.echo(f"{len(prompts)} pictures in {out}")


@group.command(
    cls=Command,
    epilog="""
    sflow edit -m checkpoints/flux-dev -p "A dog standing" -e "A dog sitting" -e "A dog in the snow" -o dog

    sflow edit -m checkpoints/flux-dev --image man.jpg -p "A man in a park" -e "A man in a park with a dog" -o man

    sflow edit -m checkpoints/flux-dev --inversion man -p "A man in a park" -e "A man at sea" --layers 0-2,17 -o sea
    """,
)
@model_options
@click.option("--prompt", "-p", required=True, help="The source: what it shows, or what to paint.")
@click.option("--edit", "-e", "edits", multiple=True, required=True, help="What an edit shows; repeat for more.")
@click.option("--image", help="A photo to edit; without it, the source is generated.")
@click.option("--inversion", help="Folder of `sflow invert`, instead of --image.")
@click.option(
    "--layers", default="vital", show_default=True, help="vital, all, none, or numbers such as 0,1,17-18."
)
@size_options
@click.option("--guidance", type=float, help="Guidance of the edits [3.5; for photos 3, and 1 for the source].")
@click.option("--seed", type=int, default=42, show_default=True, help="Seed of the noise of a generated source.")
@click.option("--nudge", type=float, default=1.15, show_default=True, help="Latent nudging of a photo; 1 is none.")
@click.option("--unnudge", is_flag=True, help="Undo the nudge when decoding; the reference does not.")
@click.option(
    "--replay",
    type=click.Choice(REPLAYS),
    default="aligned",
    show_default=True,
    help="How a photo's own path is kept.",
)
@click.option(
    "--edits-at-once",
    type=int,
    default=EDITS_AT_ONCE,
    show_default=True,
    help="Edits in one batch; fewer need less memory.",
)
@out_option
@one_line_errors
def edit(
    chosen, prompt, edits, image, inversion, layers, steps, height, width, guidance, seed, nudge, unnudge, replay,
    edits_at_once, out,
) -> None:  # fmt: skip
    """Edit a generated picture or a photo: source.png, edit-1.png …, grid.png, edit.json."""
    layers = parse_layers(layers)
    stored = None if inversion is None else Inversion.load(inversion)
    if image is not None:
        open_picture(image)  # a bad file should not cost a model's loading
    reports = chosen.meet()
    with output_folder(out if reports else None) as folder:
        flow, loading = chosen.load()
        start = time.perf_counter()
        made = flow.edit(
            prompt,
            list(edits),
            image=image,
            inversion=stored,
            layers=layers,
            steps=steps,
            guidance=guidance,
            seed=seed,
            nudge=nudge,
            unnudge=unnudge,
            replay=replay,
            edits_at_once=edits_at_once,
            height=height,
            width=width,
            progress=reports,
        )
        editing = time.perf_counter() - start
        folder.picture("source.png", made.images[0])
        for i, picture in enumerate(made.images[1:], 1):
            folder.picture(f"edit-{i}.png", picture)
        folder.image("grid.png", captioned_grid(made.images, [f"source: {prompt}", *edits]))
        real = image is not None or stored is not None
        settings = {"prompt": prompt, "edits": edits, "image": image, "inversion": inversion}
        settings |= {"layers": made.layers, "steps": made.steps, "guidance": made.guidance}
        settings |= {"nudge": made.nudge, "unnudge": unnudge, "replay": replay} if real else {"seed": seed}
        folder.json("edit.json", record(chosen.model, settings, {"load": loading, "edit": editing}))
    if reports:
        click.echo(f"source and {len(edits)} edits in {out}")


@group.command(
    cls=Command,
    epilog="""
    sflow invert -m checkpoints/flux-dev --image photo.jpg -p "A man in a park" -o man

    sflow edit -m checkpoints/flux-dev --inversion man -p "A man in a park" -e "A man dancing in a park" -o dancing
    """,
)
@model_options
@click.option("--image", required=True, help="The photo.")
@click.option("--prompt", "-p", required=True, help="What the photo shows.")
@size_options
@click.option("--nudge", type=float, default=1.15, show_default=True, help="Latent nudging; 1 is none.")
@out_option
@one_line_errors
def invert(chosen, image, prompt, steps, height, width, nudge, out) -> None:
    """Invert a photo: its path to noise for later edits, reconstruction.png, inversion.json."""
    opened = open_picture(image)
    reports = chosen.meet()
    with output_folder(out if reports else None) as folder:
        flow, loading = chosen.load()
        start = time.perf_counter()
        inversion = flow.invert(
            opened, prompt, steps=steps, nudge=nudge, height=height, width=width, progress=reports
        )
        inverting = time.perf_counter() - start
        settings = inversion.settings
        size = {"height": settings["height"], "width": settings["width"]}
        again = flow.generate(
            [prompt],
            steps=settings["steps"],
            guidance=settings["guidance"],
            noise=inversion.trajectory[-1],
            progress=reports,
            **size,
        )
        photo = fit_picture(opened, **size).astype(np.float32) / 255
        plain = flow.decode(again.latents / settings["nudge"], **size)
        figures = {
            "reconstruction": psnr(again.images[0], photo),
            "reconstruction, nudge undone": psnr(plain[0], photo),
            "autoencoder alone": psnr(flow.decode(inversion.trajectory[:1] / settings["nudge"], **size)[0], photo),
        }
        inversion.save(folder.path)
        folder.picture("reconstruction.png", again.images[0])
        settings = {
            "image": image,
            **settings,
            "psnr_db": {name: round(value, 2) for name, value in figures.items()},
        }
        folder.json("inversion.json", record(chosen.model, settings, {"load": loading, "invert": inverting}))
    if reports:
        click.echo(f"{out}: " + ", ".join(f"{name} {value:.1f} dB" for name, value in figures.items()))


@group.command(
    cls=Command,
    epilog="""
    sflow info checkpoints/flux-dev

    sflow info checkpoints/dinov2-giant

    sflow info flux-schnell

    sflow info flux-dev --plan v6e-8

    sflow info flux-dev --plan h100x1 --quantize fp8
    """,
)
@click.argument("model")
@click.option("--plan", help="A machine, such as v6e-8 or h100x1: what the model takes there.")
@click.option("--quantize", type=click.Choice(list(QUANTISATIONS)), help="Of --plan: blocks in 8 bits.")
@click.option("--offload", is_flag=True, help="Of --plan: blocks wait in host memory.")
@one_line_errors
def info(model: str, plan: str | None, quantize: str | None, offload: bool) -> None:
    """What a checkpoint is: family, sizes, vital layers, memory. Published models are known without files.

    Also tells what a converted features folder (DINOv2, CLIP) is; with --plan, mesh, memory and time on a machine.
    """
    if plan is not None:
        chip, count = parse_machine(plan)
        found, words = find_info(model)
        told = describe_plan(found, words, plan, chip, count, quantisation=quantize, offload=offload)
        click.echo("\n".join(told))
        return
    if (epath.Path(model) / FEATURES_FILE).exists():
        features = load_features_info(model)
        count = parameter_count(abstract_features(features))
        side = "×".join(map(str, features.preprocessing.crop or features.preprocessing.size))
        click.echo(f"{features.name}, stored as {features.dtype}, {count:,} parameters, sees {side} pixels")
        return
    found, _ = find_info(model)
    counts = {name: parameter_count(abstract_network(name, config)) for name, config in found.configs.items()}
    transformer = found.configs["transformer"]
    click.echo(
        f"FLUX.1 {found.family}, stored as {found.dtype}, {found.picture_size}×{found.picture_size} by default"
    )
    click.echo(
        f"layers 0 to {transformer.layers - 1}: {transformer.double_blocks} double blocks, then "
        f"{transformer.single_blocks} single blocks"
    )
    for name, count in {**counts, "all": sum(counts.values())}.items():
        click.echo(
            f"  {name:12} {count:>16,} parameters {2 * count / 2**30:9.2f} GiB in bfloat16 "
            f"{4 * count / 2**30:9.2f} GiB in float32"
        )
    if found.vital_layers is None:
        click.echo("vital layers: not known")
    else:
        click.echo(f"vital layers: {', '.join(map(str, found.vital_layers))} ({found.vital_layers_origin})")


group.add_command(vital)


def main() -> None:
    """Entry point."""
    quiet_logs()
    use_compilation_cache()
    with plain_usage_errors():
        group(standalone_mode=False)
