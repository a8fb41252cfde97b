"""One HTTP request to one server, with bounds that hold for all of it.

`http.client` follows no redirect and uses no proxy. Its timeouts are those of single reads, so that
an answer in drops outlives them: here a timer ends the connection, whatever it is doing.
"""

import contextlib
import http.client
import ipaddress
import os
import socket
import ssl
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from megatron_dr.report.hidden import shown

_CHUNK = 1 << 16
_LONGEST_WAIT = 86400.0  # seconds: sockets and timers take no more than weeks


class Failure(Exception):
    """No answer, and why: another try may have one."""


@dataclass(frozen=True)
class Address:
    """Where requests go.

    Attributes:
        host: a name or a number, without brackets.
    """

    secure: bool
    host: str
    port: int
    path: str

    @classmethod
    def of(cls, url: str, path: str, plain_http: bool) -> "Address":
        """That of a path below a URL.

        Raises:
            ValueError: the URL is not one of http or https with a host alone; or it is http to
                another machine than this one, unless `plain_http`.
        """
        if not url.startswith(("http://", "https://")) or not (url.isascii() and url.isprintable()):
            raise ValueError(
                f"the server's URL must begin with http:// or https://, not {_told(url)!r:.200}."
            )
        parts = urlsplit(url)
        if "@" in parts.netloc:  # not shown: it is a secret
            raise ValueError("the server's URL has a user or a password in it: use key.")
        try:
            host, port = parts.hostname, parts.port
        except ValueError:
            host = None
        if not host or parts.query or parts.fragment or " " in url:
            raise ValueError(
                "the server's URL needs a host, and has nothing behind its path: "
                f"{_told(url)!r:.200}."
            )
        secure = parts.scheme == "https"
        if not (secure or plain_http or _is_here(host)):
            raise ValueError(
                f"{url:.200} would send prompts and key to {host} in the open: use https, or give "
                "plain_http=True where the network between is trusted."
            )
        port = (443 if secure else 80) if port is None else port
        return cls(secure, host, port, parts.path.rstrip("/") + path)

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"http{'s' * self.secure}://{host}:{self.port}{self.path}"


@dataclass(frozen=True)
class Reply:
    """A server's answer; `location` is where it redirects to, or None."""

    status: int
    location: str | None
    body: bytes


def post(
    address: Address, body: bytes, headers: dict[str, str], seconds: float, most: int
) -> Reply:
    """What the server answers.

    Args:
        seconds: for all of it, but the look-up of the host's name.
        most: bytes that the answer may have.

    Raises:
        Failure: it can't be reached, breaks the connection, is late, or says too much.
    """
    watched = _Watched(address, seconds)
    try:
        with watched.connection() as connection:
            connection.request("POST", address.path, body, headers)
            response = connection.getresponse()
            location = response.getheader("Location") if 300 <= response.status < 400 else None
            read = _read(response, most)
    except (Failure, OSError, ValueError, http.client.HTTPException) as error:
        if watched.late or isinstance(error, TimeoutError):
            raise Failure(f"timed out after {seconds:g} s") from error
        raise Failure(f"{shown(str(error)) or type(error).__name__:.500}") from error
    if watched.late:  # an answer of unknown length ends with its connection
        raise Failure(f"timed out after {seconds:g} s")
    return Reply(response.status, location, read)


def _read(response: http.client.HTTPResponse, most: int) -> bytes:
    parts, size = [], 0
    while part := response.read(_CHUNK):
        parts.append(part)
        size += len(part)
        if size > most:
            raise Failure(f"its answer has more than {most} bytes")
    if response.length:
        raise Failure(f"closed connection {response.length} bytes before its answer's end")
    return b"".join(parts)


class _Watched:
    """A connection that is shut when its time is over.

    Attributes:
        late: whether that has happened.
    """

    def __init__(self, address: Address, seconds: float) -> None:
        self._address, self._seconds = address, min(seconds, _LONGEST_WAIT)
        self._held: socket.socket | None = None
        self.late = False

    @contextlib.contextmanager
    def connection(self) -> Iterator[http.client.HTTPConnection]:
        address = self._address
        kind: Any = http.client.HTTPConnection
        more: dict[str, Any] = {}
        if address.secure:
            kind, more = http.client.HTTPSConnection, {"context": ssl.create_default_context()}
        connection = kind(address.host, address.port, timeout=self._seconds, **more)
        connection._create_connection = self._connect  # TLS is begun on what it gives
        timer = threading.Timer(self._seconds, self._shut)
        timer.daemon = True
        timer.start()
        try:
            yield connection
        finally:
            timer.cancel()
            connection.close()
            if self._held is not None:
                self._held.close()

    def _connect(self, place: tuple[str, int], timeout: float, *more: Any) -> socket.socket:
        """A name may have several addresses, which are tried one after the other."""
        found = socket.getaddrinfo(*place, type=socket.SOCK_STREAM)
        made = socket.create_connection(place, timeout / len(found), *more)
        made.settimeout(timeout)
        # TLS takes the descriptor away from the socket that it wraps: keep another of it
        self._held = socket.socket(fileno=os.dup(made.fileno()))
        if self.late:
            self._shut()
        return made

    def _shut(self) -> None:
        self.late = True
        if self._held is not None:
            with contextlib.suppress(OSError):
                self._held.shutdown(socket.SHUT_RDWR)


def _told(url: str) -> str:
    """What of it is no secret."""
    return url.partition("?")[0].partition("#")[0].rpartition("@")[2]


def _is_here(host: str) -> bool:
    """Whether a host is this machine, by its name or number alone."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
