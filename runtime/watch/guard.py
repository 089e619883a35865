"""Checks every request before it is answered: its host, its origin and its token.

Whoever has the token sees the runs. Nobody else does, nor does another site in the same browser. The printed URL holds
the token. The answer to it sets a cookie with the token, and redirects to the URL without it, so that it stays out of
histories and referrers.
"""

import hmac
import ipaddress
from collections.abc import Collection
from urllib.parse import urlsplit

from starlette.requests import Request
from starlette.responses import PlainTextResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

LOOPBACK = ("127.0.0.1", "localhost", "::1")
_HEADERS = {
    # No inline script or style, nothing from other sites, no text that becomes markup, and no frame around this page.
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'"
    ),
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
    "cache-control": "no-store",
}


class Guard:
    """An ASGI application around `app`.

    Args:
        token: secret that a request must carry, in the cookie or as a bearer token.
        cookie: name of the cookie. It must differ between servers on one host: browsers send cookies to all ports.
        hosts: names and addresses that the Host header of a request may have.
    """

    def __init__(self, app: ASGIApp, *, token: str, cookie: str, hosts: Collection[str]) -> None:
        self._app, self._token, self._cookie, self._hosts = app, token, cookie, frozenset(hosts)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
        elif scope["type"] == "http":
            answer = self._refusal(Request(scope)) or self._app
            await answer(scope, receive, _with_headers(send))

    def _refusal(self, request: Request) -> Response | None:
        """The answer to a request that goes no further; None lets it through."""
        if not self._is_for_this_page(request):
            return PlainTextResponse("This request comes by another name or from another site.\n", 403)
        if request.method not in ("GET", "HEAD"):
            return PlainTextResponse("This page can only be read.\n", 405, {"allow": "GET, HEAD"})
        given = request.query_params.get("token")
        if given is not None and request.url.path == "/" and self._is_token(given):
            return self._redirect_with_cookie()
        if self._is_token(request.cookies.get(self._cookie, "")) or self._is_token(_bearer(request)):
            return None
        return PlainTextResponse("Open the whole URL that `trimtab watch` has printed: it holds the token.\n", 401)

    def _is_for_this_page(self, request: Request) -> bool:
        """Whether the request is for this server and from its page.

        In DNS rebinding, another site lets its own name resolve to this address: then the Host header has that name.
        """
        host = request.headers.get("host", "")
        origin = request.headers.get("origin")
        return self._is_ours(host) and (origin is None or origin == f"http://{host}")

    def _is_ours(self, host: str) -> bool:
        # Any port is accepted: a tunnel may have another one than this server.
        try:
            name = urlsplit(f"//{host}").hostname or ""
        except ValueError:
            return False
        return name in self._hosts

    def _is_token(self, given: str) -> bool:
        return hmac.compare_digest(given.encode(), self._token.encode())

    def _redirect_with_cookie(self) -> Response:
        answer = RedirectResponse("/", 303)
        answer.set_cookie(self._cookie, self._token, httponly=True, samesite="strict", path="/")
        return answer


def names_of(address: str) -> set[str]:
    """The names by which a browser may call a server that is bound to this address."""
    try:
        is_loopback = ipaddress.ip_address(address).is_loopback
    except ValueError:
        is_loopback = address == "localhost"
    # The names of loopback too, if it is bound elsewhere: the browser's end of a tunnel is on loopback.
    return {address.lower(), *LOOPBACK} if not is_loopback else set(LOOPBACK)


def _bearer(request: Request) -> str:
    kind, _, token = request.headers.get("authorization", "").partition(" ")
    return token if kind.lower() == "bearer" else ""


def _with_headers(send: Send) -> Send:
    async def send_with_headers(message: Message) -> None:
        if message["type"] == "http.response.start":
            ours = [(name.encode(), value.encode()) for name, value in _HEADERS.items()]
            message = {**message, "headers": [*message.get("headers", []), *ours]}
        await send(message)

    return send_with_headers
