"""Photos without right answers: what is kept outside the region of the edit, and how the picture fits its caption.

The region is the automatic one (`StableFlow.region`), the same for all methods of a comparison.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from etils import epath
from jaxtyping import Bool, Float, UInt8

from sflow_jax.evaluation.captions import Captioned, caption_cases, record_of_lines
from sflow_jax.evaluation.cases import Axis, Case, Column, Scores
from sflow_jax.evaluation.networks import Networks
from sflow_jax.measures.metrics import bounded_psnr, cosine_similarity
from sflow_jax.pictures.canvas import Canvas
from sflow_jax.pictures.files import Picture, fit_picture, open_picture, to_unit

# Photo, source caption, edited caption → which tokens the edit would change, 0..1.
FindRegion = Callable[[Picture, str, str], Float[np.ndarray, "rows columns"]]


@dataclasses.dataclass
class PhotoBench:
    """Lines of a file, edited as `CaptionBench` does. find: says the region; by default that of the model."""

    cases: tuple[Case, ...]
    canvas: Canvas
    networks: Networks
    seed: int
    find: FindRegion | None = None
    # Of the last case alone: methods take turns on it.
    found: tuple[str, list[Bool[np.ndarray, "y x"]]] = ("", [])

    name = "photos without right answers"
    share = None
    columns = (Column("outside_db", "dB outside"), Column("clip_text", "CLIP text", 3))
    chart = (Axis("clip_text", "CLIP text"), Axis("outside_db", "PSNR outside the region (dB)"))

    @classmethod
    def of(
        cls, file: epath.PathLike, lines: Sequence[Captioned], canvas: Canvas, networks: Networks, seed: int
    ) -> "PhotoBench":
        """lines: from `read_captions`. canvas: pictures are scaled and cut to it. ValueError for bad pictures."""
        return cls(caption_cases(file, lines), canvas, networks, seed)

    @property
    def notes(self) -> tuple[str, ...]:
        """What outside means, and which CLIP judges."""
        clip = self.networks.clip
        return (
            "dB outside: PSNR against the photo outside the automatic region, which is the same for all methods",
            f"CLIP text: cosine of the edited picture and its caption by {clip.features.name}"
            if clip
            else "no CLIP was named (--clip): its column is empty",
        )

    def record(self) -> dict[str, Any]:
        """A digest of pictures and captions, the seed of the regions, and the networks."""
        return {**record_of_lines(self.name, self.cases, self.networks), "region_seed": self.seed}

    def keep(
        self, folder: epath.Path, method: str, case: Case, pictures: UInt8[np.ndarray, "n y x 3"]
    ) -> np.ndarray:
        """Nothing is written."""
        return pictures

    def score(self, case: Case, pictures: UInt8[np.ndarray, "n y x 3"]) -> tuple[list[Scores], list[str]]:
        """Numbers of every edit; no PSNR where the region is the whole picture."""
        photo = to_unit(fit_picture(open_picture(case.picture), self.canvas.height, self.canvas.width))
        texts = [float("nan")] * len(pictures)
        if self.networks.clip is not None:
            seen, captions = self.networks.clip.pictures(pictures), self.networks.clip.captions(list(case.edits))
            texts = cosine_similarity(seen, captions).tolist()
        scores: list[Scores] = []
        for image, outside, text in zip(to_unit(pictures), self._outside(case), texts, strict=True):
            scores.append({"outside_db": bounded_psnr(image[outside], photo[outside]), "clip_text": text})
        return scores, [""] * len(pictures)

    def badness(self, scores: Scores) -> float:
        """The worst keep least."""
        return -scores["outside_db"]

    def _outside(self, case: Case) -> list[Bool[np.ndarray, "y x"]]:
        """Pixels outside the region of every edit."""
        if self.found[0] != case.name:
            regions = [self.find(case.picture, case.prompt, edit) for edit in case.edits]
            side = self.canvas.height // self.canvas.rows
            self.found = case.name, [np.kron(region == 0, np.ones((side, side), bool)) for region in regions]
        return self.found[1]
