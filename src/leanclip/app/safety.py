"""What every request must be before it is looked at, and what every answer carries.

Host     one of this server's names: another page cannot reach it by a name of its own
         that leads to 127.0.0.1 (DNS rebinding)
Origin   of what is not a GET: this page's own, or none, as of a program
token    where the server is not on this machine alone
size     refused by its Content-Length before it is read, or when it is over while it is
"""

import asyncio
import hmac
import ipaddress
import secrets
import socket
from collections.abc import Iterable
from contextlib import suppress
from http.cookies import CookieError, SimpleCookie
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

MAX_BODY = 20 << 20  # bytes of a request
LINGER = 2.0  # seconds to go on reading what is refused, so that the answer arrives
LOOPBACK = ("localhost", "127.0.0.1", "::1")
OPEN_PATHS = ("/healthz", "/sign-in", "/app.css", "/icon.svg")  # without a token

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


class Refused(Exception):
    """A request that is not answered: status, words, and headers of the answer."""

    def __init__(self, status: int, message: str, headers: dict[str, str] | None = None) -> None:
        super().__init__(message)
        self.status, self.headers = status, headers or {}

    def answer(self) -> Response:
        """It as JSON."""
        return JSONResponse({"error": str(self)}, self.status, self.headers)


class Safety:
    """Middleware around the whole application.

    Args:
        app: what is within.
        host: the address that the server is bound to.
        token: what a request has to show; None: nothing.
    """

    def __init__(self, app: ASGIApp, *, host: str, token: str | None = None) -> None:
        self.app, self.token = app, token
        self.names = {*LOOPBACK, host.lower(), socket.gethostname().lower()}
        self.is_local = is_loopback(host)
        if self.is_local:
            self.names -= {socket.gethostname().lower()}
        self.session = secrets.token_urlsafe(32)  # what the cookie holds, in the token's place

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """An ASGI application."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        sender = _Sender(send, receive)
        try:
            self._check_host(headers)
            if scope["method"] not in ("GET", "HEAD", "OPTIONS"):
                self._check_origin(headers)
            self._check_token(scope, headers)
            self._check_length(headers)
        except Refused as refused:
            sender.lingers = scope["method"] not in ("GET", "HEAD")
            await refused.answer()(scope, receive, sender)
            return
        scope["leanclip.safety"] = self
        await self.app(scope, _Limited(receive, MAX_BODY, sender), sender)

    def _check_host(self, headers: Headers) -> None:
        given = headers.getlist("host")
        name = _name_of(given[0]) if len(given) == 1 else None
        if name in self.names or (not self.is_local and name and _is_address(name)):
            return
        said = repr(given[0][:80]) if given else "none"
        raise Refused(
            403,
            f"Host: found {said}; this server answers to {_names(self.names)} only, so that no "
            f"other site can reach it by a name of its own",
        )

    def _check_origin(self, headers: Headers) -> None:
        origin, site = headers.get("origin"), headers.get("sec-fetch-site")
        is_own = origin is None or origin.partition("://")[2] == headers.get("host")
        # Forms of a page without referrers come as "null"; but no page can make up Sec-Fetch-Site.
        is_own = is_own or (origin == "null" and site == "same-origin")
        if not is_own or site not in ("same-origin", "none", None):
            raise Refused(
                403, f"Origin: found {str(origin)[:80]!r}; only this server's own page may do that"
            )

    def _check_token(self, scope: Scope, headers: Headers) -> None:
        if self.token is None or scope["path"] in OPEN_PATHS:
            return
        scheme, _, bearer = headers.get("authorization", "").partition(" ")
        if scheme.lower() == "bearer" and is_same(bearer.strip(), self.token):
            return
        if is_same(_cookie(headers, cookie_name(scope)), self.session):
            return
        if scope["path"] == "/" and scope["method"] == "GET":
            raise _SignIn(303, "sign in first")
        raise Refused(
            401,
            "a token is needed: Authorization: Bearer TOKEN, or sign in on the page",
            {"www-authenticate": "Bearer"},
        )

    def _check_length(self, headers: Headers) -> None:
        given = headers.get("content-length", "0")
        if given.isdecimal() and int(given) > MAX_BODY:
            raise too_large(MAX_BODY)


class _SignIn(Refused):
    def answer(self) -> Response:
        return Response(status_code=303, headers={"location": "/sign-in"})


def too_large(limit: int) -> Refused:
    """The answer to a body over the limit."""
    return Refused(
        413,
        f"the request is over {limit >> 20} MB, which is the most that is taken at once; send "
        f"fewer or smaller images",
        {"connection": "close"},
    )


def is_same(given: str, wanted: str) -> bool:
    """Whether two secrets are equal, in a time that does not tell how much of them is."""
    return hmac.compare_digest(given.encode(), wanted.encode())


def is_loopback(host: str) -> bool:
    """Whether an address is reached from this machine alone."""
    return host.lower() == "localhost" or (
        _is_address(host) and ipaddress.ip_address(host).is_loopback
    )


def cookie_name(scope: Scope) -> str:
    """Of the session; cookies do not tell ports apart, so the name does."""
    return f"leanclip-{(scope.get('server') or ('', 0))[1]}"


def _cookie(headers: Headers, name: str) -> str:
    try:
        found = SimpleCookie(headers.get("cookie", "")).get(name)
    except CookieError:
        return ""
    return found.value if found else ""


def _name_of(host: str) -> str | None:
    """The name in a Host header, without its port; None where it is not one."""
    try:
        parts = urlsplit(f"//{host}")
        _ = parts.port
    except ValueError:
        return None
    is_plain = parts.netloc == host and not parts.username and "@" not in host
    return parts.hostname if is_plain and not parts.path and not parts.query else None


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def _names(names: Iterable[str]) -> str:
    return ", ".join(sorted(names))


class _Sender:
    """Sends answers with HEADERS, where they do not have their own.

    Where it `lingers`, a body that is on its way is read on for a moment and thrown away before
    the answer ends: a connection that is closed on one who is sending may take the answer along.
    """

    def __init__(self, send: Send, receive: Receive) -> None:
        self._send, self._receive, self.lingers = send, receive, False

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = MutableHeaders(scope=message)
            for name, value in HEADERS.items():
                headers.setdefault(name, value)
        is_last = message["type"] == "http.response.body" and not message.get("more_body")
        if is_last and self.lingers:
            self.lingers = False
            await self._send({**message, "more_body": True})
            await self._throw_away()
            message = {"type": "http.response.body", "body": b""}
        await self._send(message)

    async def _throw_away(self) -> None:
        with suppress(TimeoutError):
            async with asyncio.timeout(LINGER):
                while (message := await self._receive())["type"] == "http.request":
                    if not message.get("more_body"):
                        return


class _Limited:
    """Receives a body, and raises where it is over the limit."""

    def __init__(self, receive: Receive, limit: int, sender: _Sender) -> None:
        self._receive, self._limit, self._read, self._sender = receive, limit, 0, sender

    async def __call__(self) -> Message:
        message = await self._receive()
        self._read += len(message.get("body", b""))
        if self._read > self._limit:
            self._sender.lingers = bool(message.get("more_body"))
            raise too_large(self._limit)
        return message
