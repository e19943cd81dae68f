"""The embedded model's two word-level tokenizers, in the layouts that transformers reads."""

from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from sflow_jax.toyworld.captions import vocabulary

TEXT_TOKENS = 28
"""Tokens of a caption, padding included, for both encoders: the longest caption has 24 words."""
PAD, END, UNKNOWN = "<pad>", "</s>", "<unk>"
CLIP_START, CLIP_END = "<|startoftext|>", "<|endoftext|>"


def _word_level(tokens: list[str], unknown: str, template: str, special: tuple[str, ...]) -> Tokenizer:
    """A tokenizer that splits at spaces and punctuation and knows exactly `tokens`."""
    numbers = {token: number for number, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.WordLevel(numbers, unk_token=unknown))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=template, special_tokens=[(token, numbers[token]) for token in special]
    )
    return tokenizer


def t5_tokenizer() -> PreTrainedTokenizerFast:
    """As T5's: padding is 0, the end of text 1, nothing in front."""
    tokens = [PAD, END, UNKNOWN, *vocabulary()]
    return PreTrainedTokenizerFast(
        tokenizer_object=_word_level(tokens, UNKNOWN, f"$A {END}", (END,)),
        pad_token=PAD,
        eos_token=END,
        unk_token=UNKNOWN,
        model_max_length=TEXT_TOKENS,
    )


def clip_tokenizer() -> PreTrainedTokenizerFast:
    """As CLIP's: start and end around the words, padded with the end."""
    tokens = [*vocabulary(), UNKNOWN, CLIP_START, CLIP_END]
    return PreTrainedTokenizerFast(
        tokenizer_object=_word_level(tokens, UNKNOWN, f"{CLIP_START} $A {CLIP_END}", (CLIP_START, CLIP_END)),
        bos_token=CLIP_START,
        eos_token=CLIP_END,
        pad_token=CLIP_END,
        unk_token=UNKNOWN,
        model_max_length=TEXT_TOKENS,
    )


def token_ids(tokenizer: PreTrainedTokenizerFast, captions: list[str]) -> np.ndarray:
    """Padded ids, int32 [captions, TEXT_TOKENS]."""
    return tokenizer(captions, padding="max_length", truncation=True, return_tensors="np")["input_ids"].astype(
        np.int32
    )


def save_tokenizers(folder: Path) -> None:
    """Write `tokenizer/` (CLIP's) and `tokenizer_2/` (T5's) under `folder`."""
    clip_tokenizer().save_pretrained(folder / "tokenizer")
    t5_tokenizer().save_pretrained(folder / "tokenizer_2")
