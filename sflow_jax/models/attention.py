"""Joint attention, rotary position embedding, and the choice of attention kernel.

Axes: b batch, l joint tokens (text first, then image), h heads, k head dimension.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec, Sharding
from jaxtyping import Array, Float

from sflow_jax.arrays import AnyArray
from sflow_jax.errors import SettingError
from sflow_jax.machine.meshes import TENSOR, platform
from sflow_jax.settings import AUTOMATIC

Kernel = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
# Below so many tokens the scores are small, and XLA's fused products need no kernel.
SHORT = 512
# Splash attention works in blocks of whole lanes, so many tokens at most.
LANES, LARGEST_BLOCK = 128, 1024
# Share of padded tokens that a larger block is worth.
PADDING = 0.03
# On CPUs: from so many tokens on blocks are faster, at most so many queries a block of one head, and of all heads.
CPU_SHORT, HEAD_BLOCK, JOINT_BLOCK = 192, 256, 128


def xla_attention(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
    """Attention written out for XLA: scores and softmax in float32, memory quadratic in the tokens."""
    scale = query.shape[-1] ** -0.5
    # Scaling the query costs l·k products, scaling the scores would cost l·l.
    scores = jnp.einsum("blhk,bmhk->bhlm", query * scale, key, preferred_element_type=jnp.float32)
    # Softmax by hand: dividing after the second product touches l·k numbers instead of l·l.
    weights = jnp.exp(scores - scores.max(axis=-1, keepdims=True))
    totals = weights.sum(axis=-1)
    mixed = jnp.einsum("bhlm,bmhk->blhk", weights.astype(value.dtype), value, preferred_element_type=jnp.float32)
    return (mixed / totals.swapaxes(1, 2)[..., None]).astype(value.dtype)


def _mix(
    query: Float[Array, "*n l k"],
    key: Float[Array, "*n k m"],
    value: Float[Array, "*n m v"],
    bias: Float[Array, "#*n l m"] | None = None,
) -> Float[Array, "*n l v"]:
    """Attention of scaled queries, keys transposed: scores and softmax in float32, divided at the end."""
    scores = jnp.einsum("...lk,...km->...lm", query, key, preferred_element_type=jnp.float32)
    if bias is not None:
        scores += bias
    weights = jnp.exp(scores - scores.max(axis=-1, keepdims=True))
    totals = weights.sum(axis=-1, keepdims=True)
    mixed = jnp.einsum("...lm,...mv->...lv", weights.astype(value.dtype), value, preferred_element_type=jnp.float32)
    return (mixed / totals).astype(value.dtype)


def _in_blocks(x: Float[Array, "*n l k"], most: int) -> Float[Array, "*n blocks size k"]:
    """Rows in as few even blocks as hold at most so many, padded with zeros."""
    *leading, rows, width = x.shape
    blocks = -(-rows // most)
    size = -(-rows // blocks)
    padded = jnp.pad(x, (*[(0, 0)] * len(leading), (0, blocks * size - rows), (0, 0)))
    return padded.reshape(*leading, blocks, size, width)


def block_attention(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
    """For CPUs: a head at a time, blocks of queries against all keys, so that scores never leave the cache.

    Memory is linear in the tokens.
    """
    batch, tokens, heads, width = query.shape
    query, key, value = (x.swapaxes(1, 2).reshape(-1, tokens, width) for x in (query * width**-0.5, key, value))

    def attend(head: tuple[jax.Array, ...]) -> jax.Array:
        blocks, key, value = head
        return jax.lax.map(lambda block: _mix(block, key, value), blocks)

    mixed = jax.lax.map(attend, (_in_blocks(query, HEAD_BLOCK), key.swapaxes(1, 2), value))
    return mixed.reshape(batch, heads, -1, width)[:, :, :tokens].swapaxes(1, 2)


def extended_attention(
    query: Float[Array, "b l h k"],
    key: Float[Array, "b l h k"],
    value: Float[Array, "b l h k"],
    source_key: Float[Array, "b s h k"],
    source_value: Float[Array, "b s h k"],
    weight: Float[Array, "b l"],
) -> Float[Array, "b l h k"]:
    """Attention to the own tokens and, beside them, to a source's: those count `weight` times (0 is not at all).

    Written out for XLA on every platform: memory is quadratic in the tokens.
    """
    scaled = query * query.shape[-1] ** -0.5
    own, beside = (
        jnp.einsum("blhk,bmhk->bhlm", scaled, keys, preferred_element_type=jnp.float32)
        for keys in (key, source_key)
    )
    share = weight.astype(jnp.float32)[:, None, :, None]
    # Scores that do not count must not push the others below what can be computed with.
    top = jnp.maximum(
        own.max(axis=-1, keepdims=True), jnp.where(share > 0, beside.max(axis=-1, keepdims=True), -jnp.inf)
    )
    weights = jnp.exp(own - top), share * jnp.exp(jnp.minimum(beside - top, 0))
    totals = sum(part.sum(axis=-1) for part in weights)
    mixed = sum(
        jnp.einsum("bhlm,bmhk->blhk", part.astype(values.dtype), values, preferred_element_type=jnp.float32)
        for part, values in zip(weights, (value, source_value))
    )
    return (mixed / totals.swapaxes(1, 2)[..., None]).astype(value.dtype)


def attention_weights(
    query: Float[Array, "b q h k"],
    key: Float[Array, "b l h k"],
    source_key: Float[Array, "b s h k"] | None = None,
    weight: Float[Array, "b q"] | None = None,
) -> Float[Array, "b q l_or_l_plus_s"]:
    """How some queries share their attention among all keys, the mean over heads, float32: rows add up to one.

    source_key, weight: those of a source stand beside the own ones, and count `weight` times, as
    `extended_attention` has it. Memory is queries × tokens.
    """
    scaled = query * query.shape[-1] ** -0.5

    def scores(keys: jax.Array) -> jax.Array:
        return jnp.einsum("bqhk,bmhk->bhqm", scaled, keys, preferred_element_type=jnp.float32)

    parts = [scores(key)]
    if source_key is not None:
        # Nothing is e^-inf: such a key gets no share.
        parts.append(scores(source_key) + jnp.log(weight.astype(jnp.float32))[:, None, :, None])
    return jax.nn.softmax(jnp.concatenate(parts, axis=-1), axis=-1).mean(axis=1)


def cudnn_attention(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
    """cuDNN's flash attention (NVIDIA GPUs, 16-bit numbers); memory linear in the tokens."""
    return jax.nn.dot_product_attention(query, key, value, implementation="cudnn")


