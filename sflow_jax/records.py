"""How results were painted, in their JSON files and in the pictures themselves.

What a record says is made from the settings' dataclasses. It is read as what it may be: somebody else's input.
"""

import dataclasses
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
from etils import epath

from sflow_jax.errors import SettingError
from sflow_jax.pictures.files import PNG_SIGNATURE, read_png_record
from sflow_jax.settings import (
    LONGEST_PROMPT,
    MOST_PICTURES,
    EditSettings,
    GenerationSettings,
    InversionSettings,
    Placement,
    as_record,
)
from sflow_jax.storage.checksums import file_checksum
from sflow_jax.storage.files import LONGEST_TEXT, read_bytes, to_compact_json
from sflow_jax.storage.folders import Folder
from sflow_jax.storage.paths import is_remote
from sflow_jax.typed import Count, Name, Number, Side, parse_json, typed

logger = logging.getLogger(__name__)
# Command → the file of its record.
FILES = {
    "generate": "generate.json",
    "edit": "edit.json",
    "try": "edit.json",
    "invert": "inversion.json",
    "demo": "demo.json",
}
# A value that only Python had, such as a mask's array or a noise: what was painted from it cannot be repeated.
OWN = "own"

Prompt = Annotated[str, msgspec.Meta(max_length=LONGEST_PROMPT)]
Prompts = Annotated[list[Prompt], msgspec.Meta(min_length=1, max_length=MOST_PICTURES)]
Numbers = Annotated[list[Number], msgspec.Meta(min_length=1, max_length=MOST_PICTURES)]
Whole = Annotated[int, msgspec.Meta(ge=-(2**31), le=2**31)]
LayerNumbers = Annotated[tuple[Count, ...], msgspec.Meta(max_length=1_000)]
# Seeds have 64 bits, more than a bound of this kind may; the settings themselves check them.
Seeds = int | Annotated[list[int], msgspec.Meta(min_length=1, max_length=MOST_PICTURES)]
# Setting → its type in a record, where that is another than its option's.
TYPES = {
    "guidance": Number | Numbers,
    "layers": LayerNumbers,
    "bypass": LayerNumbers,
    "skip_layers": LayerNumbers,
    "skip_window": tuple[Whole, Whole] | None,
    "negative": Prompt | Prompts | None,
    "height": Side,
    "width": Side,
    "steps": Whole,
    "dtype": Literal["float32", "bfloat16", "float16"],
}
KINDS = {int: Whole, float: Number, bool: bool, str: Name}


def field_type(field: dataclasses.Field) -> Any:
    """A setting's type in a record."""
    if field.name == "seed":
        return Seeds if field.metadata["several"] else int
    if field.name in TYPES:
        return TYPES[field.name]
    choices = field.metadata["choices"]
    kind = Literal[choices] if choices else KINDS[field.metadata["kind"]]
    return kind | None if field.default is None else kind


def settings_fields(*settings: type, leave: tuple[str, ...] = ()) -> list[tuple[str, Any]]:
    """(name, type) of all settings that have an option, each once."""
    fields = {field.name: field for kind in settings for field in dataclasses.fields(kind) if field.metadata}
    return [(name, field_type(field)) for name, field in fields.items() if name not in leave]


MODEL_FIELDS = [
    ("model", Name),
    ("model_name", Name),
    ("model_digest", Name),
    *settings_fields(Placement),
    ("device", Name),
    ("versions", dict[Name, Name]),
]
# A file that was read, and what its bytes were.
PHOTO_FIELDS = [("image", Name | None), ("image_checksum", Name | None)]
SOURCE_FIELDS = [
    *PHOTO_FIELDS,
    ("source", Name),
    ("inversion", Name | None),
    ("inversion_checksum", Name | None),
    ("continued", Name | None),
    ("continued_checksum", Name | None),
    ("pick", Whole | None),
]
EDIT_FIELDS = [
    ("noise", Name | None),
    ("region_checksum", Name | None),
    ("region_shape", dict[Name, Number | bool | None]),
    ("evaluations", Count),
    ("method_settings", dict[Name, Any]),
]
# What all candidates of a trial share; None is each method's own.
TRIAL_FIELDS = [
    ("trial", dict[Name, Annotated[list[Name | Number | None], msgspec.Meta(max_length=1_000)]]),
    ("choose", bool),
    ("layers", LayerNumbers | Name | None),
    ("seed", int),
    ("region", Name | None),
    ("size", Name),
    ("height", Side | None),
    ("width", Side | None),
    ("method_options", dict[Name, Number | Name | LayerNumbers | None]),
    ("candidates", list[dict[Name, Any]]),
]


def _record(command: str, fields: list[tuple[str, Any]]) -> type:
    """What a command's record says, and nothing else."""
    return msgspec.defstruct(
        f"{command}_record",
        [*fields, *MODEL_FIELDS, ("seconds", dict[Name, Number] | None, None)],
        tag=command,
        tag_field="command",
        forbid_unknown_fields=True,
        rename={"continued": "continue", "continued_checksum": "continue_checksum"},
        kw_only=True,
    )


