"""The method written out in torch on diffusers' model: the oracle of the parity tests.

Follows the authors' public code, with one intended difference: the source's replay is aligned.
"""

import contextlib
import dataclasses

import torch
from diffusers import FluxTransformer2DModel
from diffusers.models.transformers.transformer_flux import FluxAttnProcessor


class InjectSource:
    """Replaces the image tokens' keys and values of every batch element by those of element 0.

    Hooks on the projections see the values before norm and rotation, as in the authors' code.
    """

    def __init__(self, text_tokens: int):
        self.text_tokens = text_tokens

    def __call__(self, module, inputs, output):
        image = slice(self.text_tokens, None)
        replaced = output.clone()
        replaced[1:, image] = output[:1, image]
        return replaced


def blocks(model: FluxTransformer2DModel) -> list[torch.nn.Module]:
    """All blocks by global layer number."""
    return [*model.transformer_blocks, *model.single_transformer_blocks]


@contextlib.contextmanager
def injecting(model: FluxTransformer2DModel, layers, text_tokens: int):
    """K/V injection in these layers for the duration of the context."""
    handles = []
    for number in layers:
        block = blocks(model)[number]
        assert isinstance(block.attn.processor, FluxAttnProcessor)
        # In double blocks the image stream has projections of its own; in single blocks text comes first.
        words = 0 if number < len(model.transformer_blocks) else text_tokens
        hook = InjectSource(words)
        handles += [layer.register_forward_hook(hook) for layer in (block.attn.to_k, block.attn.to_v)]
    yield
    for handle in handles:
        handle.remove()


@contextlib.contextmanager
def bypassing(model: FluxTransformer2DModel, layers):
    """Skip these layers for the duration of the context."""
    kept = {}
    for number in layers:
        block = blocks(model)[number]
        kept[number] = block.forward
        block.forward = lambda hidden_states, encoder_hidden_states, **_: (encoder_hidden_states, hidden_states)
    yield
    for number, forward in kept.items():
        blocks(model)[number].forward = forward


@dataclasses.dataclass
class Reference:
    """A diffusers transformer with its conditioning, positions and sigmas."""

    model: FluxTransformer2DModel
    image_ids: torch.Tensor
    sigmas: list[float]

    @torch.no_grad()
    def velocity(self, latents, text, pooled, sigma, guidance):
        batch = len(latents)
        return self.model(
            hidden_states=latents,
            encoder_hidden_states=text,
            pooled_projections=pooled,
            timestep=torch.full((batch,), float(sigma)),
            guidance=torch.as_tensor(guidance, dtype=torch.float32) if self.model.config.guidance_embeds else None,
            img_ids=self.image_ids,
            txt_ids=torch.zeros(text.shape[1], 3),
            return_dict=False,
        )[0]

    def denoise(self, latents, text, pooled, guidance, *, inject=(), bypass=(), stored=None):
        """Euler from noise; `stored` is an inversion (index 0 the picture) that element 0 replays."""
        with injecting(self.model, inject, text.shape[1]), bypassing(self.model, bypass):
            for i, (sigma, following) in enumerate(zip(self.sigmas, self.sigmas[1:])):
                step = (following - sigma) * self.velocity(latents, text, pooled, sigma, guidance)
                latents = latents + step
                if stored is not None:
                    latents = torch.cat([stored[len(self.sigmas) - 2 - i][None], latents[1:]])
        return latents

    def invert(self, latents, text, pooled, guidance=1.0):
        """Inverse Euler: the velocity at the current latents and the destination's sigma."""
        states = [latents]
        for origin, destination in zip(self.sigmas[::-1], self.sigmas[-2::-1]):
            velocity = self.velocity(states[-1], text, pooled, destination, [guidance])
            states.append(states[-1] + (destination - origin) * velocity)
        return torch.cat(states)
