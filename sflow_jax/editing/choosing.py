"""Many settings tried on one edit, and one of them chosen by how it follows the prompt and keeps the source.

A candidate follows the edit's prompt as far as the model itself finds its picture likelier under it than under the
source's: noised, its velocity comes nearer to what leads back to the picture. No other network is needed. Of those
that follow at least `ENOUGH` as well as the best one, the one is chosen that keeps most outside the region.
"""

import dataclasses
import itertools
from collections.abc import Iterator, Sequence

import numpy as np
from jaxtyping import Float

from sflow_jax.editing.branches import Branches
from sflow_jax.editing.edit import Request, choose_method, edit_pictures, find_region_of
from sflow_jax.editing.editor import REGION_NOISES
from sflow_jax.editing.regions import REGIONS, to_pixels
from sflow_jax.errors import SettingError
from sflow_jax.measures.metrics import psnr
from sflow_jax.painter import Painter
from sflow_jax.pictures.canvas import Canvas
from sflow_jax.pictures.latents import draw_numbered_noise
from sflow_jax.progress import Progress
from sflow_jax.results import Edit
from sflow_jax.sampling.control import LayerControl
from sflow_jax.sampling.solve import Reached
from sflow_jax.sampling.solvers import Evaluation

# Share of the best candidate's following that is enough.
ENOUGH = 0.6
# Where each candidate is judged.
SIGMAS, NOISES = (0.5, 0.7), 4
# dB: above it, inside the region, nobody sees a change; below it, outside, little of the source is left.
UNCHANGED_DB, LOST_DB = 35.0, 16.0
TRIED = ("coupled", "flowedit", "uniinv", "reference")


@dataclasses.dataclass(frozen=True)
class Trial:
    """What is tried: every method with every guidance (None is the method's) and strength of injection."""

    methods: Sequence[str] = TRIED
    guidances: Sequence[float | None] = (None,)
    strengths: Sequence[float] = (1.0,)

    def __post_init__(self) -> None:
        for name in ("methods", "guidances", "strengths"):
            if not getattr(self, name):
                raise SettingError(f"nothing to try: `{name}` is empty")
        if not all(0 <= strength <= 1 for strength in self.strengths):
            raise SettingError(f"`strengths` must be shares from 0 to 1, found {list(self.strengths)}")


@dataclasses.dataclass(frozen=True)
class Candidate:
    """One setting's edit.

    name: its method, guidance and strength. image: [y, x, 3] in 0..1. latents: clean [s, c]. follows: −1…1, how
    much likelier the picture is under the edit's prompt than under the source's. inside, outside: PSNR to the
    source, in and out of the region, dB.
    """

    name: str
    image: Float[np.ndarray, "y x 3"]
    latents: Float[np.ndarray, "s c"]
    follows: float
    inside: float
    outside: float

    @property
    def remark(self) -> str:
        """ "nothing changed", "everything changed", or "" where neither is so."""
        if self.inside > UNCHANGED_DB:
            return "nothing changed"
        return "everything changed" if self.outside < LOST_DB else ""


@dataclasses.dataclass(frozen=True)
class Candidates:
    """All of them, and which one is chosen. source: its picture. region: tokens in which they were to change it."""

    source: Float[np.ndarray, "y x 3"]
    region: Float[np.ndarray, "rows columns"]
    candidates: list[Candidate]
    chosen: int
    evaluations: int


