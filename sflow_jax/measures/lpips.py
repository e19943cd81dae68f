"""LPIPS: how different two pictures look, by the features of a small network (Zhang et al. 2018).

The variant with SqueezeNet 1.1, which PIE-Bench's published evaluator uses. The weights are the user's own file;
none ship. Axes: b batch, y rows, x columns, c channels.
"""

import re
from collections.abc import Iterator, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from flax import nnx
from jaxtyping import Array, Float, Real
from safetensors import SafetensorError
from safetensors.numpy import load as load_tensors

from sflow_jax.arrays import AnyArray
from sflow_jax.errors import SettingError
from sflow_jax.models.layers import parameters, with_parameters
from sflow_jax.storage.files import read_bytes

# Place among torchvision's `features` → channels in, squeezed and out (half of them 1×1, half 3×3).
FIRES = {
    3: (64, 16, 128),
    4: (128, 16, 128),
    6: (128, 32, 256),
    7: (256, 32, 256),
    9: (256, 48, 384),
    10: (384, 48, 384),
    11: (384, 64, 512),
    12: (512, 64, 512),
}
# What is compared: features after these places, each by its own head.
COMPARED = (0, 4, 7, 9, 10, 11, 12)
STEM_CHANNELS = 64
# A pool stands before these places.
SHRUNK_BEFORE = (3, 6, 9)
# Of the authors' scaling of pictures in −1..1, a channel each.
SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)
EPSILON = 1e-10
# Of a file of weights: SqueezeNet has 3 MB.
MOST_BYTES = 1 << 28
# The names of tensors: torchvision's, or those of the authors' package.
_NAMES = ((r"^net\.slice\d+\.", "features."), (r"^lins\.(\d)\.", r"lin\1."))
# Constants of the authors' package, and torchvision's classes.
_UNUSED = re.compile(r"^(scaling_layer|classifier)\.")


