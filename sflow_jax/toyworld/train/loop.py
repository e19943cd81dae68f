"""The training loop that all stages share: resumable, averaged, data-parallel over all devices."""

import dataclasses
import json
import logging
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from tqdm import tqdm

from sflow_jax.toyworld.train.optimizer import named_leaves, update_rule

log = logging.getLogger(__name__)
Batch = Mapping[str, np.ndarray]
# (trained parameters, frozen parameters, batch, key) → (loss, numbers to log)
Loss = Callable[[Any, Any, Mapping[str, jax.Array], jax.Array], tuple[jax.Array, dict[str, jax.Array]]]


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How one stage is optimised: AdamW (or Muon, if `orthogonal`), clipping, averaging.

    The learning rate rises over `warmup` steps, stays, and falls to zero as a cosine over the last `decay` of
    all steps: a run that has not begun to fall may be given another number of steps.
    """

    steps: int
    batch: int
    learning_rate: float
    warmup: int = 100
    decay: float = 0.4
    weight_decay: float = 0.01
    clip: float = 1.0
    average: float = 0.999
    orthogonal: bool = False

    def optimizer(self) -> optax.GradientTransformation:
        """The whole update rule."""
        fall = max(1, round(self.steps * self.decay))
        schedule = optax.join_schedules(
            [
                optax.linear_schedule(0.0, self.learning_rate, self.warmup),
                optax.cosine_decay_schedule(self.learning_rate, fall),
            ],
            [self.steps - fall],
        )
        return update_rule(schedule, weight_decay=self.weight_decay, clip=self.clip, orthogonal=self.orthogonal)


class State(NamedTuple):
    """Everything that a resumed run needs."""

    params: Any
    average: Any
    optimizer: Any
    step: jax.Array


@dataclasses.dataclass(frozen=True)
class Stage:
    """One stage: what is trained, on which batches, and what is drawn now and then.

    Attributes:
        name: of its folder.
        recipe: how it is optimised.
        build: seed → initial parameters (a pytree of modules).
        loss: what is minimised.
        batch: step's generator → arrays with a leading batch axis.
        frozen: networks that the loss needs and that stay as they are.
        preview: averaged parameters on the first device, step → None; writes a picture of what they can do.
        preview_every: steps between previews.
    """

    name: str
    recipe: Recipe
    build: Callable[[int], Any]
    loss: Loss
    batch: Callable[[np.random.Generator], Batch]
    frozen: Any = None
    preview: Callable[[Any, int], None] | None = None
    preview_every: int = 500


@dataclasses.dataclass(frozen=True)
class Run:
    """Where and how long a stage runs: its schedule never depends on these."""

    folder: Path
    seed: int = 0
    minutes: float | None = None
    save_minutes: float = 4.0
    progress: bool = True


def data_mesh() -> Mesh:
    """All devices in one line: batches are split over them, parameters repeated."""
    return Mesh(np.array(jax.devices()), ("data",))


def train_step(stage: Stage, seed: int) -> Callable[..., tuple[State, dict[str, jax.Array]]]:
    """One jitted optimisation step; its randomness depends on seed and step alone."""
    optimizer = stage.recipe.optimizer()

    def step(state: State, frozen: Any, batch: Mapping[str, jax.Array]) -> tuple[State, dict[str, jax.Array]]:
        key = jax.random.fold_in(jax.random.key(seed), state.step)
        (loss, extra), grads = jax.value_and_grad(stage.loss, has_aux=True)(state.params, frozen, batch, key)
        updates, moments = optimizer.update(grads, state.optimizer, state.params)
        params = optax.apply_updates(state.params, updates)
        # Early on the average follows closely, so that it forgets the initial weights.
        rate = jnp.maximum(1 - stage.recipe.average, 10 / (10.0 + state.step))
        average = jax.tree.map(lambda old, new: old + rate * (new - old), state.average, params)
        return State(params, average, moments, state.step + 1), {"loss": loss, **extra}

    return jax.jit(step, donate_argnums=0)


def initial_state(stage: Stage, seed: int) -> State:
    """Step 0."""
    params = stage.build(seed)
    return State(params, jax.tree.map(jnp.copy, params), stage.recipe.optimizer().init(params), jnp.zeros((), int))


class Checkpoints:
    """Orbax checkpoints of one stage, the newest only."""

    def __init__(self, folder: Path):
        self.folder = folder.resolve()

    def newest(self) -> Path | None:
        """The folder of the latest complete checkpoint."""
        complete = [path for path in self.folder.glob("step_*") if path.name.removeprefix("step_").isdigit()]
        return max(complete, key=lambda path: int(path.name.removeprefix("step_")), default=None)

    def save(self, state: State) -> None:
        """Write the state, then remove older ones (Orbax renames a finished folder into place)."""
        before, target = self.newest(), self.folder / f"step_{int(state.step)}"
        if before == target:
            return
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(target, named_leaves(state))
        if before is not None:
            shutil.rmtree(before)

    def restore(self, like: Any) -> Any | None:
        """The newest state, shaped and placed as `like`; None if there is none.

        `like` may be a part of the state: what else the checkpoint holds is not read.
        """
        newest = self.newest()
        if newest is None:
            return None
        # A plain loop, not jax.tree.map, which would sort the names: the leaves go back in this order.
        wanted = {
            name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)
            for name, leaf in named_leaves(like).items()
        }
        arguments = ocp.args.PyTreeRestore(
            wanted, restore_args=ocp.checkpoint_utils.construct_restore_args(wanted), partial_restore=True
        )
        with ocp.PyTreeCheckpointer() as checkpointer:
            leaves = checkpointer.restore(newest, args=arguments)
        return jax.tree.unflatten(jax.tree.structure(like), [leaves[name] for name in wanted])


def _cut(log_file: Path, step: int) -> None:
    """Drop the log's lines after `step`: a resumed run writes them again."""
    if log_file.exists():
        lines = [line for line in log_file.read_text().splitlines() if json.loads(line)["step"] <= step]
        log_file.write_text("".join(f"{line}\n" for line in lines))


