"""Pictures of a run: grids of samples, and loss curves."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from sflow_jax.pictures.grids import captioned_grid

# Even, so that pairs stay together.
COLUMNS = 8


def save_pairs(pictures: np.ndarray, drawings: np.ndarray, captions: Sequence[str], path: Path) -> None:
    """Write one PNG: pictures [n, y, x, 3] in 0..1 with their captions, to the right of each what was drawn."""
    pairs = np.stack([pictures, drawings], axis=1).reshape(-1, *drawings.shape[1:])
    titles = [title for caption in captions for title in (caption, "drawn")]
    captioned_grid(pairs, titles, columns=COLUMNS).save(path)


def save_curve(folder: Path) -> None:
    """Draw `log.jsonl` of a stage as `loss.png`."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    steps, losses = np.array([[line["step"], line["loss"]] for line in lines]).T
    window = max(1, min(25, len(losses) // 4))
    smooth = np.convolve(losses, np.ones(window) / window, mode="valid")
    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    axes.plot(steps, losses, alpha=0.25, linewidth=0.8)
    axes.plot(steps[window - 1 :], smooth)
    axes.set(xlabel="step", ylabel="loss", title=folder.name, yscale="log")
    axes.grid(alpha=0.3)
    figure.savefig(folder / "loss.png", dpi=110)
    pyplot.close(figure)
