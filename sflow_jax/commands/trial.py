"""Many settings tried on one edit: their options, and what is saved of them."""

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click

from sflow_jax.commands.options import options
from sflow_jax.commands.repeat import explicit, recorded
from sflow_jax.editing.methods import find_method
from sflow_jax.errors import SettingError

if TYPE_CHECKING:
    from sflow_jax.editing.choosing import Candidates
    from sflow_jax.storage.folders import Folder


def trial_options(command: Callable) -> Callable:
    """Options of a trial, given to the command as one mapping `trial` (None: nothing is tried)."""

    @functools.wraps(command)
    def run(*, try_methods, try_guidances, try_strengths, **values):
        if recorded() is not None and explicit("method") and not explicit("try_methods"):
            # An edit by one method instead of the record's trial.
            try_methods = try_guidances = try_strengths = None
            values["choose"] = explicit("choose")
        lists = {
            "methods": None if try_methods is None else _methods(try_methods),
            "guidances": _numbers("try_guidances", try_guidances),
            "strengths": _numbers("try_strengths", try_strengths),
        }
        trial = {name: items for name, items in lists.items() if items is not None}
        if values["choose"] and not trial:
            raise SettingError("`choose` picks among candidates: say which with `try`, such as coupled,uniinv")
        return command(**values, trial=trial or None)

    return options(
        click.option(
            "--try", "try_methods", help="Try the edit by these methods, such as coupled,uniinv,reference."
        ),
        click.option("--try-guidances", help="… with each of these, such as 1.5,2,3."),
        click.option("--try-strengths", help="… and each of these strengths of injection, such as 0,.5,1."),
        click.option(
            "--choose",
            is_flag=True,
            help="Of what was tried, make the candidate that follows the prompt and keeps most edit-1.png.",
        ),
    )(run)


def _methods(text: str) -> list[str]:
    return [find_method(name.strip()).name for name in text.split(",") if name.strip()]


def _numbers(name: str, text: str | None) -> list[float] | None:
    """Numbers with commas between; SettingError for anything else."""
    try:
        return None if text is None else [float(number) for number in text.split(",")]
    except ValueError as error:
        raise SettingError(f"`{name}` must be numbers such as 1.5,2, found {text!r}") from error


def describe_candidates(tried: "Candidates") -> list[dict[str, Any]]:
    """What is known of each."""
    return [
        {
            "name": candidate.name,
            "follows": round(candidate.follows, 4),
            "psnr_inside_db": round(candidate.inside, 2),
            "psnr_outside_db": round(candidate.outside, 2),
            "remark": candidate.remark,
            "chosen": i == tried.chosen,
        }
        for i, candidate in enumerate(tried.candidates)
    ]


def save_candidates(
    folder: "Folder", tried: "Candidates", prompt: str, choose: bool, record: dict[str, Any]
) -> None:
    """All candidates one by one and side by side; the chosen one as the edit."""
    import numpy as np

    from sflow_jax.pictures.grids import captioned_grid

    captions = [f"source: {prompt}"]
    for i, candidate in enumerate(tried.candidates):
        folder.picture(f"candidate-{i + 1}.png", candidate.image, record)
        notes = [candidate.remark, "chosen" if i == tried.chosen else ""]
        captions.append(": ".join([candidate.name, *filter(None, notes)]))
    images = np.stack([tried.source, *(candidate.image for candidate in tried.candidates)])
    folder.image("candidates.png", captioned_grid(images, captions), record)
    folder.picture("source.png", tried.source, record)
    if choose:
        folder.picture("edit-1.png", tried.candidates[tried.chosen].image, record)


def candidates_table(known: list[dict[str, Any]]) -> str:
    """A line a candidate, in plain words."""
    width = max(len(one["name"]) for one in known)
    lines = [
        f"{'→' if one['chosen'] else ' '} {one['name']:{width}}  follows {one['follows']:+.3f}  "
        f"outside {one['psnr_outside_db']:5.1f} dB  {one['remark']}".rstrip()
        for one in known
    ]
    return "\n".join(lines)