def train(stage: Stage, run: Run) -> State:
    """Run a stage to its last step, or until `run.minutes` are over, from its newest checkpoint.

    Writes `log.jsonl`, checkpoints and previews into `run.folder / stage.name`.
    """
    folder = run.folder / stage.name
    folder.mkdir(parents=True, exist_ok=True)
    mesh = data_mesh()
    everywhere, split = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in ((), ("data",)))
    checkpoints = Checkpoints(folder)
    state = jax.device_put(initial_state(stage, run.seed), everywhere)
    state = checkpoints.restore(state) or state
    frozen = jax.device_put(stage.frozen, everywhere)
    step, update = int(state.step), train_step(stage, run.seed)
    _cut(folder / "log.jsonl", step)
    begun = saved = time.monotonic()
    bar = tqdm(
        total=stage.recipe.steps, initial=step, desc=stage.name, disable=not run.progress, mininterval=5, ncols=110
    )
    with (folder / "log.jsonl").open("a") as lines, bar:
        while step < stage.recipe.steps and (run.minutes is None or time.monotonic() - begun < 60 * run.minutes):
            batch = stage.batch(np.random.default_rng((run.seed, step)))
            state, numbers = update(state, frozen, jax.device_put(batch, split))
            step += 1
            if step % 20 == 0 or step == stage.recipe.steps:
                _report(bar, lines, step, jax.device_get(numbers), stage.recipe.batch)
            bar.update()
            if time.monotonic() - saved > 60 * run.save_minutes:
                checkpoints.save(state)
                saved = time.monotonic()
            if stage.preview and (step % stage.preview_every == 0 or step == stage.recipe.steps):
                # Where the networks of the stages before are.
                stage.preview(jax.device_put(state.average, jax.devices()[0]), step)
    checkpoints.save(state)
    return state


def _report(bar: tqdm, lines: Any, step: int, numbers: Mapping[str, np.ndarray], batch: int) -> None:
    """Show and write the step's numbers."""
    shown = {name: float(value) for name, value in numbers.items()}
    rate = (bar.format_dict["rate"] or 0.0) * batch
    figures = " ".join(f"{name} {value:.4f}" for name, value in shown.items())
    bar.set_postfix_str(f"{figures} {rate:.0f} pictures/s")
    lines.write(json.dumps({"step": step, **shown}) + "\n")
    lines.flush()


def finished(stage: Stage, run: Run) -> Any:
    """The averaged parameters of a stage that has run; ValueError if it has no checkpoint."""
    checkpoint = Checkpoints(run.folder / stage.name).restore({"average": stage.build(run.seed)})
    if checkpoint is None:
        raise ValueError(f"stage {stage.name} has not run yet: no checkpoint in {run.folder / stage.name}")
    return checkpoint["average"]