def block_size(tokens: int) -> int:
    """Tokens a block of splash attention: as many as possible while padding stays below `PADDING`, or is least."""
    blocks = range(LARGEST_BLOCK, 0, -LANES)
    return next(
        (block for block in blocks if -tokens % block <= PADDING * tokens),
        min(blocks, key=lambda block: -tokens % block),
    )


def splash_attention(query: jax.Array, key: jax.Array, value: jax.Array, *, interpret: bool = False) -> jax.Array:
    """Splash attention (TPUs); memory linear in the tokens. interpret: run the kernel step by step, anywhere."""
    from jax.experimental.pallas.ops.tpu import splash_attention as splash  # takes a while to import

    _, tokens, heads, width = query.shape
    block = block_size(tokens)
    length = tokens + -tokens % block
    # Heads are padded to whole lanes with zeros, tokens to whole blocks, which a segment of their own hides.
    spare = ((0, 0), (0, 0), (0, length - tokens), (0, -width % LANES))
    padded = [jnp.pad(x.swapaxes(1, 2), spare) for x in (query * width**-0.5, key, value)]
    segments = None
    if length > tokens:
        segment = jnp.asarray(np.arange(length) >= tokens, jnp.int32)
        segments = splash.SegmentIds(q=segment, kv=segment)
    kernel = splash.make_splash_mha_single_device(
        splash.MultiHeadMask([splash.FullMask((length, length))] * heads),
        block_sizes=splash.BlockSizes(block_q=block, block_kv=block, block_kv_compute=block),
        interpret=interpret,
    )
    mixed = jax.vmap(lambda query, key, value: kernel(query, key, value, segments))(*padded)
    return mixed[:, :, :tokens, :width].swapaxes(1, 2)


KERNELS: dict[str, Kernel] = {
    "xla": xla_attention,
    "blocks": block_attention,
    "cudnn": cudnn_attention,
    "splash": splash_attention,
}


def choose_kernel(device: str, tokens: int, head_dim: int, dtype: jnp.dtype) -> str:
    """The kernel for a platform: blocks on CPUs, cuDNN's on GPUs, splash on TPUs, XLA's for short sequences.

    cuDNN takes 16-bit numbers and heads of at most 128 (a multiple of 8); XLA does the others.
    """
    if device == "cpu":
        return "blocks" if tokens >= CPU_SHORT else "xla"
    if tokens < SHORT:
        return "xla"
    if device == "gpu" and jnp.dtype(dtype).itemsize == 2 and head_dim <= 128 and head_dim % 8 == 0:
        return "cudnn"
    return "splash" if device == "tpu" else "xla"


