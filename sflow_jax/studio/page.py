"""The page of all tabs, and how it is served: to this machine alone, with nothing from other hosts."""

import os

# Before gradio is imported: it asks nobody, and reports to nobody.
os.environ.update(GRADIO_ANALYTICS_ENABLED="False", HF_HUB_DISABLE_TELEMETRY="1", DO_NOT_TRACK="1")

from pathlib import Path  # noqa: E402

import gradio as gr  # noqa: E402
from starlette.middleware import Middleware  # noqa: E402
from starlette.types import ASGIApp, Message, Receive, Scope, Send  # noqa: E402

from sflow_jax.settings import EMBEDDED  # noqa: E402
from sflow_jax.studio.edit_tab import EditTab  # noqa: E402
from sflow_jax.studio.layers_tab import LayersTab  # noqa: E402
from sflow_jax.studio.learn_tab import LearnTab  # noqa: E402
from sflow_jax.studio.parts import AT_ONCE  # noqa: E402
from sflow_jax.studio.studio import Studio  # noqa: E402

# Visitors that wait in line, and the largest file that they may bring.
MOST_WAITING, LARGEST_FILE = 20, "40mb"
# Seconds: how often uploads are looked at, and how old they may be.
CLEANED = (3600, 86_400)
FONTS = {"font": ["system-ui", "sans-serif"], "font_mono": ["ui-monospace", "monospace"]}
# The browser itself refuses whatever a page would fetch from another host.
OWN_HOST = b"default-src 'self' data: blob: 'unsafe-inline' 'unsafe-eval'; frame-ancestors 'self'"


class OwnHostOnly:
    """Sends `OWN_HOST` as the content policy of every answer."""

    def __init__(self, app: ASGIApp):
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""

        async def with_policy(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", ()), (b"content-security-policy", OWN_HOST)]
            await send(message)

        await self.app(scope, receive, with_policy)


def build(studio: Studio) -> gr.Blocks:
    """The page; Learn is there for the embedded model alone, whose right answers are known."""
    with gr.Blocks(title="sflow studio", analytics_enabled=False, delete_cache=CLEANED) as page:
        gr.Markdown(f"# sflow studio\n{studio.flow.info.title}, {studio.flow.layers} layers")
        with gr.Tab("Edit"):
            EditTab(studio)
        if studio.flow.painter.checkpoint == EMBEDDED:
            with gr.Tab("Learn"):
                learn = LearnTab(studio)
            page.load(learn.draw, [learn.scene, learn.family], learn.drawn, **AT_ONCE)
        with gr.Tab("Layers"):
            LayersTab(studio)
    return page.queue(max_size=MOST_WAITING, default_concurrency_limit=4, api_open=False)


def serve(studio: Studio, *, host: str, port: int | None, share: bool, open_browser: bool) -> tuple[gr.Blocks, str]:
    """Serve the page from threads of this process; the page, to be closed, and its address."""
    page = build(studio)
    _, local, shared = page.launch(
        server_name=host,
        server_port=port,
        share=share,
        inbrowser=open_browser,
        prevent_thread_lock=True,
        quiet=True,
        show_error=False,
        footer_links=[],
        max_file_size=LARGEST_FILE,
        allowed_paths=[str(studio.store.folder)],
        app_kwargs={"middleware": [Middleware(OwnHostOnly)]},
        theme=gr.themes.Default(**FONTS),
        css_paths=[Path(__file__).parent / "style.css"],
        ssr_mode=False,
        pwa=False,
        mcp_server=False,
        enable_monitoring=False,
    )
    return page, shared or local
