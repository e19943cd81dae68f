"""What a family of models must say. General parts ask it, and know no family's name."""

import abc
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Literal

import jax
from flax import nnx
from jaxtyping import Array, Float

from sflow_jax.arrays import AnyArray
from sflow_jax.families.defaults import Defaults
from sflow_jax.families.text import TextEncoder
from sflow_jax.models.conditioning import Conditioning
from sflow_jax.pictures.canvas import Canvas
from sflow_jax.sampling.schedule import Schedule

# Network name → its config.
Configs = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class NetworkSpec:
    """One of a family's networks.

    build, config: its module and that module's config. large: most of the weights, so split over a mesh's heads and
    put in eight bits on request. streamed: its blocks may wait in host memory. may_wait: it is used only now and
    then, and may be elsewhere in between. optional: a checkpoint may be without it.
    """

    build: Callable[..., nnx.Module]
    config: type
    large: bool = False
    streamed: bool = False
    may_wait: bool = False
    optional: bool = False


@dataclasses.dataclass(frozen=True)
class Published:
    """A model that is known without files.

    words: text tokens. repository: where the Hub has it in diffusers' layout. title: where people call it otherwise
    than the family would.
    """

    variant: str
    configs: dict[str, Any]
    scheduler: dict[str, Any]
    words: int
    picture_size: int = 1024
    repository: str = ""
    title: str = ""


@dataclasses.dataclass(frozen=True)
class VitalLayers:
    """A set of layers (global numbers) and where it comes from."""

    layers: tuple[int, ...]
    origin: str


class Family(abc.ABC):
    """All that makes one family of models different from another; stateless, one instance a family.

    name: in checkpoints. networks: name → what it is; "transformer" and "autoencoder" are always there. tokenizers:
    network → folder. published: name → model. diffusers_stacks: kind of layers → the stack of blocks in diffusers'
    model that has them; kinds of one stack follow each other. rotary: whether keys have rotary positions, which may
    be shifted. Methods get the configs of a checkpoint's networks.
    """

    name: ClassVar[str]
    networks: ClassVar[Mapping[str, NetworkSpec]]
    tokenizers: ClassVar[Mapping[str, str]]
    published: ClassVar[Mapping[str, Published]] = {}
    diffusers_stacks: ClassVar[Mapping[str, str]] = {}
    guidance: ClassVar[Literal["input", "branches", "none"]]
    rotary: ClassVar[bool] = True

    @abc.abstractmethod
    def title(self, variant: str) -> str:
        """What people call a model, such as "FLUX.1 dev"."""

    @abc.abstractmethod
    def defaults(self, variant: str) -> Defaults:
        """Steps and guidance where the caller gives none."""

    @abc.abstractmethod
    def layer_kinds(self, configs: Configs) -> tuple[tuple[str, int], ...]:
        """Kinds of layers and their counts in global order, such as (("double", 19), ("single", 38))."""

    @abc.abstractmethod
    def known_vital_layers(self, configs: Configs) -> VitalLayers | None:
        """The published set of a model of these sizes."""

    @abc.abstractmethod
    def schedule(self, scheduler: Mapping[str, Any]) -> Schedule:
        """From the scheduler's config; ValueError for options that the family does not use."""

    @abc.abstractmethod
    def text_encoder(
        self, networks: Mapping[str, Callable[[], nnx.Module]], tokenizers: Mapping[str, Any]
    ) -> TextEncoder:
        """What makes conditioning of prompts. networks: name → fetches it to where it computes.

        Of networks that a checkpoint is without, and of their tokenizers, there is none.
        """

    @abc.abstractmethod
    def words(self, tokenizer_lengths: Mapping[str, int]) -> int:
        """Text tokens that the transformer sees, from what each tokenizer pads to."""

    @abc.abstractmethod
    def token_side(self, configs: Configs) -> int:
        """Pixels along each side of a token."""

    @abc.abstractmethod
    def channels(self, configs: Configs) -> int:
        """Channels of a packed token."""

    @abc.abstractmethod
    def encode(self, autoencoder: nnx.Module, pictures: Float[Array, "b y x 3"]) -> Float[Array, "b s c"]:
        """Pictures in −1..1 → packed latents as the transformer has them; pure, called inside jit."""

    @abc.abstractmethod
    def decode(
        self, autoencoder: nnx.Module, latents: Float[AnyArray, "b s c"], canvas: Canvas
    ) -> Float[Array, "b y x 3"]:
        """The inverse of `encode`: pictures nominally in −1..1; pure, called inside jit."""

    @abc.abstractmethod
    def abstract_conditioning(
        self, configs: Configs, words: int, array: Callable[[tuple[int, ...]], jax.ShapeDtypeStruct]
    ) -> Conditioning:
        """Conditioning of shapes; `array` makes one of a row's shape (without the row axis)."""

    @abc.abstractmethod
    def step_flops(self, configs: Configs, tokens: int, words: int, batch: int) -> float:
        """Floating point operations of one step: products over tokens (a multiply-add is two), and attention."""

    @abc.abstractmethod
    def summed_numbers(self, configs: Configs) -> int:
        """Numbers a token that devices which split the layers add up in one step: sums × width of the stream."""

    def method_settings(self, configs: Configs) -> Mapping[str, Mapping[str, Any]]:
        """Editing method → settings that a model of these sizes wants otherwise than `editing.methods.METHODS`."""
        return {}

    def reused_width(self, configs: Configs) -> int | None:
        """Hidden size of the image tokens that step caching keeps; None where the network does not take
        `Interventions.cache`, and step caching is refused."""
        return None

    def own_attentions(self, configs: Configs) -> int:
        """How many layers also have an attention of the image alone, with keys and values of its own."""
        return 0

    def most_tokens(self, configs: Configs) -> int | None:
        """Tokens along the longest side of a picture; None where there is no limit."""
        return None

    def layers(self, configs: Configs) -> int:
        """Number of layers of all kinds."""
        return sum(count for _, count in self.layer_kinds(configs))
