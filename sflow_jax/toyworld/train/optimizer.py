"""Update rules: AdamW for everything, or Muon for the matrices of stacked blocks and AdamW for the rest."""

from typing import Any

import jax
import optax
from optax.contrib import MuonDimensionNumbers, muon

ADAM_B2 = 0.99
# Root mean square of Muon's update per unit of learning rate: about what AdamW's steps come to.
MUON_RMS = 0.4
# Of a network's leaves the one that nothing learns.
BUFFER = "position_table"


def named_leaves(tree: Any) -> dict[str, jax.Array]:
    """Path → leaf, e.g. `flux.image_in.kernel.value`."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}


def over_names(inner: optax.GradientTransformation) -> optax.GradientTransformation:
    """The same rule for a pytree of modules, which `inner` sees as a dict of named leaves."""

    def update(updates, state, params=None):
        changes, state = inner.update(named_leaves(updates), state, named_leaves(params))
        leaves = [0 * changes[name] if BUFFER in name else changes[name] for name in named_leaves(updates)]
        return jax.tree.unflatten(jax.tree.structure(updates), leaves), state

    return optax.GradientTransformation(lambda params: inner.init(named_leaves(params)), update)


def matrices(params: dict[str, Any]) -> dict[str, MuonDimensionNumbers | None]:
    """Which axes of each leaf go in and out, for kernels of stacked blocks; None for all other leaves.

    Modulations are left to AdamW: they are half of the numbers and see one vector per picture.
    """

    def axes(name: str) -> MuonDimensionNumbers | None:
        parts = name.removesuffix(".value").split(".")
        if not any(part.endswith("blocks") for part in parts) or parts[-1] != "kernel" or "modulation" in parts:
            return None
        if parts[-2] == "qkv":  # n d 3 h k: queries, keys and values each by themselves
            return MuonDimensionNumbers(reduction_axis=(1,), output_axis=(3, 4))
        if parts[-2] == "out":  # n h k d
            return MuonDimensionNumbers(reduction_axis=(1, 2), output_axis=(3,))
        return MuonDimensionNumbers(reduction_axis=(1,), output_axis=(2,))

    return {name: axes(name) for name in params}


def decayed(params: dict[str, Any]) -> dict[str, bool]:
    """Weight decay is for kernels and tables, not for biases and scales."""
    return {name: leaf.ndim > 1 for name, leaf in params.items()}


def update_rule(
    schedule: optax.Schedule, *, weight_decay: float, clip: float, orthogonal: bool
) -> optax.GradientTransformation:
    """Clipping, then AdamW, or with `orthogonal` Muon for matrices and AdamW for the rest."""
    if orthogonal:
        inner = muon(
            schedule,
            weight_decay=weight_decay,
            adam_b2=ADAM_B2,
            muon_weight_dimension_numbers=matrices,
            consistent_rms=MUON_RMS,
        )
    else:
        inner = optax.adamw(schedule, b2=ADAM_B2, weight_decay=weight_decay, mask=decayed)
    return over_names(optax.chain(optax.clip_by_global_norm(clip), inner))
