"""What comes back: pictures, settings, inversions."""

import dataclasses
import json
from typing import Annotated, Any

import msgspec
import numpy as np
from etils import epath
from jaxtyping import Array, Float
from safetensors import SafetensorError
from safetensors.numpy import load as load_tensors
from safetensors.numpy import save as save_tensors

from sflow_jax.settings import MOST_STEPS, EditSettings, GenerationSettings
from sflow_jax.storage.checksums import checksum
from sflow_jax.storage.files import read_bytes, write_whole
from sflow_jax.typed import Number, Positive, Side, parse_json, typed

# Of latents, which are about as large as noise.
LARGEST = 1e6
INVERSION_FILE, TURN_FILE = "inversion.safetensors", "latents.safetensors"


@dataclasses.dataclass(frozen=True)
class Generation:
    """Generated pictures.

    images: [b, y, x, 3] float32 in 0..1. latents: [b, s, c] float32, packed and scaled. settings: with every
    default filled in.
    """

    images: Float[np.ndarray, "b y x 3"]
    latents: Float[Array, "b s c"]
    settings: GenerationSettings


@dataclasses.dataclass(frozen=True)
class Edit:
    """A source picture and its edits; row 0 is the source.

    images: [1 + edits, y, x, 3] float32 in 0..1. latents: [1 + edits, s, c] float32. settings: with every default
    filled in; layers as numbers, guidance one a row, nudge a real source's, else 1. regions: where each edit might
    change the picture, tokens, 0..1; None without one. evaluations: transformer passes, every row of every batch
    one. method: with all its numbers (`editing.methods.Method`).
    """

    images: Float[np.ndarray, "b y x 3"]
    latents: Float[Array, "b s c"]
    settings: EditSettings
    regions: Float[np.ndarray, "e rows columns"] | None = None
    evaluations: int = 0
    method: Any = None

    @property
    def clean_latents(self) -> Float[Array, "b s c"]:
        """Without the source's nudge: what a next edit may begin with."""
        return self.latents / self.settings.nudge

    @property
    def region(self) -> Float[np.ndarray, "rows columns"] | None:
        """Where any of the edits might change the picture."""
        return None if self.regions is None else self.regions.max(axis=0)

    @property
    def layers(self) -> tuple[int, ...]:
        """Where the source's keys and values were injected."""
        return self.settings.layers

    @property
    def steps(self) -> int:
        """Of the solver."""
        return self.settings.steps

    @property
    def guidance(self) -> tuple[float, ...]:
        """One a row."""
        return self.settings.guidance

    @property
    def nudge(self) -> float:
        """Of a real source, else 1."""
        return self.settings.nudge


@dataclasses.dataclass(frozen=True)
class Query:
    """Whose attention is looked at. name: such as "word hat" or "point 20,31". tokens: joint numbers, text first.

    row, column: of a point's token; None of words.
    """

    name: str
    tokens: tuple[int, ...]
    row: int | None = None
    column: int | None = None


