"""What every command line shares: errors in one line, lists of layers, quiet logs."""

import contextlib
import functools
import logging
import os
import sys
from collections.abc import Callable

import click
import jax

from sflow_jax.paths import cache_folder

HELP_WIDTH = 116


class Command(click.Command):
    """A command whose help keeps the line breaks of its examples."""

    context_settings = {"max_content_width": HELP_WIDTH}

    def format_epilog(self, context: click.Context, formatter: click.HelpFormatter) -> None:
        if self.epilog:
            formatter.write_paragraph()
            with formatter.section("Examples"):
                for line in self.epilog.strip().splitlines():
                    formatter.write_text(line.strip())


def one_line_errors(command: Callable) -> Callable:
    """Bad input (ValueError) and files that cannot be read or written end with one line and exit code 2."""

    @functools.wraps(command)
    def run(*args, **kwargs):
        try:
            return command(*args, **kwargs)
        except (ValueError, OSError) as error:
            raise click.exceptions.UsageError(str(error)) from error
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                if not jax.distributed.is_initialized():
                    raise
                raise click.exceptions.UsageError(
                    f"another process was lost ({str(error).splitlines()[0]}); start all of them again"
                ) from error
            raise click.exceptions.UsageError(
                "out of device memory: choose a smaller picture, fewer edits at once, --quantize int8, --offload, "
                "or more devices with --mesh"
            ) from error

    return run


def parse_layers(text: str) -> str | tuple[int, ...]:
    """`vital`, `all` and `none` as they are; `0,1,17-18` as numbers. ValueError for anything else."""
    if text in ("vital", "all", "none"):
        return text
    numbers: list[int] = []
    for part in filter(None, (piece.strip() for piece in text.split(","))):
        first, _, last = part.partition("-")
        if not (first.isdecimal() and (last or first).isdecimal()):
            raise ValueError(f"cannot read layers {text!r}: write numbers and ranges such as 0,1,17-18")
        numbers += range(int(first), int(last or first) + 1)
    return tuple(numbers)


def parse_place(text: str, option: str) -> tuple[int, int]:
    """`2/4`, the second of four, as (1, 4); ValueError naming the option for anything else."""
    index, _, count = text.partition("/")
    if not (index.isdecimal() and count.isdecimal() and 1 <= int(index) <= int(count)):
        raise ValueError(f"{option} must be such as 1/4 to 4/4, found {text!r}")
    return int(index) - 1, int(count)


def quiet_logs() -> None:
    """Our warnings in one plain line each; libraries keep to errors."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(levelname)s: %(message)s"))
    logger = logging.getLogger("sflow_jax")
    logger.handlers[:] = [handler]
    logger.propagate = False
    for name in ("absl", "orbax", "jax", "transformers"):
        logging.getLogger(name).setLevel(logging.ERROR)


def use_compilation_cache() -> None:
    """Keep compiled programs between runs, unless the environment says where."""
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        jax.config.update("jax_compilation_cache_dir", str(cache_folder() / "compiled"))


@contextlib.contextmanager
def plain_usage_errors():
    """Print a usage error as one line, without the usage text that click puts before it."""
    try:
        yield
    except click.exceptions.Exit as stop:
        raise SystemExit(stop.exit_code) from stop
    except click.ClickException as error:
        click.echo(f"Error: {error.format_message()}", err=True)
        if jax.distributed.is_initialized():
            # Leaving in order would wait for the other processes, which wait for this one.
            sys.stdout.flush()
            os._exit(2)
        raise SystemExit(2) from error
    except click.Abort as stop:
        click.echo("Stopped.", err=True)
        raise SystemExit(130) from stop
