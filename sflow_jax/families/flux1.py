"""FLUX.1: dev, Krea-dev (guidance as an input) and schnell."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from sflow_jax.arrays import AnyArray
from sflow_jax.families.defaults import FLUX_DEV, FLUX_SCHNELL
from sflow_jax.families.family import Configs, Defaults, Family, NetworkSpec, Published, VitalLayers
from sflow_jax.families.text import find_word, tokenize
from sflow_jax.models.autoencoder import Autoencoder, AutoencoderConfig
from sflow_jax.models.clip import ClipText, ClipTextConfig
from sflow_jax.models.flux1 import Flux, FluxConditioning, FluxConfig
from sflow_jax.models.t5 import T5Config, T5Encoder
from sflow_jax.pictures.canvas import Canvas
from sflow_jax.pictures.latents import pack, unpack
from sflow_jax.sampling.schedule import Schedule
from sflow_jax.settings import check_prompts

# FLUX.1-dev: the paper's vital layers (figure 4), and the set that the authors' code injects in.
FLUX_DEV_PAPER = (0, 1, 2, 17, 18, 25, 28, 53, 54, 56)
FLUX_DEV_CODE = (0, 1, 17, 18, 25, 28, 53, 54, 56)
# FLUX.1-dev's own settings of editing methods: where the authors inject, in global numbers. Those of `coupled` are
# reasoned (guidance as the model was distilled for, a start as FlowEdit's), and not measured.
SINGLE_LAYERS = "19-56"
DEV_METHODS = {
    "coupled": {"guidance": 3.5, "begin": 0.1},
    "rf-solver": {"layers": "39-56"},
    "fireflow": {"layers": SINGLE_LAYERS},
    "directedit": {"layers": SINGLE_LAYERS},
}
PATCH = 2
# What diffusers' folders of FLUX.1-dev and FLUX.1-schnell say.
DEV_SCHEDULER = {
    "use_dynamic_shifting": True,
    "shift": 3.0,
    "base_shift": 0.5,
    "max_shift": 1.15,
    "base_image_seq_len": 256,
    "max_image_seq_len": 4096,
}
SCHNELL_SCHEDULER = {**DEV_SCHEDULER, "use_dynamic_shifting": False, "shift": 1.0}


def published_configs(transformer: FluxConfig) -> dict[str, Any]:
    """All networks of a published model around its transformer."""
    return {
        "transformer": transformer,
        "autoencoder": AutoencoderConfig.flux(),
        "t5": T5Config.xxl(),
        "clip": ClipTextConfig.large(),
    }


class Flux1(Family):
    """Double blocks, then single blocks; T5's sequence and CLIP's pooled vector."""

    name = "flux1"
    networks = {
        "transformer": NetworkSpec(Flux, FluxConfig, large=True, streamed=True),
        "autoencoder": NetworkSpec(Autoencoder, AutoencoderConfig),
        "t5": NetworkSpec(T5Encoder, T5Config, large=True, may_wait=True),
        "clip": NetworkSpec(ClipText, ClipTextConfig),
    }
    tokenizers = {"clip": "tokenizer", "t5": "tokenizer_2"}
    published = {
        "flux-dev": Published(
            "dev",
            published_configs(FluxConfig.dev()),
            DEV_SCHEDULER,
            512,
            repository="black-forest-labs/FLUX.1-dev",
        ),
        "flux-krea-dev": Published(
            "dev",
            published_configs(FluxConfig.dev()),
            DEV_SCHEDULER,
            512,
            repository="black-forest-labs/FLUX.1-Krea-dev",
            title="FLUX.1 Krea dev",
        ),
        "flux-schnell": Published(
            "schnell",
            published_configs(FluxConfig.schnell()),
            SCHNELL_SCHEDULER,
            256,
            repository="black-forest-labs/FLUX.1-schnell",
        ),
    }
    diffusers_stacks = {"double": "transformer_blocks", "single": "single_transformer_blocks"}
    guidance = "input"

    def title(self, variant: str) -> str:
        return f"FLUX.1 {variant}"

    def defaults(self, variant: str) -> Defaults:
        return FLUX_SCHNELL if variant == "schnell" else FLUX_DEV

    def layer_kinds(self, configs: Configs) -> tuple[tuple[str, int], ...]:
        config = configs["transformer"]
        return ("double", config.double_blocks), ("single", config.single_blocks)

    def known_vital_layers(self, configs: Configs) -> VitalLayers | None:
        if configs["transformer"] != FluxConfig.dev():
            return None
        return VitalLayers(FLUX_DEV_CODE, "Stable Flow's code, measured by its authors on FLUX.1-dev")

    def method_settings(self, configs: Configs) -> Mapping[str, Mapping[str, Any]]:
        return DEV_METHODS if configs["transformer"] == FluxConfig.dev() else {}

    def schedule(self, scheduler: Mapping[str, Any]) -> Schedule:
        return Schedule.from_hf(dict(scheduler))

    def text_encoder(
        self, networks: Mapping[str, Callable[[], nnx.Module]], tokenizers: Mapping[str, Any]
    ) -> "FluxText":
        return FluxText(networks["clip"](), networks["t5"], tokenizers["clip"], tokenizers["t5"])

    def words(self, tokenizer_lengths: Mapping[str, int]) -> int:
        return tokenizer_lengths["t5"]

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
    ) -> FluxConditioning:
        config = configs["transformer"]
        return FluxConditioning(array((words, config.text_width)), array((config.pooled_width,)))

    def step_flops(self, configs: Configs, tokens: int, words: int, batch: int) -> float:
        config = configs["transformer"]
        joint, width = tokens + words, config.width
        # q, k, v and out take 4 d², the MLP 2 · ratio · d², in a block of either kind.
        products = 2 * (4 + 2 * config.mlp_ratio) * width**2 * joint * config.layers
        attention = 4 * joint**2 * width * config.layers
        ends = 2 * width * (2 * config.in_channels * tokens + config.text_width * words)
        return float(batch * (products + attention + ends))

    def summed_numbers(self, configs: Configs) -> int:
        """Two sums over devices in each double block and one in each single block."""
        config = configs["transformer"]
        return (2 * config.double_blocks + config.single_blocks) * config.width

    def reused_width(self, configs: Configs) -> int:
        return configs["transformer"].width


@jax.jit
def t5_features(encoder: T5Encoder, token_ids: Int[Array, "b w"]) -> Float[Array, "b w e"]:
    """T5's features of every token."""
    return encoder(token_ids)


