"""What the pipeline returns."""

import dataclasses
import json
from typing import Any

import numpy as np
from etils import epath
from jaxtyping import Array, Float
from safetensors import SafetensorError
from safetensors.numpy import load as load_tensors
from safetensors.numpy import save as save_tensors

INVERSION_FILE = "inversion.safetensors"


@dataclasses.dataclass(frozen=True)
class Generation:
    """Generated pictures.

    images: [b, y, x, 3] float32 in 0..1. latents: [b, s, c] float32, packed and scaled.
    """

    images: Float[np.ndarray, "b y x 3"]
    latents: Float[Array, "b s c"]


@dataclasses.dataclass(frozen=True)
class Edit:
    """A source picture and its edits; row 0 is the source.

    images: [1 + edits, y, x, 3] float32 in 0..1. latents: [1 + edits, s, c] float32. layers: where the
    source's keys and values were injected. guidance: one a row. nudge: of a real source, else 1.
    """

    images: Float[np.ndarray, "b y x 3"]
    latents: Float[Array, "b s c"]
    layers: tuple[int, ...]
    steps: int
    guidance: tuple[float, ...]
    nudge: float


@dataclasses.dataclass(frozen=True)
class Inversion:
    """A picture's path to noise.

    trajectory: [steps + 1, s, c] float32, index 0 the nudged latents of the picture, last the noise.
    sigmas: [steps + 1] ascending from 0 to 1, one a state. settings: prompt, steps, guidance, nudge,
    height, width.
    """

    trajectory: Float[np.ndarray, "t_plus_1 s c"]
    sigmas: Float[np.ndarray, " t_plus_1"]
    settings: dict[str, Any]

    def save(self, folder: epath.PathLike) -> epath.Path:
        """Write one file into `folder` (under a temporary name, then renamed); returns its path."""
        path = epath.Path(folder) / INVERSION_FILE
        tensors = {"trajectory": self.trajectory, "sigmas": self.sigmas}
        temporary = path.with_name(f"{path.name}.partial")
        temporary.write_bytes(save_tensors(tensors, metadata={"settings": json.dumps(self.settings)}))
        return temporary.replace(path)

    @classmethod
    def load(cls, path: epath.PathLike) -> "Inversion":
        """Read the file, or the folder that holds it; ValueError if it is missing or broken."""
        path = epath.Path(path)
        path = path / INVERSION_FILE if path.is_dir() else path
        if not path.exists():
            raise ValueError(f"no inversion at {path}; make one with: sflow invert")
        data = path.read_bytes()
        try:
            tensors = load_tensors(data)
            # The format: 8 bytes of header length, then a JSON header with our metadata.
            header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
            settings = json.loads(header["__metadata__"]["settings"])
            return cls(tensors["trajectory"], tensors["sigmas"], settings)
        except (SafetensorError, KeyError, ValueError) as error:
            raise ValueError(f"{path} is not a readable inversion ({error}); invert the picture again") from error
