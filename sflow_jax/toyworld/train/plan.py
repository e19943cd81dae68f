"""What is trained, how large, how long: the embedded model's configs and recipes."""

import dataclasses

from sflow_jax.models.autoencoder import AutoencoderConfig
from sflow_jax.models.clip import ClipTextConfig
from sflow_jax.models.clip_vision import ClipConfig, ClipVisionConfig
from sflow_jax.models.dinov2 import Dinov2Config
from sflow_jax.models.flux1 import FluxConfig
from sflow_jax.models.sd3 import Sd3Config
from sflow_jax.models.t5 import T5Config
from sflow_jax.toyworld.captions import vocabulary
from sflow_jax.toyworld.train.loop import Recipe
from sflow_jax.toyworld.train.tokenizers import TEXT_TOKENS

# Beside the words, each tokenizer has three special tokens; CLIP's end of text is its last.
VOCABULARY = len(vocabulary()) + 3
# Of the model that ships with the package.
RECIPES = {
    "vae": Recipe(2600, 16, 2e-3, average=0.99),
    "decoder": Recipe(2600, 16, 2e-3, average=0.99),
    "clip": Recipe(450, 128, 1e-3),
    "t5": Recipe(800, 128, 2e-3, average=0.99, orthogonal=True),
    "dino": Recipe(4500, 64, 1e-3, average=0.99, orthogonal=True),
    "flow": Recipe(8000, 32, 2e-3, warmup=300, orthogonal=True),
    "distill": Recipe(400, 32, 7e-4, warmup=20, average=0.98, orthogonal=True),
    "sd3": Recipe(4000, 32, 1e-3, warmup=50, average=0.998, orthogonal=True),
}


@dataclasses.dataclass(frozen=True)
class Plan:
    """Sizes and recipes of all stages; `size` is the pictures' side, `sd3_scenes` how many the SD3 learns from."""

    size: int
    scenes: int
    sd3_scenes: int
    held_out: int
    vae: AutoencoderConfig
    clip: ClipConfig
    dino: Dinov2Config
    t5: T5Config
    flux: FluxConfig
    sd3: Sd3Config
    recipes: dict[str, Recipe]

    @classmethod
    def embedded(cls) -> "Plan":
        """The model that ships with the package."""
        text = ClipTextConfig(
            vocabulary=VOCABULARY,
            width=128,
            heads=4,
            mlp_width=512,
            layers=3,
            positions=TEXT_TOKENS,
            end_of_text=VOCABULARY - 1,
        )
        vision = ClipVisionConfig(width=128, heads=4, mlp_width=512, layers=4, picture_size=64, patch_size=8)
        return cls(
            size=64,
            scenes=80_000,
            sd3_scenes=20_000,
            held_out=512,
            vae=AutoencoderConfig(widths=(16, 32, 64), blocks_per_level=1, norm_groups=8),
            clip=ClipConfig(text, vision, projection=128),
            dino=Dinov2Config(width=128, heads=4, layers=4, picture_size=64, patch_size=8, swiglu=False),
            t5=T5Config(
                vocabulary=VOCABULARY,
                width=128,
                heads=4,
                head_dim=32,
                mlp_width=256,
                layers=2,
                position_buckets=32,
                position_reach=64,
            ),
            flux=FluxConfig(
                double_blocks=3,
                single_blocks=9,
                heads=2,
                head_dim=64,
                text_width=128,
                pooled_width=128,
                rotary_axes=(8, 28, 28),
            ),
            sd3=Sd3Config(
                layers=9,
                dual_layers=3,
                heads=2,
                head_dim=64,
                text_width=128,
                pooled_width=256,
                qk_norm=True,
                position_side=16,
            ),
            recipes=dict(RECIPES),
        )

    @classmethod
    def tiny(cls) -> "Plan":
        """The same stages at the smallest sizes, for tests: a few steps take seconds."""
        full = cls.embedded()
        text = dataclasses.replace(full.clip.text, width=16, heads=2, mlp_width=32, layers=1)
        vision = dataclasses.replace(full.clip.vision, width=16, heads=2, mlp_width=32, layers=1, picture_size=16)
        return dataclasses.replace(
            full,
            size=16,
            scenes=24,
            sd3_scenes=24,
            held_out=8,
            vae=AutoencoderConfig(widths=(8, 8, 8), blocks_per_level=1, norm_groups=4, latent_channels=4),
            clip=ClipConfig(text, vision, projection=16),
            dino=Dinov2Config(width=16, heads=2, layers=1, picture_size=16, patch_size=8, swiglu=False),
            t5=dataclasses.replace(full.t5, width=16, heads=2, head_dim=8, mlp_width=16, layers=1),
            flux=dataclasses.replace(
                full.flux,
                in_channels=16,
                double_blocks=1,
                single_blocks=1,
                head_dim=8,
                text_width=16,
                pooled_width=16,
                rotary_axes=(4, 2, 2),
            ),
            sd3=dataclasses.replace(
                full.sd3,
                in_channels=16,
                layers=3,
                dual_layers=1,
                head_dim=8,
                text_width=16,
                pooled_width=32,
                position_side=4,
            ),
            recipes={name: Recipe(4, 8, 1e-3, warmup=1) for name in full.recipes},
        )
