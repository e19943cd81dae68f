"""What a model needs on a mesh, from shapes alone: no weights are read and nothing is allocated."""

import json
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh
from jax.stages import Lowered
from jax.typing import DTypeLike

from sflow_jax.attention import AUTOMATIC
from sflow_jax.checkpoint import CheckpointError, ModelInfo, abstract_network, load_info
from sflow_jax.embedded import resolve
from sflow_jax.latents import PATCH, Canvas
from sflow_jax.models.autoencoder import AutoencoderConfig
from sflow_jax.models.clip import ClipTextConfig
from sflow_jax.models.flux import FluxConfig
from sflow_jax.models.layers import parameters, with_parameters
from sflow_jax.models.t5 import T5Config
from sflow_jax.placement import HOST, settle
from sflow_jax.programs import decode, step_latents
from sflow_jax.prompts import TOKENIZERS, t5_features
from sflow_jax.sampling import Step
from sflow_jax.sharding import AnyMesh, batch_sharding, parameter_shardings

GIB = 2**30

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


def weight_bytes(
    configs: Mapping[str, Any],
    dtype: DTypeLike,
    mesh: AnyMesh | None,
    *,
    quantisation: str | None = None,
    offload: bool = False,
) -> dict[str, int]:
    """Network → bytes of its weights in the memory of every device; ValueError where the mesh cannot split one.

    quantisation: of the transformer and T5; offload: of the transformer.
    """
    found = {}
    for name, config in configs.items():
        changes = {
            "quantisation": quantisation if name in ("transformer", "t5") else None,
            "offload": offload and name == "transformer",
        }
        leaves = jax.tree.leaves(abstract_weights(name, config, dtype, mesh, **changes))
        found[name] = sum(
            math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
            for leaf in leaves
            if leaf.sharding.memory_kind != HOST
        )
    return found


def abstract_weights(
    name: str,
    config: Any,
    dtype: DTypeLike,
    mesh: AnyMesh | None,
    *,
    quantisation: str | None = None,
    offload: bool = False,
) -> nnx.Module:
    """A network of shapes with the places that its parameters have on a mesh."""
    module = abstract_network(name, config)
    leaves = parameters(module)
    places = parameter_shardings(name, {path: leaf.shape for path, leaf in leaves.items()}, mesh)
    stored = with_parameters(
        module, {p: jax.ShapeDtypeStruct(x.shape, jnp.dtype(dtype)) for p, x in leaves.items()}
    )
    return settle(stored, places, quantisation=quantisation, offload=offload)


def lower_text(config: T5Config, *, dtype: DTypeLike, mesh: Mesh | None, words: int) -> Lowered:
    """One prompt through T5, lowered from abstract arguments."""
    ids = jax.ShapeDtypeStruct((1, words), jnp.int32, sharding=batch_sharding(mesh, 1))
    return t5_features.lower(abstract_weights("t5", config, dtype, mesh), ids)


def lower_decode(
    config: AutoencoderConfig, *, dtype: DTypeLike, mesh: Mesh | None, pictures: int, canvas: Canvas
) -> Lowered:
    """Latents to pictures, lowered from abstract arguments."""
    shape = (pictures, canvas.tokens, config.latent_channels * PATCH**2)
    latents = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=batch_sharding(mesh, pictures))
    weights = abstract_weights("autoencoder", config, dtype, mesh)
    return decode.lower(weights, latents, rows=canvas.rows, columns=canvas.columns)


def lower_step(
    config: FluxConfig,
    *,
    dtype: DTypeLike,
    mesh: Mesh | None,
    groups: int,
    members: int,
    canvas: Canvas,
    words: int,
    kernel: str = AUTOMATIC,
    quantisation: str | None = None,
    offload: bool = False,
    platforms: tuple[str, ...] | None = None,
) -> Lowered:
    """One denoising step of a full-size model, lowered from abstract arguments: `.compile()` tells its memory.

    groups × members: the batch; words: text tokens. quantisation, offload: see `sflow_jax.placement`. platforms:
    lower for these ("cuda", "tpu") whatever the devices are; such a program cannot be compiled here.
    """
    rows, everywhere, batch = batch_sharding(mesh, groups), batch_sharding(mesh, 1), groups * members

    def array(shape, dtype=jnp.float32, place=everywhere) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=place)

    mask, state = array((batch, config.layers), bool), array((groups, canvas.tokens, config.in_channels))
    text = array((batch, words, config.text_width), dtype, rows), array((batch, config.pooled_width), dtype, rows)
    traced = step_latents.trace(
        abstract_weights("transformer", config, dtype, mesh, quantisation=quantisation, offload=offload),
        text,
        array((batch,)),
        array((canvas.tokens, 3)),
        array((batch, canvas.tokens, config.in_channels), place=rows),
        Step(array(()), array(()), array(()), mask, mask, state, state, array((), bool)),
        sharding=rows,
        kernel=kernel,
    )
    return traced.lower(lowering_platforms=platforms)
