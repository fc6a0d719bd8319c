"""Where the server listens. Light to import: a taken port is told before models are read."""

from __future__ import annotations

import errno
import ipaddress
import os
import socket

__all__ = ["address_of", "is_loopback", "listen"]


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens; port 0 takes a free one.

    Raises:
        ValueError: an address that is none, or a port that is taken.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM
        )[0]
    except (OSError, UnicodeError) as error:
        raise ValueError(f"host: got {host!r}, want an address of this machine ({error})") from None
    listening = socket.socket(family, kind, protocol)
    if os.name == "posix":  # elsewhere it would let two servers have one port
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind(address)
        listening.listen(128)
    except OSError as error:
        listening.close()
        if error.errno not in (errno.EADDRINUSE, errno.EACCES):
            raise ValueError(
                f"host: got {host!r}, want an address of this machine ({error.strerror})"
            ) from None
        raise ValueError(
            f"port: cannot listen on {host}, port {port} ({error.strerror}); --port takes another, "
            "0 any that is free"
        ) from None
    return listening


def is_loopback(listening: socket.socket) -> bool:
    """Whether only this machine reaches it."""
    return ipaddress.ip_address(listening.getsockname()[0].partition("%")[0]).is_loopback


def address_of(listening: socket.socket, everywhere: str) -> str:
    """Where a browser finds it. everywhere: the name to tell where it listens on all addresses."""
    address, port = listening.getsockname()[:2]
    if ipaddress.ip_address(address.partition("%")[0]).is_unspecified:
        address = everywhere
    return f"http://[{address}]:{port}" if ":" in address else f"http://{address}:{port}"
