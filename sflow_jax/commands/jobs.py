"""`--jobs`: many edits from one YAML file, the model loaded once; what is finished stays when it is run again.

common:                          # settings of all jobs
  method: coupled
jobs:
  - image: [man.jpg, woman.jpg]  # several pictures or prompts: a job of each, or of each pair
    prompt: A person in a park
    edits: [A person at sea, A person in the snow]
  - name: dog                    # the subfolder of --out; by default job-1, job-2 …
    prompt: A dog standing       # without a picture the source is painted
    edits: A dog sitting
    steps: 20                    # any setting of `EditSettings`
    options: {until: 0.5}        # other numbers of the method
"""

import contextlib
import dataclasses
import functools
import itertools
import json
import re
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Annotated, Any

import click

from sflow_jax.commands.options import Chosen
from sflow_jax.commands.output import say, shown
from sflow_jax.commands.repeat import SOURCES, explicit
from sflow_jax.commands.sources import ChosenSource, open_source
from sflow_jax.errors import SettingError
from sflow_jax.settings import EditSettings, Placement, as_record, check_prompts

if TYPE_CHECKING:
    from etils import epath

    from sflow_jax.pipeline import StableFlow
    from sflow_jax.storage.checkpoint import ModelInfo

# Beside the edit.json of a job: what was asked for.
FILE = "job.json"
# Options that go with --jobs; the file says all else.
BESIDE = {"jobs", "out", "model", "coordinator", "process", "quiet", "verbose"}
BESIDE |= {field.name for field in dataclasses.fields(Placement)}
# What a job may set.
SETTINGS = tuple(field.name for field in dataclasses.fields(EditSettings) if field.metadata)
# Not the names of files count, but their bytes.
PLACES = ("image", "inversion", "continue")


@dataclasses.dataclass(frozen=True)
class Job:
    """One source and its edits. name: of its folder. source: as `open_source` takes it."""

    name: str
    source: dict[str, Any]
    edits: list[str]
    settings: EditSettings

    @contextlib.contextmanager
    def named(self) -> Iterator[None]:
        """Errors inside say which job they are of."""
        try:
            yield
        except (ValueError, OSError) as error:
            message = error.args[0] if isinstance(error, SettingError) else error
            raise SettingError(f"job {self.name}: {message}") from error

    def check(self, chosen: Chosen, info: "ModelInfo") -> ChosenSource:
        """Its source, read; SettingError for all that can be known before the model is loaded."""
        from sflow_jax.commands.methods import shaped_region
        from sflow_jax.editing.edit import guidance_of

        source = open_source(**self.source)
        method = source.method(self.settings, self.settings.method_options or {})
        check_prompts([source.prompt, *self.edits])
        for name, why in source.unused(method, self.settings):
            if getattr(self.settings, name) != getattr(EditSettings, name):
                raise SettingError(f"`{name}` has no effect {why}; leave it out")
        chosen.check_fit(self.settings, info)
        info.resolve_layers(self.settings.layers or method.layers)
        guidance_of(method, self.settings.guidance, 1 + len(self.edits))
        shaped_region(self.settings.region, {})
        return source

    def request(self, source: ChosenSource, chosen: Chosen, info: "ModelInfo") -> dict[str, Any]:
        """All that its pictures depend on, as JSON holds it."""
        from sflow_jax.editing.edit import region_checksum
        from sflow_jax.storage.files import to_compact_json

        mask = region_checksum(self.settings.region)
        wanted = {
            **source.files,
            "edits": self.edits,
            **as_record(self.settings),
            "region": self.settings.region if mask is None else mask,
            "model_digest": info.digest,
            "dtype": chosen.placement.dtype,
            "quantisation": chosen.placement.quantisation,
            "step_cache": chosen.placement.step_cache,
        }
        return json.loads(to_compact_json(wanted))


def jobs_option(command: Callable) -> Callable:
    """`--jobs`, which does the jobs of a file instead of the command's one edit."""

    @functools.wraps(command)
    def run(*, jobs, chosen, out, **values):
        if jobs is None:
            return command(chosen=chosen, out=out, **values)
        for option in click.get_current_context().command.params:
            if option.name not in BESIDE and explicit(option.name):
                raise SettingError(f"{option.opts[0]} has no effect with `jobs`, whose file says it; leave it out")
        run_jobs(chosen, read_jobs(jobs), out)

    return click.option("--jobs", help="A YAML file of many edits, with pictures, prompts and settings.")(run)


