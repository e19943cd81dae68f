"""Structure distance: how far the layout of a picture moved, by a vision transformer's keys (Tumanyan et al. 2022).

Every patch's key in the last layer is compared with every other's; two pictures have the same structure where these
tables of similarities agree, whatever the colours. Axes: b batch, y rows, x columns, l tokens, d width.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float, Real

from sflow_jax.arrays import AnyArray
from sflow_jax.measures.features import Features

EPSILON = 1e-8


def self_similarity(keys: Float[AnyArray, "b l d"]) -> Float[Array, "b l l"]:
    """Cosine similarity of every two tokens of each picture, −1..1, float32."""
    wide = jnp.asarray(keys, jnp.float32)
    lengths = jnp.linalg.norm(wide, axis=-1)
    products = jnp.einsum("bld,bmd->blm", wide, wide, precision="highest")
    return products / jnp.maximum(lengths[:, :, None] * lengths[:, None, :], EPSILON)


def structure_distance(
    features: Features, pictures: Real[AnyArray, "b y x 3"], references: Real[AnyArray, "b y x 3"]
) -> Float[Array, " b"]:
    """Mean squared difference of the two tables of similarities, float32; levels 0..255; jit-compatible.

    The class token and all patches count; registers do not. Published figures are made with DINO ViT-B/8 at 224
    pixels; here it is the DINOv2 that was converted, at its own preprocessing, so compare only rows of one table.
    ValueError for features of another kind.
    """
    if features.kind != "dinov2":
        raise ValueError(f"structure distance needs a dinov2, found a {features.kind}")
    tables = [
        self_similarity(features.network.last_keys(features.preprocessing(x))) for x in (pictures, references)
    ]
    return jnp.mean(jnp.square(tables[0] - tables[1]), axis=(1, 2))
