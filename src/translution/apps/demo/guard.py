"""What protects the server of the page: only its own pages may use it, and whatever a browser sends
leaves at most one line in its log."""

from __future__ import annotations

import ipaddress
import logging
import math
import socket
import traceback
from collections.abc import Iterable
from typing import Any
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

__all__ = ["OwnPagesOnly", "log_in_lines", "names_of", "numbers"]

# the libraries that answer a browser
LOGGERS = ("asyncio", "engineio.server", "nicegui", "socketio.server", "uvicorn.error")
MOST = 300  # characters of a line


class OwnPagesOnly:
    """Refuses requests that a page of another site makes a browser send.

    A request must name this server as its host. Otherwise a site could let its own name stand for
    this machine's address, and read what the server answers (DNS rebinding). The port is not
    compared, because a tunnel or a container may give the server another one. If a browser says
    which page the request comes from (`Origin`, or `Sec-Fetch-Site` where there is no origin), that
    must be a page of this server, for its socket too. A link to the page works from anywhere, but
    no other site may show the page in a frame.

    Args:
        app: the application behind it.
        names: the host names of the server.
        addresses: whether it may also be called by any address in digits, which no site can let
            stand for another. A server that other machines use has addresses that it cannot know.
    """

    def __init__(self, app: ASGIApp, names: Iterable[str], addresses: bool):
        self.app, self.names, self.addresses = app, frozenset(names), addresses

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def unframed(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)["Content-Security-Policy"] = "frame-ancestors 'none'"
            await send(message)

        if scope["type"] not in ("http", "websocket"):
            await self.app(scope, receive, send)
        elif self._is_own(Headers(scope=scope)):
            await self.app(scope, receive, unframed)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
        else:
            refused = PlainTextResponse("This page is served to its own address only.", 403)
            await refused(scope, receive, send)

    def _is_own(self, headers: Headers) -> bool:
        hosts = headers.getlist("host")
        if len(hosts) != 1 or not self._is_named(_name_in(hosts[0])):
            return False
        own = f"http://{hosts[0]}".lower()
        if any(origin.lower() != own for origin in headers.getlist("origin")):
            return False
        is_link = headers.get("sec-fetch-dest") == "document"
        return is_link or headers.get("sec-fetch-site", "none") in ("same-origin", "none")

    def _is_named(self, name: str) -> bool:
        return name in self.names or (self.addresses and _is_address(name))


def _name_in(host: str) -> str:
    """The name in a header `Host`, in small letters; nothing if the header is not name:port."""
    try:
        parts = urlsplit(f"//{host}")
        parts.port  # noqa: B018  (it raises if it is no number)
    except ValueError:
        return ""
    return "" if parts.netloc != host or "@" in host else (parts.hostname or "")


def names_of(listening: socket.socket, host: str) -> set[str]:
    """The names by which a browser may call a server that listens on a socket.

    Args:
        listening: the socket.
        host: the address or name that the user gave.
    """
    names = {"localhost", "127.0.0.1", "::1", host.lower(), listening.getsockname()[0].lower()}
    if not ipaddress.ip_address(listening.getsockname()[0].partition("%")[0]).is_loopback:
        names |= {socket.gethostname().lower(), socket.getfqdn().lower()}
    return names


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def numbers(sent: Any, *names: str) -> list[int] | None:
    """The values of these names in an event as whole numbers, or None if it has no such numbers."""
    found = []
    for name in names:
        value = sent.get(name) if isinstance(sent, dict) else None
        if not isinstance(value, int | float) or not math.isfinite(value):
            return None
        found.append(int(value))
    return found


def log_in_lines() -> None:
    """Let the libraries log an error as one line, without a traceback.

    A browser can send whatever it likes, and for most of it NiceGUI and its libraries raise.
    """
    for name in LOGGERS:
        logging.getLogger(name).addFilter(_as_line)


def _as_line(record: logging.LogRecord) -> bool:
    message = record.getMessage()
    error = record.exc_info[1] if isinstance(record.exc_info, tuple) else None
    if error is not None:
        frames = traceback.extract_tb(error.__traceback__)
        place = f" in {frames[-1].name}" if frames else ""
        message = f"{type(error).__name__}{place}: {message}"
    record.msg, record.args = " ".join(message.split())[:MOST], ()
    record.exc_info = record.exc_text = record.stack_info = None
    return True
