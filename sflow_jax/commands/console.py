"""What every command line shares: errors in one line, quiet logs, the compilation cache."""

import contextlib
import importlib.util
import logging
import os
import re
import sys
from collections.abc import Iterator, Mapping
from typing import Any, NoReturn

import click

from sflow_jax.commands.interrupts import Interrupted, stop_on_signals
from sflow_jax.commands.output import printable
from sflow_jax.errors import SettingError

# Of every command: help as wide as the terminal, up to a width that can be read.
CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 160}
VARIABLE = "JAX_COMPILATION_CACHE_DIR"
# Characters of an error.
LONGEST = 390
# Options that are texts, not places.
TEXTS = ("prompt", "edit_prompt", "negative", "coordinator")


def check_addresses(values: Mapping[str, Any]) -> None:
    """SettingError for an option that is an address of a kind which nothing here can open."""
    for name, value in values.items():
        for text in value if name == "compared" and value else [value]:
            kind = re.match(r"[a-z0-9+.-]*://", text) if isinstance(text, str) and name not in TEXTS else None
            if kind is None or kind[0] == "gs://" or (kind[0] == "s3://" and importlib.util.find_spec("s3fs")):
                continue
            raise SettingError(f"`{name}` {text[:150]}: {kind[0]} cannot be opened; give a local path, or gs://")


@contextlib.contextmanager
def one_line_errors() -> Iterator[None]:
    """Errors of a user's making as click's; everything else is a fault of the program and keeps its traceback."""
    try:
        yield
    except SettingError as error:
        from sflow_jax.commands.methods import METHOD_FLAGS
        from sflow_jax.commands.options import flags_of
        from sflow_jax.settings import Placement, SweepSettings

        message = error.as_options(METHOD_FLAGS | flags_of(Placement, SweepSettings))
        raise click.exceptions.UsageError(message) from error
    except (ValueError, OSError) as error:
        raise click.exceptions.UsageError(str(error)) from error
    except KeyError as error:
        # So epath says that it knows no such address.
        if not str(error).strip("'").endswith("://"):
            raise
        raise click.exceptions.UsageError(
            f"cannot open addresses of {error}; give a local path, or gs://"
        ) from error
    except MemoryError as error:
        raise click.exceptions.UsageError("out of memory: choose smaller settings, or a larger machine") from error
    except ImportError as error:
        if "gcsfs" not in str(error):
            raise
        raise click.exceptions.UsageError(
            'gs:// needs gcsfs; install it with: pip install "sflow_jax[gcs]"'
        ) from error
    except RuntimeError as error:
        message = _runtime_message(error)
        if message is None:
            raise
        raise click.exceptions.UsageError(message) from error


def one_line(text: str) -> str:
    """Text for a terminal: one line of bounded length, with control characters shown instead of obeyed."""
    joined = " ".join(text.split("\n")) if len(text) <= LONGEST else f"{text[:LONGEST]} …".replace("\n", " ")
    return printable(joined)


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


class _PlainFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        return one_line(text) if record.levelno >= logging.WARNING else printable(text)


def quiet_logs() -> None:
    """Our warnings in one plain line each; libraries keep to errors."""
    handler = logging.StreamHandler()
    handler.setFormatter(_PlainFormatter("%(levelname)s: %(message)s"))
    logger = logging.getLogger("sflow_jax")
    logger.handlers[:] = [handler]
    logger.propagate = False
    for name in ("absl", "orbax", "jax", "transformers"):
        logging.getLogger(name).setLevel(logging.ERROR)


def use_compilation_cache() -> None:
    """Keep compiled programs between runs, unless the environment says where."""
    if VARIABLE in os.environ:
        return
    from sflow_jax.storage.paths import cache_folder

    try:
        folder = str(cache_folder() / "compiled")
    except SettingError:  # no home: programs are compiled every time
        return
    if (jax := sys.modules.get("jax")) is not None:
        jax.config.update(VARIABLE.lower(), folder)
    else:
        # jax reads it when it is imported.
        os.environ[VARIABLE] = folder


def run_command(command: click.Command) -> None:
    """Run a command line: a usage error is one line, without the usage text that click puts before it."""
    quiet_logs()
    stop_on_signals()
    try:
        with one_line_errors():
            command(standalone_mode=False)
    except BaseException as error:
        # Libraries turn an interruption into errors of their own.
        if Interrupted.code is not None or isinstance(error, KeyboardInterrupt | click.Abort):
            _end_bars()
            click.echo("Stopped.", err=True)
            _leave(Interrupted.code or 130)
        if isinstance(error, click.exceptions.Exit):
            raise SystemExit(error.exit_code) from error
        if not isinstance(error, click.ClickException):
            raise
        _end_bars()
        click.echo(one_line(f"Error: {error.format_message()}"), err=True)
        if _joined():
            # Leaving in order would wait for the other processes, which wait for this one.
            _leave(2)
        raise SystemExit(2) from error


def _end_bars() -> None:
    """Finish the lines of progress bars that an error left open, so that its own line is one."""
    if (tqdm := sys.modules.get("tqdm")) is not None:
        for bar in list(getattr(tqdm.tqdm, "_instances", ())):
            bar.close()


def _leave(code: int) -> NoReturn:
    """End the process now, whatever its threads do."""
    sys.stdout.flush()
    os._exit(code)


def _joined() -> bool:
    """Whether other processes wait for this one."""
    jax = sys.modules.get("jax")
    return jax is not None and jax.distributed.is_initialized()
