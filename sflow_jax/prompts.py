"""Prompts → what the transformer is conditioned on: T5's sequence and CLIP's pooled vector."""

import dataclasses
import logging
import tempfile
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jaxtyping import Array, Float, Int

from sflow_jax.models.clip import ClipText
from sflow_jax.models.t5 import T5Encoder
from sflow_jax.paths import is_remote

logger = logging.getLogger(__name__)
TOKENIZERS = {"clip": "tokenizer", "t5": "tokenizer_2"}


@dataclasses.dataclass(frozen=True)
class Conditioning:
    """What the prompts became.

    text: [b, w, e], T5's features of every token. pooled: [b, p], CLIP's vector at the end of the text.
    """

    text: Float[Array, "b w e"]
    pooled: Float[Array, "b p"]

    def __len__(self) -> int:
        return self.text.shape[0]

    def rows(self, rows: Sequence[int]) -> "Conditioning":
        """The conditioning of some rows, in that order."""
        rows = np.asarray(rows)
        return Conditioning(self.text[rows], self.pooled[rows])


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


@jax.jit
def t5_features(encoder: T5Encoder, token_ids: jax.Array) -> jax.Array:
    return encoder(token_ids)


@jax.jit
def _clip_pooled(encoder: ClipText, token_ids: jax.Array) -> jax.Array:
    return encoder(token_ids)[1]


class PromptEncoder:
    """Both text encoders with their tokenizers. Prompts go through one by one: one compilation for any number.

    fetch_t5: gives T5 where it computes; called once for all prompts encoded together, and let go after them.
    """

    def __init__(self, clip: ClipText, fetch_t5: Callable[[], T5Encoder], clip_tokenizer: Any, t5_tokenizer: Any):
        self.clip, self.fetch_t5 = clip, fetch_t5
        self.clip_tokenizer, self.t5_tokenizer = clip_tokenizer, t5_tokenizer
        # A tokenizer without a stated limit reports a huge one.
        self.clip_length = min(clip_tokenizer.model_max_length, clip.config.positions)
        self.t5_length = t5_tokenizer.model_max_length
        if self.t5_length > 100_000:
            raise ValueError("the second tokenizer states no model_max_length; FLUX needs one (512 for dev)")

    def encode(self, prompts: Sequence[str]) -> Conditioning:
        """Conditioning with one row a prompt, padded to the tokenizers' lengths.

        Prompts that are too long are cut with a warning that quotes what was lost. ValueError if none is given.
        """
        if isinstance(prompts, str) or not prompts or not all(isinstance(prompt, str) for prompt in prompts):
            raise ValueError(f"prompts must be a list of at least one text, found {prompts!r}")
        t5, pooled, text = self.fetch_t5(), [], []
        for prompt in prompts:
            clip_ids = tokenize(self.clip_tokenizer, prompt, self.clip_length, "CLIP (the pooled vector)")
            t5_ids = tokenize(self.t5_tokenizer, prompt, self.t5_length, "T5")
            pooled.append(_clip_pooled(self.clip, clip_ids))
            text.append(t5_features(t5, t5_ids))
        return Conditioning(text=jnp.concatenate(text), pooled=jnp.concatenate(pooled))


def tokenize(tokenizer: Any, prompt: str, length: int, reader: str) -> Int[np.ndarray, "1 length"]:
    """Token ids padded or cut to `length`; a warning quotes what `reader` will not see."""
    ids = tokenizer(prompt, padding="max_length", max_length=length, truncation=True).input_ids
    # `verbose=False`: the tokenizer's own length warning would not say what is lost.
    whole = tokenizer(prompt, truncation=False, return_offsets_mapping=True, verbose=False)
    if len(whole.input_ids) > length:
        # The last place kept goes to the end-of-text mark.
        lost = prompt[whole.offset_mapping[length - 1][0] :]
        logger.warning("prompt is longer than the %d tokens that %s reads; ignored: %r", length, reader, lost)
    return np.asarray([ids], np.int32)
