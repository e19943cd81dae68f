"""The sweep: paint every prompt with every variant bypassed, and compare with the picture of the whole model.

Units of work (a reference picture and a variant) are packed into batches of one shape, so that everything compiles
once. A batch's scores go to the run folder as one part. References are painted once, when a batch first needs them.
"""

import dataclasses
import functools
import itertools
import time
from collections.abc import Callable, Iterable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, UInt8
from tqdm.auto import tqdm

from sflow_jax.arrays import AnyArray
from sflow_jax.console import parse_place
from sflow_jax.control import LayerControl, check_layers
from sflow_jax.features import Features
from sflow_jax.latents import Canvas, draw_noise, to_uint8
from sflow_jax.metrics import feature_cosine, picture_psnr, picture_ssim
from sflow_jax.pipeline import StableFlow
from sflow_jax.prompts import Conditioning
from sflow_jax.vitality.adaptive import Elimination, run
from sflow_jax.vitality.folder import RunFolder
from sflow_jax.vitality.scores import MEASURES, Variant
from sflow_jax.vitality.summary import Table

# (reference, variant) of every unit of work, by their numbers.
Units = Int[np.ndarray, "u 2"]
# The units of a round's batches, by the batches' numbers.
Batches = dict[int, np.ndarray]
# (number of the reference, variant or None for the reference itself, picture)
Keep = Callable[[int, Variant | None, np.ndarray], None]
# Layers named in the progress bar.
TOP_SHOWN = 4
# Seconds without a new part after which a worker no longer waits for the others.
PATIENCE = 1800.0
POLL = 2.0


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is painted: everything that the scores depend on beside the networks.

    seeds: pictures a prompt. batch: pictures at once. variants: what is bypassed, and when. Reference i is of
    prompt i // seeds, and its noise has seed i.
    """

    prompts: tuple[str, ...]
    seeds: int
    steps: int
    guidance: float
    height: int
    width: int
    batch: int
    variants: tuple[Variant, ...]

    def __post_init__(self) -> None:
        for name in ("seeds", "steps", "batch"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} must be at least 1, found {getattr(self, name)}")

    def is_layer(self, variant: Variant) -> bool:
        """Whether it is one layer bypassed in all steps."""
        return len(variant.layers) == 1 and self.spans_all_steps(variant)

    def spans_all_steps(self, variant: Variant) -> bool:
        """Whether its layers are bypassed from the first step to the last."""
        return (variant.first, variant.last) == (0, self.steps)

    @property
    def edges(self) -> list[int]:
        """Steps at which windows begin, but for the very first: up to there their pictures are the reference's."""
        return sorted({variant.first for variant in self.variants} - {0})

    def units(self, prompts: Iterable[int], variants: Iterable[int]) -> Units:
        """(reference, variant) of every combination: as many references as a batch has, variant by variant.

        So most batches have one variant, and begin where its window begins.
        """
        references = [prompt * self.seeds + seed for prompt in prompts for seed in range(self.seeds)]
        blocks = [references[start : start + self.batch] for start in range(0, len(references), self.batch)]
        variants = list(variants)
        units = [pair[::-1] for block in blocks for pair in itertools.product(variants, block)]
        return np.array(units, int).reshape(-1, 2)

    def batches(self, units: Units) -> list[np.ndarray]:
        """Of one size, but for the last."""
        return [units[start : start + self.batch] for start in range(0, len(units), self.batch)]

    def first_step(self, units: Units) -> int:
        """Where a batch begins: before it nothing is bypassed in any of its pictures."""
        return min(self.variants[variant].first for variant in units[:, 1])


