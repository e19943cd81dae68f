"""`sflow studio`: a web page to edit in."""

import importlib.util
import ipaddress
import os
import socket
import tempfile
import threading
from pathlib import Path

import click

from sflow_jax.commands.command import Command
from sflow_jax.commands.options import Chosen, model_options, refuse_unused
from sflow_jax.commands.output import say
from sflow_jax.errors import SettingError
from sflow_jax.settings import EMBEDDED, PaintingSettings


@click.command(
    cls=Command,
    epilog="""
    sflow studio

    sflow studio -m checkpoints/flux-dev --quantize int8 --port 8000 --no-open
    """,
)
@model_options(required=False)
@click.option(
    "--host",
    default="127.0.0.1",
    show_default=True,
    help="Address to serve; others than this machine's let others in.",
)
@click.option("--port", type=click.IntRange(1, 65535), help="By default the first free one from 7860 on.")
@click.option(
    "--open/--no-open", "open_browser", default=True, show_default=True, help="Open the page in a browser."
)
@click.option(
    "--share", is_flag=True, help="Also a public address, by gradio's servers: who knows it can paint here."
)
def studio(chosen: Chosen, host: str, port: int | None, open_browser: bool, share: bool) -> None:
    """Edit pictures, look at layers and learn, on a web page; without --model on the embedded model.

    What is painted is gone with the studio unless it is downloaded. Needs: pip install "sflow_jax[studio]"
    """
    refuse_unused(["coordinator", "process"], "here: the studio is one process")
    if importlib.util.find_spec("gradio") is None:
        raise SettingError('the studio needs gradio; install it with: pip install "sflow_jax[studio]"')
    check_address(host, port)
    chosen = Chosen(chosen.model or EMBEDDED, chosen.placement, None, None)
    chosen.check(PaintingSettings())
    with tempfile.TemporaryDirectory(prefix="sflow-studio-") as folder:
        # Where gradio keeps uploads; read when it is imported.
        os.environ["GRADIO_TEMP_DIR"] = str(Path(folder) / "uploads")
        from sflow_jax.studio.page import serve
        from sflow_jax.studio.studio import Studio

        say("loading the model …")
        flow, _ = chosen.load()
        shared = Studio(flow, Path(folder), reads_folders=is_loopback(host) and not share)
        page, address = serve(shared, host=host, port=port, share=share, open_browser=open_browser)
        say(f"the studio is at {address}; end it with Ctrl-C")
        try:
            threading.Event().wait()
        finally:
            page.close()


def is_loopback(host: str) -> bool:
    """Whether only this machine can come to an address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def check_address(host: str, port: int | None) -> None:
    """SettingError where nothing can be served, before a model is loaded."""
    try:
        family, *_, place = socket.getaddrinfo(host, port or 0, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, socket.SOCK_STREAM) as one:
            one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            one.bind(place)
    except OSError as error:
        raise SettingError(
            f"cannot serve at `host` {host}, `port` {port or 'any'}: {error.strerror}; choose others"
        ) from error
