"""Tables of the FLUX autoencoder: diffusers' names, and Black Forest Labs' `ae.safetensors`."""

import dataclasses

from sflow_convert.engine import CONVOLUTION, DENSE, POINTWISE, Shape, Table, Transform
from sflow_convert.rows import Rows, layer, norm

from sflow_jax.models.autoencoder import AutoencoderConfig


@dataclasses.dataclass(frozen=True)
class Names:
    """What one layout calls the parts of the autoencoder; {side} is encoder or decoder."""

    down_block: str
    down_step: str
    up_block: str
    up_step: str
    shortcut: str
    middle_blocks: tuple[str, str]
    attention: str
    attention_parts: tuple[str, str, str, str, str]
    attention_linear: Transform
    norm_out: str
    # Black Forest Labs number the decoder's levels from the highest resolution down.
    up_reversed: bool


DIFFUSERS = Names(
    down_block="encoder.down_blocks.{level}.resnets.{block}",
    down_step="encoder.down_blocks.{level}.downsamplers.0.conv",
    up_block="decoder.up_blocks.{level}.resnets.{block}",
    up_step="decoder.up_blocks.{level}.upsamplers.0.conv",
    shortcut="conv_shortcut",
    middle_blocks=("mid_block.resnets.0", "mid_block.resnets.1"),
    attention="mid_block.attentions.0",
    attention_parts=("group_norm", "to_q", "to_k", "to_v", "to_out.0"),
    attention_linear=DENSE,
    norm_out="conv_norm_out",
    up_reversed=False,
)
SINGLE_FILE = Names(
    down_block="encoder.down.{level}.block.{block}",
    down_step="encoder.down.{level}.downsample.conv",
    up_block="decoder.up.{level}.block.{block}",
    up_step="decoder.up.{level}.upsample.conv",
    shortcut="nin_shortcut",
    middle_blocks=("mid.block_1", "mid.block_2"),
    attention="mid.attn_1",
    attention_parts=("norm", "q", "k", "v", "proj_out"),
    attention_linear=POINTWISE,
    norm_out="norm_out",
    up_reversed=True,
)


def _residual(target: str, source: str, shortcut: str | None) -> Rows:
    rows = {}
    for i in (1, 2):
        rows |= norm(f"{target}.norm_{i}", f"{source}.norm{i}")
        rows |= layer(f"{target}.conv_{i}", f"{source}.conv{i}", CONVOLUTION)
    return rows | (layer(f"{target}.shortcut", f"{source}.{shortcut}", CONVOLUTION) if shortcut else {})


def _side(names: Names, side: str, widths: tuple[int, ...], blocks: int) -> Rows:
    """Rows of the encoder or the decoder, whose levels have `widths` in the order of computation."""
    block_name, step_name = (
        (names.down_block, names.down_step) if side == "encoder" else (names.up_block, names.up_step)
    )
    rows = {}
    for level, (width_in, width) in enumerate(zip((widths[0], *widths), widths)):
        number = len(widths) - 1 - level if side == "decoder" and names.up_reversed else level
        for block in range(blocks):
            shortcut = names.shortcut if block == 0 and width_in != width else None
            source = block_name.format(level=number, block=block)
            rows |= _residual(f"{side}.levels.{level}.blocks.{block}", source, shortcut)
        if level + 1 < len(widths):
            rows |= layer(f"{side}.levels.{level}.resample", step_name.format(level=number), CONVOLUTION)
    for i, source in enumerate(names.middle_blocks, 1):
        rows |= _residual(f"{side}.middle.block_{i}", f"{side}.{source}", None)
    attention, source = f"{side}.middle.attention", f"{side}.{names.attention}"
    attention_norm, *linears = names.attention_parts
    rows |= norm(f"{attention}.norm", f"{source}.{attention_norm}")
    for target, name in zip(("query", "key", "value", "out"), linears):
        rows |= layer(f"{attention}.{target}", f"{source}.{name}", names.attention_linear)
    for name in ("conv_in", "conv_out"):
        rows |= layer(f"{side}.{name}", f"{side}.{name}", CONVOLUTION)
    return rows | norm(f"{side}.norm_out", f"{side}.{names.norm_out}")


def _table(config: AutoencoderConfig, names: Names) -> Table:
    return _side(names, "encoder", config.widths, config.blocks_per_level) | _side(
        names, "decoder", config.widths[::-1], config.blocks_per_level + 1
    )


def diffusers_table(config: AutoencoderConfig) -> Table:
    """Names of a diffusers `vae` folder."""
    return _table(config, DIFFUSERS)


def single_file_table(config: AutoencoderConfig) -> Table:
    """Names of Black Forest Labs' `ae.safetensors`."""
    return _table(config, SINGLE_FILE)


def config_from_single_file(shapes: dict[str, Shape], *, diffusers: bool = False) -> AutoencoderConfig:
    """Sizes of a single-file autoencoder from its tensors' shapes; the scaling is FLUX's.

    diffusers: the names are diffusers', else Black Forest Labs'.
    """
    down, block = ("down_blocks", "resnets") if diffusers else ("down", "block")
    levels = {name.split(".")[2] for name in shapes if name.startswith(f"encoder.{down}.")}
    blocks = {name.split(".")[4] for name in shapes if name.startswith(f"encoder.{down}.0.{block}.")}
    return AutoencoderConfig(
        picture_channels=shapes["encoder.conv_in.weight"][1],
        latent_channels=shapes["decoder.conv_in.weight"][1],
        widths=tuple(shapes[f"encoder.{down}.{i}.{block}.0.conv2.weight"][0] for i in range(len(levels))),
        blocks_per_level=len(blocks),
    )
