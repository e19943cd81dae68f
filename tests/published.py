"""A small random FLUX in the published layouts, written by diffusers and transformers."""

import contextlib
import json
from pathlib import Path
from unittest import mock

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
)

# A different size for every axis, so that a confusion of two of them cannot go unseen.
FLUX = {
    "in_channels": 16,
    "num_layers": 2,
    "num_single_layers": 3,
    "attention_head_dim": 16,
    "num_attention_heads": 3,
    "joint_attention_dim": 24,
    "pooled_projection_dim": 20,
    "axes_dims_rope": (4, 6, 6),
}
VAE = {
    "latent_channels": 4,
    "block_out_channels": (8, 12, 16, 20),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
    "scaling_factor": 0.3611,
    "shift_factor": 0.1159,
    "sample_size": 64,
}
T5 = {
    "vocab_size": 40,
    "d_model": 24,
    "d_kv": 7,
    "num_heads": 4,
    "d_ff": 44,
    "num_layers": 2,
    "feed_forward_proj": "gated-gelu",
    "relative_attention_num_buckets": 12,
    "relative_attention_max_distance": 18,
}
CLIP = {
    "vocab_size": 60,
    "hidden_size": 20,
    "num_attention_heads": 2,
    "intermediate_size": 36,
    "num_hidden_layers": 3,
    "max_position_embeddings": 23,
    "bos_token_id": 58,
    "eos_token_id": 2,
}
SCHEDULERS = {
    "dev": {"use_dynamic_shifting": True, "shift": 3.0, "base_shift": 0.5, "max_shift": 1.15},
    "schnell": {"use_dynamic_shifting": False, "shift": 1.0},
}
LETTERS = "abcdefghijklmnopqrstuvwxyz"
T5_LENGTH = 13


@torch.no_grad()
def randomise(module: torch.nn.Module, seed: int) -> torch.nn.Module:
    """Give every parameter, norms and biases too, values that matter."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in module.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim >= 2:
            fan_in = parameter[0].numel()
            parameter.copy_(noise / fan_in**0.5)
        elif "norm" in name and name.endswith("weight"):
            parameter.copy_(1 + 0.3 * noise)
        else:
            parameter.copy_(0.2 * noise)
    return module.eval()


def transformer(family: str = "dev") -> FluxTransformer2DModel:
    """A random transformer, with guidance for dev and without for schnell."""
    return randomise(FluxTransformer2DModel(**FLUX, guidance_embeds=family == "dev"), 1)


def autoencoder() -> AutoencoderKL:
    """A random autoencoder, 8× downsampling."""
    return randomise(AutoencoderKL(**VAE), 2)


def t5() -> T5EncoderModel:
    """A random T5 v1.1 encoder."""
    return randomise(T5EncoderModel(T5Config(**T5)), 3)


def clip() -> CLIPTextModel:
    """A random CLIP text encoder."""
    return randomise(CLIPTextModel(CLIPTextConfig(**CLIP)), 4)


def clip_tokenizer() -> CLIPTokenizer:
    """Letters as tokens, end of text the largest id."""
    vocabulary = {token: i for i, token in enumerate([*LETTERS, *(f"{x}</w>" for x in LETTERS)])}
    vocabulary |= {"<|startoftext|>": len(vocabulary), "<|endoftext|>": len(vocabulary) + 1}
    return CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=CLIP["max_position_embeddings"])


def t5_tokenizer() -> PreTrainedTokenizerFast:
    """Words by their first letter; padding 0, end of text 1, unknown 2."""
    words = "cat dog red blue sits stands lies on in snow beach a the of photo hat".split()
    vocabulary = {token: i for i, token in enumerate(["<pad>", "</s>", "<unk>", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=T5_LENGTH,
    )


def write_diffusers(folder: Path, family: str = "dev", shard: str = "20KB") -> Path:
    """The diffusers layout; T5 in several shards with an index."""
    transformer(family).save_pretrained(folder / "transformer")
    autoencoder().save_pretrained(folder / "vae")
    clip().save_pretrained(folder / "text_encoder")
    t5().save_pretrained(folder / "text_encoder_2", max_shard_size=shard)
    clip_tokenizer().save_pretrained(folder / "tokenizer")
    t5_tokenizer().save_pretrained(folder / "tokenizer_2")
    FlowMatchEulerDiscreteScheduler(**SCHEDULERS[family]).save_pretrained(folder / "scheduler")
    parts = {
        "scheduler": ("diffusers", "FlowMatchEulerDiscreteScheduler"),
        "text_encoder": ("transformers", "CLIPTextModel"),
        "text_encoder_2": ("transformers", "T5EncoderModel"),
        "tokenizer": ("transformers", "CLIPTokenizer"),
        "tokenizer_2": ("transformers", "PreTrainedTokenizerFast"),
        "transformer": ("diffusers", "FluxTransformer2DModel"),
        "vae": ("diffusers", "AutoencoderKL"),
    }
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "FluxPipeline", **parts}))
    return folder


def write_wide(folder: Path) -> Path:
    """One with eight heads everywhere, so that eight devices can split it."""
    wider = (
        (FLUX, {"num_attention_heads": 8, "pooled_projection_dim": 24}),
        (CLIP, {"hidden_size": 24}),
        (T5, {"num_heads": 8, "d_ff": 48}),
    )
    with contextlib.ExitStack() as changed:
        for sizes, changes in wider:
            changed.enter_context(mock.patch.dict(sizes, changes))
        return write_diffusers(folder)
