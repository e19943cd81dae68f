"""What a visitor asks for on the Edit page, and how an opened result fills it in."""

import dataclasses
import os
from collections.abc import Callable, Mapping
from typing import Any

from sflow_jax.editing.methods import METHODS, Method
from sflow_jax.errors import SettingError
from sflow_jax.records import OWN, check_file, checksum_of, read_record, read_strict
from sflow_jax.results import turn_file
from sflow_jax.settings import EditSettings
from sflow_jax.storage.paths import is_remote

# Bounds of one visitor's wish.
MOST_EDITS, MOST_STEPS, LONGEST_PROMPT = 8, 100, 1_000
# A picture may have so many times the pixels that the model paints by default.
MOST_PIXELS = 2
AUTOMATIC, BRUSHED = "automatic", "brushed"
OWN_LAYERS, CHOSEN_LAYERS = "the method's own", "chosen"
LAYER_SETS = (OWN_LAYERS, "vital", "all", "none", CHOSEN_LAYERS)
REGIONS = (AUTOMATIC, "none", "auto", BRUSHED)
NUMBERS = {"strength": float, "steps": int, "guidance": float, "nudge": float, "seed": int}
# Settings that the page shows; a record's others come along until the method is changed, sizes until the photo is.
SHOWN = ("method", "layers", "steps", "guidance", "seed", "nudge", "region", "paste")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Form:
    """The page's fields; None and `AUTOMATIC` are the method's or the model's.

    edits: a line each. photo: a file. before, row: a folder of an edit, and which of its pictures is the source.
    layers: one of `LAYER_SETS`. chosen: layers by number. strength: how far keys and values move to the source's.
    region: one of `REGIONS`. mask: a file whose white parts were brushed. carried: settings of an opened record
    that the page does not show; they hold while the method is `carried["method"]`'s, and height and width while
    the photo is the one of checksum `carried["photo"]`.
    """

    prompt: str = ""
    edits: str = ""
    photo: str | None = None
    before: str | None = None
    row: int = 0
    method: str = AUTOMATIC
    layers: str = OWN_LAYERS
    chosen: tuple[int, ...] = ()
    strength: float | None = None
    steps: int | None = None
    guidance: float | None = None
    nudge: float | None = None
    seed: int = 0
    region: str = AUTOMATIC
    mask: str | None = None
    paste: bool = False
    carried: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def edit_prompts(self) -> list[str]:
        """One a line."""
        return [line.strip() for line in self.edits.splitlines() if line.strip()]

    def check(self) -> None:
        """SettingError for what is missing, or more than one visitor may ask for."""
        if not self.prompt.strip():
            raise SettingError("the source prompt is empty: say what the picture shows")
        if not self.edit_prompts:
            raise SettingError("no edit yet: write what an edit shows, one a line")
        if len(self.edit_prompts) > MOST_EDITS:
            raise SettingError(f"at most {MOST_EDITS} edits at once, found {len(self.edit_prompts)}")
        if max(map(len, [self.prompt, *self.edit_prompts])) > LONGEST_PROMPT:
            raise SettingError(f"a prompt has more than {LONGEST_PROMPT:,} characters; shorten it")
        if (self.steps or 1) > MOST_STEPS:
            raise SettingError(f"`steps` are at most {MOST_STEPS} here, found {self.steps}")
        if self.region == BRUSHED and self.mask is None:
            raise SettingError("nothing is brushed: load the source into the brush, or choose another `region`")

    def settings(self) -> EditSettings:
        """As `StableFlow.edit` takes them; SettingError for what cannot be."""
        carried = self._carried()
        layers = {OWN_LAYERS: None, CHOSEN_LAYERS: self.chosen}.get(self.layers, self.layers)
        region = {AUTOMATIC: None, BRUSHED: self.mask}.get(self.region, self.region)
        method = carried.pop("method", None) or (None if self.method == AUTOMATIC else self.method)
        numbers = {} if self.strength is None else {"keys": self.strength, "values": self.strength}
        return EditSettings(
            method=method, layers=layers, steps=self.steps, guidance=self.guidance, nudge=self.nudge,
            seed=self.seed, region=region, paste=self.paste, method_options=numbers, **carried,
        )  # fmt: skip

    def _carried(self) -> dict[str, Any]:
        """What still holds of an opened record."""
        if not self.carried or self.method != self.carried["method"].name:
            return {}
        carried = dict(self.carried)
        photo = None if self.photo is None else checksum_of(self.photo)
        if carried.pop("photo") != photo:
            carried.pop("height"), carried.pop("width")
        return carried


