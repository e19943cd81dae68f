"""Small random SD3 models of the three published architectures, written by diffusers and transformers."""

import json
from pathlib import Path

import published
import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from published import randomise
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizer, T5Config, T5EncoderModel

# A different size for every axis, so that a confusion of two of them cannot go unseen.
COMMON = {
    "sample_size": 8,
    "patch_size": 2,
    "in_channels": 4,
    "out_channels": 4,
    "attention_head_dim": 8,
    "joint_attention_dim": 40,
    "pooled_projection_dim": 22,
    "pos_embed_max_size": 7,
}
ARCHITECTURES = {
    "medium": {"num_layers": 3, "num_attention_heads": 3, "caption_projection_dim": 24},
    "3.5-medium": {
        "num_layers": 4,
        "num_attention_heads": 4,
        "caption_projection_dim": 32,
        "dual_attention_layers": (0, 1),
        "qk_norm": "rms_norm",
        "pos_embed_max_size": 10,
    },
    "3.5-large": {"num_layers": 3, "num_attention_heads": 5, "caption_projection_dim": 40, "qk_norm": "rms_norm"},
}
VAE = {**published.VAE, "scaling_factor": 1.5305, "shift_factor": 0.0609}
T5 = {**published.T5, "d_model": 40}
CLIP_L = {**published.CLIP, "projection_dim": 9}
CLIP_G = {
    **CLIP_L,
    "hidden_size": 14,
    "intermediate_size": 28,
    "num_hidden_layers": 4,
    "projection_dim": 13,
    "hidden_act": "gelu",
    "eos_token_id": 53,
}
SCHEDULER = {"shift": 3.0}


def transformer(architecture: str) -> SD3Transformer2DModel:
    """A random transformer, its position table too."""
    model = randomise(SD3Transformer2DModel(**{**COMMON, **ARCHITECTURES[architecture]}), 5)
    generator = torch.Generator().manual_seed(6)
    table = model.pos_embed.pos_embed
    table.copy_(torch.randn(table.shape, generator=generator))
    return model


def autoencoder() -> AutoencoderKL:
    """A random autoencoder, 8× downsampling."""
    return randomise(AutoencoderKL(**VAE), 2)


def clip(config: dict, seed: int) -> CLIPTextModelWithProjection:
    """A random CLIP text encoder with its projection."""
    return randomise(CLIPTextModelWithProjection(CLIPTextConfig(**config)), seed)


def t5() -> T5EncoderModel:
    """A random T5 v1.1 encoder."""
    return randomise(T5EncoderModel(T5Config(**T5)), 3)


def clip_g_tokenizer() -> CLIPTokenizer:
    """As CLIP-L's, but it pads with another token than the end of the text: a letter that no prompt has."""
    tokenizer = published.clip_tokenizer()
    tokenizer.pad_token = "z"
    return tokenizer


def pipeline(architecture: str, *, with_t5: bool = True) -> StableDiffusion3Pipeline:
    """diffusers' own pipeline of random networks."""
    pipe = StableDiffusion3Pipeline(
        transformer=transformer(architecture),
        scheduler=FlowMatchEulerDiscreteScheduler(**SCHEDULER),
        vae=autoencoder(),
        text_encoder=clip(CLIP_L, 7),
        tokenizer=published.clip_tokenizer(),
        text_encoder_2=clip(CLIP_G, 8),
        tokenizer_2=clip_g_tokenizer(),
        text_encoder_3=t5() if with_t5 else None,
        tokenizer_3=published.t5_tokenizer() if with_t5 else None,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def write_diffusers(pipe: StableDiffusion3Pipeline, folder: Path) -> Path:
    """The diffusers layout; each network by itself, as an absent one must leave no folder."""
    for name, part in pipe.components.items():
        if part is not None:
            part.save_pretrained(folder / name)
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusion3Pipeline"}))
    return folder