@jax.jit
def _clip_pooled(encoder: ClipText, token_ids: Int[Array, "b w"]) -> Float[Array, "b p"]:
    return encoder(token_ids)[1]


class FluxText:
    """Both text encoders with their tokenizers. Prompts go through one by one: one compilation for any number.

    fetch_t5: gives T5 where it computes; called once for all prompts encoded together, and let go after them.
    """

    def __init__(self, clip: ClipText, fetch_t5: Callable[[], T5Encoder], clip_tokenizer: Any, t5_tokenizer: Any):
        self.clip, self.fetch_t5 = clip, fetch_t5
        self.clip_tokenizer, self.t5_tokenizer = clip_tokenizer, t5_tokenizer
        self.clip_length = min(clip_tokenizer.model_max_length, clip.config.positions)
        self.t5_length = self.words = t5_tokenizer.model_max_length

    def encode(self, prompts: Sequence[str]) -> FluxConditioning:
        """Conditioning with one row a prompt, padded to the tokenizers' lengths.

        Prompts that are too long are cut with a warning that quotes what was lost. SettingError if none is given.
        """
        check_prompts(prompts)
        t5, pooled, text = self.fetch_t5(), [], []
        for prompt in prompts:
            clip_ids = tokenize(self.clip_tokenizer, prompt, self.clip_length, "CLIP (the pooled vector)")
            t5_ids = tokenize(self.t5_tokenizer, prompt, self.t5_length, "T5")
            pooled.append(_clip_pooled(self.clip, clip_ids))
            text.append(t5_features(t5, t5_ids))
        return FluxConditioning(text=jnp.concatenate(text), pooled=jnp.concatenate(pooled))

    def locate(self, prompt: str, word: str) -> tuple[int, ...]:
        """T5's tokens of a word; SettingError where it is not in the prompt."""
        return find_word(prompt, word, [(self.t5_tokenizer, self.t5_length)])


FLUX1 = Flux1()
