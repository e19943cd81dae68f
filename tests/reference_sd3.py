"""Edits and inversions of SD3 written out in torch on diffusers' model: the oracle of its parity tests."""

import contextlib
import dataclasses

import torch
from diffusers import SD3Transformer2DModel


def unpacked(latents: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """[b, s, c·4] in order (channel, row, column) → [b, c, 2·rows, 2·columns]."""
    batch, _, width = latents.shape
    grid = latents.reshape(batch, rows, columns, width // 4, 2, 2)
    return grid.permute(0, 3, 1, 4, 2, 5).reshape(batch, width // 4, 2 * rows, 2 * columns)


def packed(latents: torch.Tensor) -> torch.Tensor:
    """The inverse of `unpacked`."""
    batch, channels, height, width = latents.shape
    grid = latents.reshape(batch, channels, height // 2, 2, width // 2, 2)
    return grid.permute(0, 2, 4, 1, 3, 5).reshape(batch, -1, channels * 4)


@contextlib.contextmanager
def injecting(model: SD3Transformer2DModel, layers, branches: int, attentions: str = "both"):
    """In each branch, image keys and values of all elements become those of its element 0."""

    def hook(module, inputs, output):
        grouped = output.reshape(branches, -1, *output.shape[1:])
        return grouped[:, :1].expand_as(grouped).reshape(output.shape)

    handles = []
    for number in layers:
        block = model.transformer_blocks[number]
        chosen = [block.attn] if attentions != "image" else []
        chosen += [block.attn2] if block.attn2 is not None and attentions != "joint" else []
        for attention in chosen:
            handles += [layer.register_forward_hook(hook) for layer in (attention.to_k, attention.to_v)]
    yield
    for handle in handles:
        handle.remove()


@dataclasses.dataclass
class Reference:
    """A diffusers transformer, the tokens of a picture, and sigmas from noise to picture."""

    model: SD3Transformer2DModel
    rows: int
    columns: int
    sigmas: list[float]

    @torch.no_grad()
    def velocity(self, latents, text, pooled, sigma, **options):
        made = self.model(
            hidden_states=unpacked(latents, self.rows, self.columns),
            encoder_hidden_states=text,
            pooled_projections=pooled,
            timestep=torch.full((len(latents),), 1000 * float(sigma)),
            return_dict=False,
            **options,
        )[0]
        return packed(made)

    def guided(self, latents, features, negative, sigma, guidance, *, inject=(), attentions="both"):
        """Both branches in one call; each lends to itself."""
        text, pooled = (torch.cat(pair) for pair in zip(features, negative))
        with injecting(self.model, inject, 2, attentions):
            prompted, other = self.velocity(torch.cat([latents] * 2), text, pooled, sigma).chunk(2)
        return other + torch.as_tensor(guidance)[:, None, None] * (prompted - other)

    def denoise(self, latents, features, negative, guidance, *, stored=None, **options):
        """Euler from noise; `stored` is an inversion (index 0 the picture) that element 0 replays."""
        for i, (sigma, following) in enumerate(zip(self.sigmas, self.sigmas[1:])):
            velocity = self.guided(latents, features, negative, sigma, guidance, **options)
            latents = latents + (following - sigma) * velocity
            if stored is not None:
                latents = torch.cat([stored[len(self.sigmas) - 2 - i][None], latents[1:]])
        return latents

    def invert(self, latents, features, negative=None, guidance=1.0):
        """Inverse Euler: the velocity at the current latents and the destination's sigma."""
        states = [latents]
        for origin, destination in zip(self.sigmas[::-1], self.sigmas[-2::-1]):
            if negative is None:
                velocity = self.velocity(states[-1], *features, destination)
            else:
                velocity = self.guided(states[-1], features, negative, destination, [guidance])
            states.append(states[-1] + (destination - origin) * velocity)
        return torch.cat(states)
