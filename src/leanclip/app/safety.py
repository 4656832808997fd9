"""Who may send requests, and how large: programs and the page itself, with the token if one is set.

Other sites in a visitor's browser are kept out by the Origin header, and, as their names may
resolve to 127.0.0.1 (DNS rebinding), by the Host header. With a token any Host is allowed: another
site has neither the token nor the cookie, which a browser sends only to the host that set it.
"""

import hmac
import ipaddress
import secrets
from collections.abc import Awaitable, Callable

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse, RedirectResponse
from starlette.datastructures import Headers
from starlette.middleware.body_limit import RequestBodyLimitMiddleware
from starlette.middleware.trustedhost import TrustedHostMiddleware

from leanclip.errors import ConfigError

MAX_BODY = 20 << 20  # bytes per request
TOO_LARGE = f"the request is over {MAX_BODY >> 20} MB; send fewer or smaller images"
MIN_TOKEN = 16  # characters
OPEN_PATHS = ("/healthz", "/sign-in", "/static/app.css", "/static/icon.svg")  # without a token
HEADERS = {
    "content-security-policy": "default-src 'self'; img-src 'self' blob: data:; object-src 'none'; "
    "base-uri 'none'; form-action 'self'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
}


def guard(app: FastAPI, *, host: str, token: str | None) -> None:
    """Check every request to a server that is bound to `host`, and add HEADERS to responses."""
    app.state.token = token
    app.state.session = secrets.token_urlsafe(32)  # the cookie's value, in place of the token
    hosts = ["*"] if token else ["localhost", "127.0.0.1", "[::1]", host]
    app.add_middleware(RequestBodyLimitMiddleware, max_body_size=MAX_BODY)
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=hosts, www_redirect=False)

    @app.middleware("http")
    async def check(
        request: Request, call_next: Callable[[Request], Awaitable[Response]]
    ) -> Response:
        if request.method not in ("GET", "HEAD", "OPTIONS") and not is_own_origin(request.headers):
            response = error(403, "Origin: the request comes from another site's page")
        elif int(request.headers.get("content-length", 0)) > MAX_BODY:
            response = error(413, TOO_LARGE)
        elif token is None or request.url.path in OPEN_PATHS or has_token(request):
            response = await call_next(request)
        elif request.url.path == "/":
            response = RedirectResponse("sign-in", 303)
        else:
            response = error(401, "a token is required: Authorization: Bearer TOKEN, or sign in")
            response.headers["www-authenticate"] = "Bearer"
        response.headers.update(HEADERS)
        response.headers.setdefault("cache-control", "no-store")
        return response


def check_token(host: str, token: str | None) -> None:
    """Require a long token if other machines can reach the server.

    Raises:
        ConfigError: it is missing or too short.
    """
    if token is None and not is_loopback(host):
        raise ConfigError(
            f"--host {host}: other machines can reach that address, so a token is required: set "
            f"LEANCLIP_TOKEN or --token, for example to the output of: openssl rand -hex 16"
        )
    if token is not None and (len(token) < MIN_TOKEN or not token.isascii()):
        raise ConfigError(f"--token: give {MIN_TOKEN} or more ASCII characters")


def has_token(request: Request) -> bool:
    """Whether a request has the token, or the cookie of a browser that has signed in."""
    scheme, _, bearer = request.headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer" and is_same(bearer.strip(), request.app.state.token):
        return True
    return is_same(request.cookies.get(cookie_name(request), ""), request.app.state.session)


def is_own_origin(headers: Headers) -> bool:
    """Whether a request comes from this server's page, or from a program."""
    origin, site = headers.get("origin"), headers.get("sec-fetch-site")
    is_own = origin is None or origin.partition("://")[2] == headers.get("host")
    # A form on a page without referrers sends "null"; but no page can forge Sec-Fetch-Site.
    is_own = is_own or (origin == "null" and site == "same-origin")
    return is_own and site in ("same-origin", "none", None)


def is_loopback(host: str) -> bool:
    """Whether an address can be reached from this machine only."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def is_same(given: str, expected: str) -> bool:
    """Compare secrets in constant time."""
    return hmac.compare_digest(given.encode(), expected.encode())


def cookie_name(request: Request) -> str:
    """The session cookie's name, with the port, as cookies do not distinguish ports."""
    return f"leanclip-{request.url.port}"


def error(status: int, message: str) -> JSONResponse:
    """An error as the API reports it."""
    return JSONResponse({"error": message}, status)
