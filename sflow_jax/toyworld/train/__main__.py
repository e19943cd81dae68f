"""`python -m sflow_jax.toyworld.train`: draw the world, train every network, export the folder."""

import dataclasses
import logging
from pathlib import Path

import click

from sflow_jax.toyworld.train.export import export, export_sd3
from sflow_jax.toyworld.train.loop import Run, train
from sflow_jax.toyworld.train.pictures import save_curve
from sflow_jax.toyworld.train.plan import Plan
from sflow_jax.toyworld.train.stages import FROM_EMBEDDED, STAGES, Training

CHOICES = (*STAGES, "export", "all", *FROM_EMBEDDED, "export-sd3")


@click.command(context_settings={"show_default": True})
@click.option("--out", type=click.Path(path_type=Path), required=True, help="The folder to start or resume.")
@click.option("--stage", type=click.Choice(CHOICES), default="all", help="What to do; all: without the SD3.")
@click.option("--minutes", type=float, help="Stop each stage after so long; the same command goes on.")
@click.option("--steps", type=int, help="Steps of the stage, in place of the plan's.")
@click.option("--seed", type=int, default=0, help="Of scenes, weights, batches and noise.")
@click.option("--assets", type=click.Path(path_type=Path), help="Where to export to.  [default: OUT/assets…]")
def main(out: Path, stage: str, minutes: float | None, steps: int | None, seed: int, assets: Path | None) -> None:
    """Train the embedded model: the stages in order, each resumed from its newest checkpoint."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    plan = Plan.embedded()
    if steps is not None:
        plan = dataclasses.replace(
            plan,
            recipes={name: dataclasses.replace(recipe, steps=steps) for name, recipe in plan.recipes.items()},
        )
    training = Training(plan, Run(out, seed=seed, minutes=minutes))
    for name in STAGES if stage == "all" else (stage,):
        if name in (*STAGES, *FROM_EMBEDDED) and not run_stage(training, name):
            return
    if stage in ("export", "all"):
        export(training, assets or out / "assets")
    if stage == "export-sd3":
        export_sd3(training, assets or out / "assets_sd3")


def run_stage(training: Training, name: str) -> bool:
    """Whether the stage has reached its last step."""
    state = train(training.stage(name), training.run)
    save_curve(training.folder / name)
    return int(state.step) >= training.plan.recipes[name].steps


if __name__ == "__main__":
    main()
