"""Protects the web page from the network: which requests are accepted, and how large and how slow they may be.

A server on localhost can be reached by every page that its user has open in the browser. A foreign page may send
requests to it (cross-site requests, with that page's ``Origin``), and may have its own name resolve to 127.0.0.1 (DNS
rebinding, with that name as ``Host``). :class:`Guard` rejects both.
"""

from __future__ import annotations

import asyncio
import ipaddress
import json
import threading
import time
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias
from urllib.parse import urlsplit

Message: TypeAlias = MutableMapping[str, Any]
Receive: TypeAlias = Callable[[], Awaitable[Message]]
Send: TypeAlias = Callable[[Message], Awaitable[None]]
App: TypeAlias = Callable[[Message, Receive, Send], Awaitable[None]]

OWN_NAMES = frozenset({"127.0.0.1", "localhost", "::1"})
DROP_SECONDS, STOP_SECONDS = 5, 0.5
EVERY_NETWORK = frozenset({"0.0.0.0", "::"})
# The page loads everything from this server; the browser loads nothing from other addresses in answers or libraries.
HEADERS = [
    (
        b"content-security-policy",
        b"default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; worker-src 'self' blob:; "
        b"style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:; media-src 'self' data: blob:; "
        b"font-src 'self' data:; connect-src 'self' data: blob:; frame-ancestors 'none'; form-action 'self'",
    ),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"same-origin"),
]


@dataclass(frozen=True)
class Limits:
    """Limits of one request, except ``folder_bytes``.

    Attributes:
        body_bytes: of a request that is not an upload. upload_bytes: of an upload.
        body_seconds: time limit for receiving the whole body.
        folder_bytes: of all stored uploads together.
    """

    body_bytes: int = 4 * 2**20
    upload_bytes: int = 51 * 2**20
    body_seconds: float = 120
    folder_bytes: int = 2 * 2**30


class Guard:
    """Wraps the ASGI application ``app``: accepts only requests to one of its own host names, from its own pages.

    Args:
        host: the address to listen on; for all interfaces (0.0.0.0), each address of this machine is accepted.
        names: other host names, such as that of a reverse proxy.
        upload_path: the path whose requests are uploads. uploads: the folder that stores them.
        stopped: once it is set, clients still connected count as disconnected.
    """

    def __init__(
        self, app: App, *, host: str, names: tuple[str, ...] = (), upload_path: str, uploads: Path,
        stopped: threading.Event, limits: Limits = Limits(),
    ):  # fmt: skip
        self.app, self.limits, self.upload_path, self.uploads = app, limits, upload_path, uploads
        self.stopped = stopped
        self.names = frozenset(map(str.lower, names))
        self.any_address = host in EVERY_NETWORK
        self.own = OWN_NAMES | self.names | {host.lower()}

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":  # the start and the end of the server
            await self.app(scope, receive, send)
            return
        headers = [(name.lower(), value.decode("latin-1")) for name, value in scope["headers"]]
        request = _Request(self, scope, receive, send, self._bytes_of(scope["path"]))
        if refused := self._foreign(headers) or self._too_much(scope["path"], headers):
            await request.refuse(*refused)
        else:
            await request.run()

    def _foreign(self, headers: list[tuple[bytes, str]]) -> tuple[int, str] | None:
        """Status and text of the rejection of a request to another host name, or from a page of another site."""
        hosts = [value for name, value in headers if name == b"host"]
        host = _name(hosts[0]) if len(hosts) == 1 else None
        if host is None or not (host in self.own or (self.any_address and _is_address(host))):
            return 400, f"this server is not called {', '.join(hosts) or 'nothing'}; --allowed_hosts adds a name"
        for origin in (value for name, value in headers if name == b"origin"):
            netloc = origin.lower().partition("://")[2]
            if netloc != hosts[0].lower() and _name(netloc) not in self.names:
                return 403, f"a page of {origin} may not use this server"
        return None

    def _bytes_of(self, path: str) -> int:
        return self.limits.upload_bytes if path == self.upload_path else self.limits.body_bytes

    def _too_much(self, path: str, headers: list[tuple[bytes, str]]) -> tuple[int, str] | None:
        length = next((value for name, value in headers if name == b"content-length"), "0")
        if not length.isascii() or not length.isdecimal():
            return 400, "content-length is not a number"
        if int(length) > (most := self._bytes_of(path)):
            return 413, _too_large(most)
        if path == self.upload_path:
            kept = sum(file.stat().st_size for file in self.uploads.rglob("*") if file.is_file())
            if kept + int(length) > self.limits.folder_bytes:
                return 507, "too many images were uploaded; they are deleted after a day"
        return None


