"""What every command line shares: errors in one line, quiet logs, the compilation cache."""

import contextlib
import logging
import os
import sys
from collections.abc import Iterator

import click

from sflow_jax.errors import SettingError
from sflow_jax.settings import Placement, SweepSettings
from sflow_jax.storage.paths import cache_folder

HELP_WIDTH = 116
VARIABLE = "JAX_COMPILATION_CACHE_DIR"


class Command(click.Command):
    """A command whose help keeps the line breaks of its examples."""

    context_settings = {"max_content_width": HELP_WIDTH}

    def format_epilog(self, context: click.Context, formatter: click.HelpFormatter) -> None:
        if self.epilog:
            formatter.write_paragraph()
            with formatter.section("Examples"):
                for line in self.epilog.strip().splitlines():
                    formatter.write_text(line.strip())

    def invoke(self, context: click.Context):
        """Bad input (ValueError) and files that cannot be read or written end with one line and exit code 2."""
        with one_line_errors():
            return super().invoke(context)


@contextlib.contextmanager
def one_line_errors() -> Iterator[None]:
    """Errors of a user's making as click's; everything else is a fault of the program and keeps its traceback."""
    try:
        yield
    except SettingError as error:
        from sflow_jax.commands.methods import METHOD_FLAGS
        from sflow_jax.commands.options import flags_of

        message = error.as_options(METHOD_FLAGS | flags_of(Placement, SweepSettings))
        raise click.exceptions.UsageError(message) from error
    except (ValueError, OSError) as error:
        raise click.exceptions.UsageError(str(error)) from error
    except RuntimeError as error:
        message = _runtime_message(error)
        if message is None:
            raise
        raise click.exceptions.UsageError(message) from error


def _runtime_message(error: RuntimeError) -> str | None:
    """What to say of an error of the device or of another process; None for faults of the program."""
    import jax

    if not isinstance(error, jax.errors.JaxRuntimeError):
        return None
    if "RESOURCE_EXHAUSTED" in str(error):
        return (
            "out of device memory: choose a smaller picture, fewer edits at once, --quantize int8, --offload, "
            "or more devices with --mesh"
        )
    if jax.distributed.is_initialized():
        return f"another process was lost ({str(error).splitlines()[0]}); start all of them again"
    return None


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
    if VARIABLE in os.environ:
        return
    folder = str(cache_folder() / "compiled")
    if (jax := sys.modules.get("jax")) is not None:
        jax.config.update(VARIABLE.lower(), folder)
    else:
        # jax reads it when it is imported.
        os.environ[VARIABLE] = folder


def run_command(command: click.Command) -> None:
    """Run a command line: a usage error is one line, without the usage text that click puts before it."""
    quiet_logs()
    try:
        command(standalone_mode=False)
    except click.exceptions.Exit as stop:
        raise SystemExit(stop.exit_code) from stop
    except click.ClickException as error:
        click.echo(f"Error: {error.format_message()}", err=True)
        if _joined():
            # Leaving in order would wait for the other processes, which wait for this one.
            sys.stdout.flush()
            os._exit(2)
        raise SystemExit(2) from error
    except click.Abort as stop:
        click.echo("Stopped.", err=True)
        raise SystemExit(130) from stop


def _joined() -> bool:
    """Whether other processes wait for this one."""
    jax = sys.modules.get("jax")
    return jax is not None and jax.distributed.is_initialized()
