"""What a transformer is conditioned on, as a tree of rows: only a family and its network know the leaves."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np


class Conditioning:
    """Arrays with a leading axis of rows, one a prompt. Subclasses are dataclasses registered as pytrees."""

    def __len__(self) -> int:
        return jax.tree.leaves(self)[0].shape[0]

    def rows(self, rows: Sequence[int] | np.ndarray) -> "Conditioning":
        """Some rows, in that order."""
        numbers = np.asarray(rows)
        return jax.tree.map(lambda leaf: leaf[numbers], self)

    @staticmethod
    def concatenate(parts: "Sequence[Conditioning]") -> "Conditioning":
        """All rows of several, one after the other."""
        return jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *parts)
