"""The method written out in torch on diffusers' model: the oracle of the parity tests.

Follows the authors' public code, with one intended difference: the source's replay is aligned.
"""

import contextlib
import dataclasses
from unittest import mock

import torch
from diffusers import FluxTransformer2DModel
from diffusers.models.embeddings import apply_rotary_emb
from diffusers.models.transformers import transformer_flux
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


def is_double(model: FluxTransformer2DModel, number: int) -> bool:
    """Whether this layer has a stream of its own for text."""
    return number < len(model.transformer_blocks)


def chosen(before, after, elements):
    """What follows for these batch elements (default all), what was before for the others."""
    if elements is None:
        return after
    mixed = before.clone()
    mixed[elements] = after[elements]
    return mixed


@contextlib.contextmanager
def hooked(modules, hook, register=torch.nn.Module.register_forward_hook, **options):
    """A hook on each of these modules for the duration of the context."""
    handles = [register(module, hook, **options) for module in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def changing(modules, change, elements=None):
    """Pass every output of these modules through a function."""

    def hook(module, inputs, output):
        if isinstance(output, tuple):
            return tuple(chosen(part, change(part), elements) for part in output)
        return chosen(output, change(output), elements)

    return hooked(modules, hook)


def changing_input(modules, change, elements=None):
    """Pass the only input of these modules through a function."""

    def hook(module, inputs):
        return (chosen(inputs[0], change(inputs[0]), elements),)

    return hooked(modules, hook, torch.nn.Module.register_forward_pre_hook)


def bypassing(model: FluxTransformer2DModel, layers, elements=None):
    """Skip these layers for the duration of the context."""

    def hook(module, _, given, output):
        inputs = given["encoder_hidden_states"], given["hidden_states"]
        return tuple(chosen(after, before, elements) for before, after in zip(inputs, output))

    return hooked([blocks(model)[number] for number in layers], hook, with_kwargs=True)


@contextlib.contextmanager
def scaling(model: FluxTransformer2DModel, number: int, *, attention=1.0, mlp=1.0, elements=None):
    """Scale one layer's update of attention and of the MLP; a shared bias goes as far as both do."""
    block = blocks(model)[number]
    parts = [block.ff, block.ff_context] if is_double(model, number) else [block.act_mlp]
    with contextlib.ExitStack() as stack:
        stack.enter_context(changing([block.attn], lambda x: attention * x, elements))
        stack.enter_context(changing(parts, lambda x: mlp * x, elements))
        if not is_double(model, number):
            gone = (1 - max(attention, mlp)) * block.proj_out.bias
            stack.enter_context(changing([block.proj_out], lambda x: x - gone, elements))
        yield


def scaling_text(model: FluxTransformer2DModel, number: int, scale, elements=None):
    """Scale the text stream that enters one layer, and goes on behind it."""

    def hook(module, inputs, given):
        text = given["encoder_hidden_states"]
        return inputs, given | {"encoder_hidden_states": chosen(text, scale * text, elements)}

    return hooked([blocks(model)[number]], hook, torch.nn.Module.register_forward_pre_hook, with_kwargs=True)


def scaling_heads(model: FluxTransformer2DModel, number: int, scales, elements=None):
    """Scale what every head of one layer adds up, before the heads are mixed."""
    attention = blocks(model)[number].attn
    wide = torch.as_tensor(scales).repeat_interleave(attention.head_dim)
    if is_double(model, number):
        return changing_input([attention.to_out[0], attention.to_add_out], lambda x: wide * x, elements)
    return changing([attention], lambda x: wide * x, elements)


@contextlib.contextmanager
def moving(model: FluxTransformer2DModel, number: int, text_tokens: int, *, keys=1.0, values=1.0, elements=None):
    """Move one layer's image keys and values towards element 0's, by a number or a number a token [b, s].

    Keys are moved behind their norm: rotating them alike afterwards changes nothing about that.
    """
    attention = blocks(model)[number].attn
    image = slice(0 if is_double(model, number) else text_tokens, None)

    def move(strength):
        def change(x):
            share = torch.broadcast_to(torch.as_tensor(strength), x[:, image].shape[:2])
            moved = x.clone()
            moved[:, image] += share[(..., *[None] * (x.ndim - 2))] * (x[:1, image] - x[:, image])
            return moved

        return change

    with (
        changing([attention.norm_k], move(keys), elements),
        changing([attention.to_v], move(values), elements),
    ):
        yield


def shifting_keys(model: FluxTransformer2DModel, number: int, text_tokens: int, rows, columns, elements=None):
    """Rotate one layer's image keys on, by so many tokens; goes before `moving`, as hooks run in order."""
    turn = model.pos_embed(torch.tensor([[0.0, rows, columns]]))
    image = slice(0 if is_double(model, number) else text_tokens, None)

    def change(key):
        shifted = key.clone()
        shifted[:, image] = apply_rotary_emb(key[:, image], turn, sequence_dim=1)
        return shifted

    return changing([blocks(model)[number].attn.norm_k], change, elements)


def attention_weights(query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """[b, h, l, k] → softmax attention [b, l, l], the mean over heads."""
    return (query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5).softmax(dim=-1).mean(dim=1)


@contextlib.contextmanager
def recording(model: FluxTransformer2DModel, text_tokens: int):
    """A dictionary that fills with every layer's keys, values and attention, and the streams behind it."""
    seen = {name: [] for name in ("keys", "values", "text", "image", "attention")}
    attend = transformer_flux.dispatch_attention_fn

    def watch_attention(query, key, value, **options):
        seen["keys"].append(key[:, text_tokens:])
        seen["values"].append(value[:, text_tokens:])
        seen["attention"].append(attention_weights(query.transpose(1, 2), key.transpose(1, 2)))
        return attend(query, key, value, **options)

    def watch_streams(module, _, output):
        seen["text"].append(output[0])
        seen["image"].append(output[1])

    watched = mock.patch.object(transformer_flux, "dispatch_attention_fn", watch_attention)
    with watched, hooked(blocks(model), watch_streams):
        yield seen


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
