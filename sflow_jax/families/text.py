"""Prompts → token ids, for every family's text encoders."""

import logging
import re
from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int

from sflow_jax.errors import SettingError
from sflow_jax.models.conditioning import Conditioning

# Warnings are the package's, whatever the file.
logger = logging.getLogger("sflow_jax")


@runtime_checkable
class TextEncoder(Protocol):
    """What makes conditioning of prompts. words: text tokens that the transformer sees."""

    words: int

    def encode(self, prompts: Sequence[str]) -> Conditioning:
        """Conditioning with one row a prompt; SettingError unless it is a list of at least one text."""

    def locate(self, prompt: str, word: str) -> tuple[int, ...]:
        """Text tokens of a word, or several, wherever it stands in a prompt; SettingError where it does not."""


def word_spans(prompt: str, word: str) -> list[tuple[int, int]]:
    """First character and the one behind the last, wherever a word stands by itself; SettingError if nowhere."""
    spans = [match.span() for match in re.finditer(rf"(?<!\w){re.escape(word)}(?!\w)", prompt, re.IGNORECASE)]
    if not word.strip() or not spans:
        raise SettingError(f"`word` {word!r:.80} is not in the prompt {prompt!r:.200}")
    return spans


def find_word(prompt: str, word: str, readers: Sequence[tuple[Any, int]]) -> tuple[int, ...]:
    """Text tokens of a word wherever it stands in a prompt, by the tokenizers' own offsets.

    readers: tokenizers, and the number of tokens that each pads or cuts to, in the order of their tokens. A word
    stands by itself ("hat" is not in "that"), small and capital letters are the same, and it may be several.
    SettingError for one that is not in the prompt, or only behind what is read of it.
    """
    spans, tokens, before = word_spans(prompt, word), [], 0
    for tokenizer, length in readers:
        offsets = tokenizer(prompt, max_length=length, truncation=True, return_offsets_mapping=True).offset_mapping
        # Marks such as the end of text have no length.
        tokens += [
            before + number
            for number, (start, end) in enumerate(offsets)
            if start < end and any(start < last and first < end for first, last in spans)
        ]
        before += length
    if not tokens:
        raise SettingError(f"`word` {word!r:.80} stands behind the last token that is read of the prompt")
    return tuple(tokens)


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
