"""The command `translution demo`."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Annotated

import typer

from ..training.import_option import ImportOption

__all__ = ["demo"]


def demo(
    runs: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="[RUN]...",
            help="Folders of runs or checkpoints, trained on scikit-learn's digits or on text. "
            "Default: the small models in the repository's folder demo-weights.",
            show_default=False,
        ),
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: any that is free.")] = 8080,
    show: Annotated[bool, typer.Option("--open/--no-open", help="Open a browser.")] = True,
    imports: ImportOption = None,
) -> None:
    """A page to try what the mixers do, on digits that move and on text: translution demo [RUN...]

    Only this machine can reach it unless another address is given.
    """
    typer.echo("translution demo: starting")  # what comes now takes seconds
    with ExitStack() as stack:
        with _ended_quietly():
            import nicegui  # noqa: F401  (a missing package is reported before anything is read)
            import torch

            from .listening import address_of, is_loopback, listen

            listening = stack.enter_context(listen(host, port))
            from .models import open_models
            from .server import open_in_browser, serve

            models = open_models(runs or [])
        torch.set_num_threads(1)  # small models: more threads would only wait for each other
        if not is_loopback(listening):
            address = listening.getsockname()[0]
            typer.echo(
                f"translution: {address} can be reached from other machines, and whoever does can "
                "use the page; there is no password",
                err=True,
            )

        def started() -> None:
            url = address_of(listening, "<this machine>")
            typer.echo(f"translution demo: {url} (Ctrl-C ends it)")
            if show:
                open_in_browser(address_of(listening, "localhost"))

        serve(models, listening, started, host)


@contextmanager
def _ended_quietly() -> Iterator[None]:
    """Ctrl-C ends the process at once: in the middle of imports it would leave a traceback."""
    if threading.current_thread() is not threading.main_thread():  # only there are signals handled
        yield
        return
    usual = signal.getsignal(signal.SIGINT)
    if usual is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, lambda *_: os._exit(130))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, usual)
