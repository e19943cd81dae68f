"""Stage `t5`: the text encoder learns to read captions, before the transformer learns from what it says.

FLUX's T5 was trained long before the transformer and stays as it is. Ours is too: each of its tokens learns to tell
every attribute of the scene. A transformer that has to find out by itself which of three colour words belongs
to the hat needs many more pictures than one that is told.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from sflow_jax.models.t5 import T5Config, T5Encoder
from sflow_jax.toyworld.attributes import ATTRIBUTES
from sflow_jax.toyworld.train.loop import Recipe, Stage
from sflow_jax.toyworld.train.pool import NAMED, Pool, indices


class CaptionReader(nnx.Module):
    """T5 and linear layers that read every attribute off each of its tokens."""

    def __init__(self, config: T5Config, *, rngs: nnx.Rngs):
        self.network = T5Encoder(config, rngs=rngs)
        self.named = nnx.Dict({name: nnx.Linear(config.width, len(ATTRIBUTES[name]), rngs=rngs) for name in NAMED})

    def __call__(self, t5_ids: jax.Array) -> dict[str, jax.Array]:
        """Logits of each attribute at each token, [b, w, values]."""
        features = self.network(t5_ids)
        return {name: self.named[name](features) for name in NAMED}


def t5_loss(model: CaptionReader, frozen: None, batch, key) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Mean cross-entropy over attributes and tokens, padding too: the transformer sees it as well."""
    losses, right = [], []
    for column, logits in enumerate(model(batch["t5_ids"]).values()):
        truth = jnp.broadcast_to(batch["named"][:, column, None], logits.shape[:2]).astype(int)
        losses.append(optax.softmax_cross_entropy_with_integer_labels(logits, truth).mean())
        right.append(jnp.mean(logits.argmax(axis=-1) == truth))
    return sum(losses) / len(losses), {"right": jnp.mean(jnp.stack(right))}


def t5_stage(config: T5Config, recipe: Recipe, pool: Pool) -> Stage:
    """Supervised by the attributes that the captions say."""

    def batch(rng: np.random.Generator):
        chosen, wording = indices(pool, recipe.batch, rng)
        return {"t5_ids": pool.t5_ids[chosen, wording].astype(np.int32), "named": pool.named[chosen]}

    return Stage(
        name="t5",
        recipe=recipe,
        build=lambda seed: CaptionReader(config, rngs=nnx.Rngs(seed)),
        loss=t5_loss,
        batch=batch,
    )
