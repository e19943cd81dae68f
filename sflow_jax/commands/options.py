"""Options of the command line, made from the settings' dataclasses, and what every command does around its work.

Nothing here imports what takes time: `--help` and completion must be quick.
"""

import dataclasses
import functools
import time
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import click

from sflow_jax.commands.output import shown
from sflow_jax.commands.repeat import explicit, recorded, recorded_settings
from sflow_jax.errors import SettingError
from sflow_jax.families.defaults import default_texts
from sflow_jax.runs.worker import Worker, parse_place
from sflow_jax.settings import EditSettings, PaintingSettings, Placement, check_bank

if TYPE_CHECKING:
    from sflow_jax.pipeline import StableFlow
    from sflow_jax.storage.checkpoint import ModelInfo


def options(*decorators: Callable) -> Callable:
    """Several click options as one decorator, in the order given."""

    def apply(command: Callable) -> Callable:
        for decorator in reversed(decorators):
            command = decorator(command)
        return command

    return apply


def flag_of(field: dataclasses.Field) -> str:
    """The option of a setting."""
    return field.metadata["flag"] or f"--{field.name.replace('_', '-')}"


def flags_of(*settings: type) -> dict[str, str]:
    """Setting → option, where the option has another name."""
    fields = [field for kind in settings for field in dataclasses.fields(kind)]
    return {field.name: field.metadata["flag"] for field in fields if field.metadata.get("flag")}


class Several(click.ParamType):
    """One number, or several with commas between."""

    def __init__(self, kind: type):
        self.one = click.types.convert_type(kind)
        self.name = f"{self.one.name},…"

    def convert(self, value: Any, option: click.Parameter | None, context: click.Context | None) -> Any:
        """A number, or a tuple of them."""
        parts = value.split(",") if isinstance(value, str) else [value]
        numbers = tuple(self.one.convert(part, option, context) for part in parts)
        return numbers if len(numbers) > 1 else numbers[0]


def setting_option(field: dataclasses.Field) -> Callable:
    """The click option of one setting: its name, type, default and help."""
    about = field.metadata
    if about["kind"] is bool:
        return click.option(flag_of(field), field.name, is_flag=True, default=field.default, help=about["help"])
    kind = click.Choice(list(about["choices"])) if about["choices"] else about["kind"]
    kind = Several(kind) if about["several"] else kind
    unset = f"  [default: {about['unset'].format_map(default_texts())}]" if about["unset"] else ""
    return click.option(
        flag_of(field),
        field.name,
        type=kind,
        default=field.default,
        show_default=field.default not in (None, "none", ()),
        help=about["help"] + unset,
    )


def settings_options(settings: type, *, name: str = "settings", beside: type | None = None) -> Callable:
    """All settings of a dataclass as options, given to the command as one object `name`.

    Where the command repeats a record (`--from`), its values stand for options that were not given. beside: other
    settings of the command, whose options are left out here; these fields keep their defaults.
    """
    taken = set() if beside is None else {field.name for field in dataclasses.fields(beside)}
    fields = [field for field in dataclasses.fields(settings) if field.metadata and field.name not in taken]

    def bundled(command: Callable) -> Callable:
        @functools.wraps(command)
        def run(**values):
            mine = {field.name: values.pop(field.name) for field in fields} | recorded_settings(settings)
            return command(**values, **{name: settings(**mine)})

        return run

    return options(*map(setting_option, fields), bundled)


@dataclasses.dataclass(frozen=True)
class Chosen:
    """What the model's options say: which model, how and where it runs, and with which other processes."""

    model: str | None
    placement: Placement
    coordinator: str | None
    process: str | None

    def join(self) -> bool:
        """Join the other processes, if there are any, before anything touches a device; whether this one reports.

        SettingError for options that do not fit, or others that cannot be met.
        """
        if self.coordinator is None:
            if self.process is not None:
                raise SettingError("`process` needs `coordinator` HOST:PORT")
            return True
        place = None if self.process is None else parse_place(self.process, "process")
        import jax

        from sflow_jax.machine.processes import join

        join(self.coordinator, place)
        return jax.process_index() == 0

    def check(self, settings: PaintingSettings) -> "ModelInfo":
        """What the checkpoint is, before any of its weights is read; SettingError where settings do not fit it."""
        from sflow_jax.catalogue import find_model

        _, info = find_model(self.model)
        self.check_fit(settings, info)
        return info

    def check_fit(self, settings: PaintingSettings, info: "ModelInfo") -> None:
        """SettingError where settings do not fit the checkpoint, or how it is placed."""
        info.check(settings)
        if isinstance(settings, EditSettings):
            check_bank(settings.kv_cache, self.placement)

    def load(self, *, alone: bool = False) -> "tuple[StableFlow, float]":
        """The model, and the seconds it took to load. alone: on this process's devices, whatever others do."""
        import jax

        from sflow_jax.painter import Painter
        from sflow_jax.pipeline import StableFlow
        from sflow_jax.planning.meshes import placed

        start = time.perf_counter()
        placement = placed(self.model, self.placement, "sweep" if alone else "edit", alone=alone)
        flow = StableFlow(Painter.load(self.model, placement, shown(jax.process_index() == 0)))
        return flow, time.perf_counter() - start


def refuse_unused(names: Iterable[str], why: str) -> None:
    """SettingError if one of these options was given: it would change nothing."""
    for name in names:
        if explicit(name):
            raise SettingError(f"`{name}` has no effect {why}; leave it out")


def model_options(*, required: bool = True) -> Callable:
    """The model's options, given to the command as one `Chosen`."""

    def bundled(command: Callable) -> Callable:
        @functools.wraps(command)
        def run(*, model, placement, coordinator, process, **values):
            if (record := recorded()) is not None:
                record.check_repeatable()
                record.check_model()
                record.warn_of_versions()
            return command(chosen=Chosen(model, placement, coordinator, process), **values)

        return run

    return options(
        click.option(
            "--model",
            "-m",
            required=required,
            help="Converted checkpoint (a folder, local or gs://); the Hub's ORG/NAME[@REVISION], fetched and "
            "converted once; or one that ships, toyworld (FLUX) or toyworld-sd3.",
        ),
        settings_options(Placement, name="placement"),
        click.option(
            "--coordinator",
            help="Work together with other processes: auto (TPU pods, SLURM), or the first's HOST:PORT.",
        ),
        click.option("--process", help="Beside --coordinator HOST:PORT: which process this is, such as 2/8."),
        bundled,
    )


def worker_of(worker: str, chosen: Chosen) -> Worker:
    """This process's share: as asked for, or its place among the processes that it joins; SettingError for both."""
    asked = Worker.parse(worker)
    if chosen.coordinator is not None and asked != Worker():
        raise SettingError("give `worker` for processes that share only the folder, or `coordinator`, not both")
    chosen.join()
    if chosen.coordinator is None:
        return asked
    import jax

    return Worker(jax.process_index(), jax.process_count())


out_option = click.option("--out", "-o", required=True, help="Folder for the results.")