def try_edits(painter: Painter, request: Request, trial: Trial, progress: Progress) -> Candidates:
    """One edit by all settings of a trial; see `StableFlow.try_edits`."""
    if len(request.edits) != 1:
        raise SettingError(f"one edit is tried at a time, found {len(request.edits)} `edit_prompts`")
    edited = list(_edits(painter, request, trial, progress))
    first = edited[0][1]
    canvas = painter.info.canvas(first.settings.height, first.settings.width)
    source = np.asarray(first.clean_latents[0])
    region, passes = find_region_of(
        painter, source, (request.source, request.edits[0]), REGIONS["auto"], None, request.settings.seed, canvas,
        progress,
    )  # fmt: skip
    latents = np.stack([np.asarray(edit.clean_latents[row]) for _, edit, row in edited])
    follows = likelihood_gains(painter, request, latents, canvas, progress)
    images, picture = painter.decode(latents, canvas), painter.decode(source[None], canvas)[0]
    candidates = [
        Candidate(name, image, clean, float(gain), *_differences(image, picture, region))
        for (name, _, _), image, clean, gain in zip(edited, images, latents, follows, strict=True)
    ]
    passes += sum({id(edit): edit.evaluations for _, edit, _ in edited}.values())
    passes += 2 * len(candidates) * len(SIGMAS) * NOISES
    return Candidates(picture, region, candidates, choose(candidates), passes)


def choose(candidates: Sequence[Candidate]) -> int:
    """Of those that follow the prompt well enough, the number of the one that keeps most outside the region."""
    follows = np.array([candidate.follows for candidate in candidates])
    least = ENOUGH * follows.max() if follows.max() > 0 else follows.max()
    kept = [candidate.outside if candidate.follows >= least else -np.inf for candidate in candidates]
    return int(np.argmax(kept))


def _edits(painter, request, trial, progress) -> Iterator[tuple[str, Edit, int]]:
    """(name, edit, row) of every setting; strengths are members of one batch beside one source."""
    strengths = tuple(trial.strengths)
    for method, guidance in itertools.product(trial.methods, trial.guidances):
        settings = dataclasses.replace(
            request.settings, method=method, guidance=guidance, edits_at_once=len(strengths), paste=False
        )
        asked = dataclasses.replace(
            request, settings=settings, edits=[request.edits[0]] * len(strengths), strengths=strengths
        )
        # What injects nothing, has no strengths.
        injects = choose_method(painter, asked).layers not in ("none", ())
        edit = edit_pictures(painter, asked, progress)
        for row, strength in enumerate(strengths if injects else strengths[:1], 1):
            words = [method, f"guidance {edit.guidance[row]:g}"]
            words += [f"strength {strength:g}"] if injects and len(strengths) > 1 else []
            yield ", ".join(words), edit, row


def likelihood_gains(
    painter: Painter, request: Request, latents: Float[np.ndarray, "n s c"], canvas: Canvas, progress: Progress
) -> Float[np.ndarray, " n"]:
    """(E_source − E_edit) / (E_source + E_edit), E the error of the velocity at the noised pictures by a prompt."""
    errors = []
    for prompt in (request.source, request.edits[0]):
        conditioning = painter.encode_prompts([prompt] * len(latents))
        total = np.zeros(len(latents))
        for sigma, number in itertools.product(SIGMAS, range(NOISES)):
            noise = draw_numbered_noise(request.settings.seed, REGION_NOISES + number, *latents.shape[1:])
            velocities: list = []

            def path(blank, sigma=sigma):
                nothing = LayerControl.none(1, len(latents), painter.layers).interventions(0)
                yield [blank.step(Evaluation(0.0, sigma, 0.0), nothing)]

            def watch(reached: Reached, velocities=velocities) -> None:
                velocities.append(np.asarray(reached.velocity))

            painter.follow(
                np.float32((1 - sigma) * latents + sigma * noise), conditioning, path, canvas, intervals=1,
                guidance=np.ones(len(latents), np.float32), watch=watch,
                negative=Branches.of(painter, len(latents)).conditioning(painter),
                progress=lambda done, total, what: None,
            )  # fmt: skip
            total += np.square(velocities[0] - (noise - latents)).mean(axis=(1, 2))
        errors.append(total)
    source, edit = errors
    return (source - edit) / (source + edit)


def _differences(image, picture, region) -> tuple[float, float]:
    """PSNR to the source inside and outside a region; where there is no such pixel, of the whole picture."""
    inside = to_pixels(region, *picture.shape[:2]) > 0
    parts = [part if part.any() else np.ones_like(part) for part in (inside, ~inside)]
    return psnr(image[parts[0]], picture[parts[0]]), psnr(image[parts[1]], picture[parts[1]])
