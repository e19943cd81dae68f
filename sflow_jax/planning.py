"""What a model needs on a mesh, from shapes alone: no weights are read and nothing is allocated."""

import json
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import AbstractMesh, Mesh
from jax.stages import Lowered
from jax.typing import DTypeLike

from sflow_jax.attention import AUTOMATIC
from sflow_jax.checkpoint import CheckpointError, ModelInfo, abstract_network, load_info
from sflow_jax.embedded import resolve
from sflow_jax.hardware import Chip
from sflow_jax.latents import PATCH, Canvas
from sflow_jax.models.autoencoder import AutoencoderConfig
from sflow_jax.models.clip import ClipTextConfig
from sflow_jax.models.flux import FluxConfig
from sflow_jax.models.layers import parameters, with_parameters
from sflow_jax.models.t5 import T5Config
from sflow_jax.programs import decode, step_latents
from sflow_jax.prompts import TOKENIZERS, t5_features
from sflow_jax.sampling import Step
from sflow_jax.sharding import AXES, AnyMesh, batch_sharding, parameter_shardings

GIB = 2**30
# Bytes of a chip for all but weights: temporaries, inputs, the compiled programs, pictures being decoded.
RESERVE = 4 * GIB

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


def weight_bytes(configs: Mapping[str, Any], dtype: DTypeLike, mesh: AnyMesh | None) -> dict[str, int]:
    """Network → bytes of its weights on every device; ValueError where the mesh cannot split one."""
    found = {}
    for name, config in configs.items():
        shapes = {path: leaf.shape for path, leaf in parameters(abstract_network(name, config)).items()}
        places = parameter_shardings(name, shapes, mesh)
        numbers = sum(math.prod(places[path].shard_shape(shape)) for path, shape in shapes.items())
        found[name] = numbers * jnp.dtype(dtype).itemsize
    return found


def step_flops(config: FluxConfig, tokens: int, words: int, batch: int) -> float:
    """Floating point operations of one step: the products over tokens (a multiply-add is two), and attention.

    tokens: of the image; words: of the text. Norms, softmax, and products of one vector a picture are left out.
    """
    joint, width = tokens + words, config.width
    # q, k, v and out take 4 d², the MLP 2 · ratio · d², in a block of either kind.
    products = 2 * (4 + 2 * config.mlp_ratio) * width**2 * joint * config.layers
    attention = 4 * joint**2 * width * config.layers
    ends = 2 * width * (2 * config.in_channels * tokens + config.text_width * words)
    return float(batch * (products + attention + ends))


def roofline(
    config: FluxConfig, chip: Chip, chips: int, tokens: int, words: int, batch: int, *, weights: float, sent: float
) -> dict[str, Any]:
    """The least seconds of one step by published peaks: of products, memory and network, and which bounds it.

    All three overlap, and the batch is spread evenly over the chips. weights: bytes that every chip reads; sent:
    bytes that it sends.
    """
    seconds = {
        "product": step_flops(config, tokens, words, batch) / (chips * chip.flops),
        "memory": weights / chip.bandwidth,
        "network": sent / chip.network,
    }
    bound = max(seconds, key=seconds.get)
    times = {f"{part}_seconds": value for part, value in seconds.items()}
    return {**times, "step_seconds": seconds[bound], "bound": bound}


def propose_mesh(configs: Mapping[str, Any], chip: Chip, devices: int, work: str) -> tuple[dict[str, int], str]:
    """Axis sizes for so many chips, and why.

    work: "edit", where a picture should be there soon: split it over as many chips as its heads allow. "sweep",
    where many pictures should: split a model only as far as it must be to fit, and pictures over the rest.
    configs: network → config. Raises ValueError where the weights do not fit.
    """
    sizes = [
        size
        for size in range(1, devices + 1)
        if devices % size == 0 and all(configs[name].heads % size == 0 for name in ("transformer", "t5"))
    ]
    needed = {}
    for size in sizes:
        mesh = AbstractMesh((devices // size, 1, size), AXES)
        needed[size] = sum(weight_bytes(configs, jnp.bfloat16, mesh).values()) + RESERVE
    fitting = [size for size in sizes if needed[size] <= chip.memory]
    if not fitting:
        raise ValueError(
            f"{devices} {chip.name} cannot hold this model: {min(needed.values()) / GIB:.1f} GiB a chip are needed "
            f"and {chip.memory / GIB:.1f} there; take more chips, --quantize or --offload"
        )
    tensor = max(fitting) if work == "edit" else min(fitting)
    why = "every chip works on one picture" if work == "edit" else "the least split that fits"
    told = f"tensor={tensor}: {why}, {needed[tensor] / GIB:.1f} of {chip.memory / GIB:.1f} GiB a chip"
    if devices > tensor:
        told += f"; data={devices // tensor}: so many groups of pictures at once"
    return {"data": devices // tensor, "tensor": tensor}, told


def abstract_weights(name: str, config: Any, dtype: DTypeLike, mesh: Mesh | None) -> nnx.Module:
    """A network of shapes with the places that its parameters have on a mesh."""
    module = abstract_network(name, config)
    leaves = parameters(module)
    places = parameter_shardings(name, {path: leaf.shape for path, leaf in leaves.items()}, mesh)
    return with_parameters(
        module, {path: jax.ShapeDtypeStruct(x.shape, dtype, sharding=places[path]) for path, x in leaves.items()}
    )


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
) -> Lowered:
    """One denoising step of a full-size model, lowered from abstract arguments: `.compile()` tells its memory.

    groups × members: the batch; words: text tokens.
    """
    rows, everywhere, batch = batch_sharding(mesh, groups), batch_sharding(mesh, 1), groups * members

    def array(shape, dtype=jnp.float32, place=everywhere) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=place)

    mask, state = array((batch, config.layers), bool), array((groups, canvas.tokens, config.in_channels))
    text = array((batch, words, config.text_width), dtype, rows), array((batch, config.pooled_width), dtype, rows)
    return step_latents.lower(
        abstract_weights("transformer", config, dtype, mesh),
        text,
        array((batch,)),
        array((canvas.tokens, 3)),
        array((batch, canvas.tokens, config.in_channels), place=rows),
        Step(array(()), array(()), array(()), mask, mask, state, state, array((), bool)),
        sharding=rows,
        kernel=kernel,
    )
