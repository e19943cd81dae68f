"""`--from`: what the record of a result says, instead of options that were not given.

Imports late what reads pictures: every command's `--help` comes through here.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from sflow_jax.commands.output import warn
from sflow_jax.errors import SettingError

KEY = "sflow_jax.recorded"
# Options that say what is edited; one that is given replaces the record's.
SOURCES = ("image", "inversion", "before")
# What another method, or another model, brings with it: the record's own values would be of the old one.
OF_METHODS = {"steps", "guidance", "layers", "nudge", "replay", "region", "skip_window"}
OF_MODELS = OF_METHODS | {"bypass", "skip_layers", "height", "width"}


def explicit(name: str) -> bool:
    """Whether an option was given by hand (or by the environment), and is no default or record's value."""
    source = click.get_current_context().get_parameter_source(name)
    return source in (click.core.ParameterSource.COMMANDLINE, click.core.ParameterSource.ENVIRONMENT)


@dataclasses.dataclass
class Recorded:
    """The record that a command repeats. path: of its file. values: what it says."""

    path: str
    values: dict[str, Any]

    @property
    def other_model(self) -> bool:
        """Whether `-m` names another model than the record's."""
        if not explicit("model"):
            return False
        from sflow_jax.catalogue import find_model

        return find_model(click.get_current_context().params["model"])[1].digest != self.values["model_digest"]

    @property
    def new_source(self) -> bool:
        """Whether an option says what is edited."""
        return any(name in click.get_current_context().params and explicit(name) for name in SOURCES)

    def replaced(self) -> set[str]:
        """Settings whose recorded values no longer hold, because of what they follow from."""
        names = set()
        if explicit("method") or (self.new_source and self.values["source"] == "painted"):
            names |= OF_METHODS
        if self.other_model:
            names |= OF_MODELS | ({"negative"} if not self.values.get("negative") else set())
        if self.new_source or explicit("size"):
            names |= {"height", "width"}
        if explicit("inversion"):
            names |= {"steps", "nudge"}
        if explicit("steps") or explicit("skip_layers"):
            names |= {"skip_window"}
        return names

    def settings(self, kind: type) -> dict[str, Any]:
        """Setting → value, for those of a dataclass that the record decides."""
        from sflow_jax.editing.methods import Method
        from sflow_jax.records import OWN, check_file, read_strict

        names = {field.name for field in dataclasses.fields(kind) if field.metadata} & self.values.keys()
        replaced = self.replaced()
        values = {name: self.values[name] for name in names - replaced if not explicit(name)}
        if values.get("region") == OWN:
            raise SettingError(f"the `region` of {self.path} was an array that only Python had; give one")
        if values.get("region_checksum") and "region" in values:
            check_file("region", values["region"], self.values["region_checksum"])
        if "method_settings" in self.values and "method" in values and not OF_METHODS <= replaced:
            values["method"] = Method(**read_strict(self.values["method_settings"], Method))
        if "edits" in self.values and isinstance(values.get("guidance"), list):
            values["guidance"] = self._guidance(values["guidance"])
        return {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}

    def source(self, name: str) -> str | None:
        """The record's file for one of `SOURCES`, which is there and holds what it held; None where it has none."""
        if self.new_source:
            return None
        from sflow_jax.records import check_file
        from sflow_jax.results import inversion_file, turn_file
        from sflow_jax.storage.paths import is_remote

        key = "continued" if name == "before" else name
        path, checksum = self.values[key], self.values[f"{key}_checksum"]
        if path is None:
            return None
        read = {"image": Path, "inversion": inversion_file, "before": turn_file}[name]
        check_file({"before": "continue"}.get(name, name), path if is_remote(path) else str(read(path)), checksum)
        return path

    def check_repeatable(self) -> None:
        """SettingError for what was made of arrays that only Python had."""
        from sflow_jax.records import OWN

        if self.values.get("noise") == OWN:
            raise SettingError(f"{self.path} was painted from a noise that only Python had; it cannot be repeated")
        files = [self.values.get(name) for name in ("image", "inversion", "continued")]
        if self.values.get("source", "painted") != "painted" and not any(files) and not self.new_source:
            raise SettingError(f"the source of {self.path} was no file; give a photo with `image`")

    def check_model(self) -> None:
        """SettingError unless the record's model is the one that is here; a line where another was asked for."""
        from sflow_jax.catalogue import find_checkpoint, find_model
        from sflow_jax.storage.paths import is_remote

        name = self.values["model"]
        if explicit("model"):
            if self.other_model:
                warn(f"another model than that of {self.path}, with its own defaults")
            return
        # A record may be anybody's: no address is opened, and nothing fetched, because one names it.
        if is_remote(name) or not find_checkpoint(name).is_dir():
            raise SettingError(f"the record's model {name!r} is not here; name the model with `model`")
        if find_model(name)[1].digest != self.values["model_digest"]:
            raise SettingError(
                f"{name} is another model than that of {self.path}; name it with `model` to use it all the same"
            )

    def warn_of_versions(self) -> None:
        """A line where the result was painted by other versions."""
        from sflow_jax.machine.processes import package_versions

        here, there = package_versions(), self.values["versions"]
        others = [f"{name} {there[name]} (here {here[name]})" for name in here if there.get(name, "") != here[name]]
        if others:
            warn(f"painted with {', '.join(others)}: pictures may differ a little")

    def _guidance(self, rows: list[float]) -> list[float]:
        """One a row, for as many edits as there are now, where all edits had the same."""
        edits = len(click.get_current_context().params["edits"])
        return [rows[0], *rows[1:2] * edits] if len(set(rows[1:])) == 1 else rows


def recorded() -> Recorded | None:
    """The record that the command repeats, if it does."""
    context = click.get_current_context(silent=True)
    return None if context is None else context.meta.get(KEY)


def recorded_settings(kind: type) -> dict[str, Any]:
    """What a record decides of a dataclass's settings; nothing without `--from`."""
    record = recorded()
    return {} if record is None else record.settings(kind)


def from_option(*commands: str) -> Callable:
    """`--from`, for a command that repeats records of these commands."""

    def read(context: click.Context, option: click.Parameter, path: str | None) -> None:
        if path is None or context.resilient_parsing:
            return
        from sflow_jax.records import read_record

        values = read_record(path)
        if values["command"] not in commands:
            raise SettingError(f"{path} is a result of sflow {values['command']}, which `from` cannot paint here")
        context.meta[KEY] = Recorded(path, values)
        context.default_map = {**(context.default_map or {}), **_defaults(values)}

    return click.option(
        "--from",
        "from_",
        is_eager=True,
        expose_value=False,
        callback=read,
        help="Paint a result again: its JSON file, or any of its PNGs. Options beside it change it.",
    )


def _defaults(values: dict[str, Any]) -> dict[str, Any]:
    """Option → value, for what is no setting."""
    names = ("model", "prompt", "edits", "prompts")
    trial, shape = values.get("trial") or {}, values.get("region_shape") or {}
    return {
        **{name: values[name] for name in names if name in values},
        **{name: value for name, value in shape.items() if value is not None},
        **{f"try_{name}": ",".join(map(str, items)) for name, items in trial.items()},
        **({"choose": values["choose"]} if trial else {}),
    }
