"""Layers shared by the networks. Statistics are float32 whatever the weights' dtype."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float


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

    def __call__(self, x: Float[Array, "*b d"]) -> Float[Array, "*b d"]:
        wide = x.astype(jnp.float32)
        inverse = jax.lax.rsqrt((wide * wide).mean(axis=-1, keepdims=True) + self.epsilon)
        return (wide * inverse * along_last(self.scale[...], x)).astype(x.dtype)


def sinusoids(value: Float[Array, " b"], width: int, max_period: float = 10_000.0) -> Float[Array, "b width"]:
    """Sinusoidal embedding of a scalar per batch element, cosines first, float32."""
    half = width // 2
    frequencies = jnp.exp(-math.log(max_period) * jnp.arange(half, dtype=jnp.float32) / half)
    angles = value.astype(jnp.float32)[:, None] * frequencies[None]
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


def parameter_dtype(module: nnx.Module) -> jnp.dtype:
    """The dtype of a network's weights (they all share one)."""
    return jax.tree.leaves(module)[0].dtype


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
    """How many numbers the parameters hold; works on an abstract module too."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(module))
