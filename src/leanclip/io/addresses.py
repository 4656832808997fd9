"""Connections to the addresses that are allowed, and to no other.

    URL -> host -> addresses, each checked -> a connection to one of those; the same of a redirect

A stranger's URL may lead into the network of whoever fetches it, to machines and services that
nobody else can reach: by a number in any spelling, by a name, or by a redirect. So those addresses
are checked that a connection is about to be made to, and no name is looked up twice.
"""

import ipaddress
import socket
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.client import HTTPConnection
from threading import Timer
from typing import Any
from urllib.parse import unquote, urlsplit

Resolve = Callable[..., Any]  # as socket.getaddrinfo
_NAT64 = ipaddress.ip_network("64:ff9b::/96")


class PrivateAddressError(OSError):
    """A host is, or a name stands for, an address that is not the internet's."""


def is_public(address: str) -> bool:
    """Whether a numeric address is the internet's: none of this machine, of a local network, or
    reserved; nor an IPv6 address that carries such an IPv4 address.
    """
    try:
        found = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return False
    if isinstance(found, ipaddress.IPv6Address):
        number = ipaddress.IPv4Address(int(found) & 0xFFFFFFFF)
        is_compatible = int(found) < 1 << 32  # ::a.b.c.d, of old
        if found.ipv4_mapped or found in _NAT64 or is_compatible:
            return is_public(str(number))
        carried = (found.sixtofour, *(found.teredo or ()))
        if not all(is_public(str(inner)) for inner in carried if inner is not None):
            return False
    return found.is_global and not found.is_multicast and not found.is_reserved


class Guard:
    """Opens URLs, and makes their connections.

    Args:
        private: whether addresses that are not public may be connected to; None: if the first
            connection is to one, so that a URL of one's own network works, while one of the
            internet cannot redirect there.
        resolve: looks names up.
    """

    def __init__(
        self, *, private: bool | None = False, resolve: Resolve = socket.getaddrinfo
    ) -> None:
        self.private, self._resolve = private, resolve
        self.is_late = False  # the time of `within` is over
        self._watched: list[socket.socket] | None = None
        self._opener = urllib.request.OpenerDirector()  # without file:, ftp: and data:
        for handler in (
            urllib.request.ProxyHandler(),
            _Http(self),
            _Https(self),
            urllib.request.HTTPRedirectHandler(),
            urllib.request.HTTPDefaultErrorHandler(),
            urllib.request.HTTPErrorProcessor(),
            urllib.request.UnknownHandler(),
        ):
            self._opener.add_handler(handler)

    def open(self, request: urllib.request.Request | str, *, timeout: float) -> Any:
        """What is at a URL, as urllib.request.urlopen gives it.

        Raises:
            OSError: it cannot be had; a PrivateAddressError, or a URLError with one as its reason.
        """
        return self._opener.open(request, timeout=timeout)

    @contextmanager
    def within(self, seconds: float) -> Iterator[None]:
        """Break its connections off after so many seconds: a byte now and then is no timeout."""
        timer, self._watched = Timer(seconds, self._break_off), []
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()
            for watched in self._watched:
                watched.close()

    def connect(
        self, address: tuple[str, int], timeout: Any = None, source_address: Any = None
    ) -> socket.socket:
        """A connection to an address that is allowed, as socket.create_connection makes one.

        Raises:
            OSError: it is not, or there is none.
        """
        host, port = address
        places = [entry[4][0] for entry in self._resolve(host, port, 0, socket.SOCK_STREAM)]
        private = next((place for place in places if not is_public(place)), None)
        if self.private is None:
            self.private = private is not None
        if private is not None and not self.private:
            raise PrivateAddressError(f"{host} is {private}, which is not a public address")
        error: OSError = OSError(f"{host}: has no address")
        for place in places:
            try:
                made = socket.create_connection((place, port), timeout, source_address)
            except OSError as failed:
                error = failed
                continue
            if self._watched is not None:
                self._watched.append(made.dup())  # TLS takes the first one's place
            if self.is_late:
                self._break_off()
            return made
        raise error

    def check_beyond_proxy(self, host: str) -> None:
        """Refuse numbers and this machine; other names are the proxy's to look up and refuse."""
        try:
            place = socket.inet_ntoa(socket.inet_aton(host))  # takes all spellings of a number
        except OSError:
            place = host
        is_number = ":" in place or place.replace(".", "").isdecimal()
        is_private = host.lower().rstrip(".").endswith("localhost") or (
            is_number and not is_public(place)
        )
        if self.private is None:
            self.private = is_private
        if is_private and not self.private:
            raise PrivateAddressError(f"{host} is not a public address")

    def _break_off(self) -> None:
        self.is_late = True
        for watched in self._watched or ():
            with suppress(OSError):  # it has ended by itself
                watched.shutdown(socket.SHUT_RDWR)


class _Guarded(urllib.request.AbstractHTTPHandler):
    def __init__(self, guard: Guard) -> None:
        super().__init__()
        self._guard = guard

    def do_open(self, http_class: Any, req: Any, **http_conn_args: Any) -> Any:
        is_proxied = req.has_proxy() or bool(req._tunnel_host)  # the latter of https
        if is_proxied:  # urllib takes %31 in a name for 1
            self._guard.check_beyond_proxy(unquote(urlsplit(req.full_url).hostname or ""))

        def make(host: str, **more: Any) -> HTTPConnection:
            connection = http_class(host, **more)
            if not is_proxied:
                # The one place where http.client makes a socket, for https too, whose certificate
                # is then checked against the name.
                connection._create_connection = self._guard.connect
            return connection

        return super().do_open(make, req, **http_conn_args)  # pyright: ignore


class _Http(_Guarded, urllib.request.HTTPHandler):
    pass


class _Https(_Guarded, urllib.request.HTTPSHandler):
    pass
