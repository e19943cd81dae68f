"""What a sweep paints: the built-in prompts, the embedded world's own, or a file's."""

import re

import numpy as np

from sflow_jax.errors import SettingError
from sflow_jax.settings import MOST_PICTURES
from sflow_jax.storage.files import read_text
from sflow_jax.toyworld.scenes import sample_scene

BUILTIN = "builtin"
TOYWORLD = "toyworld"
COUNT = 64
# Not a seed of the world's other held-out scenes.
SEED = 20_003

# Sixteen each of animals, people, places and things: the kinds of pictures that people edit.
PROMPTS = (
    "A tabby cat asleep on a red armchair",
    "Two horses galloping along a beach at dawn",
    "A close-up photo of a hummingbird at a hibiscus flower",
    "An elephant drinking from a muddy river",
    "A golden retriever catching a frisbee in a park",
    "A snowy owl on a fence post in a blizzard",
    "A school of silver fish above a coral reef",
    "A fox cub looking out of its den in spring",
    "A brown cow standing in an alpine meadow",
    "A macro photo of a bee covered in pollen",
    "A black swan with its young on a still pond",
    "A squirrel holding an acorn on a mossy branch",
    "A camel caravan crossing orange dunes",
    "A watercolour painting of a hare in tall grass",
    "A penguin sliding on its belly over the ice",
    "A parrot on the shoulder of a wooden statue",
    "An old fisherman mending a net in a harbour",
    "A girl with a yellow umbrella on a rainy street",
    "A chef tossing vegetables in a flaming pan",
    "A cyclist climbing a mountain road in fog",
    "A pencil sketch of a woman reading by a window",
    "A toddler building a tower of coloured blocks",
    "A violinist playing in an empty concert hall",
    "A farmer carrying a basket of apples in an orchard",
    "A man in a grey suit waiting at a train station",
    "Three friends sitting around a campfire under the stars",
    "A ballet dancer stretching in a sunlit studio",
    "An astronaut walking through a field of lavender",
    "A potter shaping a bowl on a wheel",
    "A surfer inside a turquoise wave",
    "An oil portrait of a king in a blue robe",
    "A boy flying a dragon kite on a windy hill",
    "A lighthouse on a cliff during a thunderstorm",
    "A narrow street in an old town with hanging laundry",
    "A wooden cabin by a lake in autumn",
    "The skyline of a city at night, reflected in a river",
    "A waterfall in a dense tropical forest",
    "A stone bridge over a canal in the morning mist",
    "A desert road leading towards red mesas",
    "A greenhouse full of ferns and orchids",
    "A snowed-in village with lit windows",
    "A vineyard on rolling hills at sunset",
    "An abandoned factory overgrown with ivy",
    "A busy market with stalls of spices",
    "The northern lights above a frozen fjord",
    "A Japanese garden with a red footbridge",
    "A library with tall shelves and a rolling ladder",
    "A futuristic train station with glass domes",
    "A bowl of ramen with a soft-boiled egg",
    "A vintage red car parked in front of a diner",
    "A stack of pancakes with blueberries and syrup",
    "A bouquet of sunflowers in a glass vase",
    "A steaming cup of coffee on a wooden table",
    "A wooden rocking chair on a porch",
    "A chess board in the middle of a game",
    "A hot-air balloon with blue and white stripes",
    "An antique typewriter beside a candle",
    "A sailing ship in a bottle on a shelf",
    "A bicycle with a basket of baguettes",
    "A robot made of rusty tin, watering a plant",
    "A grandfather clock in a dark hallway",
    "A pile of wrapped presents under a fir tree",
    "A knitted sweater with a snowflake pattern",
    "A paper boat floating in a puddle",
)


def load_prompts(source: str) -> list[str]:
    """Prompts of "builtin", of "toyworld" (captions of held-out scenes), or of a text file, one a line.

    Empty lines and lines that begin with # are left out. SettingError if there is no such file, or nothing in it.
    """
    if source == BUILTIN:
        return list(PROMPTS)
    if source == TOYWORLD:
        return toyworld_prompts()
    try:
        text = read_text(source)
    except (OSError, ValueError) as error:
        raise SettingError(f"cannot read prompts from {source} ({error}); give a text file, or builtin") from error
    if (count := text.count("\n")) > MOST_PICTURES:
        raise SettingError(f"{source} has {count:,} prompts; at most {MOST_PICTURES:,} make sense")
    lines = [line.strip() for line in re.split("\r\n|\n|\r", text)]
    prompts = [line for line in lines if line and not line.startswith("#")]
    if not prompts:
        raise SettingError(f"{source} has no prompts; write one a line")
    return prompts


def toyworld_prompts() -> list[str]:
    """Captions of the embedded world that its training never saw."""
    rng = np.random.default_rng(SEED)
    scenes = [sample_scene(rng, "held-out") for _ in range(COUNT)]
    return [scene.caption(i) for i, scene in enumerate(scenes)]
