"""The command `translution demo`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

__all__ = ["demo"]


def demo(
    runs: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="[RUN]...",
            help="Folders of runs or checkpoints, on scikit-learn's digits or text. Default: "
            "small models that came with the package.",
            show_default=False,
        ),
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: any that is free.")] = 8080,
    show: Annotated[bool, typer.Option("--open/--no-open", help="Open a browser.")] = True,
) -> None:
    """A page to try what the mixers do, on digits that move and on text: translution demo [RUN...]

    Only this machine can reach it unless another address is given.
    """
    import nicegui  # noqa: F401  (what is missing is told before anything is read)
    import torch

    from .listening import is_loopback, listen

    with listen(host, port) as listening:
        from .models import open_models
        from .server import open_in_browser, serve

        models = open_models(runs or [])
        torch.set_num_threads(1)  # small models: more threads would only wait for each other
        address, port = listening.getsockname()[:2]
        name = f"[{address}]" if ":" in address else address
        url = f"http://{name}:{port}"
        if not is_loopback(listening):
            typer.echo(
                f"translution: {address} can be reached from other machines, and whoever does can "
                "use the page; there is no password",
                err=True,
            )

        def started() -> None:
            typer.echo(f"translution demo: {url} (Ctrl-C ends it)")
            if show:
                open_in_browser(url)

        serve(models, listening, started)
