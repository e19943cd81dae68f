"""Options of editing methods: which numbers of a method are other than its own, and the table of all methods."""

import dataclasses
import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click

from sflow_jax.commands.options import options
from sflow_jax.commands.repeat import recorded
from sflow_jax.editing.methods import METHODS, Method, describe_methods, parse_assignments
from sflow_jax.errors import SettingError
from sflow_jax.settings import EditSettings

if TYPE_CHECKING:
    from sflow_jax.editing.regions import DrawnRegion, RegionRecipe

# Number of a method → what it does, for those with an option of their own.
NUMBERS = {
    "begin": "Share of the steps left out at the noise's end; more keeps more.",
    "until": "Inject until this share of the steps.",
    "lock_until": "Until this share of the steps, what is outside the region stays the source.",
    "extended": "Attend to the source's keys and values beside the own ones, weighted by e^N; such as -1.",
}
# Number → the option that sets it, where that has another name.
METHOD_FLAGS = {
    field.name: f"--set {field.name}"
    for field in dataclasses.fields(Method)
    if field.name not in {*NUMBERS, *(setting.name for setting in dataclasses.fields(EditSettings))}
} | {"keys": "--strength", "values": "--strength"}
# What `method_options` adds to a command.
METHOD_PARAMETERS = ("strength", "keys_only", "values_only", *NUMBERS, "assignments")
SHAPES = {
    "grow": (int, "Tokens added around the region."),
    "soften": (float, "Blur of the region's edge, in tokens."),
    "cut": (float, "From which normalised difference on a token belongs to the region, 0 to 1."),
}


def list_methods(context: click.Context, option: click.Parameter, wanted: bool) -> None:
    """Print the table of methods and end."""
    if not wanted or context.resilient_parsing:
        return
    head = ("method", "from", "passes", "needs")
    rows = [head, *describe_methods()]
    widths = [max(len(row[i]) for row in rows) for i in range(len(head) - 1)]
    for row in rows:
        click.echo("  ".join([*(cell.ljust(width) for cell, width in zip(row, widths)), row[-1]]))
    click.echo("passes: of the transformer, for one edit of a photo.")
    context.exit()


def method_options(command: Callable) -> Callable:
    """Options that change a method's numbers, given to the command as one mapping `numbers`."""

    @functools.wraps(command)
    def run(*, strength, keys_only, values_only, assignments, **values):
        numbers = {name: values.pop(name) for name in NUMBERS}
        numbers |= _strengths(strength, keys_only, values_only)
        numbers = {name: value for name, value in numbers.items() if value is not None}
        # Read against any method: all have the same settings.
        texts = parse_assignments(assignments)
        if texts:
            read = next(iter(METHODS.values())).read(texts)
            numbers |= {name: getattr(read, name) for name in texts}
        if (record := recorded()) is not None:
            # Of a trial; the record of an edit holds its whole method.
            numbers = record.values.get("method_options", {}) | numbers
        return command(**values, numbers=numbers)

    return options(
        click.option(
            "--list-methods", is_flag=True, is_eager=True, expose_value=False, callback=list_methods,
            help="Show all methods and end.",
        ),
        click.option("--strength", type=float, help="How far keys and values move to the source's, 0 to 1."),
        click.option("--keys-only", is_flag=True, help="Inject no values: the content may change."),
        click.option("--values-only", is_flag=True, help="Inject no keys."),
        *(click.option(f"--{name.replace('_', '-')}", name, type=float, help=NUMBERS[name]) for name in NUMBERS),
        click.option(
            "--set", "assignments", multiple=True, metavar="NAME=VALUE",
            help="Any other number of the method, such as source_guidance=2; repeat for more.",
        ),
    )(run)  # fmt: skip


def _strengths(strength: float | None, keys_only: bool, values_only: bool) -> dict[str, float | None]:
    """Shares of keys and values; None is the method's."""
    if keys_only and values_only:
        raise SettingError("give `keys_only` or `values_only`, not both")
    whole = 1.0 if strength is None and (keys_only or values_only) else strength
    return {"keys": 0.0 if values_only else whole, "values": 0.0 if keys_only else whole}


def region_options(command: Callable) -> Callable:
    """Options that shape a region, given to the command as one mapping `shape`."""

    @functools.wraps(command)
    def run(**values):
        shape = {name: values.pop(name) for name in (*SHAPES, "invert_region")}
        return command(**values, shape=shape)

    return options(
        *(click.option(f"--{name}", type=kind, help=help) for name, (kind, help) in SHAPES.items()),
        click.option("--invert-region", is_flag=True, help="Change what is outside the region."),
    )(run)


def shaped_region(text: str | None, shape: dict[str, Any]) -> "str | RegionRecipe | DrawnRegion | None":
    """The region that was asked for, its mask file read. SettingError for shapes of no region."""
    asked = {name: value for name, value in shape.items() if value not in (None, False)}
    invert = asked.pop("invert_region", False)
    if text in (None, "none"):
        if asked or invert:
            raise SettingError(
                "`region` auto or a mask picture is needed for " + ", ".join([*asked, *["invert"] * invert])
            )
        return text
    from sflow_jax.editing.regions import REGIONS, DrawnRegion, find_recipe
    from sflow_jax.pictures.files import open_picture

    if text in REGIONS:
        return find_recipe(text).changed(**asked, invert=invert) if asked or invert else text
    if "cut" in asked:
        raise SettingError("`cut` is for regions that are found (auto), and a mask picture is given")
    return DrawnRegion(open_picture(text), invert=invert, **asked)
