"""PIE-Bench's layout: `mapping_file.json` and `annotation_images/` (Ju et al. 2024, *Direct Inversion*).

Prompts lose their square brackets, which only mark what is edited. A mask is pairs of (first pixel, count), row by
row of 512×512, 1 where the picture may change; counts that reach over the end are cut; then the outermost rows and
columns are set to 1, as the published evaluator does, so they never count as background. It blackens what is masked
in both pictures and averages over all pixels, so PSNR, MSE, SSIM and LPIPS outside depend on the mask's size; the
same is done here. A picture whose mask covers everything has no numbers outside.

Edited pictures go to `edited/METHOD/annotation_images/…`, 512×512, under the source's name and in its format: the
folder that the published evaluator reads beside the benchmark's own. They are judged as read back from there.
"""

import dataclasses
import hashlib
import io
import json
from collections.abc import Sequence
from pathlib import PurePosixPath
from typing import Any

import jax
import msgspec
import numpy as np
from etils import epath
from jaxtyping import Bool, UInt8
from PIL import Image

from sflow_jax.arrays import AnyArray
from sflow_jax.errors import SettingError
from sflow_jax.evaluation.cases import Axis, Case, Column, Prompt, Scores
from sflow_jax.evaluation.networks import Networks
from sflow_jax.measures.features import Features
from sflow_jax.measures.lpips import Lpips
from sflow_jax.measures.metrics import blacken, picture_mse, picture_psnr, picture_ssim
from sflow_jax.measures.structure import structure_distance
from sflow_jax.pictures.files import fit_picture, open_picture
from sflow_jax.storage.files import read_json, write_whole
from sflow_jax.storage.paths import absolute
from sflow_jax.typed import Name, typed

MAPPING, PICTURES, EDITED = "mapping_file.json", "annotation_images", "edited"
SIDE = 512
# Of JPEG, without subsampled colours: the least that the format loses.
QUALITY = 100


class Entry(msgspec.Struct):
    """What an entry of the mapping must say; the rest is not read."""

    image_path: Name
    original_prompt: Prompt
    editing_prompt: Prompt
    editing_type_id: Name
    mask: list[int]


@dataclasses.dataclass(frozen=True)
class Annotation:
    """One entry of the mapping. place: of the picture, under `annotation_images`. mask: 1 where it may change."""

    key: str
    place: str
    source: str
    edit: str
    kind: str
    mask: Bool[np.ndarray, "y x"]


def decode_mask(pairs: Sequence[int]) -> Bool[np.ndarray, "y x"]:
    """Pairs of (first pixel, count) → where a picture may change, its border with it.

    In: [513, 2] → row 1, columns 1 and 2; and the border. ValueError for no pairs, or a run that begins outside.
    """
    numbers = np.asarray(pairs if len(pairs) else np.zeros(0, int))
    if len(numbers) % 2 or numbers.ndim != 1 or not np.issubdtype(numbers.dtype, np.integer):
        raise ValueError("a mask is a list of pairs of whole numbers")
    mask = np.zeros(SIDE * SIDE, bool)
    for first, count in numbers.reshape(-1, 2):
        if not (0 <= first < SIDE * SIDE and count >= 0):
            raise ValueError(f"a mask's run of {count} pixels from {first} is outside {SIDE}×{SIDE}")
        mask[first : first + count] = True
    mask = mask.reshape(SIDE, SIDE)
    mask[[0, -1]], mask[:, [0, -1]] = True, True
    return mask


def encode_mask(mask: Bool[np.ndarray, "y x"]) -> list[int]:
    """The inverse of `decode_mask`, but for the border: pairs of (first pixel, count)."""
    steps = np.diff(np.concatenate([[0], mask.ravel().astype(np.int8), [0]]))
    first, after = np.flatnonzero(steps == 1), np.flatnonzero(steps == -1)
    return np.stack([first, after - first], axis=1).ravel().tolist()


def read_mapping(folder: epath.PathLike) -> list[Annotation]:
    """Every entry of a benchmark's mapping; SettingError in one line for what is missing or cannot be read."""
    file = absolute(folder) / MAPPING
    if not file.exists():
        raise SettingError(f"{folder} is not in PIE-Bench's layout (no {MAPPING}); give another folder for `pie`")
    entries = read_json(file, dict[Name, Any], SettingError, "give another folder for `pie`")
    if not entries:
        raise SettingError(f"{file} holds no entries; give another folder for `pie`")
    try:
        return [_annotation(key, content) for key, content in entries.items()]
    except ValueError as error:
        raise SettingError(f"cannot read {file}: {error}") from error


def _annotation(key: str, content: Any) -> Annotation:
    try:
        entry = typed(content, Entry)
        place = PurePosixPath(entry.image_path)
        if place.is_absolute() or ".." in place.parts:
            raise ValueError(f"{place} is outside its folder")
        mask = decode_mask(entry.mask)
    except ValueError as error:
        raise ValueError(f"entry {key}: {error}") from error
    prompts = (_without_brackets(prompt) for prompt in (entry.original_prompt, entry.editing_prompt))
    return Annotation(key, entry.image_path, *prompts, entry.editing_type_id, mask)


def _without_brackets(prompt: str) -> str:
    return prompt.replace("[", "").replace("]", "")


@jax.jit
def _preservation(
    dino: Features | None,
    lpips: Lpips | None,
    picture: UInt8[AnyArray, "b y x 3"],
    source: UInt8[AnyArray, "b y x 3"],
    outside: Bool[AnyArray, "b y x"],
) -> dict[str, jax.Array]:
    """Measures of an edited picture against its source, by the published evaluator's names."""
    masked = [blacken(pixels, outside) for pixels in (source, picture)]
    scores = {
        "psnr_unedit_part": picture_psnr(*masked),
        "mse_unedit_part": picture_mse(*masked),
        "ssim_unedit_part": picture_ssim(*masked),
    }
    if lpips is not None:
        scores["lpips_unedit_part"] = lpips(*masked)
    if dino is not None:
        scores["structure_distance"] = structure_distance(dino, picture, source)
    return scores