def run_jobs(chosen: Chosen, jobs: list[Job], out: str) -> None:
    """Do what is not done yet, each job in its own subfolder of `out`. SettingError, naming the job."""
    from etils import epath

    reports = chosen.join()
    info = chosen.check(EditSettings())
    waiting = []
    for job in jobs:
        with job.named():
            request = job.request(job.check(chosen, info), chosen, info)
            if not is_finished(epath.Path(out) / job.name, request):
                waiting.append((job, request))
    if waiting:
        flow, loading = chosen.load()
        for job, request in waiting:
            with job.named():
                paint(flow, job, request, epath.Path(out) / job.name if reports else None, loading)
    if reports:
        say(f"{len(jobs)} jobs in {out}, {len(jobs) - len(waiting)} of them finished before")


def is_finished(folder: "epath.Path", request: dict[str, Any]) -> bool:
    """Whether a job's folder holds what is asked for; SettingError where it holds another result."""
    from sflow_jax.runs.folder import check_same
    from sflow_jax.storage.files import read_json

    if not (folder / "edit.json").exists():
        return False
    stored = read_json(folder / FILE, dict[str, Any], SettingError, "choose another folder for `out`")
    check_same(folder, stored, request, PLACES)
    return True


def paint(
    flow: "StableFlow", job: Job, request: dict[str, Any], folder: "epath.Path | None", loading: float
) -> None:
    """One job's edits into its folder (None: of a process that does not report)."""
    from sflow_jax.storage.folders import output_folder

    source, start = open_source(**job.source), time.perf_counter()
    if folder is not None:
        say(f"{job.name}: {source.prompt}")
    settings = source.sized(job.settings)
    with output_folder(folder, "edit.json") as whole:
        result = flow.edit(
            source.prompt, job.edits, **source.of_edit(), **as_record(settings), progress=shown(folder is not None)
        )
        whole.json(FILE, request)
        seconds = {"load": loading, "edit": time.perf_counter() - start}
        dataclasses.replace(result, record=result.record | source.files).write(whole, seconds)


def read_jobs(path: str) -> list[Job]:
    """The jobs of a YAML file; SettingError, in one line, for what is none."""
    from sflow_jax.storage.files import read_text
    from sflow_jax.typed import parse_yaml

    try:
        file = parse_yaml(read_text(path), jobs_type())
    except (OSError, ValueError) as error:
        reason = str(error).removeprefix(f"{path} ").replace("`", "'")
        raise SettingError(f"cannot read `jobs` from {path}: {reason}") from error
    jobs = [job for number, entry in enumerate(file.jobs, 1) for job in expanded(entry, file.common, number)]
    names = [job.name for job in jobs]
    for name in names:
        if names.count(name) > 1 or not re.fullmatch(r"\w[\w .-]{0,99}", name):
            raise SettingError(f"{path}: job {name!r:.80} needs a name of its own, of letters, digits, - and _")
    return jobs


def jobs_type() -> type:
    """What the file may say: settings as the dataclass checks them, nothing else."""
    import msgspec

    Texts = str | Annotated[list[str], msgspec.Meta(min_length=1)]
    settings = [*((name, Any, msgspec.UNSET) for name in SETTINGS), ("options", dict[str, Any], {})]
    common = msgspec.defstruct("common", settings, forbid_unknown_fields=True, frozen=True)
    sources = [(name, Texts | None, None) for name in ("prompt", "image", "inversion", "before")]
    job = msgspec.defstruct(
        "job",
        [("edits", Texts), ("name", str | None, None), *sources, ("pick", int, 1), *settings],
        forbid_unknown_fields=True,
        rename={"before": "continue"},
        kw_only=True,
    )
    return msgspec.defstruct(
        "jobs",
        [("jobs", Annotated[list[job], msgspec.Meta(min_length=1)]), ("common", common, common())],
        forbid_unknown_fields=True,
    )


def expanded(entry: Any, common: Any, number: int) -> Iterator[Job]:
    """A job for every combination of the entry's pictures and prompts."""
    name = entry.name or f"job-{number}"
    places = {place: as_list(getattr(entry, place)) for place in ("prompt", *SOURCES)}
    combinations = list(itertools.product(*places.values()))
    for count, values in enumerate(combinations, 1):
        own = name if len(combinations) == 1 else f"{name}-{count}"
        source = dict(zip(places, values)) | {"pick": entry.pick}
        try:
            numbers = {"method_options": common.options | entry.options}
            settings = EditSettings(**settings_of(common) | settings_of(entry) | numbers)
        except SettingError as error:
            raise SettingError(f"job {own}: {error.args[0]}") from error
        yield Job(own, source, as_list(entry.edits), settings)


def settings_of(entry: Any) -> dict[str, Any]:
    """Those that it says; lists as tuples."""
    import msgspec

    values = {name: getattr(entry, name) for name in SETTINGS}
    known = {name: value for name, value in values.items() if value is not msgspec.UNSET}
    return {name: tuple(value) if isinstance(value, list) else value for name, value in known.items()}


def as_list(texts: Any) -> list[Any]:
    """One or several, as several."""
    return texts if isinstance(texts, list) else [texts]
