"""What comes back: pictures, settings, inversions."""

import abc
import dataclasses
import json
import math
from collections.abc import Mapping
from typing import Annotated, Any

import jax.numpy as jnp
import msgspec
import numpy as np
from etils import epath
from jaxtyping import Array, Float
from PIL import Image
from safetensors import SafetensorError
from safetensors.numpy import load as load_tensors
from safetensors.numpy import save as save_tensors

from sflow_jax.pictures.files import open_picture, png_bytes, to_uint8, to_unit
from sflow_jax.pictures.grids import captioned_grid
from sflow_jax.records import FILES, RecordError, read_record, write_record
from sflow_jax.settings import MOST_STEPS, EditSettings, GenerationSettings
from sflow_jax.storage.checksums import checksum
from sflow_jax.storage.files import read_bytes, write_whole
from sflow_jax.storage.folders import Folder, output_folder
from sflow_jax.typed import Number, Positive, Side, parse_json, typed

# Of latents, which are about as large as noise.
LARGEST = 1e6
INVERSION_FILE, TURN_FILE = "inversion.safetensors", "latents.safetensors"


class Pictures(abc.ABC):
    """Pictures with captions and a record of how they were painted: shown, saved and loaded in one way."""

    images: Float[np.ndarray, "b y x 3"]
    record: Mapping[str, Any]

    @property
    @abc.abstractmethod
    def captions(self) -> list[str]:
        """One a picture."""

    @abc.abstractmethod
    def write(self, folder: Folder, seconds: Mapping[str, float] | None = None) -> None:
        """Put pictures and the record into a folder that a command fills. seconds: how long each part took."""

    def pil(self) -> list[Image.Image]:
        """The pictures in 8 bits a colour."""
        return [Image.fromarray(picture) for picture in to_uint8(self.images)]

    def grid(self) -> Image.Image:
        """The pictures side by side, with captions."""
        return captioned_grid(self.images, self.captions)

    def save(self, folder: epath.PathLike) -> epath.Path:
        """Write what the command writes: pictures, grid.png, and the JSON file that can be painted `--from`.

        An earlier result of the same kind in the folder is replaced whole. SettingError for other folders.
        """
        if not self.record:
            raise ValueError("a result without a record cannot be saved; take it as the pipeline returned it")
        with output_folder(folder, FILES[self.record["command"]]) as whole:
            self.write(whole)
        return epath.Path(folder)

    def _repr_png_(self) -> bytes:
        """How notebooks show it."""
        return png_bytes(self.grid())

    def _described(self, what: str) -> str:
        settings, sides = self.settings, self.images.shape[1:3]
        return f"<{what}, {sides[0]}×{sides[1]}, {settings.steps} steps, seed {settings.seed}>"


@dataclasses.dataclass(frozen=True, repr=False)
class Generation(Pictures):
    """Generated pictures.

    images: [b, y, x, 3] float32 in 0..1. latents: [b, s, c] float32, packed and scaled; None where it was loaded.
    settings: with every default filled in. record: these, the prompts, the model, and where it ran.
    """

    images: Float[np.ndarray, "b y x 3"]
    latents: Float[Array, "b s c"] | None
    settings: GenerationSettings
    record: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __repr__(self) -> str:
        return self._described(f"{len(self.images)} generated pictures")

    @property
    def captions(self) -> list[str]:
        """Prompts, with their seeds where there are several."""
        count, seed = len(self.images), self.settings.seed
        prompts = list(self.record.get("prompts", map(str, range(1, count + 1))))
        prompts = prompts * count if len(prompts) == 1 else prompts
        if isinstance(seed, int):
            return prompts
        return [f"{prompt} (seed {number})" for prompt, number in zip(prompts, seed)]

    def write(self, folder: Folder, seconds: Mapping[str, float] | None = None) -> None:
        """picture-1.png …, grid.png, generate.json."""
        for i, image in enumerate(self.images, 1):
            folder.picture(f"picture-{i}.png", image, self.record)
        folder.image("grid.png", self.grid(), self.record)
        write_record(folder, self.record, seconds)

    @classmethod
    def load(cls, folder: epath.PathLike) -> "Generation":
        """What `save` or `sflow generate` wrote: pictures in 8 bits, without latents. ValueError for others."""
        folder, record = epath.Path(folder), _read_record(folder, "generate")
        settings = GenerationSettings(**_of(record, GenerationSettings))
        count = len(settings.seed) if isinstance(settings.seed, tuple) else len(record["prompts"])
        names = [f"picture-{i}.png" for i in range(1, count + 1)]
        return cls(_read_pictures(folder, names, record), None, settings, record)


