"""The socket of the server; quick to import, so that a used port is reported before loading."""

from __future__ import annotations

import errno
import ipaddress
import os
import socket

__all__ = ["address_of", "is_loopback", "listen"]


def listen(host: str, port: int) -> socket.socket:
    """Open a socket that listens.

    Args:
        host: the name or address of this machine to listen on.
        port: the port; 0 takes a free one.

    Raises:
        ValueError: the address is not one of this machine, or the port is in use.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM
        )[0]
    except (OSError, UnicodeError) as error:
        raise ValueError(f"host: got {host!r}, want an address of this machine ({error})") from None
    listening = socket.socket(family, kind, protocol)
    if os.name == "posix":  # on other systems this would let two servers use one port
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
            f"port: cannot listen on {host}, port {port} ({error.strerror}); choose another "
            "with --port, or 0 for a free one"
        ) from None
    return listening


def is_loopback(listening: socket.socket) -> bool:
    """Return whether only this machine can reach a socket."""
    return ipaddress.ip_address(listening.getsockname()[0].partition("%")[0]).is_loopback


def address_of(listening: socket.socket, everywhere: str) -> str:
    """Return the address that a browser opens.

    Args:
        listening: the socket.
        everywhere: the host name to use if the socket listens on all addresses.
    """
    address, port = listening.getsockname()[:2]
    if ipaddress.ip_address(address.partition("%")[0]).is_unspecified:
        address = everywhere
    return f"http://[{address}]:{port}" if ":" in address else f"http://{address}:{port}"
