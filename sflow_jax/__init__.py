"""Stable Flow in JAX: find the vital layers of diffusion transformers, edit pictures with them, train nothing.

The public names; each is imported when it is first used, so that importing the package takes no time.
"""

import importlib
from typing import TYPE_CHECKING, Any

# Name → the module that has it.
_HOME = {
    "AttentionAtlas": "results",
    "Candidates": "editing.choosing",
    "Edit": "results",
    "EditSettings": "settings",
    "FLUX_DEV_CODE": "families.flux1",
    "FLUX_DEV_PAPER": "families.flux1",
    "Generation": "results",
    "GenerationSettings": "settings",
    "Inversion": "results",
    "InversionSettings": "settings",
    "LayerControl": "sampling.control",
    "LayerEditSettings": "settings",
    "Painter": "painter",
    "METHODS": "editing.methods",
    "Method": "editing.methods",
    "Placement": "settings",
    "RegionRecipe": "editing.regions",
    "SourceBank": "editing.bank",
    "StableFlow": "pipeline",
    "Stopped": "progress",
    "Summary": "vitality.summary",
    "SweepSettings": "settings",
    "find_layers_by_edits": "evaluation.importance",
    "find_vital_layers": "vitality.find",
    "diffusers_layer_skip": "vitality.layer_file",
    "load_features": "catalogue",
    "make_mesh": "machine.meshes",
    "read_record": "records",
    "read_layer_file": "vitality.layer_file",
    "write_layer_file": "vitality.layer_file",
}
__all__ = [*_HOME, "__version__"]

if TYPE_CHECKING:
    from sflow_jax.catalogue import load_features
    from sflow_jax.editing.bank import SourceBank
    from sflow_jax.editing.choosing import Candidates
    from sflow_jax.editing.methods import METHODS, Method
    from sflow_jax.editing.regions import RegionRecipe
    from sflow_jax.evaluation.importance import find_layers_by_edits
    from sflow_jax.families.flux1 import FLUX_DEV_CODE, FLUX_DEV_PAPER
    from sflow_jax.machine.meshes import make_mesh
    from sflow_jax.painter import Painter
    from sflow_jax.pipeline import StableFlow
    from sflow_jax.progress import Stopped
    from sflow_jax.records import read_record
    from sflow_jax.results import AttentionAtlas, Edit, Generation, Inversion
    from sflow_jax.sampling.control import LayerControl
    from sflow_jax.settings import (
        EditSettings,
        GenerationSettings,
        InversionSettings,
        LayerEditSettings,
        Placement,
        SweepSettings,
    )
    from sflow_jax.vitality.find import find_vital_layers
    from sflow_jax.vitality.layer_file import diffusers_layer_skip, read_layer_file, write_layer_file
    from sflow_jax.vitality.summary import Summary


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("sflow_jax")
    if name not in _HOME:
        raise AttributeError(f"module 'sflow_jax' has no attribute {name!r}")
    return getattr(importlib.import_module(f"sflow_jax.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
