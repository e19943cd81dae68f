"""Tables of the FLUX transformer: diffusers' names, and Black Forest Labs' single-file names."""

from collections.abc import Iterable

from sflow_convert.engine import (
    DENSE,
    DENSE_FROM_HEADS,
    ROTARY_DENSE,
    ROTARY_VECTOR,
    VECTOR,
    Piece,
    Shape,
    Table,
    Transform,
)
from sflow_convert.rows import layer

from sflow_jax.models.flux1 import FluxConfig


def projection(target: str, sources: Iterable[tuple[str, slice | None]]) -> dict[str, tuple[Piece, ...]]:
    """Rows of a fused q, k, v projection from three layers, or three row ranges of one layer."""
    kernel, bias = [], []
    for number, (source, rows) in enumerate(sources):
        # Values are not rotated: only queries and keys are reordered.
        rotary = number < 2
        part = None if rows is None else (rows, slice(None))
        kernel.append(Piece(f"{source}.weight", ROTARY_DENSE if rotary else DENSE, part, (slice(None), number)))
        bias.append(Piece(f"{source}.bias", ROTARY_VECTOR if rotary else VECTOR, part and part[:1], (number,)))
    return {f"{target}.kernel": tuple(kernel), f"{target}.bias": tuple(bias)}


def head_norms(target: str, query: str, key: str) -> dict[str, tuple[Piece, ...]]:
    """Rows of the two RMS norms over the head dimension."""
    return {
        f"{target}.query_norm.scale": (Piece(query, ROTARY_VECTOR),),
        f"{target}.key_norm.scale": (Piece(key, ROTARY_VECTOR),),
    }


def joined_out(config: FluxConfig, source: str) -> dict[str, tuple[Piece, ...]]:
    """A single block's output layer: one source weight [d, d + f] over attention and MLP, two kernels here."""
    width = config.width
    attention = slice(0, width)
    joined = slice(width, width * (1 + config.mlp_ratio))
    return {
        "single_blocks.attention.out.kernel": (
            Piece(f"{source}.weight", DENSE_FROM_HEADS, (attention, attention)),
        ),
        "single_blocks.attention.out.bias": (Piece(f"{source}.bias", VECTOR),),
        "single_blocks.mlp_out.kernel": (Piece(f"{source}.weight", DENSE, (attention, joined)),),
    }


def embedders(config: FluxConfig, names: dict[str, str], layers: tuple[str, str]) -> dict[str, tuple[Piece, ...]]:
    """Rows of the timestep, guidance and pooled-text embedders."""
    rows = {}
    for target, source in names.items():
        if target != "guidance_in" or config.guidance:
            rows |= layer(f"{target}.in_layer", f"{source}.{layers[0]}")
            rows |= layer(f"{target}.out_layer", f"{source}.{layers[1]}")
    return rows


def diffusers_table(config: FluxConfig) -> Table:
    """Names of a diffusers `transformer` folder."""
    double, single = "transformer_blocks.{block}", "single_transformer_blocks.{block}"
    rows = embedders(
        config,
        {
            "timestep_in": "time_text_embed.timestep_embedder",
            "guidance_in": "time_text_embed.guidance_embedder",
            "pooled_in": "time_text_embed.text_embedder",
        },
        ("linear_1", "linear_2"),
    )
    rows |= layer("image_in", "x_embedder") | layer("text_in", "context_embedder")
    for stream, suffix, qkv, norms, out in (
        ("image", "", ("to_q", "to_k", "to_v"), ("norm_q", "norm_k"), "to_out.0"),
        (
            "text",
            "_context",
            ("add_q_proj", "add_k_proj", "add_v_proj"),
            ("norm_added_q", "norm_added_k"),
            "to_add_out",
        ),
    ):
        target = f"double_blocks.{stream}"
        rows |= layer(f"{target}.modulation", f"{double}.norm1{suffix}.linear")
        rows |= projection(f"{target}.attention.qkv", [(f"{double}.attn.{name}", None) for name in qkv])
        rows |= head_norms(f"{target}.attention", *(f"{double}.attn.{name}.weight" for name in norms))
        rows |= layer(f"{target}.attention.out", f"{double}.attn.{out}", DENSE_FROM_HEADS)
        rows |= layer(f"{target}.mlp_in", f"{double}.ff{suffix}.net.0.proj")
        rows |= layer(f"{target}.mlp_out", f"{double}.ff{suffix}.net.2")
    rows |= layer("single_blocks.modulation", f"{single}.norm.linear")
    rows |= projection("single_blocks.attention.qkv", [(f"{single}.attn.to_{x}", None) for x in "qkv"])
    rows |= head_norms("single_blocks.attention", *(f"{single}.attn.norm_{x}.weight" for x in "qk"))
    rows |= layer("single_blocks.mlp_in", f"{single}.proj_mlp")
    rows |= joined_out(config, f"{single}.proj_out")
    # diffusers keeps (scale, shift) in the last modulation, everything else (shift, scale).
    halves = (slice(0, config.width), slice(config.width, 2 * config.width))

    def swapped(name: str, transform: Transform, axes: int) -> tuple[Piece, ...]:
        lead = (slice(None),) * (axes - 1)
        return tuple(
            Piece(f"norm_out.linear.{name}", transform, (source, *lead), (*lead, target))
            for source, target in zip(halves, halves[::-1])
        )

    rows |= {
        "modulation_out.kernel": swapped("weight", DENSE, 2),
        "modulation_out.bias": swapped("bias", VECTOR, 1),
    }
    return rows | layer("image_out", "proj_out")


