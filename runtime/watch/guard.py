"""Who may ask: everything passes by here before a request is looked at any further.

The page shows a run to whoever has the token; nobody else, and no other site in the same browser, sees anything. The
token is in the URL once. The answer to that puts it into a cookie, and leads to the URL without it, so that it stays
out of histories and referrers.
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
    # No inline script or style, nothing from elsewhere, no text that becomes markup, and no page around this one.
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

    token: what a request must show. cookie: the name of the cookie that it is kept in; of its own for each port, since
    cookies know no ports. hosts: names and addresses that a browser may call this server by.
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
        if not self._is_meant(request):
            return PlainTextResponse("This request comes by another name or from another site.\n", 403)
        if request.method not in ("GET", "HEAD"):
            return PlainTextResponse("This page can only be read.\n", 405, {"allow": "GET, HEAD"})
        given = request.query_params.get("token")
        if given is not None and request.url.path == "/" and self._is_token(given):
            return self._welcome()
        if self._is_token(request.cookies.get(self._cookie, "")) or self._is_token(_bearer(request)):
            return None
        return PlainTextResponse("Open the whole URL that `trimtab watch` has printed: it holds the token.\n", 401)

    def _is_meant(self, request: Request) -> bool:
        """Whether the browser means this server: a name of another site may lead to this address (DNS rebinding)."""
        host = request.headers.get("host", "")
        origin = request.headers.get("origin")
        return self._is_ours(host) and (origin is None or origin == f"http://{host}")

    def _is_ours(self, host: str) -> bool:
        # The port may be another one: a tunnel's.
        try:
            name = urlsplit(f"//{host}").hostname or ""
        except ValueError:
            return False
        return name in self._hosts

    def _is_token(self, given: str) -> bool:
        return hmac.compare_digest(given.encode(), self._token.encode())

    def _welcome(self) -> Response:
        answer = RedirectResponse("/", 303)
        answer.set_cookie(self._cookie, self._token, httponly=True, samesite="strict", path="/")
        return answer


def names_of(address: str) -> set[str]:
    """By which names a browser may call a server that is bound to this address."""
    try:
        is_loopback = ipaddress.ip_address(address).is_loopback
    except ValueError:
        is_loopback = address == "localhost"
    # By loopback also where it is bound elsewhere: a tunnel that ends here.
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