class Fire(nnx.Module):
    """SqueezeNet's block: squeeze by 1×1, then expand by 1×1 and 3×3 side by side."""

    def __init__(self, before: int, squeezed: int, after: int, *, rngs: nnx.Rngs):
        self.squeeze = nnx.Conv(before, squeezed, (1, 1), rngs=rngs)
        self.expand1x1 = nnx.Conv(squeezed, after // 2, (1, 1), rngs=rngs)
        self.expand3x3 = nnx.Conv(squeezed, after // 2, (3, 3), padding=1, rngs=rngs)

    def __call__(self, x: Float[Array, "b y x c"]) -> Float[Array, "b y x d"]:
        x = jax.nn.relu(self.squeeze(x))
        return jax.nn.relu(jnp.concatenate([self.expand1x1(x), self.expand3x3(x)], axis=-1))


def pool(x: Float[Array, "b y x c"]) -> Float[Array, "b v u c"]:
    """The largest of every 3×3, two apart; windows that reach over the end count (torch's `ceil_mode`)."""
    over = [(0, (size - 3) % 2) for size in x.shape[1:3]]
    return jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (1, 3, 3, 1), (1, 2, 2, 1), ((0, 0), *over, (0, 0)))


class Lpips(nnx.Module):
    """SqueezeNet's features and one weight a channel of those that are compared."""

    def __init__(self, *, rngs: nnx.Rngs):
        self.stem = nnx.Conv(3, STEM_CHANNELS, (3, 3), strides=(2, 2), padding="VALID", rngs=rngs)
        for place, (before, squeezed, after) in FIRES.items():
            setattr(self, f"fire{place}", Fire(before, squeezed, after, rngs=rngs))
        for number, place in enumerate(COMPARED):
            channels = FIRES[place][2] if place in FIRES else STEM_CHANNELS
            setattr(self, f"head{number}", nnx.Param(jnp.ones((channels,), jnp.float32)))

    def features(self, pictures: Real[AnyArray, "b y x 3"]) -> Iterator[Float[Array, "b v u c"]]:
        """Features at every place that is compared, each token of length one; pictures of levels 0..255."""
        shift, scale = (jnp.asarray(values, jnp.float32).reshape(1, 1, 1, 3) for values in (SHIFT, SCALE))
        x = (jnp.asarray(pictures, jnp.float32) / 127.5 - 1 - shift) / scale
        x = jax.nn.relu(self.stem(x))
        yield _unit(x)
        for place in FIRES:
            x = getattr(self, f"fire{place}")(pool(x) if place in SHRUNK_BEFORE else x)
            if place in COMPARED:
                yield _unit(x)

    def __call__(
        self, pictures: Real[AnyArray, "b y x 3"], references: Real[AnyArray, "b y x 3"]
    ) -> Float[Array, " b"]:
        """Distance of every picture to its reference, at least 0, float32; levels 0..255, of at least 25×25."""
        total = jnp.zeros(len(pictures), jnp.float32)
        for number, (one, other) in enumerate(zip(self.features(pictures), self.features(references))):
            weights = getattr(self, f"head{number}")[...].reshape(1, 1, 1, -1)
            total = total + jnp.mean(jnp.sum(jnp.square(one - other) * weights, axis=-1), axis=(1, 2))
        return total


def _unit(x: Float[Array, "b y x c"]) -> Float[Array, "b y x c"]:
    return x / (jnp.linalg.norm(x, axis=-1, keepdims=True) + EPSILON)


def load_lpips(file: epath.PathLike) -> Lpips:
    """LPIPS with the weights of a safetensors file; SettingError where it cannot be read or does not fit.

    The file holds torchvision's `squeezenet1_1` (`features.…`) and the seven heads (`lin0.model.1.weight` …); the
    names of the authors' package (`net.slice1.0.weight`, `lins.0.model.1.weight`) will do too.
    """
    path = epath.Path(file)
    if not path.exists():
        raise SettingError(f"no file at {path}; `lpips` takes a safetensors file with SqueezeNet's weights")
    try:
        tensors = load_tensors(read_bytes(path, MOST_BYTES))
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise SettingError(f"cannot read {path} ({error}); `lpips` takes a safetensors file") from error
    module = nnx.eval_shape(lambda: Lpips(rngs=nnx.Rngs(0)))
    targets = {name: leaf.shape for name, leaf in parameters(module).items()}
    return with_parameters(module, _assigned(_renamed(tensors), targets, path))


def _renamed(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    renamed = {}
    for name, tensor in tensors.items():
        for pattern, replacement in _NAMES:
            name = re.sub(pattern, replacement, name)
        if not _UNUSED.match(name):
            renamed[name] = tensor
    return renamed


def _source_name(target: str) -> str:
    """`fire3.squeeze.kernel` → `features.3.squeeze.weight`."""
    first, _, rest = target.partition(".")
    if first.startswith("head"):
        return f"lin{first.removeprefix('head')}.model.1.weight"
    rest = rest.replace("kernel", "weight")
    return f"features.{'0' if first == 'stem' else first.removeprefix('fire')}.{rest}"


def _assigned(
    tensors: dict[str, np.ndarray], targets: Mapping[str, tuple[int, ...]], path: epath.Path
) -> dict[str, Array]:
    """Every tensor at its parameter, once; SettingError names what is missing, left over or of another shape."""
    sources = {target: _source_name(target) for target in targets}
    problems = [f"missing {name}" for name in sources.values() if name not in tensors]
    problems += [f"unexpected {name}" for name in tensors.keys() - set(sources.values())]
    values = {}
    for target, source in sources.items():
        if source in tensors:
            values[target] = _turned(tensors[source], target)
            if values[target].shape != targets[target]:
                problems.append(f"{source} is {list(tensors[source].shape)}")
    if problems:
        shown = ", ".join(sorted(problems)[:3])
        raise SettingError(f"{path} is no LPIPS with SqueezeNet 1.1 ({shown}); give another file for `lpips`")
    return values


def _turned(tensor: np.ndarray, target: str) -> Array:
    """Torch's order of axes as ours."""
    tensor = jnp.asarray(tensor, jnp.float32)
    if target.startswith("head"):
        return tensor.reshape(-1)
    return tensor.transpose(2, 3, 1, 0) if tensor.ndim == 4 else tensor
