"""The page, served."""

from __future__ import annotations

import contextlib
import socket
import warnings
import webbrowser
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import uvicorn
from fastapi import FastAPI
from nicegui import ui

from .cards import COLOURS
from .digits import DigitsView
from .guard import OwnPagesOnly, log_in_lines, names_of
from .listening import is_loopback
from .models import Models
from .text import TextView

__all__ = ["open_in_browser", "page", "serve"]

VARIABLES = "".join(f"--{name}: {colour}; " for name, colour in COLOURS.items())
STYLE = f":root {{ {VARIABLES}}}\n" + (Path(__file__).parent / "page.css").read_text("utf-8")
INTRO = "Small models that differ only in how their tokens mix."


def page(models: Models) -> None:
    """Fill a page of NiceGUI's for one window."""
    ui.add_css(STYLE)
    ui.colors(primary="#1f6f5c")
    parts: dict[str, Callable[[], DigitsView | TextView]] = {}
    if models.digits:
        parts["Digits"] = lambda: DigitsView(models.digits)
    if models.text:
        parts["Text"] = lambda: TextView(models.text)
    with ui.element("main").classes("page"):
        with ui.element("header").classes("top"):
            ui.html("<h1>translution demo</h1>", sanitize=False)
            with ui.tabs().props('align=left no-caps inline-label aria-label="Parts"') as tabs:
                for name in parts:
                    ui.tab(name)
            ui.label(INTRO).classes("help")
        with ui.tab_panels(tabs, value=next(iter(parts))).props("keep-alive").classes("panels"):
            for name, make in parts.items():
                with ui.tab_panel(name).props(f'role=region aria-label="{name}"'):
                    view = make()
                ui.context.client.on_delete(view.stop)


def serve(
    models: Models, listening: socket.socket, started: Callable[[], None], host: str = "localhost"
) -> None:
    """Serve the page until the process is ended.

    Args:
        models: what the page shows.
        listening: the socket of the server.
        started: called once the server answers.
        host: the address or name that the user gave for the server.
    """

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        started()
        yield

    app = FastAPI(lifespan=lifespan, openapi_url=None)
    ui.page("/", title="translution demo", dark=None, language="en-US")(lambda: page(models))
    ui.run_with(app, show_welcome_message=False, tailwind=True)
    # to find its server NiceGUI looks at every object there is; torch has one that complains
    warnings.filterwarnings("ignore", message=".*reduce_op", category=FutureWarning)
    log_in_lines()
    guarded = OwnPagesOnly(app, names_of(listening, host), not is_loopback(listening))
    config = uvicorn.Config(guarded, log_level="warning", timeout_graceful_shutdown=1)
    uvicorn.Server(config).run(sockets=[listening])


def open_in_browser(url: str) -> None:
    with contextlib.suppress(webbrowser.Error):
        webbrowser.open(url)
