"""Stable Diffusion 3 and 3.5: medium, 3.5-medium, 3.5-large; true classifier-free guidance."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from sflow_jax.arrays import AnyArray
from sflow_jax.families.defaults import DEFAULTS
from sflow_jax.families.family import Configs, Defaults, Family, NetworkSpec, Published, VitalLayers
from sflow_jax.families.text import find_word, tokenize
from sflow_jax.models.autoencoder import Autoencoder, AutoencoderConfig
from sflow_jax.models.clip import ClipText, ClipTextConfig
from sflow_jax.models.sd3 import PATCH, Sd3, Sd3Conditioning, Sd3Config
from sflow_jax.models.t5 import T5Config, T5Encoder
from sflow_jax.pictures.canvas import Canvas
from sflow_jax.pictures.latents import pack, unpack
from sflow_jax.sampling.schedule import Schedule
from sflow_jax.settings import check_prompts

# SD3-medium: the paper's vital layers.
SD3_MEDIUM_PAPER = (0, 7, 8, 9)
# What diffusers' folders of all three models say.
SCHEDULER = {"num_train_timesteps": 1000, "shift": 3.0, "use_dynamic_shifting": False}
TRAINED_TIMES = 1000
# T5's tokens, whatever its tokenizer could take; and the rows of zeros in its place.
T5_WORDS = 256
CLIP_WORDS = 77
# Variant → the name that it is known by without files.
NAMES = {"medium": "sd3-medium", "3.5-medium": "sd35-medium", "3.5-large": "sd35-large"}
TITLES = {"medium": "SD3 medium", "3.5-medium": "SD3.5 medium", "3.5-large": "SD3.5 large"}


def variant_of(config: Sd3Config) -> str:
    """Which of the three a transformer of such sizes is, or is nearest to."""
    if config.dual_layers:
        return "3.5-medium"
    return "3.5-large" if config.qk_norm else "medium"


def published_model(transformer: Sd3Config, repository: str) -> Published:
    """A published model around its transformer."""
    configs = {
        "transformer": transformer,
        "autoencoder": AutoencoderConfig.sd3(),
        "clip_l": ClipTextConfig.large(projected=True),
        "clip_g": ClipTextConfig.giant(),
        "t5": T5Config.xxl(),
    }
    words = CLIP_WORDS + T5_WORDS
    return Published(variant_of(transformer), configs, SCHEDULER, words, repository=f"stabilityai/{repository}")


class StableDiffusion3(Family):
    """Joint blocks; the sequences of two CLIPs and of T5, which may be absent, and both CLIPs' pooled vectors."""

    name = "sd3"
    networks = {
        "transformer": NetworkSpec(Sd3, Sd3Config, large=True, streamed=True),
        "autoencoder": NetworkSpec(Autoencoder, AutoencoderConfig),
        "clip_l": NetworkSpec(ClipText, ClipTextConfig),
        "clip_g": NetworkSpec(ClipText, ClipTextConfig, may_wait=True),
        "t5": NetworkSpec(T5Encoder, T5Config, large=True, may_wait=True, optional=True),
    }
    tokenizers = {"clip_l": "tokenizer", "clip_g": "tokenizer_2", "t5": "tokenizer_3"}
    published = {
        "sd3-medium": published_model(Sd3Config.medium(), "stable-diffusion-3-medium-diffusers"),
        "sd35-medium": published_model(Sd3Config.medium_35(), "stable-diffusion-3.5-medium"),
        "sd35-large": published_model(Sd3Config.large_35(), "stable-diffusion-3.5-large"),
    }
    diffusers_stacks = {"dual": "transformer_blocks", "joint": "transformer_blocks"}
    guidance = "branches"
    rotary = False

    def title(self, variant: str) -> str:
        return TITLES[variant]

    def defaults(self, variant: str) -> Defaults:
        return DEFAULTS[NAMES[variant]]

    def layer_kinds(self, configs: Configs) -> tuple[tuple[str, int], ...]:
        config = configs["transformer"]
        dual = (("dual", config.dual_layers),) if config.dual_layers else ()
        return *dual, ("joint", config.layers - config.dual_layers)

    def known_vital_layers(self, configs: Configs) -> VitalLayers | None:
        if configs["transformer"] != Sd3Config.medium():
            return None
        return VitalLayers(SD3_MEDIUM_PAPER, "Stable Flow's paper, measured by its authors on SD3-medium")

    def own_attentions(self, configs: Configs) -> int:
        return configs["transformer"].dual_layers

    def most_tokens(self, configs: Configs) -> int | None:
        return configs["transformer"].position_side

    def schedule(self, scheduler: Mapping[str, Any]) -> Schedule:
        """diffusers': the last time is the least that training saw, shifted once more."""
        times = scheduler.get("num_train_timesteps", TRAINED_TIMES)
        if times != TRAINED_TIMES:
            raise ValueError(f"scheduler option num_train_timesteps={times} is not supported, only {TRAINED_TIMES}")
        plain = Schedule.from_hf(dict(scheduler))
        shift = 1.0 if plain.dynamic else plain.shift
        return dataclasses.replace(plain, least=shift / TRAINED_TIMES / (1 + (shift - 1) / TRAINED_TIMES))

    def text_encoder(
        self, networks: Mapping[str, Callable[[], nnx.Module]], tokenizers: Mapping[str, Any]
    ) -> "Sd3Text":
        return Sd3Text(networks["clip_l"](), networks["clip_g"], networks.get("t5"), tokenizers)

    def words(self, tokenizer_lengths: Mapping[str, int]) -> int:
        return tokenizer_lengths["clip_l"] + min(T5_WORDS, tokenizer_lengths.get("t5", T5_WORDS))

    def token_side(self, configs: Configs) -> int:
        return configs["autoencoder"].downsampling * PATCH

    def channels(self, configs: Configs) -> int:
        return configs["transformer"].in_channels

    def encode(self, autoencoder: Autoencoder, pictures: Float[Array, "b y x 3"]) -> Float[Array, "b s c"]:
        mean, _ = autoencoder.encode(pictures)
        config = autoencoder.config
        return pack((mean - config.shift_factor) * config.scaling_factor, PATCH)

    def decode(
        self, autoencoder: Autoencoder, latents: Float[AnyArray, "b s c"], canvas: Canvas
    ) -> Float[Array, "b y x 3"]:
        config = autoencoder.config
        unscaled = unpack(latents, canvas.rows, canvas.columns, PATCH) / config.scaling_factor + config.shift_factor
        return autoencoder.decode(unscaled)

    def abstract_conditioning(
        self, configs: Configs, words: int, array: Callable[[tuple[int, ...]], jax.ShapeDtypeStruct]
    ) -> Sd3Conditioning:
        config = configs["transformer"]
        return Sd3Conditioning(array((words, config.text_width)), array((config.pooled_width,)))

    def step_flops(self, configs: Configs, tokens: int, words: int, batch: int) -> float:
        config = configs["transformer"]
        # q, k, v and out take 4 d², the MLP 2 · ratio · d², in each stream; the last text stream has q, k, v alone.
        stream = 2 * (4 + 2 * config.mlp_ratio) * config.width**2
        products = stream * (tokens * config.layers + words * (config.layers - 1)) + 6 * config.width**2 * words
        attention = 4 * (tokens + words) ** 2 * config.width * config.layers
        own = config.dual_layers * (8 * config.width**2 * tokens + 4 * tokens**2 * config.width)
        ends = 2 * config.width * (2 * config.in_channels * tokens + config.text_width * words)
        return float(batch * (products + attention + own + ends))

    def summed_numbers(self, configs: Configs) -> int:
        """Two sums over devices in each layer, and one more of the image in those with two attentions."""
        config = configs["transformer"]
        return (2 * config.layers + config.dual_layers) * config.width

    def reused_width(self, configs: Configs) -> int:
        return configs["transformer"].width


