"""Tokenizers of a converted checkpoint."""

import json
import tempfile
from typing import Any

from etils import epath

from sflow_jax.storage.paths import is_remote


def load_tokenizer(folder: epath.PathLike) -> Any:
    """A transformers tokenizer from a folder, local or remote; ValueError if there is none."""
    from transformers import AutoTokenizer  # takes seconds to import

    folder = epath.Path(folder)
    if not folder.exists():
        raise ValueError(f"no tokenizer at {folder}; convert the source again")
    with tempfile.TemporaryDirectory() as temporary:
        local = folder
        if is_remote(folder):
            local = epath.Path(temporary)
            for file in folder.iterdir():
                file.copy(local / file.name)
        try:
            return AutoTokenizer.from_pretrained(str(local), local_files_only=True)
        except (OSError, ValueError) as error:
            raise ValueError(f"cannot read the tokenizer in {folder}: {str(error).splitlines()[0]}") from error


def text_tokens(folder: epath.PathLike) -> int:
    """How many tokens a tokenizer pads to, by its config alone; ValueError where that cannot be read."""
    file = epath.Path(folder) / "tokenizer_config.json"
    try:
        return int(json.loads(file.read_text())["model_max_length"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"cannot read {file}; convert the source again") from error