GenerateRecord = _record(
    "generate", [("prompts", Prompts), *settings_fields(GenerationSettings), ("noise", Name | None)]
)
EditRecord = _record(
    "edit",
    [("prompt", Prompt), ("edits", Prompts), *SOURCE_FIELDS, *settings_fields(EditSettings), *EDIT_FIELDS],
)
TryRecord = _record(
    "try",
    [
        ("prompt", Prompt),
        ("edits", Prompts),
        *SOURCE_FIELDS,
        *TRIAL_FIELDS,
        ("region_checksum", Name | None),
        ("region_shape", dict[Name, Number | bool | None]),
        ("evaluations", Count),
    ],
)
InvertRecord = _record(
    "invert",
    [
        ("prompt", Prompt),
        *PHOTO_FIELDS,
        *settings_fields(InversionSettings),
        ("psnr_db", dict[Name, Number]),
    ],
)
DemoRecord = _record(
    "demo",
    [
        ("layers", LayerNumbers),
        *((row, list[dict[Name, Any]]) for row in ("painted", "drawn", "reference")),
        ("edits", dict[Name, dict[Name, Any]]),
    ],
)
RECORDS = GenerateRecord | EditRecord | TryRecord | InvertRecord | DemoRecord


class RecordError(ValueError):
    """A file that holds no record, or a broken one; the message says what is wrong with it."""


def read_record(path: epath.PathLike) -> dict[str, Any]:
    """What a result's JSON file, or one of its PNGs, says: "command" and a value for every name.

    The file may be anybody's: types and limits are checked, and names that are not known refused. RecordError.
    """
    try:
        text = read_png_record(path) if _is_png(path) else read_bytes(path, LONGEST_TEXT)
        record = parse_json(text, RECORDS)
    except FileNotFoundError as error:
        raise RecordError(
            f"no record at {path}; name an edit.json, a generate.json or a picture of theirs"
        ) from error
    except (OSError, ValueError) as error:
        reason = str(error).removeprefix(f"{path} ").replace("`", "'")
        raise RecordError(f"{path} holds no record that can be read: {reason}") from error
    renamed = {name: getattr(record, name) for name in record.__struct_fields__}
    return {"command": record.__struct_config__.tag, **renamed}


def strict(name: str, kind: type) -> type:
    """A dataclass of numbers and texts as a type of a record: every field needed, no others."""
    kinds = {int: Whole, float: Number, str: Name, float | None: Number | None, Any: LayerNumbers | Name}
    fields = [(field.name, kinds[field.type]) for field in dataclasses.fields(kind)]
    return msgspec.defstruct(name, fields, forbid_unknown_fields=True)


def read_strict(content: Mapping[str, Any], kind: type) -> dict[str, Any]:
    """The fields of `kind`, a dataclass, from a part of a record; RecordError where they do not fit."""
    try:
        return msgspec.structs.asdict(typed(content, strict(kind.__name__, kind)))
    except ValueError as error:
        raise RecordError(
            f"the record's {kind.__name__.lower()} cannot be read: {error}".replace("`", "'")
        ) from error


def _is_png(path: epath.PathLike) -> bool:
    path = epath.Path(path)
    if not is_remote(path) and path.exists() and not Path(path).is_file():
        raise ValueError("it is no ordinary file")
    with path.open("rb") as file:
        return file.read(len(PNG_SIGNATURE)) == PNG_SIGNATURE


# ---- written


def write_record(folder: Folder, record: Mapping[str, Any], seconds: Mapping[str, float] | None = None) -> None:
    """The JSON file of a record. seconds: how long each part took; pictures do not say it, so that they repeat."""
    logger.info(
        "settings: %s", to_compact_json({name: value for name, value in record.items() if value is not None})
    )
    rounded = None if seconds is None else {name: round(value, 3) for name, value in seconds.items()}
    folder.json(FILES[record["command"]], {**record, **({"seconds": rounded} if rounded else {})})


def placement_record(placement: Placement, dtype: str) -> dict[str, Any]:
    """Where and how a model runs. dtype: of the computation."""
    fields = as_record(placement) | {"dtype": dtype}
    if fields["mesh"] is not None:
        split = [f"{axis}={size}" for axis, size in fields["mesh"].shape.items() if size > 1]
        fields["mesh"] = ",".join(split) or "data=1"
    return fields


def photo_record(image: Any) -> dict[str, str | None]:
    """A photo's file, as it was named, and the checksum of its bytes; None for what was no file."""
    named = isinstance(image, str | os.PathLike)
    return {"image": os.fspath(image) if named else None, "image_checksum": checksum_of(image) if named else None}


def checksum_of(path: epath.PathLike) -> str | None:
    """Of a file's bytes; None for what is no file (whoever reads it says so)."""
    path = epath.Path(path)
    readable = path.exists() if is_remote(path) else Path(path).is_file()
    return file_checksum(path, lambda _: None).checksum if readable else None


def check_file(name: str, path: str, wanted: str | None) -> None:
    """SettingError unless a file that a record names is there and holds what it held. name: the setting."""
    if is_remote(path):
        raise SettingError(f"the record names {path}, which is opened only if you name it: give `{name}`")
    if not Path(path).is_file():
        raise SettingError(f"the record's {path} is not there; give `{name}`")
    if wanted is not None and checksum_of(path) != wanted:
        raise SettingError(f"the record's {path} has changed since; give `{name}` to take it as it is now")
