"""Options that say what is edited: a prompt to paint, a photo, its inversion, or an earlier edit."""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import click

from sflow_jax.commands.options import options
from sflow_jax.commands.repeat import explicit, recorded
from sflow_jax.editing.methods import NO_REGION, Method, default_method, find_method
from sflow_jax.errors import SettingError
from sflow_jax.settings import EditSettings

if TYPE_CHECKING:
    from sflow_jax.results import Inversion, Turn

# Settings that only one kind of source has.
OF_PHOTOS, OF_GENERATED, OF_INVERTING = ("nudge", "unnudge", "replay"), ("seed",), ("nudge",)


@dataclasses.dataclass(frozen=True)
class ChosenSource:
    """What is edited, its files read. prompt: what it shows. files: what they were, as results record it."""

    prompt: str
    photo: Any
    stored: "Inversion | None"
    turn: "Turn | None"
    files: dict[str, Any]

    @property
    def painted(self) -> bool:
        """Whether the model paints it."""
        return self.photo is None and self.stored is None and self.turn is None

    @property
    def kind(self) -> str:
        """What it comes from, as results record it."""
        kinds = {"image": self.photo, "inversion": self.stored, "latents": self.turn}
        return next((kind for kind, value in kinds.items() if value is not None), "painted")

    def of_edit(self) -> dict[str, Any]:
        """As `StableFlow.edit` takes it."""
        latents = None if self.turn is None else self.turn.latents[0]
        return {"image": self.photo, "inversion": self.stored, "latents": latents}

    def method(self, settings: EditSettings, numbers: Mapping[str, Any]) -> Method:
        """The method that edits it, with numbers of the user's own."""
        default = default_method(settings, painted=self.painted, inverted=self.stored is not None)
        return find_method(settings.method or default).changed(**numbers)

    def unused(self, method: Method, settings: EditSettings) -> Iterator[tuple[str, str]]:
        """Settings that change nothing with such a source, each with the reason."""
        from sflow_jax.editing.regions import is_mask_file

        if self.painted:
            yield from ((name, "without a photo (--image or --inversion)") for name in OF_PHOTOS)
        elif not method.draws and (settings.region in (None, NO_REGION) or is_mask_file(settings.region)):
            yield from ((name, f"on a photo by method {method.name}") for name in OF_GENERATED)
        if self.stored is not None:
            yield from ((name, "with an inversion, which has its own") for name in OF_INVERTING)

    def sized(self, settings: Any) -> Any:
        """Settings with an earlier edit's size."""
        if self.turn is None:
            return settings
        sizes = {name: getattr(settings, name) or getattr(self.turn, name) for name in ("height", "width")}
        return dataclasses.replace(settings, **sizes)


def source_options(command: Callable) -> Callable:
    """The source's options, given to the command as one `ChosenSource`; bad files cost no model's loading."""

    @functools.wraps(command)
    def run(*, prompt, image, inversion, before, pick, **values):
        if (record := recorded()) is not None:
            image, inversion, before = (
                path or record.source(name)
                for name, path in (("image", image), ("inversion", inversion), ("before", before))
            )
            prompt = None if explicit("before") and not explicit("prompt") else prompt
            pick = pick if explicit("pick") or record.new_source else record.values["pick"] or 0
        return command(source=open_source(prompt, image, inversion, before, pick), **values)

    return options(
        click.option("--prompt", "-p", help="The source: what it shows, or what to paint."),
        click.option("--image", help="A photo to edit; without it, the source is generated."),
        click.option("--inversion", help="Folder of `sflow invert`, instead of --image."),
        click.option("--continue", "before", help="An edit.json: its edit is the source now, and its --prompt."),
        click.option(
            "--pick", type=int, default=1, show_default=True, help="Of --continue: which edit; 0: source."
        ),
    )(run)


def open_source(
    prompt: str | None,
    image: str | None = None,
    inversion: str | None = None,
    before: str | None = None,
    pick: int = 1,
) -> ChosenSource:
    """What these options say, read; SettingError for options that do not fit together, and files that are none."""
    from sflow_jax.pictures.files import open_picture
    from sflow_jax.results import Inversion

    if image and inversion:
        raise SettingError("give `image` or `inversion`, not both")
    stored = None if inversion is None else Inversion.load(inversion)
    turn = None if before is None else _picked(before, pick, image or inversion)
    if prompt is None and turn is None:
        raise SettingError("`prompt` is missing: say what the source shows")
    prompt = turn.prompts[0] if prompt is None else prompt
    photo = None if image is None else open_picture(image)
    return ChosenSource(prompt, photo, stored, turn, _files(prompt, image, inversion, before, pick))


def _files(prompt: str, image: str | None, inversion: str | None, before: str | None, pick: int) -> dict[str, Any]:
    """Prompt, paths as they were given, and checksums."""
    from sflow_jax.records import checksum_of, photo_record
    from sflow_jax.results import inversion_file, turn_file

    return {
        "prompt": prompt,
        **photo_record(image),
        "inversion": inversion,
        "inversion_checksum": None if inversion is None else checksum_of(inversion_file(inversion)),
        "continue": before,
        "continue_checksum": None if before is None else checksum_of(turn_file(before)),
        "pick": None if before is None else pick,
    }


def _picked(path: str, row: int, other: str | None) -> "Turn":
    """One picture of an earlier edit, as the next source."""
    from sflow_jax.results import Turn

    if other is not None:
        raise SettingError("give `continue`, or `image` or `inversion`, not both")
    turn = Turn.load(path)
    if not 0 <= row < len(turn.prompts):
        raise SettingError(f"`pick` must be from 0 to {len(turn.prompts) - 1}, the edits of {path}, found {row}")
    return dataclasses.replace(turn, latents=turn.latents[row : row + 1], prompts=turn.prompts[row : row + 1])