class _Request:
    """One request whose body may have ``most`` bytes; its response gets :data:`HEADERS`."""

    def __init__(self, guard: Guard, scope: Message, receive: Receive, send: Send, most: int):
        self.app, self.scope, self.receive, self.send, self.most = guard.app, scope, receive, send, most
        self.stopped, self.deadline = guard.stopped, time.monotonic() + guard.limits.body_seconds
        self.came, self.complete, self.begun, self.refused = 0, False, False, False

    async def run(self) -> None:
        try:
            await self.app(self.scope, self._receive, self._send)
        except Exception:  # the application's response to a request that was already answered here
            if not self.refused:
                raise

    async def _receive(self) -> Message:
        if self.refused:
            return {"type": "http.disconnect"}
        if self.complete:
            return await self._left()
        try:
            message = await asyncio.wait_for(self.receive(), max(0.0, self.deadline - time.monotonic()))
        except (asyncio.TimeoutError, TimeoutError):
            return await self.refuse(408, "the request was sent too slowly")
        self.came += len(message.get("body", b""))
        self.complete = not message.get("more_body", False)
        return await self.refuse(413, _too_large(self.most)) if self.came > self.most else message

    async def _left(self) -> Message:
        """Returns when the client closes the connection, or the server ends."""
        waiting = asyncio.ensure_future(self.receive())
        try:
            while not self.stopped.is_set():
                if (await asyncio.wait([waiting], timeout=STOP_SECONDS))[0]:
                    return waiting.result()
        finally:
            waiting.cancel()
        return {"type": "http.disconnect"}

    async def refuse(self, status: int, text: str) -> Message:
        """Answer with JSON, whose ``detail`` the page shows, and close the connection. What is left of the body is
        dropped first, if it is not much: a client that is still sending does not see the answer."""
        self.refused = True
        dropped, last = 0, min(self.deadline, time.monotonic() + DROP_SECONDS)
        while status != 408 and not self.complete and dropped < 4 * self.most and (left := last - time.monotonic()) > 0:
            try:
                message = await asyncio.wait_for(self.receive(), left)
            except (asyncio.TimeoutError, TimeoutError):
                break
            dropped += len(message.get("body", b""))
            self.complete = not message.get("more_body", False)
        if not self.begun:
            body = json.dumps({"detail": text}).encode()
            kind = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
            headers = [*kind, (b"connection", b"close"), *HEADERS]
            await self.send({"type": "http.response.start", "status": status, "headers": headers})
            await self.send({"type": "http.response.body", "body": body})
        return {"type": "http.disconnect"}

    async def _send(self, message: Message) -> None:
        if self.refused:
            return
        if message["type"] == "http.response.start":
            self.begun = True
            message = {**message, "headers": [*message.get("headers", []), *HEADERS]}
        await self.send(message)


def _name(netloc: str) -> str | None:
    """The host of ``host:port`` in lower case, without brackets; None where that is none."""
    try:
        return urlsplit(f"//{netloc}").hostname
    except ValueError:
        return None


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def _too_large(most: int) -> str:
    return f"the request is too large: at most {most:,} bytes"