@jax.jit
def _t5_features(encoder: T5Encoder, token_ids: Int[Array, "b w"]) -> Float[Array, "b w e"]:
    return encoder(token_ids)


@jax.jit
def _clip_features(
    encoder: ClipText, token_ids: Int[Array, "b w"]
) -> tuple[Float[Array, "b w d"], Float[Array, "b p"]]:
    return encoder.before_last(token_ids)


def _as_wide(text: Float[Array, "b w d"], width: int) -> Float[Array, "b w e"]:
    """Filled up with zeros, or cut, as diffusers does where both CLIPs together are wider than T5."""
    return jnp.pad(text[..., :width], ((0, 0), (0, 0), (0, max(0, width - text.shape[-1]))))


class Sd3Text:
    """All text encoders with their tokenizers. Prompts go through one by one: one compilation for any number.

    fetch_clip_g, fetch_t5: give these where they compute; called once for all prompts encoded together, and let go
    after them. fetch_t5 is None for a model without T5, whose features are zeros.
    """

    def __init__(
        self,
        clip_l: ClipText,
        fetch_clip_g: Callable[[], ClipText],
        fetch_t5: Callable[[], T5Encoder] | None,
        tokenizers: Mapping[str, Any],
    ):
        self.clip_l, self.fetch_clip_g, self.fetch_t5, self.tokenizers = clip_l, fetch_clip_g, fetch_t5, tokenizers
        self.clip_length = min(tokenizers["clip_l"].model_max_length, clip_l.config.positions)
        self.t5_length = min(T5_WORDS, tokenizers["t5"].model_max_length) if fetch_t5 else T5_WORDS
        self.words = self.clip_length + self.t5_length

    def encode(self, prompts: Sequence[str]) -> Sd3Conditioning:
        """Conditioning with one row a prompt, padded to the tokenizers' lengths.

        Prompts that are too long are cut with a warning that quotes what was lost. SettingError if none is given.
        """
        check_prompts(prompts)
        clips = {"clip_l": self.clip_l, "clip_g": self.fetch_clip_g()}
        t5 = self.fetch_t5() if self.fetch_t5 else None
        rows = [self._encode_one(prompt, clips, t5) for prompt in prompts]
        return Sd3Conditioning.concatenate(rows)

    def locate(self, prompt: str, word: str) -> tuple[int, ...]:
        """CLIP's tokens of a word (both CLIPs share them), then T5's; SettingError where it is not in a prompt."""
        readers = [(self.tokenizers["clip_l"], self.clip_length)]
        if self.fetch_t5 is not None:
            readers.append((self.tokenizers["t5"], self.t5_length))
        return find_word(prompt, word, readers)

    def _encode_one(self, prompt: str, clips: dict[str, ClipText], t5: T5Encoder | None) -> Sd3Conditioning:
        texts, pooled = [], []
        for name, clip in clips.items():
            reader = "both CLIPs read" if name == "clip_l" else ""
            ids = tokenize(self.tokenizers[name], prompt, self.clip_length, reader)
            sequence, vector = _clip_features(clip, ids)
            texts.append(sequence)
            pooled.append(vector)
        text = jnp.concatenate(texts, axis=-1)
        if t5 is None:
            rest = jnp.zeros((1, self.t5_length, text.shape[-1]), text.dtype)
        else:
            rest = _t5_features(t5, tokenize(self.tokenizers["t5"], prompt, self.t5_length, "T5")).astype(
                text.dtype
            )
            text = _as_wide(text, rest.shape[-1])
        return Sd3Conditioning(jnp.concatenate([text, rest], axis=1), jnp.concatenate(pooled, axis=-1))


SD3 = StableDiffusion3()
