"""The pool of drawn scenes that every stage trains on, drawn once and kept as arrays on disk."""

import dataclasses
import json
import multiprocessing
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from sflow_jax.toyworld import scenes
from sflow_jax.toyworld.attributes import ATTRIBUTES, DETAIL_RANGES
from sflow_jax.toyworld.train.tokenizers import clip_tokenizer, t5_tokenizer, token_ids

WORDINGS = 8
"""Captions kept for every scene; each time a scene is seen, one of them is taken at random."""
NAMED = tuple(ATTRIBUTES)
UNNAMED = (*DETAIL_RANGES, "facing")
_CHUNK = 1000


@dataclasses.dataclass(frozen=True)
class Pool:
    """Scenes as arrays, n scenes each.

    Attributes:
        pictures: uint8 [n, 64, 64, 3].
        named: index into `ATTRIBUTES` of every named attribute, uint8 [n, 8].
        unnamed: every unnamed detail scaled to -1..1, float32 [n, 15].
        t5_ids, clip_ids: caption tokens, uint8 [n, WORDINGS, TEXT_TOKENS].
    """

    pictures: np.ndarray
    named: np.ndarray
    unnamed: np.ndarray
    t5_ids: np.ndarray
    clip_ids: np.ndarray

    def __len__(self) -> int:
        return len(self.pictures)


def scene(seed: int, number: int, split: str) -> tuple[scenes.Scene, np.random.Generator]:
    """Scene `number` of a split, and the generator that goes on to word its captions."""
    rng = np.random.default_rng((seed, scenes.SPLITS.index(split), number))
    return scenes.sample_scene(rng, split), rng


def _details(drawn: scenes.Scene) -> list[float]:
    unnamed = drawn.unnamed()
    scaled = [(unnamed[k] - low) / (high - low) * 2 - 1 for k, (low, high) in DETAIL_RANGES.items()]
    return [*scaled, unnamed["facing"]]


def _draw_chunk(task: tuple[int, int, int, str, int]) -> dict[str, np.ndarray]:
    """The arrays of scenes `start` to `stop`."""
    seed, start, stop, split, size = task
    parts: dict[str, list] = {field.name: [] for field in dataclasses.fields(Pool)}
    captions = []
    for number in range(start, stop):
        drawn, rng = scene(seed, number, split)
        attributes = drawn.attributes()
        parts["pictures"].append(drawn.draw(size))
        parts["named"].append([ATTRIBUTES[name].index(attributes[name]) for name in NAMED])
        parts["unnamed"].append(_details(drawn))
        captions += [drawn.caption(rng) for _ in range(WORDINGS)]
    for name, tokenizer in (("t5_ids", t5_tokenizer()), ("clip_ids", clip_tokenizer())):
        parts[name] = token_ids(tokenizer, captions).reshape(stop - start, WORDINGS, -1)
    types = {"unnamed": np.float32}
    return {name: np.asarray(values).astype(types.get(name, np.uint8)) for name, values in parts.items()}


def _chunks(count: int, seed: int, split: str, size: int) -> Iterator[dict[str, np.ndarray]]:
    tasks = [(seed, start, min(start + _CHUNK, count), split, size) for start in range(0, count, _CHUNK)]
    if len(tasks) == 1:
        yield _draw_chunk(tasks[0])
        return
    # Spawned, not forked: the parent may already run JAX's threads.
    with multiprocessing.get_context("spawn").Pool() as workers:
        yield from workers.imap(_draw_chunk, tasks)


def load_pool(folder: Path, count: int, *, seed: int, split: str = "train", size: int = 64) -> Pool:
    """The pool of `count` scenes, drawn and written to `folder` unless it is already there."""
    done = folder / "pool.json"
    description = {"count": count, "seed": seed, "split": split, "size": size}
    names = [field.name for field in dataclasses.fields(Pool)]
    if not done.exists() or json.loads(done.read_text()) != description:
        folder.mkdir(parents=True, exist_ok=True)
        parts = list(_chunks(count, seed, split, size))
        for name in names:
            np.save(folder / f"{name}.npy", np.concatenate([part[name] for part in parts]))
        done.write_text(json.dumps(description))
    return Pool(**{name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in names})


def indices(pool: Pool, count: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """A batch of `count` scenes (in order: the arrays lie on disk), and a wording for each."""
    return np.sort(rng.integers(len(pool), size=count)), rng.integers(WORDINGS, size=count)
