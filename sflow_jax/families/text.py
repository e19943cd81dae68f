"""Prompts → token ids, for every family's text encoders."""

import logging
from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int

from sflow_jax.models.conditioning import Conditioning

# Warnings are the package's, whatever the file.
logger = logging.getLogger("sflow_jax")


@runtime_checkable
class TextEncoder(Protocol):
    """What makes conditioning of prompts. words: text tokens that the transformer sees."""

    words: int

    def encode(self, prompts: Sequence[str]) -> Conditioning:
        """Conditioning with one row a prompt; SettingError unless it is a list of at least one text."""


def tokenize(tokenizer: Any, prompt: str, length: int, reader: str) -> Int[np.ndarray, "1 length"]:
    """Token ids padded or cut to `length`; a warning quotes what `reader` will not see."""
    ids = tokenizer(prompt, padding="max_length", max_length=length, truncation=True).input_ids
    # `verbose=False`: the tokenizer's own length warning would not say what is lost.
    uncut = tokenizer(prompt, truncation=False, return_offsets_mapping=True, verbose=False)
    if len(uncut.input_ids) > length:
        # The last place kept goes to the end-of-text mark.
        lost = prompt[uncut.offset_mapping[length - 1][0] :]
        logger.warning("prompt is longer than the %d tokens that %s reads; ignored: %r", length, reader, lost)
    return np.asarray([ids], np.int32)
