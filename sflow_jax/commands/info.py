"""`sflow info`: what a checkpoint or a features folder is, and what a model takes on a machine."""

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from sflow_jax.commands.command import Command
from sflow_jax.commands.options import refuse_unused
from sflow_jax.commands.output import answer, json_option
from sflow_jax.settings import PUBLISHED, QUANTISATIONS, Placement

if TYPE_CHECKING:
    from sflow_jax.storage.checkpoint import ModelInfo

GIB = 2**30


@click.command(
    cls=Command,
    help=f"""What a checkpoint is: family, sizes, vital layers, memory; or how a result was painted.

    MODEL is a converted checkpoint or features folder (DINOv2, CLIP); or a model that is known without files:
    {", ".join(PUBLISHED)}; or a result, its JSON file or any of its PNGs: all settings that it was painted with.
    With --plan, mesh, memory and time on a machine.
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
@json_option
def info(model: str, plan: str | None, quantize: str | None, offload: bool, verify: bool) -> None:
    """`sflow info`."""
    if plan is None:
        refuse_unused(["quantize", "offload"], "without --plan")
    if is_record(model):
        refuse_unused(["plan", "quantize", "offload", "verify"], "with a result")
        content, lines = record_content(model)
    else:
        checked, about = files_content(model) if verify else ({}, [])
        content, lines = model_content(model, plan, Placement(quantisation=quantize, offload=offload))
        content, lines = checked | content, about + lines
    answer(content, "\n".join(lines))


def is_record(name: str) -> bool:
    """Whether a name is that of a result's file."""
    return Path(name).suffix.lower() in (".png", ".json") and not Path(name).is_dir()


def record_content(path: str) -> tuple[dict[str, Any], list[str]]:
    """A result's settings, and the same in lines."""
    from sflow_jax.records import read_record

    record = {name.replace("continued", "continue"): value for name, value in read_record(path).items()}
    width = max(map(len, record))
    known = {name: value for name, value in record.items() if value is not None}
    return record, [f"{name:{width}}  {json.dumps(value, ensure_ascii=False)}" for name, value in known.items()]


def model_content(model: str, machine: str | None, placement: Placement) -> tuple[dict[str, Any], list[str]]:
    """What a model or a features folder is, or what a model takes on a machine; and the same in lines."""
    from sflow_jax.catalogue import find_info
    from sflow_jax.machine.chips import parse_machine
    from sflow_jax.measures.features import is_features_folder
    from sflow_jax.planning.costs import describe_plan, plan_machine

    if machine is not None:
        chip, count = parse_machine(machine)
        plan = plan_machine(*find_info(model), machine, chip, count, placement)
        return plan, describe_plan(plan)
    if is_features_folder(model):
        content = features_content(model)
        return content, describe_features(content)
    content = checkpoint_content(find_info(model)[0])
    return content, describe_checkpoint(content)


def files_content(model: str) -> tuple[dict[str, Any], list[str]]:
    """How many files are as they were written, and a line about it. CheckpointError if the folder is damaged."""
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
    line = f"{count} files are as they were written"
    if count is None:
        line = f"{folder} has no checksums (an older version converted it); convert the source again to have them"
    return {"verified_files": count}, [line]


def features_content(folder: str) -> dict[str, Any]:
    """Of a features folder. sees: height and width in pixels."""
    from sflow_jax.measures.features import abstract_features, load_info
    from sflow_jax.models.layers import parameter_count

    features = load_info(folder)
    return {
        "features": features.name,
        "kind": features.kind,
        "dtype": features.dtype,
        "parameters": parameter_count(abstract_features(features)),
        "sees": features.preprocessing.crop or features.preprocessing.size,
    }


def describe_features(content: dict[str, Any]) -> list[str]:
    """A line of a `features_content`."""
    return [
        f"{content['features']}, stored as {content['dtype']}, {content['parameters']:,} parameters, "
        f"sees {'×'.join(map(str, content['sees']))} pixels"
    ]


def checkpoint_content(info: "ModelInfo") -> dict[str, Any]:
    """Of a checkpoint."""
    from sflow_jax.models.layers import parameter_count

    return {
        "model": info.title,
        # A model with a name of its own says also which family it is of.
        "family": info.family.title(info.variant),
        "dtype": info.dtype,
        "picture_size": info.picture_size,
        "layers": info.layers,
        "layer_kinds": info.layer_kinds,
        "parameters": {name: parameter_count(info.abstract_network(name)) for name in info.configs},
        "vital_layers": info.vital_layers,
        "vital_layers_origin": info.vital_layers_origin,
        "defaults": dataclasses.asdict(info.defaults),
        "digest": info.digest,
    }


def describe_checkpoint(content: dict[str, Any]) -> list[str]:
    """Lines of a `checkpoint_content`."""
    counts, side = content["parameters"], content["picture_size"]
    kinds = ", then ".join(f"{count} {kind} blocks" for kind, count in content["layer_kinds"])
    family = "" if content["family"] == content["model"] else f" ({content['family']})"
    vital = "not known"
    if content["vital_layers"] is not None:
        vital = f"{', '.join(map(str, content['vital_layers']))} ({content['vital_layers_origin']})"
    return [
        f"{content['model']}{family}, stored as {content['dtype']}, {side}×{side} by default",
        f"layers 0 to {content['layers'] - 1}: {kinds}",
        *(
            f"  {name:12} {count:>16,} parameters {2 * count / GIB:9.2f} GiB in bfloat16 "
            f"{4 * count / GIB:9.2f} GiB in float32"
            for name, count in {**counts, "all": sum(counts.values())}.items()
        ),
        f"vital layers: {vital}",
    ]
