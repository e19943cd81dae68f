"""What a model needs on a mesh, from shapes alone: no weights are read and nothing is allocated."""

import json
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding
from jax.stages import Lowered
from jax.typing import DTypeLike

from sflow_jax.checkpoint import CheckpointError, ModelInfo, abstract_network, load_info
from sflow_jax.embedded import resolve
from sflow_jax.latents import Canvas
from sflow_jax.models.autoencoder import AutoencoderConfig
from sflow_jax.models.clip import ClipTextConfig
from sflow_jax.models.flux import FluxConfig
from sflow_jax.models.layers import parameters, with_parameters
from sflow_jax.models.t5 import T5Config
from sflow_jax.programs import step_latents
from sflow_jax.prompts import TOKENIZERS
from sflow_jax.sampling import Step
from sflow_jax.sharding import batch_sharding, parameter_shardings

# Name → transformer, text tokens, scheduler of the published models.
PUBLISHED: dict[str, tuple[FluxConfig, int, dict[str, Any]]] = {
    "flux-dev": (FluxConfig.dev(), 512, {"use_dynamic_shifting": True, "shift": 3.0}),
    "flux-schnell": (FluxConfig.schnell(), 256, {"use_dynamic_shifting": False, "shift": 1.0}),
}


def find_info(model: str) -> tuple[ModelInfo, int]:
    """What a checkpoint is, and its number of text tokens: a converted folder's, or a published model's by name.

    Raises CheckpointError for anything else.
    """
    folder = resolve(model)
    if model in PUBLISHED and not folder.exists():
        transformer, words, scheduler = PUBLISHED[model]
        configs = {
            "transformer": transformer,
            "autoencoder": AutoencoderConfig.flux(),
            "t5": T5Config.xxl(),
            "clip": ClipTextConfig.large(),
        }
        return ModelInfo(model.removeprefix("flux-"), 1024, "bfloat16", configs, scheduler), words
    info = load_info(folder)
    file = folder / TOKENIZERS["t5"] / "tokenizer_config.json"
    try:
        return info, int(json.loads(file.read_text())["model_max_length"])
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"cannot read {file}; convert the source again") from error


def planned_devices(count: int) -> list[jax.Device]:
    """So many devices to plan for, made up on the CPU where nothing has touched a device yet.

    ValueError where there are fewer and it is too late to make some up.
    """
    try:
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", count)
    except RuntimeError:
        pass
    devices = jax.devices("cpu")
    if len(devices) < count:
        raise ValueError(f"a mesh of {count} devices cannot be planned after {len(devices)} are in use; start anew")
    return devices[:count]


def weight_bytes(configs: Mapping[str, Any], dtype: DTypeLike, mesh: Mesh | None) -> dict[str, int]:
    """Network → bytes of its weights on every device; ValueError where the mesh cannot split one."""
    found = {}
    for name, config in configs.items():
        shapes = {path: leaf.shape for path, leaf in parameters(abstract_network(name, config)).items()}
        places = parameter_shardings(name, shapes, mesh)
        numbers = sum(math.prod(places[path].shard_shape(shape)) for path, shape in shapes.items())
        found[name] = numbers * jnp.dtype(dtype).itemsize
    return found


def lower_step(
    config: FluxConfig,
    *,
    dtype: DTypeLike,
    mesh: Mesh | None,
    groups: int,
    members: int,
    canvas: Canvas,
    words: int,
    kernel: str = "xla",
) -> Lowered:
    """One denoising step of a full-size model, lowered from abstract arguments: `.compile()` tells its memory.

    groups × members: the batch; words: text tokens.
    """
    module = abstract_network("transformer", config)
    leaves = parameters(module)
    places = parameter_shardings("transformer", {path: leaf.shape for path, leaf in leaves.items()}, mesh)
    weights = {path: jax.ShapeDtypeStruct(x.shape, dtype, sharding=places[path]) for path, x in leaves.items()}
    rows, batch = batch_sharding(mesh, groups), groups * members
    everywhere = (
        SingleDeviceSharding(jax.local_devices()[0]) if mesh is None else NamedSharding(mesh, PartitionSpec())
    )

    def array(shape, dtype=jnp.float32, place=everywhere) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=place)

    mask, state = array((batch, config.layers), bool), array((groups, canvas.tokens, config.in_channels))
    text = array((batch, words, config.text_width), dtype, rows), array((batch, config.pooled_width), dtype, rows)
    return step_latents.lower(
        with_parameters(module, weights),
        text,
        array((batch,)),
        array((canvas.tokens, 3)),
        array((batch, canvas.tokens, config.in_channels), place=rows),
        Step(array(()), array(()), array(()), mask, mask, state, state, array((), bool)),
        sharding=rows,
        kernel=kernel,
    )
