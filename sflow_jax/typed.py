"""Typed JSON: what a file may say, with limits; whatever does not fit is a ValueError of one line."""

import dataclasses
from typing import Annotated, Any

import msgspec

# Limits far beyond any model, so that a damaged file cannot ask for what no machine has.
Size = Annotated[int, msgspec.Meta(ge=1, le=1_000_000)]
Count = Annotated[int, msgspec.Meta(ge=0, le=1_000_000_000)]
Layers = Annotated[int, msgspec.Meta(ge=1, le=1_000)]
Side = Annotated[int, msgspec.Meta(ge=1, le=16_384)]
Positive = Annotated[float, msgspec.Meta(gt=0, le=1e9)]
Epsilon = Annotated[float, msgspec.Meta(gt=0, le=0.1)]
Number = Annotated[float, msgspec.Meta(ge=-1e9, le=1e9)]
Name = Annotated[str, msgspec.Meta(max_length=1_000)]


def typed(content: Any, kind: Any) -> Any:
    """JSON's objects and lists as a dataclass, msgspec structure or any type; ValueError says what does not fit."""
    try:
        return msgspec.convert(content, kind)
    except msgspec.ValidationError as error:
        raise ValueError(_plain(str(error))) from error


def typed_whole(content: Any, kind: Any) -> Any:
    """As `typed`, of a file that must say every field of a dataclass: a default may not be what was meant."""
    whole = typed(content, kind)
    for field in dataclasses.fields(kind):
        if field.name not in content:
            raise ValueError(f"does not say '{field.name}'")
        if dataclasses.is_dataclass(value := getattr(whole, field.name)):
            typed_whole(content[field.name], type(value))
    return whole


def parse_json(text: str | bytes, kind: Any) -> Any:
    """JSON text (UTF-8, with or without a byte order mark) as `kind`; ValueError says what is wrong."""
    data = text.encode() if isinstance(text, str) else text
    try:
        return msgspec.json.decode(data.removeprefix(b"\xef\xbb\xbf"), type=kind)
    except msgspec.ValidationError as error:
        raise ValueError(_plain(str(error))) from error
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"no JSON in UTF-8: {error}") from error
    except RecursionError as error:
        raise ValueError("no JSON that can be read: nested too deeply") from error


def parse_yaml(text: str, kind: Any) -> Any:
    """YAML text as `kind`; ValueError says what is wrong, in one line."""
    try:
        return msgspec.yaml.decode(text, type=kind)
    except msgspec.ValidationError as error:
        raise ValueError(_plain(str(error))) from error
    except msgspec.DecodeError as error:
        raise ValueError(f"no YAML: {' '.join(str(error).split())}") from error
    except RecursionError as error:
        raise ValueError("no YAML that can be read: nested too deeply") from error


def _plain(message: str) -> str:
    """msgspec's "Expected `int`, got `str` - at `$.num_layers`" with the place first."""
    reason, _, place = message.replace("Object missing required field ", "does not say ").partition(" - at ")
    reason = reason.replace("`", "'" if reason.startswith("does not say") else "")
    place = place.replace("`", "")
    return f"{place.removeprefix('$').lstrip('.')}: {reason}" if place.removeprefix("$") else reason
