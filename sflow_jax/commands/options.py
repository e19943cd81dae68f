"""Options of the command line, made from the settings' dataclasses, and what every command does around its work.

Nothing here imports what takes time: `--help` and completion must be quick.
"""

import dataclasses
import functools
import time
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import click

from sflow_jax.errors import SettingError
from sflow_jax.runs.worker import Worker, parse_place
from sflow_jax.settings import AUTOMATIC, PaintingSettings, Placement, as_record

if TYPE_CHECKING:
    import jax

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


def setting_option(field: dataclasses.Field) -> Callable:
    """The click option of one setting: its name, type, default and help."""
    about = field.metadata
    if about["kind"] is bool:
        return click.option(flag_of(field), field.name, is_flag=True, default=field.default, help=about["help"])
    kind = click.Choice(list(about["choices"])) if about["choices"] else about["kind"]
    unset = f" [{about['unset']}]" if about["unset"] else ""
    return click.option(
        flag_of(field),
        field.name,
        type=kind,
        default=field.default,
        show_default=field.default not in (None, "none", ()),
        help=about["help"].removesuffix(".") + f"{unset}.",
    )


def settings_options(settings: type, *, name: str = "settings") -> Callable:
    """All settings of a dataclass as options, given to the command as one object `name`."""
    fields = [field for field in dataclasses.fields(settings) if field.metadata]

    def bundled(command: Callable) -> Callable:
        @functools.wraps(command)
        def run(**values):
            mine = {field.name: values.pop(field.name) for field in fields}
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
        info.check(settings)
        return info

    def load(self, *, alone: bool = False) -> "tuple[StableFlow, float]":
        """The model, and the seconds it took to load. alone: on this process's devices, whatever others do."""
        from sflow_jax.painter import Painter
        from sflow_jax.pipeline import StableFlow

        start = time.perf_counter()
        flow = StableFlow(Painter.load(self.model, self.placed("sweep" if alone else "edit", alone=alone)))
        return flow, time.perf_counter() - start

    def placed(self, work: str, *, alone: bool = False) -> Placement:
        """The placement with its mesh made: as asked for, or proposed for these devices and this work."""
        import jax

        from sflow_jax.machine.meshes import make_mesh, parse_mesh

        try:
            devices = jax.local_devices() if alone else jax.devices()
        except RuntimeError as error:
            raise SettingError(f"no usable device: {str(error).splitlines()[0]}") from error
        if self.placement.mesh is None:
            return self.placement
        automatic = self.placement.mesh == AUTOMATIC
        if automatic and len(devices) == 1:
            return dataclasses.replace(self.placement, mesh=None)
        sizes = self._proposed(devices, work) if automatic else parse_mesh(self.placement.mesh)
        return dataclasses.replace(self.placement, mesh=make_mesh(sizes, devices))

    def _proposed(self, devices: "Sequence[jax.Device]", work: str) -> dict[str, int]:
        from sflow_jax.catalogue import find_info
        from sflow_jax.machine.chips import find_chip
        from sflow_jax.planning.costs import propose_mesh

        chip = find_chip(devices[0].device_kind)
        sizes, why = propose_mesh(find_info(self.model)[0], chip, len(devices), work, self.placement)
        click.echo(f"mesh {why}", err=True)
        return sizes


def refuse_unused(names: Iterable[str], why: str) -> None:
    """SettingError if one of these options was given: it would change nothing."""
    context = click.get_current_context()
    for name in names:
        source = context.get_parameter_source(name)
        if source in (click.core.ParameterSource.COMMANDLINE, click.core.ParameterSource.ENVIRONMENT):
            raise SettingError(f"`{name}` has no effect {why}; leave it out")


def model_options(*, required: bool = True) -> Callable:
    """The model's options, given to the command as one `Chosen`."""

    def bundled(command: Callable) -> Callable:
        @functools.wraps(command)
        def run(*, model, placement, coordinator, process, **values):
            return command(chosen=Chosen(model, placement, coordinator, process), **values)

        return run

    return options(
        click.option(
            "--model",
            "-m",
            required=required,
            help="Converted checkpoint (a folder, local or gs://); the Hub's ORG/NAME[@REVISION], fetched and "
            "converted once; or toyworld, the embedded model.",
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


def record(model: str, settings: dict[str, Any], seconds: dict[str, float]) -> dict[str, Any]:
    """What a result's JSON says: settings, versions, device, seconds."""
    from sflow_jax.machine.processes import describe_devices, package_versions

    return {
        "model": model,
        **settings,
        "device": describe_devices(),
        "versions": package_versions(),
        "seconds": {name: round(value, 3) for name, value in seconds.items()},
    }


def placement_record(placement: Placement) -> dict[str, Any]:
    """Where and how a model ran, as a result's JSON says it."""
    fields = as_record(placement)
    if fields["mesh"] is not None:
        fields["mesh"] = ",".join(f"{axis}={size}" for axis, size in fields["mesh"].shape.items() if size > 1)
    return fields
