"""Configs of checkpoints to be converted, and the other JSON beside the weights."""

import random
from collections.abc import Iterator

import numpy as np

from hardness.cases import Box, Case, alive, unchanged_picture
from hardness.conversions import CONFIGS, CONVERT, INFO, PAINTED
from hardness.documents import (
    CHOICE,
    COUNT,
    EPSILON,
    FLAG,
    NUMBER,
    NUMBERS,
    OPTIONAL,
    POSITIVE,
    SIZE,
    SIZES,
    UNREAD,
    Document,
    value_cases,
    whole_cases,
)

TRANSFORMER_KEYS = {
    "in_channels": SIZE + OPTIONAL,
    "num_layers": SIZE + OPTIONAL,
    "num_single_layers": SIZE + OPTIONAL,
    "num_attention_heads": SIZE + OPTIONAL,
    "attention_head_dim": SIZE + OPTIONAL,
    "joint_attention_dim": SIZE + OPTIONAL,
    "pooled_projection_dim": SIZE + OPTIONAL,
    "guidance_embeds": FLAG + OPTIONAL,
    "axes_dims_rope": SIZES + OPTIONAL,
    "patch_size": SIZE + OPTIONAL,
    "_diffusers_version": UNREAD,
}
VAE_KEYS = {
    "in_channels": SIZE + OPTIONAL,
    "latent_channels": SIZE + OPTIONAL,
    "block_out_channels": SIZES,
    "layers_per_block": SIZE + OPTIONAL,
    "norm_num_groups": SIZE + OPTIONAL,
    "scaling_factor": POSITIVE,
    "shift_factor": NUMBER + OPTIONAL,
    "sample_size": SIZE + OPTIONAL,
    "act_fn": CHOICE + OPTIONAL,
    "use_quant_conv": FLAG + OPTIONAL,
    "mid_block_add_attention": FLAG + OPTIONAL,
    "force_upcast": UNREAD,
}
CLIP_KEYS = {
    "vocab_size": SIZE,
    "hidden_size": SIZE,
    "num_attention_heads": COUNT,
    "intermediate_size": SIZE,
    "num_hidden_layers": SIZE,
    "max_position_embeddings": SIZE + OPTIONAL,
    "hidden_act": CHOICE + OPTIONAL,
    "eos_token_id": COUNT + OPTIONAL,
    "layer_norm_eps": EPSILON + OPTIONAL,
    "attention_dropout": UNREAD,
}
T5_KEYS = {
    "vocab_size": SIZE,
    "d_model": SIZE,
    "d_kv": SIZE,
    "num_heads": SIZE,
    "d_ff": SIZE,
    "num_layers": SIZE,
    "feed_forward_proj": CHOICE,
    "relative_attention_num_buckets": SIZE + OPTIONAL,
    "relative_attention_max_distance": COUNT + OPTIONAL,
    "layer_norm_epsilon": EPSILON + OPTIONAL,
    "use_cache": UNREAD,
}
SCHEDULER_KEYS = {
    "shift": POSITIVE + OPTIONAL,
    "base_shift": NUMBER + OPTIONAL,
    "max_shift": NUMBER + OPTIONAL,
    "base_image_seq_len": COUNT + OPTIONAL,
    "max_image_seq_len": COUNT + OPTIONAL,
    "use_dynamic_shifting": FLAG + OPTIONAL,
    "num_train_timesteps": SIZE + OPTIONAL,
    "time_shift_type": CHOICE + OPTIONAL,
    "use_karras_sigmas": FLAG + OPTIONAL,
    "_diffusers_version": UNREAD,
}
DINO_KEYS = {
    "hidden_size": SIZE,
    "num_attention_heads": SIZE,
    "mlp_ratio": SIZE + OPTIONAL,
    "num_hidden_layers": SIZE,
    "image_size": COUNT + OPTIONAL,
    "patch_size": SIZE + OPTIONAL,
    "use_swiglu_ffn": FLAG + OPTIONAL,
    "layer_norm_eps": EPSILON + OPTIONAL,
    "hidden_act": CHOICE + OPTIONAL,
    "qkv_bias": FLAG + OPTIONAL,
    "model_type": CHOICE,
    "architectures": UNREAD,
}
CLIP_MODEL_KEYS = {
    "projection_dim": SIZE + OPTIONAL,
    "text_config.vocab_size": SIZE + OPTIONAL,
    "text_config.hidden_size": SIZE + OPTIONAL,
    "text_config.num_hidden_layers": SIZE + OPTIONAL,
    "vision_config.hidden_size": SIZE + OPTIONAL,
    "vision_config.patch_size": SIZE + OPTIONAL,
    "vision_config.image_size": SIZE + OPTIONAL,
    "vision_config.layer_norm_eps": EPSILON + OPTIONAL,
    "vision_config.hidden_act": CHOICE + OPTIONAL,
}
PREPROCESSOR_KEYS = {
    "crop_size.height": SIZE,
    "size.shortest_edge": COUNT,
    "image_processor_type": CHOICE,
    "resample": SIZE + OPTIONAL,
    "rescale_factor": POSITIVE + OPTIONAL,
    "do_resize": FLAG + OPTIONAL,
    "do_normalize": FLAG + OPTIONAL,
    "image_mean": NUMBERS,
    "image_std": SIZES,
}


