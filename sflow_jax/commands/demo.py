"""`sflow demo`: what the method does, shown on the embedded model in under a minute."""

import click

from sflow_jax.commands.command import Command
from sflow_jax.commands.output import say, shown


@click.command(cls=Command, epilog="sflow demo")
@click.option("--out", "-o", default="sflow-demo", show_default=True, help="Folder for the results.")
def demo(out: str) -> None:
    """See edits on the embedded model, in under a minute: grid.png, every picture, demo.json."""
    import numpy as np

    from sflow_jax.commands.examples import CHANGES, run_demo, summary
    from sflow_jax.pictures.grids import captioned_grid
    from sflow_jax.records import write_record
    from sflow_jax.storage.folders import output_folder

    with output_folder(out, "demo.json") as folder:
        examples = run_demo(shown())
        rows = [(row.name, [row.source, *row.edits]) for row in examples.rows]
        images = np.concatenate([np.stack(pictures) for _, pictures in rows])
        folder.image(
            "grid.png", captioned_grid(images, examples.captions, columns=1 + len(CHANGES)), examples.record
        )
        for name, (source, *edits) in rows:
            folder.picture(f"{name}-source.png", source, examples.record)
            for number, edit in enumerate(edits, 1):
                folder.picture(f"{name}-edit-{number}.png", edit, examples.record)
        write_record(folder, examples.record, examples.seconds)
    say(summary(examples, out))
