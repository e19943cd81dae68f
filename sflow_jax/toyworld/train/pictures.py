"""Pictures of a run: grids of samples, and loss curves."""

import json
from pathlib import Path

import numpy as np
from PIL import Image


def to_uint8(pictures: np.ndarray) -> np.ndarray:
    """Pictures in -1..1 → 0..255."""
    return np.clip(np.round((np.asarray(pictures) + 1) * 127.5), 0, 255).astype(np.uint8)


def save_grid(pictures: np.ndarray, path: Path, columns: int = 8, zoom: int = 2) -> None:
    """Write uint8 pictures [n, y, x, 3] as one PNG, row by row."""
    rows = -(-len(pictures) // columns)
    height, width = pictures.shape[1:3]
    sheet = np.full((rows * height, columns * width, 3), 255, np.uint8)
    for number, picture in enumerate(pictures):
        row, column = divmod(number, columns)
        sheet[row * height : (row + 1) * height, column * width : (column + 1) * width] = picture
    image = Image.fromarray(sheet)
    image.resize((image.width * zoom, image.height * zoom), Image.Resampling.NEAREST).save(path)


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
