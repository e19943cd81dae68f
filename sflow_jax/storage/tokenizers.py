"""Tokenizers of a converted checkpoint."""

import tempfile
from typing import Annotated, Any

import msgspec
from etils import epath

from sflow_jax.storage.files import read_json
from sflow_jax.storage.paths import is_remote

# A tokenizer without a stated limit reports a huge one.
LONGEST_TEXT = 100_000
# Bytes of one file of a tokenizer; the largest known have 35 MB.
LARGEST_FILE = 64 * 10**6
ADVICE = "take the whole folder of the published model, with tokenizer.json and tokenizer_config.json"


class TokenizerConfig(msgspec.Struct):
    """What is needed of `tokenizer_config.json`; libraries write a huge length for none."""

    model_max_length: Annotated[float, msgspec.Meta(ge=1)] | None = None


def load_tokenizer(folder: epath.PathLike) -> Any:
    """A transformers tokenizer from a folder, local or remote; ValueError if there is none."""
    from transformers import AutoTokenizer  # takes seconds to import

    folder = epath.Path(folder)
    if not folder.exists():
        raise ValueError(f"no tokenizer at {folder}; convert the source again")
    for file in folder.iterdir():
        if not file.is_dir() and file.stat().length > LARGEST_FILE:
            raise ValueError(f"{file} is larger than any tokenizer's ({LARGEST_FILE // 10**6} MB); {ADVICE}")
    with tempfile.TemporaryDirectory() as temporary:
        local = folder
        if is_remote(folder):
            local = epath.Path(temporary)
            for file in folder.iterdir():
                file.copy(local / file.name)
        try:
            tokenizer = AutoTokenizer.from_pretrained(str(local), local_files_only=True, trust_remote_code=False)
        except Exception as error:  # tokenizers of every kind raise errors of every kind
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise ValueError(f"cannot read the tokenizer in {folder} ({reason[:150]}); {ADVICE}") from error
    if not len(tokenizer):
        raise ValueError(f"the tokenizer in {folder} has no tokens; {ADVICE}")
    if not tokenizer.is_fast:
        raise ValueError(f"the tokenizer in {folder} has no tokenizer.json; {ADVICE}")
    text_tokens(folder)
    return tokenizer


def text_tokens(folder: epath.PathLike) -> int:
    """How many tokens a tokenizer pads to, by its config alone; ValueError where that cannot be read."""
    file = epath.Path(folder) / "tokenizer_config.json"
    length = read_json(file, TokenizerConfig, ValueError, ADVICE).model_max_length
    if length is None or length > LONGEST_TEXT:
        raise ValueError(
            f"{file} states no model_max_length; write the number of tokens there (FLUX.1: 77 for CLIP, for T5 "
            "512 of dev and 256 of schnell)"
        )
    return int(length)
