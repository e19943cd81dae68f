"""Stable Flow in JAX: find the vital layers of FLUX and edit pictures with them, without training."""

from sflow_jax.control import FLUX_DEV_CODE, FLUX_DEV_PAPER, LayerControl
from sflow_jax.pipeline import StableFlow
from sflow_jax.results import Edit, Generation, Inversion
from sflow_jax.sharding import make_mesh

__all__ = [
    "FLUX_DEV_CODE",
    "FLUX_DEV_PAPER",
    "Edit",
    "Generation",
    "Inversion",
    "LayerControl",
    "StableFlow",
    "make_mesh",
]
