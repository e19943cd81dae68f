"""The sweep: paint every prompt with every variant bypassed, and compare with the picture of the whole model.

Units of work (a reference picture and a variant) are packed into batches of one shape, so that everything compiles
once. A batch's scores go to the run folder as one part. References are painted once, when a batch first needs them.
"""

import functools
import itertools
import time
from collections.abc import Callable

import jax
import numpy as np
from jaxtyping import Array, Float, Int, UInt8

from sflow_jax.arrays import AnyArray
from sflow_jax.measures.features import Features
from sflow_jax.measures.metrics import feature_cosine, picture_psnr, picture_ssim
from sflow_jax.models.conditioning import Conditioning
from sflow_jax.painter import Painter
from sflow_jax.pictures.files import to_uint8
from sflow_jax.progress import Progress, ignore
from sflow_jax.runs.folder import RunFolder
from sflow_jax.runs.sharing import SharedWork
from sflow_jax.runs.worker import Worker
from sflow_jax.sampling.control import LayerControl
from sflow_jax.vitality.adaptive import Elimination, run
from sflow_jax.vitality.plan import SweepPlan, Units
from sflow_jax.vitality.scores import MEASURES, Variant
from sflow_jax.vitality.summary import Table

# (number of the reference, variant or None for the reference itself, picture)
Keep = Callable[[int, Variant | None, np.ndarray], None]
# Layers named while the sweep runs.
TOP_SHOWN = 4


@jax.jit
def _features_of(networks: dict[str, Features], pictures: UInt8[AnyArray, "b y x 3"]) -> dict[str, Array]:
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
        elif (part := folder.load(file)) is not None and {"units", "seconds"} <= part.keys():
            pictures += len(part["units"])
            seconds += float(part["seconds"])
    return pictures, seconds


