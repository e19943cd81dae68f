"""The pictures that a sweep's folder keeps."""

import dataclasses
import io

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from sflow_jax.runs.folder import RunFolder
from sflow_jax.storage.files import write_whole
from sflow_jax.storage.paths import list_folder
from sflow_jax.vitality.plan import SweepPlan
from sflow_jax.vitality.scores import Variant
from sflow_jax.vitality.sweep import Keep

# Longest side of a thumbnail, pixels.
THUMBNAIL = 384
JPEG_QUALITY = 90
FOLDER = "pictures"


@dataclasses.dataclass(frozen=True)
class Comparison:
    """What bypassing does to one picture. bypassed: layer number → the picture painted without that layer."""

    prompt: str
    seed: int
    reference: UInt8[np.ndarray, "y x 3"]
    bypassed: dict[int, UInt8[np.ndarray, "y x 3"]]


@dataclasses.dataclass(frozen=True)
class KeptFiles:
    """Files of one picture and what bypassing does to it, as the run's folder names them.

    number: the prompt's. bypassed: layer number → file, of the layers whose picture was kept.
    """

    number: int
    prompt: str
    seed: int
    reference: str
    bypassed: dict[int, str]


def picture_name(plan: SweepPlan, reference: int, variant: Variant | None) -> str:
    """File name without its ending, such as `prompt-003-seed-3-without-17`; a reference's number is its seed."""
    name = f"prompt-{reference // plan.seeds:03d}-seed-{reference}"
    if variant is None:
        return f"{name}-reference"
    name += f"-without-{'+'.join(map(str, variant.layers))}"
    return name if plan.spans_all_steps(variant) else f"{name}-in-steps-{variant.first}-{variant.last - 1}"


def keeper(folder: RunFolder, plan: SweepPlan, keep: str) -> Keep | None:
    """Writes pictures into the run's folder: whole as PNG, or thumbnails as JPEG; None to keep none."""
    if keep == "none":
        return None
    (folder.path / FOLDER).mkdir(exist_ok=True)

    def write(reference: int, variant: Variant | None, picture: np.ndarray) -> None:
        image, data = Image.fromarray(picture), io.BytesIO()
        if keep == "thumbnails":
            image.thumbnail((THUMBNAIL, THUMBNAIL))
            image.save(data, "JPEG", quality=JPEG_QUALITY)
        else:
            image.save(data, "PNG")
        ending = "jpg" if keep == "thumbnails" else "png"
        write_whole(folder.path / FOLDER / f"{picture_name(plan, reference, variant)}.{ending}", data.getvalue())

    return write


def kept_comparisons(folder: RunFolder, plan: SweepPlan, prompts: int) -> list[Comparison]:
    """The first prompts' pictures that the run kept, with every single layer bypassed."""
    comparisons = []
    for prompt in range(min(prompts, len(plan.prompts))):
        number = prompt * plan.seeds
        reference = _read(folder, picture_name(plan, number, None))
        if reference is None:
            return comparisons
        bypassed = {
            variant.layers[0]: _read(folder, picture_name(plan, number, variant))
            for variant in plan.variants
            if plan.is_layer(variant)
        }
        stored = {layer: picture for layer, picture in bypassed.items() if picture is not None}
        comparisons.append(Comparison(plan.prompts[prompt], number, reference, stored))
    return comparisons


def kept_files(folder: RunFolder, plan: SweepPlan) -> list[KeptFiles]:
    """Every reference that the run kept, with every single layer bypassed; names are relative to the folder."""
    stored = {file.stem: f"{FOLDER}/{file.name}" for file in list_folder(folder.path / FOLDER)}
    layers = [variant for variant in plan.variants if plan.is_layer(variant)]
    kept = []
    for reference in range(len(plan.prompts) * plan.seeds):
        whole, prompt = picture_name(plan, reference, None), reference // plan.seeds
        names = {variant.layers[0]: picture_name(plan, reference, variant) for variant in layers}
        bypassed = {layer: stored[name] for layer, name in names.items() if name in stored}
        if whole in stored and bypassed:
            kept.append(KeptFiles(prompt, plan.prompts[prompt], reference, stored[whole], bypassed))
    return kept


def _read(folder: RunFolder, name: str) -> np.ndarray | None:
    for ending in ("png", "jpg"):
        file = folder.path / FOLDER / f"{name}.{ending}"
        if file.exists():
            with file.open("rb") as opened, Image.open(opened) as image:
                return np.asarray(image.convert("RGB"))
    return None
