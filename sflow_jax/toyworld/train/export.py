"""Stages `export` and `export-sd3`: networks under their published names, in the folder layouts of diffusers."""

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from safetensors.numpy import save_file
from sflow_convert import autoencoder, engine, flux, sd3, text_encoders, vision

from sflow_jax.embedded import VITAL_LAYERS_FILE
from sflow_jax.models.layers import parameters
from sflow_jax.toyworld.attributes import ATTRIBUTES, DETAIL_RANGES
from sflow_jax.toyworld.train.hf import (
    MODEL_INDEX,
    SCHEDULER,
    SD3_MODEL_INDEX,
    SD3_SCHEDULER,
    clip_config,
    clip_text_config,
    dinov2_config,
    flux_config,
    preprocessor_config,
    sd3_config,
    t5_config,
    vae_config,
)
from sflow_jax.toyworld.train.pool import NAMED, UNNAMED
from sflow_jax.toyworld.train.stages import Training
from sflow_jax.toyworld.train.tokenizers import save_tokenizers
from sflow_jax.toyworld.train.vision import CLIP_STATISTICS, DINO_STATISTICS, Reader

DTYPE = np.float16
DIFFUSERS_WEIGHTS = "diffusion_pytorch_model.safetensors"
TRANSFORMERS_WEIGHTS = "model.safetensors"


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write one of the folder's JSON files."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")


def write_network(path: Path, network: nnx.Module, table: engine.Table, config: dict[str, Any]) -> None:
    """Weights at `path` under the table's names, half precision, and `config.json` beside them."""
    arrays = {name: np.asarray(leaf, DTYPE) for name, leaf in parameters(network).items()}
    reads = engine.plan_reads(table, {name: array.shape for name, array in arrays.items()})
    tensors = engine.export(reads, arrays)
    write_json(path.parent / "config.json", config)
    # "format" is what transformers asks of a file before it reads it.
    contiguous = {name: np.array(x, order="C") for name, x in tensors.items()}
    save_file(contiguous, path, metadata={"format": "pt"})


def write_reader(folder: Path, reader: Reader) -> None:
    """The linear layers that read attributes from DINOv2's class token, as [classes, width] and [classes]."""
    heads = {**{name: reader.named[name] for name in NAMED}, "unnamed": reader.unnamed}
    tensors = {}
    for name, layer in heads.items():
        tensors[f"{name}.weight"] = np.ascontiguousarray(np.asarray(layer.kernel[...], DTYPE).T)
        tensors[f"{name}.bias"] = np.asarray(layer.bias[...], DTYPE)
    write_json(
        folder / "config.json",
        {
            "named": {name: list(ATTRIBUTES[name]) for name in NAMED},
            "unnamed": {name: list(DETAIL_RANGES.get(name, (-1.0, 1.0))) for name in UNNAMED},
        },
    )
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def export(training: Training, assets: Path, transformer: str = "distill") -> None:
    """Write the folder; `transformer` names the stage that gives it (`flow` before there is a student).

    All stages before it must have run.
    """
    plan = training.plan
    world = training.world()
    model, reader, clip = (training.trained(name) for name in (transformer, "dino", "clip"))
    vae = world.autoencoder.config
    write_json(assets / "model_index.json", MODEL_INDEX)
    write_json(assets / "scheduler" / "scheduler_config.json", SCHEDULER)
    save_tokenizers(assets)
    networks = {
        f"transformer/{DIFFUSERS_WEIGHTS}": (model, flux.diffusers_table(plan.flux), flux_config(plan.flux)),
        f"vae/{DIFFUSERS_WEIGHTS}": (
            world.autoencoder,
            autoencoder.diffusers_table(vae),
            vae_config(vae, plan.size),
        ),
        f"text_encoder/{TRANSFORMERS_WEIGHTS}": (
            clip.text,
            text_encoders.clip_text_table(plan.clip.text),
            clip_text_config(plan.clip),
        ),
        f"text_encoder_2/{TRANSFORMERS_WEIGHTS}": (world.t5, text_encoders.t5_table(plan.t5), t5_config(plan.t5)),
        f"clip/{TRANSFORMERS_WEIGHTS}": (clip, vision.clip_table(plan.clip), clip_config(plan.clip)),
        f"dinov2/{TRANSFORMERS_WEIGHTS}": (
            reader.network,
            vision.dinov2_table(plan.dino),
            dinov2_config(plan.dino),
        ),
    }
    for path, (network, table, config) in networks.items():
        write_network(assets / path, jax.device_get(network), table, config)
    for name, statistics in (("clip", CLIP_STATISTICS), ("dinov2", DINO_STATISTICS)):
        write_json(assets / name / "preprocessor_config.json", preprocessor_config(plan.size, statistics))
    write_reader(assets / "reader", reader)


def export_sd3(training: Training, folder: Path) -> None:
    """Write what of the embedded SD3 is its own: the transformer, the schedule, and no vital layers yet."""
    config = training.plan.sd3
    write_json(folder / "model_index.json", SD3_MODEL_INDEX)
    write_json(folder / "scheduler" / "scheduler_config.json", SD3_SCHEDULER)
    write_json(folder / VITAL_LAYERS_FILE, {"layers": None, "origin": ""})
    weights, model = folder / "transformer" / DIFFUSERS_WEIGHTS, jax.device_get(training.trained("sd3"))
    write_network(weights, model, sd3.diffusers_table(config), sd3_config(config))
