"""Tables of T5 and CLIP text encoders, names of transformers' folders."""

from sflow_convert.engine import DENSE, DENSE_FROM_HEADS, SAME, VECTOR, Piece, Table

from sflow_jax.models.clip import ClipTextConfig
from sflow_jax.models.t5 import T5Config


def t5_table(config: T5Config) -> Table:
    """Names of a T5 encoder folder (`text_encoder_2` of FLUX)."""
    block = "encoder.block.{block}"
    attention, mlp = f"{block}.layer.0.SelfAttention", f"{block}.layer.1.DenseReluDense"
    return {
        "embedding.embedding": (Piece("shared.weight", SAME),),
        "position_bias.embedding": (
            Piece("encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight", SAME),
        ),
        "blocks.attention_norm.scale": (Piece(f"{block}.layer.0.layer_norm.weight", VECTOR),),
        "blocks.qkv.kernel": tuple(
            Piece(f"{attention}.{name}.weight", DENSE, index=(slice(None), i)) for i, name in enumerate("qkv")
        ),
        "blocks.out.kernel": (Piece(f"{attention}.o.weight", DENSE_FROM_HEADS),),
        "blocks.mlp_norm.scale": (Piece(f"{block}.layer.1.layer_norm.weight", VECTOR),),
        "blocks.gate.kernel": (Piece(f"{mlp}.wi_0.weight", DENSE),),
        "blocks.mlp_in.kernel": (Piece(f"{mlp}.wi_1.weight", DENSE),),
        "blocks.mlp_out.kernel": (Piece(f"{mlp}.wo.weight", DENSE),),
        "final_norm.scale": (Piece("encoder.final_layer_norm.weight", VECTOR),),
    }


def clip_block_rows(block: str) -> dict[str, tuple[Piece, ...]]:
    """Rows of a stack of CLIP blocks whose source names begin with `block`."""
    rows = {}
    for target, source in (("attention_norm", "layer_norm1"), ("mlp_norm", "layer_norm2")):
        rows[f"blocks.{target}.scale"] = (Piece(f"{block}.{source}.weight", VECTOR),)
        rows[f"blocks.{target}.bias"] = (Piece(f"{block}.{source}.bias", VECTOR),)
    for target, source, transform in (
        ("out", "self_attn.out_proj", DENSE_FROM_HEADS),
        ("mlp_in", "mlp.fc1", DENSE),
        ("mlp_out", "mlp.fc2", DENSE),
    ):
        rows[f"blocks.{target}.kernel"] = (Piece(f"{block}.{source}.weight", transform),)
        rows[f"blocks.{target}.bias"] = (Piece(f"{block}.{source}.bias", VECTOR),)
    names = [f"{block}.self_attn.{x}_proj" for x in "qkv"]
    rows["blocks.qkv.kernel"] = tuple(
        Piece(f"{name}.weight", DENSE, index=(slice(None), i)) for i, name in enumerate(names)
    )
    rows["blocks.qkv.bias"] = tuple(Piece(f"{name}.bias", VECTOR, index=(i,)) for i, name in enumerate(names))
    return rows


def clip_text_table(config: ClipTextConfig) -> Table:
    """Names of a CLIP text folder (`text_encoder` of FLUX), with a projection where the config says so."""
    projection = {"text_projection.kernel": (Piece("text_projection.weight", DENSE),)}
    rows = clip_block_rows("text_model.encoder.layers.{block}") | (projection if config.projection else {})
    return rows | {
        "token_embedding.embedding": (Piece("text_model.embeddings.token_embedding.weight", SAME),),
        "position_embedding.embedding": (Piece("text_model.embeddings.position_embedding.weight", SAME),),
        "final_norm.scale": (Piece("text_model.final_layer_norm.weight", VECTOR),),
        "final_norm.bias": (Piece("text_model.final_layer_norm.bias", VECTOR),),
    }