def single_file_table(config: FluxConfig) -> Table:
    """Names of Black Forest Labs' `flux1-*.safetensors`."""
    width = config.width
    thirds = [slice(i * width, (i + 1) * width) for i in range(3)]
    double, single = "double_blocks.{block}", "single_blocks.{block}"
    rows = embedders(
        config,
        {"timestep_in": "time_in", "guidance_in": "guidance_in", "pooled_in": "vector_in"},
        ("in_layer", "out_layer"),
    )
    rows |= layer("image_in", "img_in") | layer("text_in", "txt_in")
    for stream, short in (("image", "img"), ("text", "txt")):
        target = f"double_blocks.{stream}"
        norm = f"{double}.{short}_attn.norm"
        rows |= layer(f"{target}.modulation", f"{double}.{short}_mod.lin")
        rows |= projection(f"{target}.attention.qkv", [(f"{double}.{short}_attn.qkv", rows_) for rows_ in thirds])
        rows |= head_norms(f"{target}.attention", f"{norm}.query_norm.scale", f"{norm}.key_norm.scale")
        rows |= layer(f"{target}.attention.out", f"{double}.{short}_attn.proj", DENSE_FROM_HEADS)
        rows |= layer(f"{target}.mlp_in", f"{double}.{short}_mlp.0")
        rows |= layer(f"{target}.mlp_out", f"{double}.{short}_mlp.2")
    rows |= layer("single_blocks.modulation", f"{single}.modulation.lin")
    rows |= projection("single_blocks.attention.qkv", [(f"{single}.linear1", rows_) for rows_ in thirds])
    rows |= head_norms(
        "single_blocks.attention", f"{single}.norm.query_norm.scale", f"{single}.norm.key_norm.scale"
    )
    hidden = slice(3 * width, (3 + config.mlp_ratio) * width)
    rows |= {
        "single_blocks.mlp_in.kernel": (Piece(f"{single}.linear1.weight", DENSE, (hidden, slice(None))),),
        "single_blocks.mlp_in.bias": (Piece(f"{single}.linear1.bias", VECTOR, (hidden,)),),
    }
    rows |= joined_out(config, f"{single}.linear2")
    rows |= layer("modulation_out", "final_layer.adaLN_modulation.1")
    return rows | layer("image_out", "final_layer.linear")


def config_from_single_file(shapes: dict[str, Shape]) -> FluxConfig:
    """Sizes of a single-file transformer from its tensors' shapes (it carries no config)."""

    def count(prefix: str) -> int:
        return len({name.split(".")[1] for name in shapes if name.startswith(prefix)})

    width, in_channels = shapes["img_in.weight"]
    (head_dim,) = shapes["double_blocks.0.img_attn.norm.query_norm.scale"]
    # The published split of 128 into (16, 56, 56), kept in proportion for other sizes.
    row = 7 * head_dim // 32 * 2
    return FluxConfig(
        in_channels=in_channels,
        double_blocks=count("double_blocks."),
        single_blocks=count("single_blocks."),
        heads=width // head_dim,
        head_dim=head_dim,
        text_width=shapes["txt_in.weight"][1],
        pooled_width=shapes["vector_in.in_layer.weight"][1],
        guidance="guidance_in.in_layer.weight" in shapes,
        rotary_axes=(head_dim - 2 * row, row, row),
    )
