"""`sflow`: generate, edit and invert pictures, find vital layers, and look at checkpoints."""

import importlib

import click
from click.shell_completion import CompletionItem

from sflow_jax.commands.console import CONTEXT, run_command

# Command → what it does in a line. Its module is imported only when the command is used.
COMMANDS = {
    "atlas": "See where points and words attend in every layer.",
    "demo": "See the method at work on the embedded model.",
    "edit": "Edit a generated picture or a photo.",
    "evaluate": "Compare ways of editing on a benchmark.",
    "generate": "Generate pictures of prompts.",
    "info": "What a checkpoint is, and what it takes on a machine.",
    "invert": "Invert a photo, for many edits.",
    "studio": "A web page to edit in.",
    "vital": "Find a model's vital layers.",
}


class Commands(click.Group):
    """The commands of `COMMANDS`, each in the module of its name."""

    def list_commands(self, context: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, context: click.Context, name: str) -> click.Command | None:
        if name not in COMMANDS:
            return None
        return getattr(importlib.import_module(f"sflow_jax.commands.{name}"), name)

    def format_commands(self, context: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))

    def shell_complete(self, context: click.Context, incomplete: str) -> list[CompletionItem]:
        names = [name for name in COMMANDS if name.startswith(incomplete)]
        items = [CompletionItem(name, help=COMMANDS[name]) for name in names]
        return items or super().shell_complete(context, incomplete)


@click.group(cls=Commands, context_settings=CONTEXT)
@click.version_option(package_name="sflow_jax")
def group() -> None:
    """Edit pictures with FLUX by injecting keys and values in its vital layers; no training.

    Start with: sflow demo

    Then convert a checkpoint in the published layout: sflow-convert SOURCE DEST
    """


def main() -> None:
    """Entry point."""
    run_command(group)