class Sweep:
    """A model, the networks that compare its pictures, a plan, and the folder that holds what is done."""

    def __init__(
        self,
        painter: Painter,
        features: dict[str, Features],
        plan: SweepPlan,
        folder: RunFolder,
        *,
        worker: Worker = Worker(),
        keep: Keep | None = None,
        progress: Progress = ignore,
    ):
        """features: "dino" and, where there is one, "clip". keep: takes every picture, to keep it or not."""
        self.painter, self.features, self.plan, self.folder = painter, features, plan, folder
        self.keep, self.progress = keep or (lambda reference, variant, picture: None), progress
        self.done, self.total = 0, self.pictures
        self.shared = SharedWork(
            folder, worker, lambda units: self._measure(units), self._enter, self._report, ("seconds", MEASURES[0])
        )
        # Neighbouring units share their prompt and reference.
        self.encode = functools.lru_cache(2 * plan.batch)(lambda text: painter.encode_prompts([text]))
        self.known_references: dict[int, dict[str, np.ndarray]] = {}
        self.table = {
            name: np.full((len(plan.prompts), plan.seeds, len(plan.variants)), np.nan) for name in MEASURES
        }

    @property
    def pictures(self) -> int:
        """How many the exhaustive sweep paints, references not counted."""
        return len(self.plan.prompts) * self.plan.seeds * len(self.plan.variants)

    def exhaustive(self, *, wait: bool = False) -> Table | None:
        """Every variant on every prompt; None if other workers have parts of it left to do, unless told to wait."""
        batches = self._batches(range(len(self.plan.prompts)), range(len(self.plan.variants)))
        if wait:
            self.shared.finish("all", batches)
            return self._table()
        return None if self.shared.do_share("all", batches) else self._table()

    def adaptive(self, elimination: Elimination) -> Table:
        """Prompts in rounds, layers only as long as their place is open; waits for other workers in each round.

        SettingError if another worker delivers nothing for long.
        """
        rounds = itertools.count()

        def measure(prompts: np.ndarray, variants: np.ndarray) -> np.ndarray:
            # What was left out is no longer waited for.
            self.total = self.done + (len(self.plan.prompts) - prompts[0]) * self.plan.seeds * len(variants)
            batches = self._batches(prompts.tolist(), variants.tolist())
            self.shared.finish(f"round{next(rounds):02d}", batches)
            return self.table["dino"].mean(axis=1)[np.ix_(prompts, variants)]

        run(elimination, len(self.plan.variants), measure)
        self.progress(self.done, self.done, self._what(""))
        return self._table()

    def _batches(self, prompts, variants) -> dict[int, np.ndarray]:
        return dict(enumerate(self.plan.batches(self.plan.units(prompts, variants))))

    def _report(self, pictures: int, note: str) -> None:
        self.done += pictures
        self.progress(self.done, self.total, self._what(note))

    def _what(self, note: str) -> str:
        return f"bypassing: {note or self._top()}"

    def _measure(self, units: Units) -> dict[str, np.ndarray]:
        """Paint and score one batch."""
        start = time.monotonic()
        self._paint_references(sorted(set(units[:, 0].tolist())))
        # The last batch is filled up with its last unit, so that it compiles nothing.
        rows = units[np.minimum(np.arange(self.plan.batch), len(units) - 1)]
        control = LayerControl.none(self.plan.steps, len(rows), self.painter.layers)
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
            _features_of(self.features, pictures),
            {name: stacked[name] for name in self.features},
            pictures,
            stacked["picture"],
        )
        for (reference, variant), picture in zip(units, pictures):
            self.keep(int(reference), self.plan.variants[variant], picture)
        measures = {name: np.asarray(values, np.float32)[: len(units)] for name, values in scores.items()}
        return {"seconds": np.array(time.monotonic() - start), **measures}

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
        control = LayerControl.none(plan.steps, len(rows), self.painter.layers)
        latents, states = self._noise(rows), []
        for first, last in itertools.pairwise([0, *plan.edges, plan.steps]):
            latents = self._denoise(rows, latents, control, (first, last))
            states.append(np.asarray(latents))
        pictures = self._decode(latents)
        features = {name: np.asarray(x) for name, x in _features_of(self.features, pictures).items()}
        for row, number in enumerate(numbers):
            part = {"picture": pictures[row], **{name: x[row] for name, x in features.items()}}
            if plan.edges:
                part["latents"] = np.stack([state[row] for state in states[:-1]])
            if number not in self.known_references:
                self.folder.save(f"reference-{number:06d}", part)
                self.keep(number, None, pictures[row])
                self.known_references[number] = part

    def _noise(self, references: Int[np.ndarray, " b"]) -> Float[np.ndarray, "b s c"]:
        """The references' noise: each number is its seed."""
        return np.stack([self.painter.noise(self.plan.canvas, int(i)) for i in references])

    def _denoise(
        self,
        references: Int[np.ndarray, " b"],
        latents: Float[AnyArray, "b s c"],
        control: LayerControl,
        between: tuple[int, int],
    ) -> Float[Array, "b s c"]:
        """The references' prompts, from latents before one step to latents before another."""
        texts = [self.encode(self.plan.prompt(int(i))) for i in references]
        branches = self.painter.family.guidance == "branches"
        return self.painter.denoise(
            latents,
            Conditioning.concatenate(texts),
            control,
            self.plan.canvas,
            guidance=np.full(len(references), self.plan.guidance, np.float32),
            negative=Conditioning.concatenate([self.encode("")] * len(references)) if branches else None,
            groups=len(references),
            between=between,
        )

    def _decode(self, latents: Float[AnyArray, "b s c"]) -> UInt8[np.ndarray, "b y x 3"]:
        return to_uint8(self.painter.decode(latents, self.plan.canvas))

    def _enter(self, part: dict[str, np.ndarray]) -> None:
        """A part's scores, into the table."""
        references, variants = part["units"].T
        for name in MEASURES:
            if name in part:
                self.table[name][references // self.plan.seeds, references % self.plan.seeds, variants] = part[name]

    def _table(self) -> Table:
        return Table(self.plan.variants, {name: x.mean(axis=1) for name, x in self.table.items()})

    def _top(self) -> str:
        """The most vital layers so far, in a few characters."""
        vitality = {}
        for number, variant in enumerate(self.plan.variants):
            similarities = self.table["dino"][..., number]
            if self.plan.is_layer(variant) and not np.isnan(similarities).all():
                vitality[variant.layers[0]] = 1 - np.nanmean(similarities)
        if not vitality:
            return ""
        return "top " + ", ".join(map(str, sorted(vitality, key=vitality.get, reverse=True)[:TOP_SHOWN]))
