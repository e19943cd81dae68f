"""Errors of settings: the library names a setting, the command line turns its name into the option's."""

import re

_SETTING = re.compile(r"`(\w+)`")


class SettingError(ValueError):
    """A setting that does not fit. In the message settings stand in backticks: "`steps` must be at least 1"."""

    def __str__(self) -> str:
        """The message for callers of the library, who know settings by their plain names."""
        return _SETTING.sub(r"\1", super().__str__())

    def as_options(self, flags: dict[str, str] | None = None) -> str:
        """The message for the command line: `batch` becomes --batch, or what `flags` says of it."""
        named = flags or {}
        return _SETTING.sub(lambda m: named.get(m[1], f"--{m[1].replace('_', '-')}"), super().__str__())
