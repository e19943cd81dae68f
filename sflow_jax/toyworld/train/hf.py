"""The configs of the exported folder, as diffusers and transformers write them."""

from typing import Any

from sflow_jax.families import sd3
from sflow_jax.families.flux1 import DEV_SCHEDULER
from sflow_jax.models.autoencoder import AutoencoderConfig
from sflow_jax.models.clip import ClipTextConfig
from sflow_jax.models.clip_vision import ClipConfig, ClipVisionConfig
from sflow_jax.models.dinov2 import Dinov2Config
from sflow_jax.models.flux1 import FluxConfig
from sflow_jax.models.sd3 import PATCH, Sd3Config
from sflow_jax.models.t5 import T5Config
from sflow_jax.toyworld.train.tokenizers import TEXT_TOKENS

MODEL_INDEX = {
    "_class_name": "FluxPipeline",
    "_diffusers_version": "0.30.0",
    "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "text_encoder_2": ["transformers", "T5EncoderModel"],
    "tokenizer": ["transformers", "PreTrainedTokenizerFast"],
    "tokenizer_2": ["transformers", "PreTrainedTokenizerFast"],
    "transformer": ["diffusers", "FluxTransformer2DModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}
SCHEDULER = {
    "_class_name": "FlowMatchEulerDiscreteScheduler",
    "_diffusers_version": "0.30.0",
    "num_train_timesteps": 1000,
    **DEV_SCHEDULER,
}
SD3_MODEL_INDEX = {
    "_class_name": "StableDiffusion3Pipeline",
    "_diffusers_version": "0.30.0",
    "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
    "text_encoder": ["transformers", "CLIPTextModelWithProjection"],
    "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
    "text_encoder_3": ["transformers", "T5EncoderModel"],
    "tokenizer": ["transformers", "PreTrainedTokenizerFast"],
    "tokenizer_2": ["transformers", "PreTrainedTokenizerFast"],
    "tokenizer_3": ["transformers", "PreTrainedTokenizerFast"],
    "transformer": ["diffusers", "SD3Transformer2DModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}
# Latents along each side of a picture.
SD3_SAMPLE_SIZE = 16
SD3_SCHEDULER = {
    "_class_name": "FlowMatchEulerDiscreteScheduler",
    "_diffusers_version": "0.30.0",
    **sd3.SCHEDULER,
}


def preprocessor_config(size: int, statistics: tuple[tuple[float, ...], tuple[float, ...]]) -> dict[str, Any]:
    """`preprocessor_config.json` of a vision network."""
    mean, spread = statistics
    return {
        "do_center_crop": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "crop_size": {"height": size, "width": size},
        "size": {"shortest_edge": size},
        "resample": 3,
        "rescale_factor": 1 / 255,
        "image_mean": list(mean),
        "image_std": list(spread),
        "image_processor_type": "CLIPImageProcessor",
    }


def flux_config(config: FluxConfig) -> dict[str, Any]:
    """`transformer/config.json`."""
    return {
        "_class_name": "FluxTransformer2DModel",
        "_diffusers_version": "0.30.0",
        "attention_head_dim": config.head_dim,
        "axes_dims_rope": list(config.rotary_axes),
        "guidance_embeds": config.guidance,
        "in_channels": config.in_channels,
        "joint_attention_dim": config.text_width,
        "num_attention_heads": config.heads,
        "num_layers": config.double_blocks,
        "num_single_layers": config.single_blocks,
        "patch_size": 1,
        "pooled_projection_dim": config.pooled_width,
    }


def sd3_config(config: Sd3Config) -> dict[str, Any]:
    """`transformer/config.json` of the SD3."""
    channels = config.in_channels // PATCH**2
    return {
        "_class_name": "SD3Transformer2DModel",
        "_diffusers_version": "0.30.0",
        "attention_head_dim": config.head_dim,
        "caption_projection_dim": config.width,
        "dual_attention_layers": list(range(config.dual_layers)),
        "in_channels": channels,
        "joint_attention_dim": config.text_width,
        "num_attention_heads": config.heads,
        "num_layers": config.layers,
        "out_channels": channels,
        "patch_size": PATCH,
        "pooled_projection_dim": config.pooled_width,
        "pos_embed_max_size": config.position_side,
        "qk_norm": "rms_norm" if config.qk_norm else None,
        "sample_size": SD3_SAMPLE_SIZE,
    }


def vae_config(config: AutoencoderConfig, size: int) -> dict[str, Any]:
    """`vae/config.json`."""
    levels = len(config.widths)
    return {
        "_class_name": "AutoencoderKL",
        "_diffusers_version": "0.30.0",
        "act_fn": "silu",
        "block_out_channels": list(config.widths),
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "force_upcast": True,
        "in_channels": config.picture_channels,
        "latent_channels": config.latent_channels,
        "layers_per_block": config.blocks_per_level,
        "mid_block_add_attention": True,
        "norm_num_groups": config.norm_groups,
        "out_channels": config.picture_channels,
        "sample_size": size,
        "scaling_factor": config.scaling_factor,
        "shift_factor": config.shift_factor,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "use_post_quant_conv": False,
        "use_quant_conv": False,
    }


def _clip_text(config: ClipTextConfig, projection: int) -> dict[str, Any]:
    return {
        "bos_token_id": config.end_of_text - 1,
        "eos_token_id": config.end_of_text,
        "hidden_act": config.activation,
        "hidden_size": config.width,
        "intermediate_size": config.mlp_width,
        "layer_norm_eps": config.epsilon,
        "max_position_embeddings": config.positions,
        "model_type": "clip_text_model",
        "num_attention_heads": config.heads,
        "num_hidden_layers": config.layers,
        "pad_token_id": config.end_of_text,
        "projection_dim": projection,
        "vocab_size": config.vocabulary,
    }


def _clip_vision(config: ClipVisionConfig, projection: int) -> dict[str, Any]:
    return {
        "hidden_act": config.activation,
        "hidden_size": config.width,
        "image_size": config.picture_size,
        "intermediate_size": config.mlp_width,
        "layer_norm_eps": config.epsilon,
        "model_type": "clip_vision_model",
        "num_attention_heads": config.heads,
        "num_channels": 3,
        "num_hidden_layers": config.layers,
        "patch_size": config.patch_size,
        "projection_dim": projection,
    }


def clip_text_config(config: ClipConfig) -> dict[str, Any]:
    """`text_encoder/config.json`."""
    return {"architectures": ["CLIPTextModel"], **_clip_text(config.text, config.projection)}


def clip_config(config: ClipConfig) -> dict[str, Any]:
    """`clip/config.json`."""
    return {
        "architectures": ["CLIPModel"],
        "model_type": "clip",
        "projection_dim": config.projection,
        "text_config": _clip_text(config.text, config.projection),
        "vision_config": _clip_vision(config.vision, config.projection),
    }


def t5_config(config: T5Config) -> dict[str, Any]:
    """`text_encoder_2/config.json`."""
    return {
        "architectures": ["T5EncoderModel"],
        "d_ff": config.mlp_width,
        "d_kv": config.head_dim,
        "d_model": config.width,
        "decoder_start_token_id": 0,
        "dense_act_fn": "gelu_new",
        "dropout_rate": 0.0,
        "eos_token_id": 1,
        "feed_forward_proj": "gated-gelu",
        "is_encoder_decoder": True,
        "is_gated_act": True,
        "layer_norm_epsilon": config.epsilon,
        "model_type": "t5",
        "n_positions": TEXT_TOKENS,
        "num_heads": config.heads,
        "num_layers": config.layers,
        "pad_token_id": 0,
        "relative_attention_max_distance": config.position_reach,
        "relative_attention_num_buckets": config.position_buckets,
        "tie_word_embeddings": False,
        "vocab_size": config.vocabulary,
    }


def dinov2_config(config: Dinov2Config) -> dict[str, Any]:
    """`dinov2/config.json`."""
    return {
        "architectures": ["Dinov2Model"],
        "hidden_act": "gelu",
        "hidden_size": config.width,
        "image_size": config.picture_size,
        "layer_norm_eps": config.epsilon,
        "layerscale_value": 1.0,
        "mlp_ratio": config.mlp_ratio,
        "model_type": "dinov2",
        "num_attention_heads": config.heads,
        "num_channels": 3,
        "num_hidden_layers": config.layers,
        "patch_size": config.patch_size,
        "qkv_bias": True,
        "use_swiglu_ffn": config.swiglu,
    }