def _flux(label: str, file: str, keys: dict[str, str], names: tuple[str, ...] = ()) -> Document:
    return Document(
        label=f"source/{label}",
        category=CONFIGS,
        part="source",
        file=file,
        keys=keys,
        steps=(CONVERT, PAINTED),
        accepted=unchanged_picture,
        alive=alive,
        needs=("painted",),
        # Sizes that fit no tensor are seen at the tensors.
        names=("tensors do not fit", *names),
    )


def described(box: Box) -> str | None:
    """What is wrong with features that were converted: their numbers for a picture must be finite."""
    from sflow_jax.catalogue import load_features

    features = load_features(str(box.work / "out"), dtype="float32")
    ramp = np.arange(64 * 64 * 3, dtype=np.uint8).reshape(1, 64, 64, 3)
    values = np.asarray(features(ramp))
    return None if np.isfinite(values).all() and values.std() > 0 else "features are not finite, or all equal"


def _features(label: str, part: str, file: str, keys: dict[str, str]) -> Document:
    return Document(
        label=f"source/{label}",
        category=CONFIGS,
        part=part,
        file=file,
        keys=keys,
        steps=(("sflow-convert", part, "out"), INFO),
        accepted=described,
        alive=described,
        names=("tensors do not fit",),
    )


DOCUMENTS = (
    (_flux("transformer", "transformer/config.json", TRANSFORMER_KEYS), 0.3, 9),
    (_flux("vae", "vae/config.json", VAE_KEYS), 0.3, 7),
    (_flux("clip", "text_encoder/config.json", CLIP_KEYS), 0.25, 6),
    (_flux("t5", "text_encoder_2/config.json", T5_KEYS), 0.25, 6),
    (_flux("scheduler", "scheduler/scheduler_config.json", SCHEDULER_KEYS), 0.3, 6),
    (_features("dino", "dino_source", "config.json", DINO_KEYS), 0.25, 7),
    (_features("clip-model", "clip_source", "config.json", CLIP_MODEL_KEYS), 0.2, 4),
    (_features("preprocessor", "dino_source", "preprocessor_config.json", PREPROCESSOR_KEYS), 0.3, 6),
)
INDEX = "text_encoder_2/model.safetensors.index.json"
FILES_READ_WHOLE = (
    (_flux("t5-index", INDEX, {}), 9),
    (_flux("tokenizer-config", "tokenizer/tokenizer_config.json", {}, names=("tokenizer",)), 7),
    (_flux("tokenizer-file", "tokenizer/tokenizer.json", {}, names=("tokenizer",)), 6),
    (_flux("tokenizer-2-config", "tokenizer_2/tokenizer_config.json", {}, names=("tokenizer_2",)), 6),
    (_flux("tokenizer-2-file", "tokenizer_2/tokenizer.json", {}, names=("tokenizer_2",)), 6),
)


def cases(draw: random.Random) -> Iterator[Case]:
    """All of this file."""
    for document, share, whole in DOCUMENTS:
        yield from value_cases(document, draw, share)
        yield from whole_cases(document, draw, whole)
    for document, whole in FILES_READ_WHOLE:
        yield from whole_cases(document, draw, whole)
