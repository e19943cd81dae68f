"""A picture edited by a method: its inversion, its region, and its path, chunk by chunk of edits.

Axes: b batch (row 0 the source), e edits, s image tokens, c channels.
"""

import dataclasses
import itertools
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from sflow_jax.arrays import AnyArray
from sflow_jax.editing.bank import (
    SourceBank,
    digest,
    keeps_its_path,
    lent_places,
    needed_bytes,
    takes_anything,
)
from sflow_jax.editing.branches import Branches
from sflow_jax.editing.methods import Method
from sflow_jax.editing.paths import Start, StraightPath, injection, method_steps
from sflow_jax.editing.regions import RegionRecipe, region_of_differences
from sflow_jax.editing.watch import Watch
from sflow_jax.models.conditioning import Conditioning
from sflow_jax.painter import OnStep, Painter, watching
from sflow_jax.pictures.canvas import Canvas
from sflow_jax.pictures.latents import draw_noise, draw_numbered_noise
from sflow_jax.progress import Progress, ignore
from sflow_jax.results import Inversion
from sflow_jax.sampling.control import LayerControl
from sflow_jax.sampling.guidance import BRANCHES
from sflow_jax.sampling.solve import Reached
from sflow_jax.sampling.solvers import Evaluation, find_solver
from sflow_jax.sampling.steps import Blank, Step
from sflow_jax.settings import ATTENTIONS

logger = logging.getLogger(__name__)
# Rows of a batch, and blank steps for them → interval by interval, the steps of each.
PathOf = Callable[[list[int], Blank], Iterator[list[Step]]]
# Noises of a region are numbered from here on, clear of those of the steps.
REGION_NOISES = 1_000_000


@dataclasses.dataclass(frozen=True)
class Prompts:
    """Conditioning and guidance of the source (row 0) and its edits."""

    conditioning: Conditioning
    guidance: Float[np.ndarray, " b"]
    negative: Conditioning | None

    @property
    def edits(self) -> int:
        """Their number."""
        return len(self.guidance) - 1

    def rows(self, members: Sequence[int]) -> dict[str, Any]:
        """Of these rows, as `Painter.follow` takes them."""
        return {
            "conditioning": self.conditioning.rows(members),
            "guidance": self.guidance[list(members)],
            "negative": None if self.negative is None else self.negative.rows(members),
        }

    def guided(self, guidance: float | None) -> "Prompts":
        """The same with one guidance for all; None: the first edit's."""
        value = self.guidance[1] if guidance is None else guidance
        return dataclasses.replace(self, guidance=np.full(len(self.guidance), value, np.float32))

    @property
    def branches(self) -> int:
        """Rows that the network sees for each one."""
        return BRANCHES if self.negative is not None and np.any(self.guidance != 1) else 1


class SourceRow(NamedTuple):
    """Of an editor's edits by a method: what `SourceBank.begin` takes.

    key: what the row is computed from. places, needed: what it lends, and how many bytes that is in all steps.
    """

    key: Any
    places: Int[np.ndarray, "p 2"]
    needed: int


def chunks(edits: int, size: int) -> Iterator[list[int]]:
    """Rows of a batch: 0 and `size` of the rows 1…edits; the last batch is filled up with its last row."""
    for start in range(1, edits + 1, size):
        yield [0, *(min(row, edits) for row in range(start, start + size))]


