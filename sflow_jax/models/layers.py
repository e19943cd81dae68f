"""Layers shared by the networks. Statistics are float32 whatever the weights' dtype."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import qwix
from flax import nnx
from jaxtyping import Array, Float

FP8 = jnp.float8_e4m3fn


class Buffer(nnx.Variable):
    """Numbers that are stored with a network's parameters but are none: nothing learned them."""


def check_heads(width: int, heads: int) -> None:
    """ValueError unless the heads split the width."""
    if width % heads:
        raise ValueError(f"{heads} heads do not split a width of {width}")


def check_patches(picture_size: int, patch_size: int) -> None:
    """ValueError unless a picture has a patch."""
    if patch_size > picture_size:
        raise ValueError(f"patches of {patch_size} pixels do not fit pictures of {picture_size}")


def stacked(count: int, build: Callable[[nnx.Rngs], nnx.Module], rngs: nnx.Rngs) -> nnx.Module:
    """`count` modules as one whose parameters have a leading block axis, for `jax.lax.scan`."""
    return jax.vmap(lambda key: build(nnx.Rngs(key)))(jax.random.split(rngs.params(), count))


def layer_norm(x: Float[Array, "*b d"], epsilon: float) -> Float[Array, "*b d"]:
    """Normalise the last axis to zero mean and unit variance; returns float32, no affine part."""
    x = x.astype(jnp.float32)
    centred = x - x.mean(axis=-1, keepdims=True)
    return centred * jax.lax.rsqrt((centred * centred).mean(axis=-1, keepdims=True) + epsilon)


def along_last(vector: Float[Array, " d"], like: Float[Array, "*b d"]) -> Float[Array, "*ones d"]:
    """A vector with the rank of `like`, so that products broadcast without silent rank promotion."""
    return vector.reshape((1,) * (like.ndim - 1) + vector.shape)


class Linear(nnx.Module):
    """A product over the last axes, and a bias: kernel [*inputs, *outputs], bias [*outputs].

    The kernel may be quantised: one of 8-bit whole numbers is used with the input as it is, one of 8-bit floats
    with the input in 8 bits too, one scale a row, and stored [*outputs, *inputs].
    """

    def __init__(
        self,
        inputs: int | tuple[int, ...],
        outputs: int | tuple[int, ...],
        *,
        use_bias: bool = True,
        rngs: nnx.Rngs,
    ):
        inputs, outputs = (sizes if isinstance(sizes, tuple) else (sizes,) for sizes in (inputs, outputs))
        drawn = jax.nn.initializers.lecun_normal()(rngs.params(), (math.prod(inputs), math.prod(outputs)))
        self.kernel = nnx.Param(drawn.reshape(*inputs, *outputs))
        if use_bias:
            self.bias = nnx.Param(jnp.zeros(outputs))
        self.input_axes = len(inputs)

    def product(self, x: jax.Array) -> jax.Array:
        """Without the bias."""
        kernel, last = self.kernel.get_value(), x.ndim - self.input_axes
        ours, theirs = tuple(range(last, x.ndim)), tuple(range(self.input_axes))

        def times(x: jax.Array, kernel: jax.Array) -> jax.Array:
            return jax.lax.dot_general(x, kernel, ((ours, theirs), ((), ())))

        def scaled_first(x: jax.Array, kernel: qwix.QArray) -> jax.Array:
            return times(x, (kernel.qvalue.astype(jnp.float32) * kernel.scale).astype(x.dtype))

        def scaled_last(x: jax.Array, kernel: qwix.QArray) -> jax.Array:
            y = times(x, kernel.qvalue.astype(x.dtype)).astype(jnp.float32)
            return (y * kernel.scale.reshape((1,) * last + y.shape[last:])).astype(x.dtype)

        if not is_quantised(kernel):
            return times(x, kernel)
        if kernel.qtype != FP8:
            # A GPU's library adds the bias and computes the activation with its product, if no scale comes between,
            # and widened kernels are written out anyway.
            return jax.lax.platform_dependent(x, kernel, cuda=scaled_first, default=scaled_last)
        # Stored [*outputs, *inputs]: a GPU takes both sides by rows, and would turn all kernels in every step.
        theirs = tuple(range(kernel.qvalue.ndim - self.input_axes, kernel.qvalue.ndim))
        rows = qwix.quantize(x, FP8, channelwise_axes=range(last), scale_dtype=jnp.float32)
        # In the stream's own numbers, which is half of what float32 sums would be to write and to read.
        y = jax.lax.dot_general(
            rows.qvalue, kernel.qvalue, ((ours, theirs), ((), ())), preferred_element_type=x.dtype
        ).astype(jnp.float32)
        outputs = y.shape[last:]
        y = y * kernel.scale.reshape((1,) * last + outputs)
        return (y * rows.scale.reshape(x.shape[:last] + (1,) * len(outputs))).astype(x.dtype)

    def add_bias(self, y: jax.Array) -> jax.Array:
        """What follows the product."""
        bias = self.bias[...]
        return y + bias.reshape((1,) * (y.ndim - bias.ndim) + bias.shape)

    def split(self, x: jax.Array) -> tuple[jax.Array, ...]:
        """Outputs [count, …] as so many arrays, such as q, k and v.

        Each takes its share of the bias by itself, in whatever reads it: added before, no product's own epilogue
        could do it, and the whole would be written and read once more.
        """
        y, bias = self.product(x), self.bias[...] if hasattr(self, "bias") else None
        axis = x.ndim - self.input_axes
        parts = [part.squeeze(axis) for part in jnp.split(y, y.shape[axis], axis=axis)]
        if bias is None:
            return tuple(parts)
        return tuple(part + own.reshape((1,) * axis + own.shape) for part, own in zip(parts, bias))

    def __call__(self, x: jax.Array) -> jax.Array:
        y = self.product(x)
        return self.add_bias(y) if hasattr(self, "bias") else y