@dataclasses.dataclass(frozen=True)
class AttentionAtlas:
    """Where points of a picture and words of its prompt attend, in every layer and step.

    Softmax attention, the mean over heads and over a word's tokens, float32. Of one step, layer and query all
    numbers add up to one. text: [t, n, q, w], to text tokens. own: [t, n, q, rows, columns], to image tokens by the
    picture's own keys. source: the same, to those whose keys are the source's, injected or beside the own ones; of
    a key that is injected by a share, that share. Values do not count. queries: one a q. first_step: the number of
    the first step, since some methods leave steps out. layer_kinds: as ("double", 19) in global order. result: what
    was painted.
    """

    text: Float[np.ndarray, "t n q w"]
    own: Float[np.ndarray, "t n q rows columns"]
    source: Float[np.ndarray, "t n q rows columns"]
    queries: tuple[Query, ...]
    first_step: int
    layer_kinds: tuple[tuple[str, int], ...]
    result: Edit | Generation

    @property
    def image(self) -> Float[np.ndarray, "y x 3"]:
        """The picture that is looked at."""
        return self.result.images[-1]

    @property
    def shares(self) -> Float[np.ndarray, "t n q 3"]:
        """Of attention that goes to the source's image tokens, to the own ones, and to text."""
        parts = (self.source.sum(axis=(-2, -1)), self.own.sum(axis=(-2, -1)), self.text.sum(axis=-1))
        return np.stack(parts, axis=-1)

    @property
    def layer_names(self) -> list[str]:
        """Such as "18 double"."""
        kinds = [kind for kind, count in self.layer_kinds for _ in range(count)]
        return [f"{number} {kind}" for number, kind in enumerate(kinds)]

    def mean(self) -> "AttentionAtlas":
        """The mean over steps, as one step."""
        means = {name: getattr(self, name).mean(axis=0, keepdims=True) for name in ("text", "own", "source")}
        return dataclasses.replace(self, **means)


@dataclasses.dataclass(frozen=True)
class Inversion:
    """A picture's path to noise.

    trajectory: [steps + 1, s, c] float32, index 0 the nudged latents of the picture, last the noise. sigmas: [steps
    + 1] ascending from 0 to 1, one a state. settings: prompt, steps, guidance, nudge, height, width, solver.
    stored_points: [steps, s, c], where the velocity was evaluated that led from each state to the next; None where
    that was the state itself. stored_evaluated: [steps], the sigma that it was told; None where that was the next
    state's, as the reference's inversion has it.
    """

    trajectory: Float[np.ndarray, "t_plus_1 s c"]
    sigmas: Float[np.ndarray, " t_plus_1"]
    settings: dict[str, Any]
    stored_points: Float[np.ndarray, "t s c"] | None = None
    stored_evaluated: Float[np.ndarray, " t"] | None = None

    def __post_init__(self) -> None:
        steps = len(self.trajectory) - 1
        tensors = (self.trajectory, self.sigmas, self.points, self.evaluated)
        if not all(np.issubdtype(x.dtype, np.floating) and (np.abs(x) < LARGEST).all() for x in tensors):
            raise ValueError("an inversion has numbers that are no latents")
        if steps < 1 or [len(x) - 1 for x in tensors[:2]] + [len(x) for x in tensors[2:]] != [steps] * 4:
            raise ValueError("an inversion's states, sigmas and points are not of one number of steps")
        if (
            self.trajectory[0].shape != self.points[0].shape
            or np.any(np.diff(self.sigmas) <= 0)
            or self.sigmas[-1] > 1
        ):
            raise ValueError("an inversion's sigmas must ascend to 1, and its points be like its states")

    @property
    def points(self) -> Float[np.ndarray, "t s c"]:
        """Where the velocity was evaluated that led from each state to the next."""
        return self.trajectory[:-1] if self.stored_points is None else self.stored_points

    @property
    def evaluated(self) -> Float[np.ndarray, " t"]:
        """The sigma that each evaluation was told."""
        return self.sigmas[1:] if self.stored_evaluated is None else self.stored_evaluated

    def save(self, folder: epath.PathLike) -> epath.Path:
        """Write one file into `folder`, whole; returns its path."""
        tensors = {
            "trajectory": self.trajectory,
            "sigmas": self.sigmas,
            "points": self.stored_points,
            "evaluated": self.stored_evaluated,
        }
        stored = {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items() if tensor is not None}
        return _write_tensors(epath.Path(folder) / INVERSION_FILE, stored, self.settings)

    @classmethod
    def load(cls, path: epath.PathLike) -> "Inversion":
        """Read the file, or the folder that holds it; ValueError if it is missing, broken or damaged."""
        path = epath.Path(path)
        path = path / INVERSION_FILE if path.is_dir() else path
        if not path.exists():
            raise ValueError(f"no inversion at {path}; make one with: sflow invert")
        try:
            tensors, settings = _read_tensors(path, InversionRecord)
            return cls(
                tensors["trajectory"], tensors["sigmas"], settings, tensors.get("points"), tensors.get("evaluated")
            )
        except (SafetensorError, KeyError, ValueError, OverflowError) as error:
            raise ValueError(f"{path} is not a readable inversion ({error}); invert the picture again") from error


