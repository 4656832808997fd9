"""Checks every request before the application sees it, and adds headers to every response.

Host    one of this server's names, as another site's may resolve to 127.0.0.1 (DNS rebinding)
Origin  for other methods than GET: this page's own, or none, as from a program
token   required if the server can be reached from other machines
size    refused by Content-Length before the body is read, or once it is exceeded
"""

import asyncio
import hmac
import ipaddress
import re
import secrets
import socket
from contextlib import suppress
from typing import Any

from fastapi.responses import JSONResponse
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import HTTPConnection
from starlette.types import ASGIApp, Message, Receive, Scope, Send

MAX_BODY = 20 << 20  # bytes per request
DRAIN = 2.0  # seconds to read on after an early response, so that it arrives
OPEN_PATHS = ("/healthz", "/sign-in", "/static/app.css", "/static/icon.svg")  # without a token
HEADERS = {
    "content-security-policy": "default-src 'self'; img-src 'self' blob: data:; object-src 'none'; "
    "base-uri 'none'; form-action 'self'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "x-frame-options": "DENY",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "cache-control": "no-store",
}


class Safety:
    """Middleware around the whole application, for a server that is bound to `host`."""

    def __init__(self, app: ASGIApp, *, host: str, token: str | None = None) -> None:
        self.app, self.token, self.is_local = app, token, is_loopback(host)
        self.hosts = ["localhost", "127.0.0.1", "[::1]", host.lower()]
        self.hosts += [] if self.is_local else [socket.gethostname().lower()]
        self.session = secrets.token_urlsafe(32)  # the cookie's value, in place of the token

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve an ASGI request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        exchange = _Exchange(scope, receive, send)
        try:
            await self._check(HTTPConnection(scope), scope["method"])
        except HTTPException as error:
            await error_response(error)(scope, exchange.receive, exchange.send)
        else:
            await self.app(scope, exchange.receive, exchange.send)

    async def _check(self, request: HTTPConnection, method: str) -> None:
        """Raise an HTTPException unless the request may be served."""
        host, origin = request.headers.get("host", ""), request.headers.get("origin", "")
        if not await self._is_own_host(request.scope, host):
            names = ", ".join(dict.fromkeys(self.hosts))
            raise HTTPException(403, f"Host: found {host[:80]!r}; use one of {names}")
        if method not in ("GET", "HEAD", "OPTIONS") and not is_own_origin(request.headers):
            raise HTTPException(403, f"Origin: found {origin[:80]!r}, which is another site's")
        if not self._has_token(request):
            if method == "GET" and request.scope["path"] == "/":
                raise HTTPException(303, "sign in first", {"location": "sign-in"})
            message = "a token is required: Authorization: Bearer TOKEN, or sign in on the page"
            raise HTTPException(401, message, {"www-authenticate": "Bearer"})

    async def _is_own_host(self, scope: Scope, host: str) -> bool:
        """The decision of Starlette's TrustedHostMiddleware, whose response is not JSON."""
        passed = False

        async def accept(*_: object) -> None:
            nonlocal passed
            passed = True

        async def ignore(*_: object) -> Any:
            pass

        hosts, name = self.hosts, re.sub(r":\d+$", "", host.lower())
        if not self.is_local and is_address(name.strip("[]")):
            hosts = [*hosts, name]  # any address is safe, as DNS rebinding needs a name
        await TrustedHostMiddleware(accept, hosts, www_redirect=False)(scope, ignore, ignore)
        return passed

    def _has_token(self, request: HTTPConnection) -> bool:
        if self.token is None or request.scope["path"] in OPEN_PATHS:
            return True
        scheme, _, bearer = request.headers.get("authorization", "").partition(" ")
        if scheme.lower() == "bearer" and is_same(bearer.strip(), self.token):
            return True
        return is_same(request.cookies.get(cookie_name(request), ""), self.session)


def is_own_origin(headers: Headers) -> bool:
    """Whether a request comes from this server's page, or from a program."""
    origin, site = headers.get("origin"), headers.get("sec-fetch-site")
    is_own = origin is None or origin.partition("://")[2] == headers.get("host")
    # A form on a page without referrers sends "null"; but no page can forge Sec-Fetch-Site.
    is_own = is_own or (origin == "null" and site == "same-origin")
    return is_own and site in ("same-origin", "none", None)


def error_response(error: HTTPException) -> JSONResponse:
    """An error as the API reports it."""
    return JSONResponse({"error": error.detail}, error.status_code, error.headers)


def is_same(given: str, expected: str) -> bool:
    """Compare secrets in constant time."""
    return hmac.compare_digest(given.encode(), expected.encode())


def is_address(host: str) -> bool:
    """Whether a host is an IP address."""
    with suppress(ValueError):
        return bool(ipaddress.ip_address(host))
    return False


def is_loopback(host: str) -> bool:
    """Whether an address can be reached from this machine only."""
    return host.lower() == "localhost" or (
        is_address(host) and ipaddress.ip_address(host).is_loopback
    )


def cookie_name(request: HTTPConnection) -> str:
    """The session cookie's name, with the port, as cookies do not distinguish ports."""
    return f"leanclip-{request.url.port}"


class _Exchange:
    """The messages of a request and its response."""

    def __init__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._receive, self._send, headers = receive, send, Headers(scope=scope)
        self._length, self._received = headers.get("content-length", ""), 0
        self._has_more = "content-length" in headers or "transfer-encoding" in headers

    async def receive(self) -> Message:
        """The next part of the body, unless the body is over the limit."""
        self._check_size(int(self._length) if self._length.isdecimal() else 0)
        message = await self._receive()
        self._has_more = message.get("more_body", False)
        self._received += len(message.get("body", b""))
        self._check_size(self._received)
        return message

    def _check_size(self, size: int) -> None:
        if size > MAX_BODY:
            message = f"the request is over {MAX_BODY >> 20} MB; send fewer or smaller images"
            raise HTTPException(413, message, {"connection": "close"})

    async def send(self, message: Message) -> None:
        """Send a part of the response; before the last one, the body is read to its end.

        A client that is still sending when the connection closes may not see the response.
        """
        if message["type"] == "http.response.start":
            headers = MutableHeaders(scope=message)
            for name, value in HEADERS.items():
                headers.setdefault(name, value)
        elif self._has_more and not message.get("more_body"):
            await self._send({**message, "more_body": True})
            with suppress(TimeoutError):
                async with asyncio.timeout(DRAIN):
                    while self._has_more:
                        self._has_more = (await self._receive()).get("more_body", False)
            message = {"type": "http.response.body", "body": b""}
        await self._send(message)