class LayerNorm(nnx.Module):
    """Layer normalisation with learned scale and bias, float32 inside, input's dtype outside."""

    def __init__(self, width: int, epsilon: float):
        self.scale = nnx.Param(jnp.ones((width,)))
        self.bias = nnx.Param(jnp.zeros((width,)))
        self.epsilon = epsilon

    def __call__(self, x: Float[Array, "*b d"]) -> Float[Array, "*b d"]:
        scale, bias = along_last(self.scale[...], x), along_last(self.bias[...], x)
        return (layer_norm(x, self.epsilon) * scale + bias).astype(x.dtype)


class RMSNorm(nnx.Module):
    """Root-mean-square normalisation with a learned scale, float32 inside, input's dtype outside."""

    def __init__(self, width: int, epsilon: float):
        self.scale = nnx.Param(jnp.ones((width,)))
        self.epsilon = epsilon

    def inverse(self, x: Float[Array, "*b d"]) -> Float[Array, "*b 1"]:
        """One over the root of the mean square, float32."""
        wide = x.astype(jnp.float32)
        return jax.lax.rsqrt((wide * wide).mean(axis=-1, keepdims=True) + self.epsilon)

    def scaled(self, x: Float[Array, "*b d"]) -> Float[Array, "*b d"]:
        """Times the learned scale alone, float32."""
        return x.astype(jnp.float32) * along_last(self.scale[...], x)

    def __call__(self, x: Float[Array, "*b d"]) -> Float[Array, "*b d"]:
        return (self.scaled(x) * self.inverse(x)).astype(x.dtype)


def sinusoids(value: Float[Array, " b"], width: int, max_period: float = 10_000.0) -> Float[Array, "b width"]:
    """Sinusoidal embedding of a scalar per batch element, cosines first, float32."""
    half = width // 2
    frequencies = jnp.exp(-math.log(max_period) * jnp.arange(half, dtype=jnp.float32) / half)
    angles = value.astype(jnp.float32)[:, None] * frequencies[None]
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


