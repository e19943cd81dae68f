"""Tables of CLIP (both towers) and DINOv2, names of transformers' folders."""

from sflow_convert.engine import CONVOLUTION, DENSE, DENSE_FROM_HEADS, SAME, VECTOR, Piece, Table, Transform
from sflow_convert.rows import Rows, layer, norm
from sflow_convert.text_encoders import clip_block_rows, clip_text_table

from sflow_jax.models.clip_vision import ClipConfig, ClipVisionConfig
from sflow_jax.models.dinov2 import Dinov2Config


def _leading(count: int) -> Transform:
    """The same array with `count` leading axes of one in the source: [l, d] ↔ [1, l, d]."""
    return Transform(
        source_shape=lambda shape: (1,) * count + shape,
        to_ours=lambda x, shape: x.reshape(shape),
        to_source=lambda x: x.reshape((1,) * count + x.shape),
    )


BATCHED = _leading(1)


def clip_vision_table(config: ClipVisionConfig) -> Table:
    """Names of the picture half of a CLIP folder."""
    embeddings = "vision_model.embeddings"
    rows = clip_block_rows("vision_model.encoder.layers.{block}") | {
        "patch_embedding.kernel": (Piece(f"{embeddings}.patch_embedding.weight", CONVOLUTION),),
        "class_embedding": (Piece(f"{embeddings}.class_embedding", SAME),),
        "position_embedding.embedding": (Piece(f"{embeddings}.position_embedding.weight", SAME),),
    }
    # The published name is misspelt.
    return rows | norm("norm_in", "vision_model.pre_layrnorm") | norm("norm_out", "vision_model.post_layernorm")


def clip_table(config: ClipConfig) -> Table:
    """Names of a whole CLIPModel folder."""
    rows = {f"text.{path}": pieces for path, pieces in clip_text_table(config.text).items()}
    rows |= {f"vision.{path}": pieces for path, pieces in clip_vision_table(config.vision).items()}
    return rows | {
        "text_projection.kernel": (Piece("text_projection.weight", DENSE),),
        "vision_projection.kernel": (Piece("visual_projection.weight", DENSE),),
        "logit_scale": (Piece("logit_scale", SAME),),
    }


def dinov2_table(config: Dinov2Config) -> Table:
    """Names of a DINOv2 folder, with or without register tokens."""
    block = "encoder.layer.{block}"
    rows: Rows = {
        "class_token": (Piece("embeddings.cls_token", BATCHED),),
        "mask_token": (Piece("embeddings.mask_token", SAME),),
        "position_embedding": (Piece("embeddings.position_embeddings", BATCHED),),
        "blocks.attention_scale": (Piece(f"{block}.layer_scale1.lambda1", VECTOR),),
        "blocks.mlp_scale": (Piece(f"{block}.layer_scale2.lambda1", VECTOR),),
    }
    if config.registers:
        rows["registers"] = (Piece("embeddings.register_tokens", BATCHED),)
    rows |= layer("patch_embedding", "embeddings.patch_embeddings.projection", CONVOLUTION)
    rows |= norm("blocks.attention_norm", f"{block}.norm1") | norm("blocks.mlp_norm", f"{block}.norm2")
    names = [f"{block}.attention.attention.{name}" for name in ("query", "key", "value")]
    rows["blocks.qkv.kernel"] = tuple(
        Piece(f"{name}.weight", DENSE, index=(slice(None), i)) for i, name in enumerate(names)
    )
    rows["blocks.qkv.bias"] = tuple(Piece(f"{name}.bias", VECTOR, index=(i,)) for i, name in enumerate(names))
    rows |= layer("blocks.out", f"{block}.attention.output.dense", DENSE_FROM_HEADS)
    first, second = ("weights_in", "weights_out") if config.swiglu else ("fc1", "fc2")
    rows |= layer("blocks.mlp_in", f"{block}.mlp.{first}") | layer("blocks.mlp_out", f"{block}.mlp.{second}")
    return rows | norm("final_norm", "layernorm")