def joint_attention(
    query: Float[Array, "b l h k"],
    key: Float[Array, "b l h k"],
    value: Float[Array, "b l h k"],
    *,
    kernel: str = AUTOMATIC,
    sharding: Sharding | None = None,
) -> Float[Array, "b l h k"]:
    """Full attention over text and image tokens, no mask, scores divided by sqrt(k).

    kernel: an entry of `KERNELS`, or "auto", see `choose_kernel`. sharding: how arrays with a batch axis are
    placed; on a mesh every device computes its own heads and groups. Raises ValueError for another kernel's
    name, and for cuDNN with numbers or heads that it does not take.
    """
    device, width = platform(sharding), query.shape[-1]
    if kernel == AUTOMATIC:
        kernel = choose_kernel(device, query.shape[1], width, query.dtype)
    if kernel not in KERNELS:
        raise SettingError(f"unknown `attention` {kernel!r}; choose one of {', '.join((AUTOMATIC, *KERNELS))}")
    if kernel == "xla":
        return xla_attention(query, key, value)
    if kernel == "cudnn" and choose_kernel("gpu", SHORT, width, query.dtype) != "cudnn":
        raise SettingError(
            f"cuDNN's `attention` takes 16-bit numbers and heads of at most 128, found {query.dtype} and heads of "
            f"{width}; choose xla, or `dtype` bfloat16"
        )
    compute = KERNELS[kernel]
    if kernel == "splash":
        compute = functools.partial(splash_attention, interpret=device != "tpu")
    if isinstance(sharding, NamedSharding):
        # Custom kernels cannot be split by the compiler.
        spec = PartitionSpec(*(sharding.spec or (None,)), None, TENSOR, None)
        compute = jax.shard_map(
            compute, mesh=sharding.mesh, in_specs=(spec, spec, spec), out_specs=spec, check_vma=False
        )
    return compute(query, key, value)


def self_attention(
    query: Float[Array, "b l h k"],
    key: Float[Array, "b l h k"],
    value: Float[Array, "b l h k"],
    *,
    bias: Float[Array, "h l l"] | None = None,
    scale: float | None = None,
) -> Float[Array, "b l h k"]:
    """Attention of the other networks: jax's own, but for long sequences on CPUs, which go in blocks of queries.

    bias: added to the scores. scale: of the scores, by default 1/sqrt(k). Nothing is known of a mesh here, so all
    heads of a block go together: batch and heads may be split as they are.
    """
    if query.shape[1] < CPU_SHORT:
        return _jax_attention(query, key, value, bias=bias, scale=scale)
    # Chosen when the program is lowered, since it may be for another platform than this process's.
    return jax.lax.platform_dependent(
        query,
        key,
        value,
        bias,
        cpu=functools.partial(_query_blocks, scale=scale),
        default=functools.partial(_jax_attention, scale=scale),
    )


def _jax_attention(
    query: jax.Array, key: jax.Array, value: jax.Array, bias: jax.Array | None, scale: float | None
) -> jax.Array:
    bias = None if bias is None else bias[None]
    return jax.nn.dot_product_attention(query, key, value, bias=bias, scale=scale)


def _query_blocks(
    query: jax.Array, key: jax.Array, value: jax.Array, bias: jax.Array | None, scale: float | None
) -> jax.Array:
    """All heads at a time, blocks of queries against all keys."""
    tokens, width = query.shape[1], query.shape[3]
    query = query * (width**-0.5 if scale is None else scale)
    query, key, value = (x.swapaxes(1, 2) for x in (query, key, value))
    key = key.swapaxes(2, 3)
    rows = [jnp.moveaxis(_in_blocks(query, JOINT_BLOCK), 2, 0)]
    if bias is not None:
        rows.append(jnp.moveaxis(_in_blocks(bias, JOINT_BLOCK), 1, 0)[:, None])
    mixed = jnp.moveaxis(jax.lax.map(lambda block: _mix(block[0], key, value, *block[1:]), rows), 0, 2)
    return mixed.reshape(*mixed.shape[:2], -1, width)[:, :, :tokens].swapaxes(1, 2)


def rotary_angles(
    position_ids: Float[AnyArray, "l axes"], axes: tuple[int, ...], theta: float
) -> Float[Array, "l half_k"]:
    """Rotation angle of every token and rotary pair, in radians, float32.

    Axis i of the position ids drives `axes[i] / 2` pairs with frequencies theta^(-2j / axes[i]).
    """
    angles = []
    for axis, width in enumerate(axes):
        frequencies = theta ** (-np.arange(0, width, 2, dtype=np.float64) / width)
        angles.append(position_ids[:, axis, None] * jnp.asarray(frequencies, jnp.float32)[None])
    return jnp.concatenate(angles, axis=-1)


def rotate(
    x: Float[Array, "b l h k"], angles: Float[Array, "l half_k"] | Float[Array, "b 1 half_k"]
) -> Float[Array, "b l h k"]:
    """Apply rotary position embedding, in float32, to queries or keys; angles a token, or a batch element.

    Pairs are (i, i + k/2): the converter reorders each head's channels from the published
    (2i, 2i + 1), which leaves every query-key product as it was and avoids strided access.
    """
    turns = angles.reshape(-1, *angles.shape[-2:])[:, :, None]  # b or 1, l or 1, 1, half_k
    cos, sin = jnp.cos(turns), jnp.sin(turns)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)