def scan_layers(
    body: Callable[..., tuple[Any, Any]], carry: Any, blocks: nnx.Module, rows: Any, *, unroll: bool = False
) -> tuple[Any, Any]:
    """`carry, captured = body(carry, block, row)` over stacked blocks and the rows of `rows`.

    Returns the last carry, and what every block captured, stacked. Kernels that wait in host memory are copied to
    the device one block ahead, while the block before computes.
    """
    if not waits_on_host(blocks):
        return jax.lax.scan(lambda carry, layer: body(carry, *layer), carry, (blocks, rows), unroll=unroll)
    count = len(jax.tree.leaves(blocks)[0])

    def fetch(i: jax.Array | int) -> nnx.Module:
        one = jax.tree.map(lambda leaf: jax.lax.dynamic_index_in_dim(leaf, i, keepdims=False), blocks)
        return jax.device_put(one, jax.memory.Space.Device)

    def ahead(carry: Any, layer: Any) -> tuple[Any, Any]:
        (inner, block), (i, row) = carry, layer
        # The last block fetches itself again, which keeps the loop free of conditions.
        following = fetch(jnp.minimum(i + 1, count - 1))
        inner, captured = body(inner, block, row)
        return (inner, following), captured

    (carry, _), captured = jax.lax.scan(ahead, (carry, fetch(0)), (jnp.arange(count), rows))
    return carry, captured


def waits_on_host(module: nnx.Module) -> bool:
    """Whether any parameter is in host memory."""
    return any(jax.typeof(leaf).memory_space == jax.memory.Space.Host for leaf in jax.tree.leaves(module))


def of_every_block(linear: Linear, x: Float[Array, "b d"]) -> Float[Array, "n b o"]:
    """What a stacked linear layer makes of the same input in every block.

    One batched product, which reads the stack in place, where a scan would copy each block's kernel first. Kernels
    in host memory or in 8 bits go block by block: all of them widened on the device would be too much.
    """
    if waits_on_host(linear) or is_quantised(linear.kernel.get_value()):
        return scan_layers(lambda carry, layer, _: (carry, layer(x)), (), linear, None)[1]
    count = len(jax.tree.leaves(linear)[0])
    return jax.vmap(lambda layer, x: layer(x))(linear, jnp.broadcast_to(x, (count, *x.shape)))


def without(module: nnx.Module, name: str) -> nnx.Module:
    """The same module with no parameters in the parts of this name, for a scan that should not fetch them."""

    def keep(path: tuple[Any, ...], leaf: Any) -> Any:
        return None if f".{name}." in f".{jax.tree_util.keystr(path, simple=True, separator='.')}." else leaf

    return jax.tree_util.tree_map_with_path(keep, module)


def is_quantised(leaf: Any) -> bool:
    """Whether a leaf of a network is a quantised kernel, itself a tree of numbers and scales."""
    return isinstance(leaf, qwix.QArray)


def parameter_dtype(module: nnx.Module) -> jnp.dtype:
    """The dtype of a network's weights (they all share one, but for quantised kernels)."""
    return next(leaf.dtype for leaf in jax.tree.leaves(module, is_leaf=is_quantised) if not is_quantised(leaf))


def parameters(module: nnx.Module) -> dict[str, jax.Array | jax.ShapeDtypeStruct]:
    """Dotted path → array of every parameter, e.g. `double_blocks.image.mlp_in.kernel`, in tree order."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(module)
    # nnx ends each parameter's path with the variable's own `.value`.
    return {
        jax.tree_util.keystr(path, simple=True, separator=".").removesuffix(".value"): leaf for path, leaf in leaves
    }


def with_parameters(module: nnx.Module, values: Mapping[str, Any]) -> nnx.Module:
    """The same module (abstract or not) around other arrays, or other shapes, given by path."""
    paths = parameters(module)
    return jax.tree.unflatten(jax.tree.structure(module), [values[path] for path in paths])


def parameter_count(module: nnx.Module) -> int:
    """How many numbers the parameters hold, without buffers; works on an abstract module too."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(nnx.state(module, nnx.Param)))
