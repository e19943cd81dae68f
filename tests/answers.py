"""What diffusers and transformers compute with the small published models: oracles where neither is installed.

`python tests/answers.py FOLDER` writes models and answers; tests take them from SFLOW_TEST_PUBLISHED.
"""

import sys
from pathlib import Path

import numpy as np
import published
import torch

from sflow_jax.models.flux1 import position_ids
from sflow_jax.pictures.canvas import Canvas

HEIGHT, WIDTH, SIGMA = 48, 64, 0.7
Arrays = dict[str, np.ndarray]


def t5() -> Arrays:
    """Of random words."""
    ids = np.random.default_rng(1).integers(0, published.T5["vocab_size"], (3, 29)).astype(np.int32)
    return {"ids": ids, "states": published.t5()(torch.tensor(ids)).last_hidden_state}


def clip() -> Arrays:
    """Of random words that end at different places."""
    end = published.CLIP["vocab_size"] - 1
    ids = np.random.default_rng(2).integers(0, end, (3, 17)).astype(np.int32)
    ids[[0, 1, 2], [16, 4, 9]] = end
    output = published.clip()(torch.tensor(ids))
    return {"ids": ids, "states": output.last_hidden_state, "pooled": output.pooler_output}


def autoencoder() -> Arrays:
    """Of noise; channels last."""
    pictures = np.random.default_rng(3).uniform(-1, 1, (2, 32, 56, 3)).astype(np.float32)
    model = published.autoencoder()
    latents = model.encode(torch.tensor(pictures).permute(0, 3, 1, 2)).latent_dist
    outputs = {"mean": latents.mean, "log_variance": latents.logvar, "decoded": model.decode(latents.mean).sample}
    return {"pictures": pictures} | {name: output.permute(0, 2, 3, 1) for name, output in outputs.items()}


def transformer() -> Arrays:
    """One velocity of two pictures with guidances of their own."""
    draw, image_ids = np.random.default_rng(4).standard_normal, position_ids(Canvas.of(HEIGHT, WIDTH, 16))
    shapes = {"latents": (2, len(image_ids), 16), "text": (2, 11, 24), "pooled": (2, 20)}
    inputs = {name: draw(shape).astype(np.float32) for name, shape in shapes.items()}
    inputs["guidance"] = np.float32([1.0, 4.5])
    latents, text, pooled, guidance = (torch.tensor(x) for x in inputs.values())
    (velocity,) = published.transformer()(
        hidden_states=latents,
        encoder_hidden_states=text,
        pooled_projections=pooled,
        guidance=guidance,
        timestep=torch.full((2,), SIGMA),
        img_ids=torch.tensor(image_ids),
        txt_ids=torch.zeros(text.shape[1], 3),
        return_dict=False,
    )
    return inputs | {"velocity": velocity}


@torch.no_grad()
def write(folder: Path) -> Path:
    """The models, small and with eight heads, and `answers.npz` of the small one."""
    published.write_diffusers(folder / "tiny-dev")
    published.write_wide(folder / "wide")
    cases = {case.__name__: case() for case in (t5, clip, autoencoder, transformer)}
    np.savez(
        folder / "answers.npz",
        **{f"{name}.{x}": value for name, case in cases.items() for x, value in case.items()},
    )
    return folder


if __name__ == "__main__":
    print(write(Path(sys.argv[1])))
