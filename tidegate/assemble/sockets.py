"""Listening sockets, made before the servers that use them: what is taken is known at once and said in one line."""

import errno
import os
import socket
from pathlib import Path

BACKLOG = 2_048


class StartError(Exception):
    """The platform cannot start here; one line, safe to show, that says what to do."""


def listen_tcp(host: str, port: int) -> socket.socket:
    """A listening socket on `host`:`port` (0 takes a free port). StartError when it is taken or not allowed.

    The platform holds it and hands it to each gateway process: while one is restarted, clients wait in the backlog
    instead of being refused.
    """
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
    except socket.gaierror as error:
        raise StartError(f"host {host!r} is not an address of this machine ({error.strerror})") from error
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(BACKLOG)
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRINUSE:
            raise StartError(
                f"port {port} on {host} is in use; stop what listens there or choose another --port"
            ) from error
        raise StartError(f"cannot listen on {host} port {port}: {error.strerror}") from error
    listener.setblocking(False)
    return listener


def listen_unix(path: Path) -> socket.socket:
    """A listening Unix socket only this user can reach. Replaces a dead one of an earlier run."""
    path.unlink(missing_ok=True)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    mask = os.umask(0o177)
    try:
        listener.bind(str(path))
        listener.listen(BACKLOG)
    except OSError as error:
        listener.close()
        raise StartError(f"cannot listen on {path.name}: {error.strerror}") from error
    finally:
        os.umask(mask)
    listener.setblocking(False)
    return listener


def public_url(listener: socket.socket, host: str) -> str:
    """What a person types: wildcard addresses are shown as the loopback one."""
    port = listener.getsockname()[1]
    shown = {"0.0.0.0": "127.0.0.1", "::": "[::1]", "": "127.0.0.1"}.get(host, f"[{host}]" if ":" in host else host)
    return f"http://{shown}:{port}"