def read_numbers(texts: Mapping[str, Any]) -> dict[str, Any]:
    """The page's numbers, written as text so that empty can mean the method's own; SettingError for other texts."""
    numbers = {}
    for name, kind in NUMBERS.items():
        # A field that was never shown is None.
        text = (texts[name] or "").strip()
        try:
            numbers[name] = kind(text) if text else getattr(Form, name)
        except ValueError as error:
            wanted = "a whole number" if kind is int else "a number"
            raise SettingError(f"`{name}` must be {wanted}, or empty, found {text!r:.40}") from error
    return numbers


Brought = Callable[[str], str | None]
"""The file that visitors brought with such a checksum, if there is one."""


def open_result(path: str, model_digest: str, brought: Brought) -> tuple[Form, str]:
    """What paints a result again, from its JSON file or one of its PNGs, and a note on what does not come along.

    Its photo and mask may be among what was brought. SettingError for other files, and where its photo, mask or
    earlier edit is not what it was.
    """
    record = read_record(path)
    if record["command"] == "generate":
        seed = record["seed"]
        return Form(prompt=record["prompts"][0], seed=seed if isinstance(seed, int) else seed[0]), ""
    if record["command"] != "edit":
        raise SettingError(f"a result of sflow {record['command']} cannot be opened here; open one of sflow edit")
    if any(record["region_shape"].values()) or OWN in (record["noise"], record["region"]):
        raise SettingError("its region or noise was made elsewhere; paint it with: sflow edit --from")
    form = dataclasses.replace(
        _source(record, brought), prompt=record["prompt"], edits="\n".join(record["edits"]), seed=record["seed"]
    )
    if record["model_digest"] != model_digest:
        return form, f"painted by {record['model_name']}: here its prompts and source alone are taken"
    return _with_settings(form, record, brought), ""


def _source(record: Mapping[str, Any], brought: Brought) -> Form:
    """The photo or the earlier edit, where it was."""
    if record["source"] == "painted":
        return Form()
    if record["image"] is not None:
        return Form(photo=_file(record, "image", brought))
    if record["continued"] is not None:
        path = record["continued"]
        _check("continue", path if is_remote(path) else str(turn_file(path)), record["continued_checksum"])
        return Form(before=path, row=record["pick"] or 0)
    raise SettingError("its source was an inversion; give the photo, or paint it with: sflow edit --from")


def _file(record: Mapping[str, Any], name: str, brought: Brought) -> str:
    """A photo or mask: brought before, or where it was."""
    checksum = record[f"{name}_checksum"]
    there = brought(checksum) if checksum else None
    if there is None:
        _check(name, record[name], checksum)
    return there or record[name]


def _check(name: str, path: str, checksum: str | None) -> None:
    """SettingError unless a file is here and is what a record, which may be anybody's, says that it is."""
    if checksum is None:
        raise SettingError(f"the record does not say what its {os.path.basename(path)} held; give the photo itself")
    try:
        check_file(name, path, checksum)
    except SettingError as error:
        reason = error.args[0].partition("; give")[0]
        raise SettingError(f"{reason}: load that photo into the page first, then open the result again") from error


def _with_settings(form: Form, record: Mapping[str, Any], brought: Brought) -> Form:
    """The record's settings, those that the page shows in its fields."""
    method = Method(**read_strict(record["method_settings"], Method))
    fields = [
        field.name for field in dataclasses.fields(EditSettings) if field.metadata and field.name not in SHOWN
    ]
    rows, region, masked = record["guidance"], record["region"], record["region_checksum"] is not None
    if method.name not in METHODS or len(set(rows[1:])) > 1:
        raise SettingError("its method or guidance was made elsewhere; paint it with: sflow edit --from")
    if rows[0] not in (method.source_guidance, rows[-1]):
        method = method.changed(source_guidance=rows[0])
    carried = {name: record[name] for name in fields} | {"method": method, "photo": record["image_checksum"]}
    return dataclasses.replace(
        form,
        method=method.name,
        layers=CHOSEN_LAYERS,
        chosen=tuple(record["layers"]),
        steps=record["steps"],
        guidance=rows[-1],
        nudge=None if record["source"] == "painted" else record["nudge"],
        region=BRUSHED if masked else region if region in REGIONS else AUTOMATIC,
        mask=_file(record, "region", brought) if masked else None,
        paste=record["paste"],
        carried=carried,
    )