class PieBench:
    """Pictures in PIE-Bench's layout, each with one edit."""

    name = "PIE-Bench's layout"
    share = None
    columns = (
        Column("structure_distance", "structure ×10³", scale=1e3, higher=False),
        Column("psnr_unedit_part", "PSNR outside (dB)"),
        Column("lpips_unedit_part", "LPIPS outside ×10³", scale=1e3, higher=False),
        Column("mse_unedit_part", "MSE outside ×10⁴", scale=1e4, higher=False),
        Column("ssim_unedit_part", "SSIM outside ×10²", scale=1e2),
        Column("clip_similarity_source_image", "CLIP of the source", higher=None),
        Column("clip_similarity_target_image", "CLIP whole"),
        Column("clip_similarity_target_image_edit_part", "CLIP edited"),
    )
    chart = (
        Axis("clip_similarity_target_image_edit_part", "CLIP similarity of the edited part (×100)"),
        Axis("psnr_unedit_part", "PSNR outside the mask (dB)"),
    )

    def __init__(self, folder: epath.PathLike, annotations: Sequence[Annotation], networks: Networks):
        """annotations: from `read_mapping`. ValueError for pictures that cannot be read, or are not 512×512."""
        self.folder, self.networks = absolute(folder), networks
        self.annotations = {annotation.key: annotation for annotation in annotations}
        self.cases = tuple(map(self._case, self.annotations.values()))

    @property
    def notes(self) -> tuple[str, ...]:
        """Which networks judge, and which do not."""
        dino, clip, lpips = self.networks.dino, self.networks.clip, self.networks.lpips
        return (
            "structure distance by the keys of "
            + (f"{dino.name} at its own preprocessing" if dino else "no network: `--features` names one")
            + "; published figures use DINO ViT-B/8 at 224 pixels",
            f"CLIP similarity ×100 by {clip.features.name}; published figures use ViT-L/14"
            if clip
            else "no CLIP was named (--clip): its columns are empty",
            "LPIPS with SqueezeNet" if lpips else "no LPIPS weights were named (--lpips): its column is empty",
            "outside: both pictures black inside the mask, means over all pixels, as the published evaluator does",
        )

    def _case(self, annotation: Annotation) -> Case:
        file = self.folder / PICTURES / annotation.place
        size = open_picture(file).size
        if size != (SIDE, SIDE):
            raise SettingError(f"{file} is {size[0]}×{size[1]}; pictures of PIE-Bench are {SIDE}×{SIDE}")
        return Case(annotation.key, file, annotation.source, (annotation.edit,), (annotation.kind,))

    def record(self) -> dict[str, Any]:
        """A digest of the mapping's entries and of the pictures, and the networks."""
        digest = hashlib.sha256()
        for case, x in zip(self.cases, self.annotations.values()):
            digest.update(json.dumps([x.key, x.place, x.source, x.edit, encode_mask(x.mask)]).encode())
            digest.update(case.picture.read_bytes())
        return {
            "benchmark": self.name,
            "pictures": len(self.cases),
            "mapping": digest.hexdigest()[:16],
            **self.networks.record(),
        }

    def keep(
        self, folder: epath.Path, method: str, case: Case, pictures: UInt8[np.ndarray, "n y x 3"]
    ) -> np.ndarray:
        """Write the edited picture where the published evaluator looks for it, and read it again."""
        place = folder / EDITED / method.replace(":", "-") / PICTURES / self.annotations[case.name].place
        fitted = fit_picture(Image.fromarray(pictures[0]), SIDE, SIDE)
        place.parent.mkdir(parents=True, exist_ok=True)
        write_whole(place, _encoded(Image.fromarray(fitted), place.suffix))
        return np.asarray(open_picture(place))[None]

    def score(self, case: Case, pictures: UInt8[np.ndarray, "n y x 3"]) -> tuple[list[Scores], list[str]]:
        """One row: every column, NaN where its network was not named or the mask covers everything."""
        annotation, source = self.annotations[case.name], np.asarray(open_picture(case.picture))[None]
        scores = dict.fromkeys((column.name for column in self.columns), float("nan"))
        outside = ~annotation.mask[None]
        measured = _preservation(self.networks.dino, self.networks.lpips, pictures, source, outside)
        scores |= {
            name: float(value[0])
            for name, value in measured.items()
            if outside.any() or not name.endswith("_unedit_part")
        }
        if (clip := self.networks.clip) is not None:
            inside = pictures * annotation.mask[None, ..., None]
            seen = clip.pictures(np.concatenate([source, pictures, inside]))
            before, after = clip.captions([annotation.source, annotation.edit])
            names = [column.name for column in self.columns if column.name.startswith("clip")]
            similarities = 100 * np.maximum([seen[0] @ before, seen[1] @ after, seen[2] @ after], 0)
            scores |= dict(zip(names, similarities.tolist(), strict=True))
        return [scores], [""]

    def badness(self, scores: Scores) -> float:
        """The worst keep least."""
        return -scores["psnr_unedit_part"]


def _encoded(picture: Image.Image, suffix: str) -> bytes:
    """A picture in the format of a file's ending; PNG for one that is not known."""
    data = io.BytesIO()
    if suffix.lower() in (".jpg", ".jpeg"):
        picture.save(data, "JPEG", quality=QUALITY, subsampling=0)
    else:
        picture.save(data, "PNG")
    return data.getvalue()
