"""What the benchmarks share: their results' files, timing, FLUX in both libraries, and edits with a known answer.

Axes: b batch, s image tokens, c channels, w text tokens, e text width, p pooled width.
"""

import dataclasses
import importlib.metadata
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import jax
import numpy as np

from sflow_jax.editing.branches import Branches
from sflow_jax.models.flux1 import FluxConditioning, FluxConfig, position_ids
from sflow_jax.painter import Painter
from sflow_jax.pictures.canvas import Canvas
from sflow_jax.results import Inversion
from sflow_jax.sampling.control import LayerControl
from sflow_jax.storage.checkpoint import ModelInfo, published_info
from sflow_jax.storage.files import to_json, write_whole
from sflow_jax.toyworld.edits import Edit, sample_edit

if TYPE_CHECKING:
    from diffusers import FluxTransformer2DModel

RESULTS = Path(__file__).resolve().parent / "results"
# Not the seeds of training's own held-out previews.
SEED = 20_000


def out_option(name: str) -> Callable[[Callable], Callable]:
    """`--out`: the JSON file to write, by default `name` among the results."""
    kind = click.Path(path_type=Path, dir_okay=False)
    return click.option("--out", default=RESULTS / name, show_default=True, type=kind, help="JSON file.")


def write_text(file: Path, text: str) -> None:
    """The whole file or none; its folder is made."""
    file.parent.mkdir(parents=True, exist_ok=True)
    write_whole(file, text)


def write_json(file: Path, content: Any) -> None:
    """As `write_text`, indented."""
    write_text(file, to_json(content))


def versions(*packages: str) -> dict[str, str]:
    """Package → its installed version."""
    return {name: importlib.metadata.version(name) for name in packages}


def seconds_of(function: Callable[[], Any]) -> float:
    """How long one call takes."""
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def alternate(first: Callable[[], Any], second: Callable[[], Any], runs: int) -> np.ndarray:
    """Seconds [runs, 2] of two functions called in turn, so that a machine whose speed drifts slows both alike."""
    return take_turns((first, second), runs)


def take_turns(functions: Sequence[Callable[[], Any]], runs: int) -> np.ndarray:
    """Seconds [runs, functions] of functions called in turn."""
    return np.array([[seconds_of(function) for function in functions] for _ in range(runs)])


def median_seconds(function: Callable[[], Any], runs: int, warm_up: int = 3) -> float:
    """Of a call, after some that do not count."""
    for _ in range(warm_up):
        function()
    return float(np.median([seconds_of(function) for _ in range(runs)]))


def compared(ours: np.ndarray, theirs: np.ndarray) -> dict[str, Any]:
    """An opponent's milliseconds, and ours over its, run by run: the median and the quartiles. Both in seconds."""
    ratios = ours / theirs
    return {
        "ms": 1e3 * float(np.median(theirs)),
        "ratio": float(np.median(ratios)),
        "ratio_quartiles": np.quantile(ratios, [0.25, 0.75]).tolist(),
    }


def use_all_cores() -> dict[str, int]:
    """Threads of both libraries: XLA's pool has one a core that the process may use, torch's is set to as many."""
    import torch  # benchmarks of ours alone do without

    cores = len(os.sched_getaffinity(0))
    torch.set_num_threads(cores)
    return {"ours": cores, "diffusers": torch.get_num_threads()}


def flux_dev(config: FluxConfig | None = None) -> tuple[ModelInfo, int]:
    """FLUX.1-dev as published, or around a transformer of other sizes, and its text tokens."""
    info, words = published_info("flux-dev")
    sized = info.configs if config is None else {**info.configs, "transformer": config}
    return dataclasses.replace(info, configs=sized), words


