"""Who may use the explorer: one user on this machine.

Every request needs the token and a Host of this machine: other users, and pages of other hosts, get no answer.
"""

from __future__ import annotations

import hmac
from http.cookies import CookieError, SimpleCookie

from starlette.requests import Request
from starlette.responses import RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

LOCAL = ("127.0.0.1", "localhost", "[::1]")  # any port: it may be forwarded, as by ssh -L
HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "cross-origin-resource-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-store",
}


class Guard:
    """Refuses a request without the token or for another host, and adds the headers that keep the page to itself.

    The token comes in the query (the address that was printed) or in the cookie that the first answer sets.
    """

    def __init__(self, app: ASGIApp, token: str, cookie: str) -> None:
        self.app, self.token, self.cookie = app, token, cookie

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                extra = [(name.encode(), value.encode()) for name, value in HEADERS.items()]
                message["headers"] = [*message["headers"], *extra]
            await send(message)

        if scope["type"] == "http":
            await self._answer(Request(scope), receive, send_guarded)

    async def _answer(self, request: Request, receive: Receive, send: Send) -> None:
        host = request.headers.get("host", "")
        given = request.query_params.get("token", "")
        response: ASGIApp
        if host.rpartition(":")[0] not in LOCAL and host not in LOCAL:
            response = Response("This address is not served here.\n", 403)
        elif self._is_token(given) and request.url.path == "/":  # not in the address: that is for links and the history
            response = RedirectResponse("/", 303)
            response.set_cookie(self.cookie, self.token, httponly=True, samesite="lax")
        elif self._is_token(given) or self._is_token(self._from_cookie(request)):
            response = self.app
        else:
            response = Response("Open the address that gtsa explore printed: it holds the token.\n", 403)
        await response(request.scope, receive, send)

    def _is_token(self, given: str) -> bool:
        return hmac.compare_digest(given.encode(errors="replace"), self.token.encode())

    def _from_cookie(self, request: Request) -> str:
        try:
            cookie = SimpleCookie(request.headers.get("cookie", "")).get(self.cookie)
        except CookieError:
            return ""
        return cookie.value if cookie else ""
