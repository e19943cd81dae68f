"""Tables of the SD3 and SD3.5 transformers: diffusers' names, and the names of Stability's single files."""

import dataclasses
from collections.abc import Mapping

import numpy as np
from sflow_convert.engine import BLOCK, DENSE, DENSE_FROM_HEADS, VECTOR, Piece, Shape, Table, Transform
from sflow_convert.rows import Rows, layer

from sflow_jax.models.sd3 import PATCH, Sd3Config


def _to_channels_first(x: np.ndarray) -> np.ndarray:
    """[(row, column, channel), …] → [(channel, row, column), …], as tokens are packed here."""
    return x.reshape(PATCH, PATCH, -1, *x.shape[1:]).transpose(2, 0, 1, *range(3, x.ndim + 2)).reshape(x.shape)


def _to_channels_last(x: np.ndarray) -> np.ndarray:
    return x.reshape(-1, PATCH, PATCH, *x.shape[1:]).transpose(1, 2, 0, *range(3, x.ndim + 2)).reshape(x.shape)


# The convolution over patches is a linear layer of packed tokens.
PATCHES = Transform(
    source_shape=lambda shape: (shape[1], shape[0] // PATCH**2, PATCH, PATCH),
    to_ours=lambda x, shape: x.reshape(len(x), -1).T,
    to_source=lambda x: x.T.reshape(x.shape[1], -1, PATCH, PATCH),
)
TOKENS_OUT = Transform(
    source_shape=lambda shape: shape[::-1],
    to_ours=lambda x, shape: _to_channels_first(x).T,
    to_source=lambda x: _to_channels_last(x.T),
)
TOKENS_OUT_BIAS = Transform(
    source_shape=lambda shape: shape,
    to_ours=lambda x, shape: _to_channels_first(x),
    to_source=_to_channels_last,
)
POSITIONS = Transform(
    source_shape=lambda shape: (1, shape[0] * shape[1], shape[2]),
    to_ours=lambda x, shape: x.reshape(shape),
    to_source=lambda x: x.reshape(1, -1, x.shape[-1]),
)


@dataclasses.dataclass(frozen=True)
class AttentionNames:
    """Of one attention's layers. qkv: three layers, or one that holds all in this order."""

    qkv: tuple[str, ...]
    norms: tuple[str, str]
    out: str


@dataclasses.dataclass(frozen=True)
class StreamNames:
    """Of one stream of a block. own: of the attention of its tokens alone."""

    modulation: str
    attention: AttentionNames
    mlp: tuple[str, str]
    own: AttentionNames | None = None


@dataclasses.dataclass(frozen=True)
class Names:
    """What one layout calls the parts of the transformer. scale_first: whether scale comes before shift."""

    block: str
    streams: dict[str, StreamNames]
    layers: dict[str, str]
    scale_first: bool


def _diffusers_attention(name: str, projections: str, norms: str, out: str) -> AttentionNames:
    return AttentionNames(
        tuple(f"{name}.{projections.format(x)}" for x in "qkv"),
        tuple(f"{name}.{norms.format(x)}.weight" for x in "qk"),
        f"{name}.{out}",
    )


def _single_attention(name: str) -> AttentionNames:
    return AttentionNames((f"{name}.qkv",), (f"{name}.ln_q.weight", f"{name}.ln_k.weight"), f"{name}.proj")


def _single_stream(name: str, own: AttentionNames | None = None) -> StreamNames:
    mlp = (f"{name}.mlp.fc1", f"{name}.mlp.fc2")
    return StreamNames(f"{name}.adaLN_modulation.1", _single_attention(f"{name}.attn"), mlp, own)


DIFFUSERS = Names(
    block=f"transformer_blocks.{BLOCK}",
    streams={
        "image": StreamNames(
            "norm1.linear",
            _diffusers_attention("attn", "to_{}", "norm_{}", "to_out.0"),
            ("ff.net.0.proj", "ff.net.2"),
            _diffusers_attention("attn2", "to_{}", "norm_{}", "to_out.0"),
        ),
        "text": StreamNames(
            "norm1_context.linear",
            _diffusers_attention("attn", "add_{}_proj", "norm_added_{}", "to_add_out"),
            ("ff_context.net.0.proj", "ff_context.net.2"),
        ),
    },
    layers={
        "timestep_in.in_layer": "time_text_embed.timestep_embedder.linear_1",
        "timestep_in.out_layer": "time_text_embed.timestep_embedder.linear_2",
        "pooled_in.in_layer": "time_text_embed.text_embedder.linear_1",
        "pooled_in.out_layer": "time_text_embed.text_embedder.linear_2",
        "text_in": "context_embedder",
        "image_in": "pos_embed.proj",
        "position_table": "pos_embed.pos_embed",
        "modulation_out": "norm_out.linear",
        "image_out": "proj_out",
    },
    scale_first=True,
)
SINGLE_FILE = Names(
    block=f"joint_blocks.{BLOCK}",
    streams={
        "image": _single_stream("x_block", own=_single_attention("x_block.attn2")),
        "text": _single_stream("context_block"),
    },
    layers={
        "timestep_in.in_layer": "t_embedder.mlp.0",
        "timestep_in.out_layer": "t_embedder.mlp.2",
        "pooled_in.in_layer": "y_embedder.mlp.0",
        "pooled_in.out_layer": "y_embedder.mlp.2",
        "text_in": "context_embedder",
        "image_in": "x_embedder.proj",
        "position_table": "pos_embed",
        "modulation_out": "final_layer.adaLN_modulation.1",
        "image_out": "final_layer.linear",
    },
    scale_first=False,
)


def _attention(config: Sd3Config, target: str, block: str, names: AttentionNames, *, has_out: bool = True) -> Rows:
    width = config.width
    if len(names.qkv) == 3:
        parts = [(name, None) for name in names.qkv]
    else:
        parts = [(names.qkv[0], slice(i * width, (i + 1) * width)) for i in range(3)]
    kernel, bias = [], []
    for number, (name, rows) in enumerate(parts):
        part = None if rows is None else (rows, slice(None))
        kernel.append(Piece(f"{block}.{name}.weight", DENSE, part, (slice(None), number)))
        bias.append(Piece(f"{block}.{name}.bias", VECTOR, part and part[:1], (number,)))
    made = {f"{target}.qkv.kernel": tuple(kernel), f"{target}.qkv.bias": tuple(bias)}
    if config.qk_norm:
        for norm, name in zip(("query_norm", "key_norm"), names.norms):
            made[f"{target}.{norm}.scale"] = (Piece(f"{block}.{name}", VECTOR),)
    return made | (layer(f"{target}.out", f"{block}.{names.out}", DENSE_FROM_HEADS) if has_out else {})


def _shift_and_scale(target: str, source: str, width: int, *, scale_first: bool) -> Rows:
    """A modulation of two halves: (shift, scale) here."""
    halves = (slice(0, width), slice(width, 2 * width))
    ordered = halves[::-1] if scale_first else halves
    return {
        f"{target}.{ours}": tuple(
            Piece(f"{source}.{theirs}", transform, (there, *rest), (*rest, here))
            for there, here in zip(halves, ordered)
        )
        for ours, theirs, transform, rest in (
            ("kernel", "weight", DENSE, (slice(None),)),
            ("bias", "bias", VECTOR, ()),
        )
    }


def _stream(config: Sd3Config, target: str, block: str, names: StreamNames, *, dual: bool = False) -> Rows:
    rows = layer(f"{target}.modulation", f"{block}.{names.modulation}")
    rows |= _attention(config, f"{target}.attention", block, names.attention)
    if dual:
        rows |= _attention(config, f"{target}.own_attention", block, names.own)
    for ours, theirs in zip(("mlp_in", "mlp_out"), names.mlp):
        rows |= layer(f"{target}.{ours}", f"{block}.{theirs}")
    return rows


def _last_text(config: Sd3Config, target: str, names: Names) -> Rows:
    text = names.streams["text"]
    return _attention(config, f"{target}.attention", names.block, text.attention, has_out=False) | _shift_and_scale(
        f"{target}.modulation", f"{names.block}.{text.modulation}", config.width, scale_first=names.scale_first
    )


def _numbered(rows: Rows, first: int) -> Rows:
    """Rows of a stack whose first block has this number in the source."""
    return {path: tuple(dataclasses.replace(p, first=first) for p in pieces) for path, pieces in rows.items()}


def _table(config: Sd3Config, names: Names) -> Table:
    def image(stack: str, *, dual: bool = False) -> Rows:
        return _stream(config, f"{stack}.image", names.block, names.streams["image"], dual=dual)

    def text(stack: str) -> Rows:
        return _stream(config, f"{stack}.text", names.block, names.streams["text"])

    rows = _numbered(image("joint_blocks") | text("joint_blocks"), config.dual_layers)
    last = image("last_blocks") | _last_text(config, "last_blocks.text", names)
    rows |= _numbered(last, config.layers - 1)
    if config.dual_layers:
        rows |= image("dual_blocks", dual=True) | text("dual_blocks")
    ends = dict(names.layers)
    table, out, final = (ends.pop(name) for name in ("position_table", "image_out", "modulation_out"))
    for target, source in ends.items():
        rows |= layer(target, source)
    rows["image_in.kernel"] = (Piece(f"{ends['image_in']}.weight", PATCHES),)
    rows |= {
        "position_table": (Piece(table, POSITIONS),),
        "image_out.kernel": (Piece(f"{out}.weight", TOKENS_OUT),),
        "image_out.bias": (Piece(f"{out}.bias", TOKENS_OUT_BIAS),),
    }
    return rows | _shift_and_scale("modulation_out", final, config.width, scale_first=names.scale_first)


def diffusers_table(config: Sd3Config) -> Table:
    """Names of a diffusers `transformer` folder."""
    return _table(config, DIFFUSERS)


def single_file_table(config: Sd3Config) -> Table:
    """Names of Stability's single files, without their prefix."""
    return _table(config, SINGLE_FILE)


def config_from_single_file(shapes: Mapping[str, Shape]) -> Sd3Config:
    """Sizes of a single-file transformer from its tensors' shapes (it carries no config); KeyError names a gap."""
    blocks = {int(name.split(".")[1]) for name in shapes if name.startswith("joint_blocks.")}
    dual = {name.split(".")[1] for name in shapes if ".attn2." in name}
    width, channels, *_ = shapes["x_embedder.proj.weight"]
    norm = "joint_blocks.0.x_block.attn.ln_q.weight"
    # SD3 names no head anywhere; all published models have heads of 64.
    head_dim = shapes[norm][0] if norm in shapes else 64
    return Sd3Config(
        in_channels=channels * PATCH**2,
        layers=len(blocks),
        dual_layers=len(dual),
        heads=width // head_dim,
        head_dim=head_dim,
        text_width=shapes["context_embedder.weight"][1],
        pooled_width=shapes["y_embedder.mlp.0.weight"][1],
        qk_norm=norm in shapes,
        position_side=int(round(shapes["pos_embed"][1] ** 0.5)),
    )