@dataclasses.dataclass(frozen=True)
class Turn:
    """What an edit leaves for the next one.

    latents: [b, s, c] float32, clean, row 0 the source. prompts: one a row. height, width: pixels.
    """

    latents: Float[np.ndarray, "b s c"]
    prompts: list[str]
    height: int
    width: int

    @classmethod
    def of(cls, edit: Edit, prompts: list[str]) -> "Turn":
        """Of an edit. prompts: of the source and the edits."""
        latents = np.asarray(edit.clean_latents, np.float32)
        return cls(latents, prompts, edit.settings.height, edit.settings.width)

    def save(self, folder: epath.PathLike) -> epath.Path:
        """Write one file into `folder`, whole; returns its path."""
        about = {"prompts": self.prompts, "height": self.height, "width": self.width}
        return _write_tensors(epath.Path(folder) / TURN_FILE, {"latents": self.latents}, about)

    @classmethod
    def load(cls, path: epath.PathLike) -> "Turn":
        """Beside an `edit.json`, or in the folder that holds it; ValueError if it is missing or broken."""
        path = epath.Path(path)
        path = (path if path.is_dir() else path.parent) / TURN_FILE
        if not path.exists():
            raise ValueError(f"no {path}; it is beside the edit.json of every sflow edit")
        try:
            tensors, settings = _read_tensors(path, TurnRecord)
            latents = tensors["latents"]
            if latents.ndim != 3 or len(latents) != len(settings["prompts"]) or not np.isfinite(latents).all():
                raise ValueError("its latents are not one picture a prompt")
            return cls(np.float32(latents), settings["prompts"], settings["height"], settings["width"])
        except (SafetensorError, KeyError, ValueError, OverflowError) as error:
            raise ValueError(f"{path} is not what an edit left ({error}); edit again") from error


class _Header(msgspec.Struct):
    metadata: dict[str, str] = msgspec.field(name="__metadata__")


class InversionRecord(msgspec.Struct):
    """What an inversion's settings must say."""

    prompt: str
    steps: Annotated[int, msgspec.Meta(ge=1, le=MOST_STEPS)]
    guidance: Number
    nudge: Positive
    height: Side
    width: Side
    solver: str = ""


def _checksum(tensors: dict[str, np.ndarray]) -> str:
    return checksum(b"".join(name.encode() + tensors[name].tobytes() for name in sorted(tensors)))


class TurnRecord(msgspec.Struct):
    """What the settings beside an edit's latents must say."""

    prompts: list[str]
    height: Side
    width: Side


def _write_tensors(path: epath.Path, tensors: dict[str, np.ndarray], settings: dict[str, Any]) -> epath.Path:
    """A file of tensors, settings and a checksum, whole."""
    metadata = {"settings": json.dumps(settings), "checksum": _checksum(tensors)}
    return write_whole(path, save_tensors(tensors, metadata=metadata))


def _read_tensors(path: epath.Path, record: type) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """The same read again. record: what the settings must say. ValueError for other or damaged files."""
    data = read_bytes(path)
    tensors = load_tensors(data)
    # The format: 8 bytes of header length, then a JSON header with our metadata.
    header = parse_json(data[8 : 8 + int.from_bytes(data[:8], "little")], _Header)
    settings = parse_json(header.metadata["settings"], dict[str, Any])
    typed(settings, record)
    if "checksum" in header.metadata and header.metadata["checksum"] != _checksum(tensors):
        raise ValueError("its numbers are not what was written")
    return tensors, settings
