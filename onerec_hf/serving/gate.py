"""Outermost ASGI middleware: authentication, request size and time limits, request metrics."""

from __future__ import annotations

import asyncio
import json
import time
from typing import TYPE_CHECKING, Any

from starlette.exceptions import HTTPException

from .access import is_allowed
from .service import STOPPING

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

    from .service import RecommendationService

#: Routes without authentication: health probes, the schema and the page about it, which reveal nothing about the model.
OPEN_PATHS = frozenset({"/health", "/ready", "/openapi.json", "/docs"})
#: Routes that the model answers.
ANSWERED_PATHS = frozenset({"/recommend", "/similar"})
KNOWN_PATHS = OPEN_PATHS | ANSWERED_PATHS | {"/metrics", "/reload"}


class Gate:
    """
    ASGI middleware: 401 without the token, before the request body is read; 413 for a body that is too large; 408 for a body that does not
    arrive within the service's timeout, or soon after a stop; 503 for requests that come later. It also counts requests, with unknown paths as "other".
    """

    def __init__(self, app: ASGIApp, service: RecommendationService, token: str | None):
        self.app, self.service, self.token = app, service, token

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started = time.monotonic()
        path, headers = scope["path"], dict(scope["headers"])
        path = path if path in KNOWN_PATHS else "other"
        status = 500

        async def watched(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                if self.service.draining:
                    message["headers"] = [*message.get("headers", []), (b"connection", b"close")]
            await send(message)

        if path in ANSWERED_PATHS:
            self.service.in_flight += 1
            self.service.metrics.in_flight.inc()
        try:
            if (
                self.token is not None
                and path not in OPEN_PATHS
                and not is_allowed(headers.get(b"authorization"), self.token)
            ):
                await refuse(
                    watched,
                    401,
                    "missing or wrong token; send the header Authorization: Bearer TOKEN",
                    (b"www-authenticate", b"Bearer"),
                )
            elif path in ANSWERED_PATHS and self.service.draining:
                await refuse(watched, 503, STOPPING, (b"retry-after", b"1"))
            elif _length(headers) > self.service.settings.max_body_bytes:
                await refuse(watched, 413, self._too_large(), (b"connection", b"close"))
            else:
                await self.app(scope, self._limited(receive), watched)
        finally:
            if path in ANSWERED_PATHS:
                self.service.in_flight -= 1
                self.service.metrics.in_flight.dec()
            self.service.metrics.request(path, status, time.monotonic() - started)

    def _too_large(self) -> str:
        return f"the request body exceeds this server's limit of {self.service.settings.max_body_bytes} bytes; send fewer histories per request"

    def _limited(self, receive: Receive) -> Receive:
        settings = self.service.settings
        end, total, complete = time.monotonic() + settings.timeout, 0, False

        async def limited() -> Message:
            nonlocal total, complete
            if complete:  # later calls wait for the client to disconnect
                return await receive()
            try:
                async with asyncio.timeout(max(0.001, end - time.monotonic())) as deadline:
                    self.service.uploads.add(deadline)
                    message = await receive()
            except TimeoutError:
                if self.service.draining:
                    raise HTTPException(503, STOPPING, {"retry-after": "1"}) from None
                raise HTTPException(408, f"the request did not arrive within {settings.timeout:g} seconds") from None
            finally:
                self.service.uploads.discard(deadline)
            total += len(message.get("body", b""))
            if total > settings.max_body_bytes:
                raise HTTPException(413, self._too_large())
            complete = not message.get("more_body", False)
            return message

        return limited


def _length(headers: dict[bytes, bytes]) -> int:
    value = headers.get(b"content-length", b"")
    return int(value) if value.isdigit() and len(value) < 20 else 0


async def refuse(send: Send, status: int, detail: str, *headers: tuple[bytes, bytes]) -> None:
    """Sends `{"detail": ...}`."""
    body = json.dumps({"detail": detail}).encode()
    start: dict[str, Any] = {
        "type": "http.response.start",
        "status": status,
        "headers": [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode()), *headers],
    }
    await send(start)
    await send({"type": "http.response.body", "body": body})