@dataclasses.dataclass(frozen=True, repr=False)
class Edit(Pictures):
    """A source picture and its edits; row 0 is the source.

    images: [1 + edits, y, x, 3] float32 in 0..1. latents: [1 + edits, s, c] float32. settings: with every default
    filled in; layers as numbers, guidance one a row, nudge a real source's, else 1. regions: where each edit might
    change the picture, tokens, 0..1; None without one. evaluations: transformer passes, every row of every batch
    one. method: with all its numbers (`editing.methods.Method`); None where it was loaded (its record has them).
    record: all of it, the prompts, the model, and where it ran.
    """

    images: Float[np.ndarray, "b y x 3"]
    latents: Float[Array, "b s c"]
    settings: EditSettings
    regions: Float[np.ndarray, "e rows columns"] | None = None
    evaluations: int = 0
    method: Any = None
    record: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __repr__(self) -> str:
        edits = len(self.images) - 1
        return self._described(f"a source and {edits} edit{'s' * (edits != 1)} by {self.settings.method}")

    @property
    def captions(self) -> list[str]:
        """Prompts of the source and the edits."""
        if not self.record:
            return ["source", *(f"edit {i}" for i in range(1, len(self.images)))]
        return [f"source: {self.record['prompt']}", *self.record["edits"]]

    def write(self, folder: Folder, seconds: Mapping[str, float] | None = None) -> None:
        """source.png, edit-1.png …, region-1.png …, grid.png, latents.safetensors, edit.json."""
        folder.picture("source.png", self.images[0], self.record)
        for i, picture in enumerate(self.images[1:], 1):
            folder.picture(f"edit-{i}.png", picture, self.record)
        folder.image("grid.png", self.grid(), self.record)
        for i, region in enumerate(() if self.regions is None else self.regions, 1):
            side = self.images.shape[1] // len(region)
            levels = np.kron(region, np.ones((side, side)))[..., None]
            folder.picture(f"region-{i}.png", np.repeat(levels, 3, axis=-1), self.record)
        Turn.of(self, [self.record["prompt"], *self.record["edits"]]).save(folder.path)
        write_record(folder, self.record, seconds)

    @classmethod
    def load(cls, folder: epath.PathLike) -> "Edit":
        """What `save` or `sflow edit` wrote: pictures and regions in 8 bits, latents. ValueError for others."""
        folder, record = epath.Path(folder), _read_record(folder, "edit")
        settings, numbers = EditSettings(**_of(record, EditSettings)), range(1, len(record["edits"]) + 1)
        images = _read_pictures(folder, ["source.png", *(f"edit-{i}.png" for i in numbers)], record)
        turn, regions = Turn.load(folder), None
        if len(turn.latents) != len(images):
            raise RecordError(f"{folder} has latents of {len(turn.latents)} pictures and {len(images)} pictures")
        if (folder / "region-1.png").exists():
            shown = _read_pictures(folder, [f"region-{i}.png" for i in numbers], record)
            side = _token_side(turn.latents.shape[1], record)
            regions = shown[:, side // 2 :: side, side // 2 :: side, 0]
        latents = jnp.asarray(turn.latents * np.float32(settings.nudge))
        return cls(images, latents, settings, regions, record["evaluations"], None, record)

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


@dataclasses.dataclass(frozen=True, repr=False)
class Inversion:
    """A picture's path to noise.

    trajectory: [steps + 1, s, c] float32, index 0 the nudged latents of the picture, last the noise. sigmas: [steps
    + 1] ascending from 0 to 1, one a state. settings: prompt, steps, guidance, nudge, height, width, solver.
    stored_points: [steps, s, c], where the velocity was evaluated that led from each state to the next; None where
    that was the state itself. stored_evaluated: [steps], the sigma that it was told; None where that was the next
    state's, as the reference's inversion has it. record: how it was made, where the pipeline made it just now.
    bank: what the picture's row lends to edits (`editing.bank.SourceBank`), in memory alone.
    """

    trajectory: Float[np.ndarray, "t_plus_1 s c"]
    sigmas: Float[np.ndarray, " t_plus_1"]
    settings: dict[str, Any]
    stored_points: Float[np.ndarray, "t s c"] | None = None
    stored_evaluated: Float[np.ndarray, " t"] | None = None
    record: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    bank: Any = dataclasses.field(default=None, compare=False)

    def __repr__(self) -> str:
        about = self.settings
        sides = "×".join(str(about.get(side, "?")) for side in ("height", "width"))
        return f"<inversion of {about.get('prompt', 'a picture')!r:.60}, {sides}, {len(self.trajectory) - 1} steps>"

    def __post_init__(self) -> None:
        if self.trajectory.ndim < 2 or self.sigmas.ndim != 1 or self.points.ndim < 2:
            raise ValueError("an inversion's states, sigmas or points have too few axes")
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
        """Write one file into `folder`, whole, the folder made if need be; returns its path."""
        epath.Path(folder).mkdir(parents=True, exist_ok=True)
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
        path = inversion_file(path)
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
        path = turn_file(path)
        try:
            tensors, settings = _read_tensors(path, TurnRecord)
            latents = tensors["latents"]
            if latents.ndim != 3 or len(latents) != len(settings["prompts"]) or not np.isfinite(latents).all():
                raise ValueError("its latents are not one picture a prompt")
            return cls(np.float32(latents), settings["prompts"], settings["height"], settings["width"])
        except (SafetensorError, KeyError, ValueError, OverflowError) as error:
            raise ValueError(f"{path} is not what an edit left ({error}); edit again") from error


def inversion_file(path: epath.PathLike) -> epath.Path:
    """The file itself, or that in the folder; ValueError where there is none."""
    path = epath.Path(path)
    path = path / INVERSION_FILE if path.is_dir() else path
    if not path.exists():
        raise ValueError(f"no inversion at {path}; make one with: sflow invert")
    return path


def turn_file(path: epath.PathLike) -> epath.Path:
    """Beside an `edit.json`, or in the folder that holds it; ValueError where there is none."""
    path = epath.Path(path)
    path = (path if path.is_dir() else path.parent) / TURN_FILE
    if not path.exists():
        raise ValueError(f"no {path}; it is beside the edit.json of every sflow edit")
    return path


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


def _read_record(folder: epath.PathLike, command: str) -> dict[str, Any]:
    """A folder's record; RecordError unless it is that command's."""
    record = read_record(epath.Path(folder) / FILES[command])
    if record["command"] != command:
        raise RecordError(f"{folder} holds a result of sflow {record['command']}, not of sflow {command}")
    return record


def _of(record: Mapping[str, Any], settings: type) -> dict[str, Any]:
    """The settings in a record; lists as tuples."""
    values = {field.name: record[field.name] for field in dataclasses.fields(settings) if field.name in record}
    return {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}


def _read_pictures(folder: epath.Path, names: list[str], record: Mapping[str, Any]) -> Float[np.ndarray, "b y x 3"]:
    """Pictures of the size that a record says; RecordError for others."""
    pictures = [np.asarray(open_picture(folder / name)) for name in names]
    wanted = (record["height"], record["width"], 3)
    for name, picture in zip(names, pictures):
        if picture.shape != wanted:
            raise RecordError(f"{folder / name} is {picture.shape[0]}×{picture.shape[1]}, not as its record says")
    return to_unit(np.stack(pictures))


def _token_side(tokens: int, record: Mapping[str, Any]) -> int:
    """Pixels along a token; RecordError where a picture of the record's size has no such number of tokens."""
    side = math.isqrt(record["height"] * record["width"] // tokens)
    if not side or record["height"] % side or record["width"] % side:
        raise RecordError(f"{tokens} tokens make no picture of {record['height']}×{record['width']}")
    return side


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