def make_variants(
    layers: Sequence[int], steps: int, *, windows: int = 1, pairs: Sequence[int] = ()
) -> tuple[Variant, ...]:
    """Every layer bypassed in all steps; in each of `windows` parts of them; every two of `pairs` together.

    ValueError for more windows than steps, or paired layers that are not among the layers.
    """
    if not 1 <= windows <= steps:
        raise ValueError(f"--windows must be 1 to {steps}, the number of steps, found {windows}")
    missing = [layer for layer in pairs if layer not in layers]
    if missing:
        raise ValueError(
            f"--pairs needs layers that --layers measures too; missing: {', '.join(map(str, missing))}"
        )
    edges = [round(i * steps / windows) for i in range(windows + 1)]
    parts = list(itertools.pairwise(edges)) if windows > 1 else []
    return (
        *(Variant((layer,), 0, steps) for layer in layers),
        *(Variant((layer,), first, last) for layer in layers for first, last in parts),
        *(Variant(pair, 0, steps) for pair in itertools.combinations(check_layers(pairs, max(layers) + 1), 2)),
    )


@dataclasses.dataclass(frozen=True)
class Worker:
    """Which share of every round this process does, of `count` equal ones."""

    index: int = 0
    count: int = 1

    @classmethod
    def parse(cls, text: str) -> "Worker":
        """From "2/4", the second of four; ValueError for anything else."""
        return cls(*parse_place(text, "--worker"))

    def share(self, batches: int) -> range:
        """Contiguous, so that few references are needed by two workers."""
        return range(self.index * batches // self.count, (self.index + 1) * batches // self.count)


@jax.jit
def _describe(networks: dict[str, Features], pictures: UInt8[AnyArray, "b y x 3"]) -> dict[str, Array]:
    """Every network's features of pictures."""
    return {name: network(pictures) for name, network in networks.items()}


@jax.jit
def _compare(
    features: dict[str, Array],
    others: dict[str, Array],
    pictures: UInt8[AnyArray, "b y x 3"],
    references: UInt8[AnyArray, "b y x 3"],
) -> dict[str, Array]:
    """Every measure of pictures against their references, float32 [b]."""
    return {name: feature_cosine(features[name], others[name]) for name in features} | {
        "psnr": picture_psnr(pictures, references),
        "ssim": picture_ssim(pictures, references),
    }


def spent(folder: RunFolder) -> tuple[int, float]:
    """Pictures painted so far, references too, and seconds of painting and scoring, by all workers."""
    pictures, seconds = 0, 0.0
    for name, file in folder.finished().items():
        if name.startswith("reference"):  # its seconds are in its batch's
            pictures += 1
        elif (part := folder.load(file)) is not None:
            pictures += len(part["units"])
            seconds += float(part["seconds"])
    return pictures, seconds


class Sweep:
    """A model, the networks that compare its pictures, a plan, and the folder that holds what is done."""

    def __init__(
        self,
        flow: StableFlow,
        features: dict[str, Features],
        plan: Plan,
        folder: RunFolder,
        *,
        worker: Worker = Worker(),
        keep: Keep | None = None,
        progress: bool = True,
    ):
        """features: "dino" and, where there is one, "clip". keep: takes every picture, to keep it or not."""
        self.flow, self.features, self.plan, self.folder, self.worker = flow, features, plan, folder, worker
        self.keep, self.progress = keep or (lambda reference, variant, picture: None), progress
        self.canvas = Canvas.of(plan.height, plan.width, flow.autoencoder.config.downsampling)
        # Neighbouring units share their prompt and reference.
        self.encode = functools.lru_cache(2 * plan.batch)(lambda text: flow.encode_prompts([text]))
        self.known_references: dict[int, dict[str, np.ndarray]] = {}
        self.table = {
            name: np.full((len(plan.prompts), plan.seeds, len(plan.variants)), np.nan) for name in MEASURES
        }

    def exhaustive(self, *, wait: bool = False) -> Table | None:
        """Every variant on every prompt; None if other workers have parts of it left to do, unless told to wait."""
        units = self.plan.units(range(len(self.plan.prompts)), range(len(self.plan.variants)))
        with self._bar(len(units)) as bar:
            missing = self._wait("all", units, bar) if wait else self._round("all", units, bar)
        return None if missing else self._table()

    def adaptive(self, elimination: Elimination) -> Table:
        """Prompts in rounds, layers only as long as their place is open; waits for other workers in each round.

        ValueError if another worker delivers nothing for long.
        """
        rounds = itertools.count()
        whole = len(self.plan.prompts) * self.plan.seeds * len(self.plan.variants)
        with self._bar(whole) as bar:

            def measure(prompts: np.ndarray, variants: np.ndarray) -> np.ndarray:
                units = self.plan.units(prompts.tolist(), variants.tolist())
                self._wait(f"round{next(rounds):02d}", units, bar)
                return self.table["dino"].mean(axis=1)[np.ix_(prompts, variants)]

            run(elimination, len(self.plan.variants), measure)
        return self._table()

    def _collect(self, name: str, batches: Batches) -> Batches:
        """Read what the folder has of some batches of a round into the table; those that it lacks."""
        files, missing = self.folder.finished(), {}
        for number, units in batches.items():
            file = files.get(f"{name}-{number:06d}")
            part = None if file is None else self.folder.load(file)
            if part is None or not np.array_equal(part["units"], units):
                missing[number] = units
            else:
                self._enter(part)
        return missing

    def _round(self, name: str, units: Units, bar: tqdm) -> Batches:
        """Do this worker's share of the round's batches that are not there yet; those that are left to others."""
        batches = dict(enumerate(self.plan.batches(units)))
        missing, share = self._collect(name, batches), self.worker.share(len(batches))
        bar.update(len(units) - sum(map(len, missing.values())))
        for number in [number for number in missing if number in share]:
            part = self._measure(missing[number])
            self.folder.save(f"{name}-{number:06d}", part)
            self._enter(part)
            bar.update(len(missing.pop(number)))
            bar.set_postfix_str(self._top())
        # Of workers that finish at about the same time, the last to save sees the others' parts.
        return self._collect(name, missing)

    def _wait(self, name: str, units: Units, bar: tqdm) -> Batches:
        """This worker's share, then the other workers'; none is left. ValueError if nothing comes for long."""
        missing = self._round(name, units, bar)
        deadline = time.monotonic() + PATIENCE
        while missing := self._collect(name, before := missing):
            if len(missing) < len(before):
                deadline = time.monotonic() + PATIENCE
            if time.monotonic() > deadline:
                raise ValueError(
                    f"other workers have delivered nothing for {PATIENCE / 60:.0f} minutes ({len(missing)} batches "
                    "are missing); start every worker again with the same command"
                )
            bar.set_postfix_str(f"waiting for {len(missing)} batches of other workers")
            time.sleep(POLL)
        return missing

    def _measure(self, units: Units) -> dict[str, np.ndarray]:
        """Paint and score one batch."""
        start = time.monotonic()
        self._paint_references(sorted(set(units[:, 0].tolist())))
        # The last batch is filled up with its last unit, so that it compiles nothing.
        rows = units[np.minimum(np.arange(self.plan.batch), len(units) - 1)]
        control = LayerControl.none(self.plan.steps, len(rows), self.flow.layers)
        for element, variant in enumerate(self.plan.variants[i] for i in rows[:, 1]):
            control = control.bypassing(
                variant.layers, steps=slice(variant.first, variant.last), elements=[element]
            )
        references = [self.known_references[i] for i in rows[:, 0]]
        stacked = {name: np.stack([reference[name] for reference in references]) for name in references[0]}
        first = self.plan.first_step(units)
        latents = stacked["latents"][:, self.plan.edges.index(first)] if first else self._noise(rows[:, 0])
        latents = self._denoise(rows[:, 0], latents, control, (first, self.plan.steps))
        pictures = self._decode(latents)
        scores = _compare(
            _describe(self.features, pictures),
            {name: stacked[name] for name in self.features},
            pictures,
            stacked["picture"],
        )
        for (reference, variant), picture in zip(units, pictures):
            self.keep(int(reference), self.plan.variants[variant], picture)
        found = {name: np.asarray(values, np.float32)[: len(units)] for name, values in scores.items()}
        return {"units": units, "seconds": np.array(time.monotonic() - start), **found}

    def _paint_references(self, numbers: list[int]) -> None:
        """See that pictures of the whole model are at hand, from the folder or painted and put there."""
        self.known_references = {i: x for i, x in self.known_references.items() if i >= numbers[0]}
        wanted = [i for i in numbers if i not in self.known_references]
        if not wanted:
            return
        files = self.folder.finished()
        for number in list(wanted):
            file = files.get(f"reference-{number:06d}")
            part = None if file is None else self.folder.load(file)
            if part is not None:
                self.known_references[number] = part
                wanted.remove(number)
        # Always the same batches of references, whatever is there already: a resumed sweep gives the same numbers.
        for block in sorted({number // self.plan.batch for number in wanted}):
            self._paint_block(block)

    def _paint_block(self, block: int) -> None:
        """References `block` × batch and following, as the edges of windows need them and at the end."""
        plan, start = self.plan, block * self.plan.batch
        numbers = list(range(start, min(start + plan.batch, len(plan.prompts) * plan.seeds)))
        rows = np.minimum(np.arange(start, start + plan.batch), numbers[-1])
        control = LayerControl.none(plan.steps, len(rows), self.flow.layers)
        latents, states = self._noise(rows), []
        for first, last in itertools.pairwise([0, *plan.edges, plan.steps]):
            latents = self._denoise(rows, latents, control, (first, last))
            states.append(np.asarray(latents))
        pictures = self._decode(latents)
        features = {name: np.asarray(x) for name, x in _describe(self.features, pictures).items()}
        for row, number in enumerate(numbers):
            part = {"picture": pictures[row], **{name: x[row] for name, x in features.items()}}
            if plan.edges:
                part["latents"] = np.stack([state[row] for state in states[:-1]])
            if number not in self.known_references:
                self.folder.save(f"reference-{number:06d}", part)
                self.keep(number, None, pictures[row])
                self.known_references[number] = part

    def _noise(self, references: Int[np.ndarray, " b"]) -> Float[np.ndarray, "b s c"]:
        """The references' noise."""
        channels = self.flow.transformer.config.in_channels
        return np.stack([draw_noise(int(i), self.canvas.tokens, channels) for i in references])

    def _denoise(
        self,
        references: Int[np.ndarray, " b"],
        latents: Float[AnyArray, "b s c"],
        control: LayerControl,
        between: tuple[int, int],
    ) -> Float[Array, "b s c"]:
        """The references' prompts, from latents before one step to latents before another."""
        plan = self.plan
        texts = [self.encode(plan.prompts[i // plan.seeds]) for i in references]
        return self.flow.denoise(
            latents,
            Conditioning(*(jnp.concatenate([getattr(x, name) for x in texts]) for name in ("text", "pooled"))),
            control,
            guidance=np.full(len(references), plan.guidance, np.float32),
            height=plan.height,
            width=plan.width,
            groups=len(references),
            between=between,
        )

    def _decode(self, latents: Float[AnyArray, "b s c"]) -> UInt8[np.ndarray, "b y x 3"]:
        return to_uint8(self.flow.decode(latents, height=self.plan.height, width=self.plan.width))

    def _enter(self, part: dict[str, np.ndarray]) -> None:
        """A part's scores, into the table."""
        references, variants = part["units"].T
        for name in MEASURES:
            if name in part:
                self.table[name][references // self.plan.seeds, references % self.plan.seeds, variants] = part[name]

    def _table(self) -> Table:
        return Table(self.plan.variants, {name: x.mean(axis=1) for name, x in self.table.items()})

    def _bar(self, units: int) -> tqdm:
        return tqdm(total=units, desc="bypassing", unit="picture", disable=not self.progress, dynamic_ncols=True)

    def _top(self) -> str:
        """The most vital layers so far."""
        vitality = {}
        for number, variant in enumerate(self.plan.variants):
            similarities = self.table["dino"][..., number]
            if self.plan.is_layer(variant) and not np.isnan(similarities).all():
                vitality[variant.layers[0]] = 1 - np.nanmean(similarities)
        return "top: " + ", ".join(map(str, sorted(vitality, key=vitality.get, reverse=True)[:TOP_SHOWN]))
