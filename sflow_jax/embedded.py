"""The models that ship, `toyworld` and `toyworld-sd3`: published folders, converted once to the cache.

The SD3 shares the FLUX's autoencoder, text encoders and tokenizers, which are in the package once.
"""

import dataclasses
import hashlib
import json
import shutil
import tempfile
import time
from pathlib import Path

import msgspec
from etils import epath
from safetensors.numpy import load_file, save_file
from sflow_convert.job import convert
from sflow_convert.layouts import open_source

from sflow_jax.errors import SettingError
from sflow_jax.settings import EMBEDDED, EMBEDDED_SD3
from sflow_jax.storage.checkpoint import FORMAT, CheckpointError, load_info
from sflow_jax.storage.checksums import verify
from sflow_jax.storage.files import read_json, to_json, write_whole
from sflow_jax.storage.folders import Busy
from sflow_jax.storage.paths import cache_folder
from sflow_jax.typed import Count, Name

ASSETS = Path(__file__).parent / "toyworld" / "assets"
SD3_ASSETS = ASSETS.with_name("assets_sd3")
VITAL_LAYERS_FILE = "vital_layers.json"
# Seconds to wait for another process that converts an embedded model.
PATIENCE, POLL = 120.0, 0.3
# Folder of the SD3 → the FLUX's of the same files. Both CLIPs are one, see `write_clip`.
SHARED = {
    "vae": "vae",
    "text_encoder_3": "text_encoder_2",
    "tokenizer": "tokenizer",
    "tokenizer_2": "tokenizer",
    "tokenizer_3": "tokenizer_2",
}
CLIPS = ("text_encoder", "text_encoder_2")
CLIP_WEIGHTS = "model.safetensors"


@dataclasses.dataclass(frozen=True)
class EmbeddedModel:
    """What a name stands for. own: its folder in the package. shares: whether the rest is the FLUX's."""

    title: str
    own: Path
    shares: bool = False

    @property
    def folders(self) -> tuple[Path, ...]:
        """All that it is made of."""
        return (ASSETS, self.own) if self.shares else (self.own,)


MODELS = {
    EMBEDDED: EmbeddedModel("the embedded FLUX of the toy world", ASSETS),
    EMBEDDED_SD3: EmbeddedModel("the embedded SD3 of the toy world", SD3_ASSETS, shares=True),
}


class SavedLayers(msgspec.Struct):
    """A vital set in a file of its own."""

    layers: tuple[Count, ...] | None
    origin: Name


def embedded_checkpoint(name: str) -> epath.Path:
    """A model's converted folder in the cache, made at the first call, and again where it is damaged."""
    folder = epath.Path(cache_folder() / f"{name}-{_digest(name)}")
    deadline = time.monotonic() + PATIENCE
    try:
        while not _is_good(folder):
            try:
                folder.rmtree(missing_ok=True)
                _convert(name, folder)
            except Busy:  # another process converts it just now
                if time.monotonic() > deadline:
                    raise
                time.sleep(POLL)
    except OSError as error:
        raise SettingError(
            f"cannot keep the embedded model in {folder.parent} ({error.strerror or error}); set XDG_CACHE_HOME "
            "to a folder with room that you can write to"
        ) from error
    return folder


def write_published(name: str, folder: Path) -> None:
    """An embedded model as a new folder that diffusers reads."""
    model = MODELS[name]
    shutil.copytree(model.own, folder)
    if model.shares:
        write_shared(folder)


def write_shared(folder: Path) -> None:
    """What the embedded SD3 shares with the FLUX, into its folder."""
    for place, source in SHARED.items():
        shutil.copytree(ASSETS / source, folder / place)
    for place in CLIPS:
        write_clip(folder / place)


def write_clip(folder: Path) -> None:
    """The text half of the embedded CLIP with its projection, which the FLUX's text encoder is without."""
    config = json.loads((ASSETS / "clip" / "config.json").read_text())["text_config"]
    text = {
        name: tensor
        for name, tensor in load_file(ASSETS / "clip" / CLIP_WEIGHTS).items()
        if name.startswith(("text_model.", "text_projection."))
    }
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(to_json({"architectures": ["CLIPTextModelWithProjection"], **config}))
    save_file(text, folder / CLIP_WEIGHTS, metadata={"format": "pt"})


def save_layers(name: str, layers: tuple[int, ...], origin: str) -> epath.Path:
    """Record layers as a model's vital ones in a file of the user's own, since all share the model; the file."""
    file = _saved_file(name)
    file.parent.mkdir(parents=True, exist_ok=True)
    return write_whole(file, to_json({"layers": layers, "origin": origin}))


def saved_layers(name: str) -> SavedLayers | None:
    """What the user saved for a model, if anything; CheckpointError if it cannot be read."""
    file = _saved_file(name)
    return read_json(file, SavedLayers, CheckpointError, f"remove {file}") if file.exists() else None


def forget_layers(name: str) -> bool:
    """Take a model's own vital layers again; whether others had been saved."""
    saved = _saved_file(name).exists()
    _saved_file(name).unlink(missing_ok=True)
    return saved


def _saved_file(name: str) -> epath.Path:
    return epath.Path(cache_folder() / f"{name}-{_digest(name)}-{VITAL_LAYERS_FILE}")


def _digest(name: str) -> str:
    """Of everything that a conversion of the model depends on."""
    total = hashlib.sha256(str(FORMAT).encode())
    for folder in MODELS[name].folders:
        for path in sorted(path for path in folder.rglob("*") if path.is_file()):
            total.update(str(path.relative_to(folder)).encode())
            total.update(path.read_bytes())
    return total.hexdigest()[:16]


def _convert(name: str, destination: epath.Path) -> None:
    model = MODELS[name]
    vital = read_json(model.own / VITAL_LAYERS_FILE, SavedLayers, CheckpointError, "install the package again")
    with tempfile.TemporaryDirectory() as temporary:
        source = Path(temporary) / name
        write_published(name, source)
        convert(
            open_source(source),
            destination,
            vital_layers=vital.layers,
            vital_origin=vital.origin,
            title=model.title,
            progress=False,
        )


def _is_good(folder: epath.Path) -> bool:
    try:
        load_info(folder)
        verify(folder, CheckpointError, lambda _: None)
    except (CheckpointError, OSError):
        return False
    return True
