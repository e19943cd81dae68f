"""Which share of a run a process does."""

import dataclasses
import re

from sflow_jax.errors import SettingError


def parse_place(text: str, name: str) -> tuple[int, int]:
    """`2/4`, the second of four, as (1, 4); SettingError naming the setting for anything else."""
    index, _, count = text.partition("/")
    numbers = re.fullmatch(r"[0-9]{1,6}", index) and re.fullmatch(r"[0-9]{1,6}", count)
    if not (numbers and 1 <= int(index) <= int(count)):
        raise SettingError(f"`{name}` must be such as 1/4 to 4/4, found {text[:40]!r}")
    return int(index) - 1, int(count)


@dataclasses.dataclass(frozen=True)
class Worker:
    """Which share of every round this process does, of `count` equal ones."""

    index: int = 0
    count: int = 1

    @classmethod
    def parse(cls, text: str) -> "Worker":
        """From "2/4", the second of four; SettingError for anything else."""
        return cls(*parse_place(text, "worker"))

    def share(self, batches: int) -> range:
        """Contiguous, so that few references are needed by two workers."""
        return range(self.index * batches // self.count, (self.index + 1) * batches // self.count)