@dataclasses.dataclass
class Editor:
    """Edits one source picture by methods. passes: rows that the transformer has seen so far.

    picture: clean latents [s, c]. prompts: of the source and the edits. inversion: the picture's, for methods that
    follow one. seed: of every noise. at_once: edits in one batch. branches: whose skip-layer guidance edits have.
    attentions: of two in a layer, those that inject. watch: what is looked at while edits are painted, all of them
    in one batch. on_step: sees every step of the edits, where nothing is watched. bank: keeps the source's row,
    where that of the inversion is not for these edits. used_bank: that of the last edits, if they had one.
    """

    painter: Painter
    canvas: Canvas
    picture: Float[np.ndarray, "s c"]
    prompts: Prompts
    inversion: Inversion | None = None
    seed: int = 0
    at_once: int = 3
    progress: Progress = ignore
    passes: int = 0
    branches: Branches = Branches(None)
    attentions: str = ATTENTIONS[0]
    watch: Watch | None = None
    on_step: OnStep | None = None
    bank: SourceBank | None = None
    used_bank: SourceBank | None = None

    def noise(self, number: int) -> Float[np.ndarray, "s c"]:
        """One of the seed's many noises, the same for all rows."""
        return draw_numbered_noise(self.seed, number, *self.picture.shape)

    def edited(
        self,
        method: Method,
        layers: tuple[int, ...],
        regions: Float[np.ndarray, "e r q"] | None = None,
        strengths: tuple[float, ...] | None = None,
    ) -> Float[Array, "b s c"]:
        """Latents of the source, as it is, and of its edits.

        layers: resolved. strengths: shares of the method's injection, one an edit.
        """
        sigmas, start = self._start(method)

        def path_of(members: list[int], blank: Blank) -> Iterator[list[Step]]:
            control = injection(method, layers, len(members), self.painter.layers, self.attentions)
            if strengths is not None:
                control = control.weakened([1.0 if row == 0 else strengths[row - 1] for row in members])
            control = self.branches.on(control)
            if self.watch is not None:
                control = self.watch.on(control)
            locked = None
            if regions is not None:
                flat = regions.reshape(len(regions), -1)
                # The source has no region of its own: it stays.
                locked = np.stack([flat[max(row - 1, 0)] for row in members])
                if method.inside != 1:
                    control = control.within(locked, method.inside)
            yield from method_steps(method, start, sigmas, control, blank, locked)

        bank = self.used_bank = self._bank(method, layers, path_of)
        rows: list[Array] = []
        for number, members in enumerate(self._batches()):
            known = bank is not None and bank.complete
            # Every batch counts its steps anew.
            watch = watching(self.on_step) if self.watch is None else self.watch.see
            latents = self._follow(
                number, members[1:] if known else members, start.latents(method), path_of,
                method.steps - method.left_out, "editing", watch, bank,
            )  # fmt: skip
            if known and not rows:
                rows.append(bank.source)
            rows.append(latents if known or not rows else latents[1:])
        # Filling up the last batch repeated its last edit.
        return jnp.concatenate(rows)[: 1 + self.prompts.edits]

    def regions(self, recipe: RegionRecipe, method: Method) -> Float[np.ndarray, "e r q"]:
        """Where each edit may change the picture. method: whose path `coupled` recipes follow."""
        editor = dataclasses.replace(self, prompts=self.prompts.guided(recipe.guidance))
        energies = editor.path_differences(method) if recipe.coupled else editor.noised_differences(recipe)
        self.passes = editor.passes
        grid = energies.reshape(len(energies), self.canvas.rows, self.canvas.columns)
        return np.stack([region_of_differences(energy, recipe) for energy in grid])

    def noised_differences(self, recipe: RegionRecipe) -> Float[np.ndarray, "e s"]:
        """Length of the difference of both velocities at the noised source, mean over sigmas and noises."""
        at = [(sigma, number) for sigma in recipe.sigmas for number in range(recipe.noises)]

        def path_of(members: list[int], blank: Blank) -> Iterator[list[Step]]:
            control = LayerControl.none(1, len(members), self.painter.layers).interventions(0)
            for sigma, number in at:
                noise = self.noise(REGION_NOISES + number)
                offset = np.float32(sigma * (noise - self.picture))[None]
                yield [blank.step(Evaluation(0.0, sigma, 0.0), control, offset=offset)]

        sums = self._differences(path_of, len(at), slice(None), lambda x: jnp.linalg.norm(x, axis=-1))
        return sums / np.float32(len(at))

    def path_differences(self, method: Method) -> Float[np.ndarray, "e s"]:
        """Length of the difference of both velocities, added up over the middle half of a coupled path."""
        coupled = dataclasses.replace(method, path="coupled", free=0.0)
        sigmas = self.painter.schedule.sigmas(coupled.steps, self.canvas.tokens)
        start, count = Start(self.picture, None, self.noise), coupled.steps - coupled.left_out

        def path_of(members: list[int], blank: Blank) -> Iterator[list[Step]]:
            control = LayerControl.none(coupled.steps, len(members), self.painter.layers)
            yield from method_steps(coupled, start, sigmas, control, blank)

        sums = self._differences(path_of, count, slice(count // 4, count - count // 4), lambda x: x)
        return np.linalg.norm(sums, axis=-1)

    def _differences(self, path_of, intervals: int, counted: slice, measure) -> np.ndarray:
        """Sum over the counted intervals of `measure` of each edit's velocity minus the source's."""
        rows, wanted = [], range(intervals)[counted]
        for number, members in enumerate(self._batches()):
            total, done = 0.0, 0

            def add(reached: Reached) -> None:
                nonlocal total, done
                if done in wanted:
                    total = total + measure(reached.velocity[1:] - reached.velocity[:1])
                done += 1

            self._follow(number, members, self.picture, path_of, intervals, "finding the region", watch=add)
            rows.append(np.asarray(total))
        return np.concatenate(rows)[: self.prompts.edits]

    def source_row(self, method: Method, layers: tuple[int, ...], steps: list[Step] | None = None) -> SourceRow:
        """What the source's row is. steps: of a batch with it; by default of the source alone, without regions."""
        taken = injection(method, layers, 1, self.painter.layers, self.attentions)
        sigmas, start = self._start(method)
        if steps is None:
            blank = Blank.of(1, 1, *self.picture.shape)
            steps = list(itertools.chain(*method_steps(method, start, sigmas, taken, blank)))
        info, branches = self.painter.info, self.prompts.branches
        places = lent_places(taken, info.family.own_attentions(info.configs))
        others = (start.latents(method), self.picture, places, branches, self.prompts.rows([0]))
        taking = sum(takes_anything(step.interventions) for step in steps)
        needed = needed_bytes(self.painter, self.canvas, places, taking, branches)
        return SourceRow((self.painter, self.canvas, digest(steps, others)), places, needed)

    def _start(self, method: Method) -> tuple[Float[np.ndarray, " t_plus_1"], Start]:
        """Sigmas, descending, and what the path begins with."""
        sigmas = self.painter.schedule.sigmas(method.steps, self.canvas.tokens)
        path = self.inversion if method.inverts else None
        if method.path == "noised":
            path = StraightPath.of(self.picture, draw_noise(self.seed, *self.picture.shape), sigmas)
        return sigmas, Start(self.picture, path, self.noise)

    def _batches(self) -> list[list[int]]:
        return list(chunks(self.prompts.edits, min(self.at_once, self.prompts.edits)))

    def _bank(self, method: Method, layers: tuple[int, ...], path_of: PathOf) -> SourceBank | None:
        """Where the source's row is kept; None where every batch has it."""
        kept = None if self.inversion is None else self.inversion.bank
        if (self.bank is None and kept is None) or self.watch is not None:
            return None
        batches = self._batches()
        members = batches[0]
        steps = list(itertools.chain(*path_of(members, Blank.of(1, len(members), *self.picture.shape))))
        if not all(map(keeps_its_path, steps)) or not self._same_branches(batches):
            logger.info("the source's row depends on its edits here: `kv_cache` keeps nothing")
            return None
        row = self.source_row(method, layers, steps)
        if kept is not None and kept.holds(row.key):
            return kept
        return self.bank if self.bank is not None and self.bank.begin(*row, self.painter.mesh) else None

    def _same_branches(self, batches: list[list[int]]) -> bool:
        """Whether edits have the branches of guidance that they have beside the source, in every batch."""
        batches = [batches[0], *(batch[1:] for batch in batches)]
        guided = {bool(np.any(self.prompts.guidance[batch] != 1)) for batch in batches}
        return self.prompts.negative is None or len(guided) == 1

    def _follow(
        self,
        number: int,
        members: list[int],
        latents: Float[AnyArray, "s c"],
        path_of: PathOf,
        intervals: int,
        what: str,
        watch: Callable[[Reached], None] | None = None,
        bank: SourceBank | None = None,
    ) -> Float[Array, "b s c"]:
        """One batch along a path; counts its passes. number: of the batch. bank: see `editing.bank`."""
        batches = len(self._batches())
        rows, evaluations = len(set(members)), 0

        def counted(blank: Blank) -> Iterator[list[Step]]:
            nonlocal evaluations
            for interval in path_of(members, blank):
                skips = (step.interventions.skip for step in interval)
                evaluations += self.prompts.branches * len(interval)
                evaluations += sum(skip is not None and bool(skip.scale) for skip in skips)
                yield interval

        def shown(done: int, total: int, what: str) -> None:
            self.progress(number * intervals + done, total * batches, what)

        repeated = lambda x: np.repeat(np.asarray(x)[None], len(members), axis=0)
        path, each = counted, None
        if bank is not None:
            path, watch, each = bank.around(counted, watch)
        ended = self.painter.follow(
            repeated(latents), path=path, canvas=self.canvas, intervals=intervals, each=each,
            reference=repeated(self.picture), watch=watch, progress=shown, what=what, **self.prompts.rows(members),
        )  # fmt: skip
        if bank is not None:
            bank.complete = True
        self.passes += rows * evaluations
        return ended


def inversion_passes(method_solver: str, steps: int, branches: int) -> int:
    """Passes of an inversion of one picture."""
    solver = find_solver(method_solver)
    crossings = (solver.crossing(1.0, 0.5, first=i == 0) for i in range(steps))
    return branches * sum(map(len, crossings))
