"""`sflow info`: what a checkpoint or a features folder is, and what a model takes on a machine."""

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from sflow_jax.commands.console import Command, say
from sflow_jax.commands.options import refuse_unused
from sflow_jax.settings import PUBLISHED, QUANTISATIONS, Placement

if TYPE_CHECKING:
    from sflow_jax.storage.checkpoint import ModelInfo

GIB = 2**30


@click.command(
    cls=Command,
    help=f"""What a checkpoint is: family, sizes, vital layers, memory.

    MODEL is a converted checkpoint or features folder (DINOv2, CLIP), or a model that is known without files:
    {", ".join(PUBLISHED)}. With --plan, mesh, memory and time on a machine.
    """,
    epilog="""
    sflow info checkpoints/flux-dev

    sflow info checkpoints/dinov2-giant

    sflow info checkpoints/flux-dev --verify

    sflow info flux-schnell

    sflow info dog/edit-1.png

    sflow info flux-dev --plan v6e-8

    sflow info flux-dev --plan h100x1 --quantize fp8
    """,
)
@click.argument("model")
@click.option("--plan", help="A machine, such as v6e-8 or h100x1: what the model takes there.")
@click.option("--quantize", type=click.Choice(list(QUANTISATIONS)), help="Of --plan: blocks in 8 bits.")
@click.option("--offload", is_flag=True, help="Of --plan: blocks wait in host memory.")
@click.option("--verify", is_flag=True, help="Read all of it, and compare it with what conversion wrote.")
def info(model: str, plan: str | None, quantize: str | None, offload: bool, verify: bool) -> None:
    """`sflow info`."""
    if plan is None:
        refuse_unused(["quantize", "offload"], "without --plan")
    if is_record(model):
        refuse_unused(["plan", "quantize", "offload", "verify"], "with a result")
        say("\n".join(describe_record(model)))
        return
    if verify:
        say(describe_files(model))
    say("\n".join(_lines(model, plan, Placement(quantisation=quantize, offload=offload))))


def is_record(name: str) -> bool:
    """Whether a name is that of a result's file."""
    return Path(name).suffix.lower() in (".png", ".json") and not Path(name).is_dir()


def describe_record(path: str) -> list[str]:
    """Lines about a result: every setting, as JSON has it."""
    from sflow_jax.records import read_record

    record = read_record(path)
    width = max(map(len, record))
    known = {name.replace("continued", "continue"): value for name, value in record.items() if value is not None}
    return [f"{name:{width}}  {json.dumps(value, ensure_ascii=False)}" for name, value in known.items()]


def _lines(model: str, machine: str | None, placement: Placement) -> list[str]:
    from sflow_jax.catalogue import find_info
    from sflow_jax.machine.chips import parse_machine
    from sflow_jax.measures.features import is_features_folder
    from sflow_jax.planning.costs import describe_plan

    if machine is not None:
        chip, count = parse_machine(machine)
        described, words = find_info(model)
        return describe_plan(described, words, machine, chip, count, placement)
    return describe_features(model) if is_features_folder(model) else describe_model(find_info(model)[0])


def describe_files(model: str) -> str:
    """Compare a converted folder with what was written; a line about it. CheckpointError if it is damaged."""
    from sflow_jax.catalogue import find_checkpoint
    from sflow_jax.measures import features
    from sflow_jax.storage.checkpoint import INFO_FILE, CheckpointError, verify_signature
    from sflow_jax.storage.checksums import verify

    folder = find_checkpoint(model)
    if not folder.is_dir():
        raise CheckpointError(
            f"no converted folder at {folder}; `sflow info` without --verify knows published models"
        )
    for name in (INFO_FILE, features.INFO_FILE):
        if (folder / name).exists():
            verify_signature(folder / name)
    count = verify(folder, CheckpointError, lambda _: None)
    if count is None:
        return f"{folder} has no checksums (an older version converted it); convert the source again to have them"
    return f"{count} files are as they were written"


def describe_features(folder: str) -> list[str]:
    """A line about a features folder."""
    from sflow_jax.measures.features import abstract_features, load_info
    from sflow_jax.models.layers import parameter_count

    features = load_info(folder)
    count = parameter_count(abstract_features(features))
    side = "×".join(map(str, features.preprocessing.crop or features.preprocessing.size))
    return [f"{features.name}, stored as {features.dtype}, {count:,} parameters, sees {side} pixels"]


def describe_model(info: "ModelInfo") -> list[str]:
    """Lines about a checkpoint."""
    from sflow_jax.models.layers import parameter_count

    counts = {name: parameter_count(info.abstract_network(name)) for name in info.configs}
    kinds = ", then ".join(f"{count} {kind} blocks" for kind, count in info.layer_kinds)
    # A model with a name of its own says also which family it is of.
    family = f" ({info.family.title(info.variant)})" if info.named else ""
    vital = "not known"
    if info.vital_layers is not None:
        vital = f"{', '.join(map(str, info.vital_layers))} ({info.vital_layers_origin})"
    return [
        f"{info.title}{family}, stored as {info.dtype}, {info.picture_size}×{info.picture_size} by default",
        f"layers 0 to {info.layers - 1}: {kinds}",
        *(
            f"  {name:12} {count:>16,} parameters {2 * count / GIB:9.2f} GiB in bfloat16 "
            f"{4 * count / GIB:9.2f} GiB in float32"
            for name, count in {**counts, "all": sum(counts.values())}.items()
        ),
        f"vital layers: {vital}",
    ]
