"""A small set in PIE-Bench's layout, drawn from the embedded world on demand."""

import io
import re
from typing import Any

from etils import epath
from PIL import Image

from sflow_jax.errors import SettingError
from sflow_jax.evaluation.known import scene_edits
from sflow_jax.evaluation.pie import MAPPING, PICTURES, SIDE, encode_mask
from sflow_jax.storage.files import to_json
from sflow_jax.storage.folders import new_folder
from sflow_jax.storage.paths import absolute
from sflow_jax.toyworld.edits import Edit

# Family → PIE-Bench's number and name of it.
KINDS = {
    "replace": ("1", "change_object"),
    "add": ("2", "add_object"),
    "remove": ("3", "delete_object"),
    "non-rigid": ("5", "change_pose"),
    "recolour": ("6", "change_color"),
    "scene": ("8", "change_background"),
}


def draw_pie(folder: epath.PathLike, scenes: int, seed: int = 0) -> int:
    """Draw so many scenes with an edit a family, 512×512, into a new folder; how many pictures there are.

    SettingError if something is there already.
    """
    destination = absolute(folder)
    if destination.exists():
        raise SettingError(f"{folder} is there already; choose a new folder for `draw_pie`")
    entries: dict[str, Any] = {}
    with new_folder(destination) as partial:
        for scene in range(scenes):
            for number, edit in enumerate(scene_edits(seed, scene)):
                entry = _entry(edit, key := f"{scene:06d}{number:06d}")
                file, data = partial / PICTURES / entry["image_path"], io.BytesIO()
                file.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(edit.source.draw(SIDE)).save(data, "PNG")
                file.write_bytes(data.getvalue())
                entries[key] = entry
        (partial / MAPPING).write_text(to_json(entries))
    return len(entries)


def _entry(edit: Edit, key: str) -> dict[str, Any]:
    """One edit as the mapping says it."""
    number, name = KINDS[edit.family]
    source, target, words = _bracketed(edit.source_caption, edit.edit_caption)
    before, after = (scene.attributes()[edit.attribute] for scene in (edit.source, edit.target))
    return {
        "image_path": f"{number}_{name}/{key}.png",
        "original_prompt": source,
        "editing_prompt": target,
        "editing_instruction": f"change the {edit.attribute.replace('_', ' ')} from {before} to {after}",
        "editing_type_id": number,
        "blended_word": words,
        "mask": encode_mask(edit.mask(SIDE)),
    }


def _bracketed(source: str, target: str) -> tuple[str, str, str]:
    """Two prompts with what differs in brackets, and those words where each has exactly one.

    In: "a red cat", "a blue cat" → "a [red] cat", "a [blue] cat", "red blue".
    """
    one, other = source.split(" "), target.split(" ")
    most = min(len(one), len(other))
    first = next((i for i in range(most) if one[i] != other[i]), most)
    last = next((i for i in range(most - first) if one[-1 - i] != other[-1 - i]), most - first)
    middles = [words[first : len(words) - last] for words in (one, other)]
    marked = [
        " ".join([*words[:first], *([f"[{' '.join(middle)}]"] if middle else []), *words[len(words) - last :]])
        for words, middle in zip((one, other), middles)
    ]
    single = all(len(middle) == 1 for middle in middles)
    return *marked, re.sub(r"[^\w ]", "", f"{middles[0][0]} {middles[1][0]}") if single else ""