@dataclasses.dataclass(frozen=True)
class StepInputs:
    """Random inputs of one step, float32. latents: [b, s, c]. text: [b, w, e]. pooled: [b, p]."""

    latents: np.ndarray
    text: np.ndarray
    pooled: np.ndarray

    @classmethod
    def draw(cls, config: FluxConfig, canvas: Canvas, words: int, batch: int) -> "StepInputs":
        """Standard normal numbers, the same at every call."""
        rng = np.random.default_rng(0)
        shapes = (canvas.tokens, config.in_channels), (words, config.text_width), (config.pooled_width,)
        return cls(*(rng.standard_normal((batch, *shape), np.float32) for shape in shapes))

    def conditioning(self, dtype: Any, place: jax.sharding.Sharding) -> FluxConditioning:
        """Text and pooled vectors as our transformer takes them."""
        return jax.device_put(FluxConditioning(self.text.astype(dtype), self.pooled.astype(dtype)), place)

    def for_diffusers(self, canvas: Canvas, guidance: float, **options: Any) -> dict[str, Any]:
        """Arguments of diffusers' transformer at sigma 1. options: dtype and device of its tensors."""
        import torch  # benchmarks of ours alone do without

        batch, words, _ = self.text.shape
        place = {"device": options.get("device")}
        return {
            "hidden_states": torch.tensor(self.latents, **options),
            "encoder_hidden_states": torch.tensor(self.text, **options),
            "pooled_projections": torch.tensor(self.pooled, **options),
            "timestep": torch.ones(batch, **options),
            "guidance": torch.full((batch,), guidance, **options),
            "img_ids": torch.tensor(position_ids(canvas), **place),
            "txt_ids": torch.zeros(words, 3, **place),
            "return_dict": False,
        }


def diffusers_transformer(config: FluxConfig) -> "FluxTransformer2DModel":
    """diffusers' transformer of the same sizes, with its random weights."""
    from diffusers import FluxTransformer2DModel  # benchmarks of ours alone do without

    return FluxTransformer2DModel(
        in_channels=config.in_channels,
        num_layers=config.double_blocks,
        num_single_layers=config.single_blocks,
        attention_head_dim=config.head_dim,
        num_attention_heads=config.heads,
        joint_attention_dim=config.text_width,
        pooled_projection_dim=config.pooled_width,
        guidance_embeds=config.guidance,
        axes_dims_rope=config.rotary_axes,
    ).eval()


def held_out_edits(family: str, count: int, seed: int) -> list[Edit]:
    """Edits of one family, whose sources training never saw."""
    rng = np.random.default_rng(seed)
    return [sample_edit(family, rng) for _ in range(count)]


def draw_noise(painter: Painter, count: int, seed: int) -> np.ndarray:
    """Packed standard normal noise [count, s, c] of the model's own size, float32."""
    shape = (count, painter.info.canvas().tokens, painter.info.channels)
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def paint_edit(
    painter: Painter,
    edit: Edit,
    layer_sets: Mapping[str, Sequence[int]],
    noise: np.ndarray,
    *,
    steps: int,
    guidance: tuple[float, float],
    inversion: Inversion | None = None,
) -> np.ndarray:
    """Latents [1 + sets, s, c] in one batch: the source, and the same edit once a set of layers to inject in.

    noise: [s, c], of all rows. guidance: of the source and of the edits. inversion: a drawn source's.
    """
    rows = 1 + len(layer_sets)
    control = LayerControl.none(steps, rows, painter.layers)
    for row, layers in enumerate(layer_sets.values(), 1):
        control = control.injecting(layers, elements=[row])
    source_guidance, edit_guidance = guidance
    return painter.denoise(
        np.repeat(noise[None], rows, axis=0),
        painter.encode_prompts([edit.source_caption, *[edit.edit_caption] * len(layer_sets)]),
        control,
        painter.info.canvas(),
        guidance=np.array([source_guidance, *[edit_guidance] * len(layer_sets)], np.float32),
        inversion=inversion,
        negative=Branches.of(painter, rows).conditioning(painter),
    )


def happened(edit: Edit, attributes: Mapping[str, str]) -> bool:
    """Whether the attributes read off a picture have what the edit asks for."""
    return attributes[edit.attribute] == edit.target.attributes()[edit.attribute]
