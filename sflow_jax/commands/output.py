"""How much a command says, and in which form: -q, -v, --json."""

import contextlib
import logging
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from sflow_jax.progress import Progress

QUIET, VERBOSE, JSON = "quiet", "verbose", "json"
# Seconds from which on a program is worth a line.
SLOW = 1.0
logger = logging.getLogger("sflow_jax")


def _switch(*flags: str, name: str, help: str) -> Callable[[], click.Option]:
    """An option that is noted for the whole command, whatever its function takes."""

    def note(context: click.Context, option: click.Parameter, value: bool) -> None:
        context.meta[f"sflow_jax.{name}"] = value

    return lambda: click.Option([*flags, name], is_flag=True, expose_value=False, callback=note, help=help)


quiet_option = _switch("--quiet", "-q", name=QUIET, help="Say nothing but errors.")
verbose_option = _switch("--verbose", "-v", name=VERBOSE, help="Say more: settings, meshes, what is compiled.")
_json_option = _switch("--json", name=JSON, help="Say it as one JSON document; all else goes to standard error.")


def json_option(command: Callable) -> Callable:
    """Adds `--json` to a command."""
    click.decorators._param_memo(command, _json_option())
    return command


def asked(name: str) -> bool:
    """Whether `QUIET`, `VERBOSE` or `JSON` was asked for."""
    context = click.get_current_context(silent=True)
    return context is not None and context.meta.get(f"sflow_jax.{name}", False)


def printable(text: str) -> str:
    """Text with control characters (but for the ends of lines) and undecodable bytes as escapes."""
    return "".join(
        c if c == "\n" or c.isprintable() else c.encode("unicode_escape", "replace").decode() for c in text
    )


def say(text: str) -> None:
    """Print what a command has to say."""
    if not asked(QUIET):
        click.echo(printable(text), err=asked(JSON))


def warn(text: str) -> None:
    """Print, on standard error, what the user may want to know."""
    if not asked(QUIET):
        click.echo(printable(text), err=True)


def answer(content: Any, text: str) -> None:
    """What was asked for: text, or with `--json` the content. NaN and infinity become null."""
    if not asked(JSON):
        return say(text)
    import msgspec

    encoded = msgspec.json.encode(content, enc_hook=lambda value: value.tolist())
    click.echo(msgspec.json.format(encoded, indent=2).decode())


def shown(reports: bool = True) -> "Progress":
    """Progress of a command on the terminal. reports: whether this process is the one that does."""
    from sflow_jax.progress import ignore, on_terminal

    return on_terminal() if reports and not asked(QUIET) else ignore


@contextlib.contextmanager
def listen() -> Iterator[None]:
    """With -q no warnings; with -v also what the library notes, and every program that took long to compile."""
    before = logger.level
    logger.setLevel(logging.ERROR if asked(QUIET) else logging.INFO if asked(VERBOSE) else before)
    try:
        with _compilations() if asked(VERBOSE) else contextlib.nullcontext():
            yield
    finally:
        logger.setLevel(before)


@contextlib.contextmanager
def _compilations() -> Iterator[None]:
    import jax

    from sflow_jax.machine.compilation import COMPILING

    def note(event: str, seconds: float, **about: Any) -> None:
        if event == COMPILING and seconds >= SLOW:
            logger.info("compiled %s in %.1f s", about.get("fun_name", "a program"), seconds)

    jax.monitoring.register_event_duration_secs_listener(note)
    try:
        yield
    finally:
        jax.monitoring.unregister_event_duration_listener(note)
