"""Request bodies: what is too much is refused before it is parsed, since a parser holds up all other requests."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

from fastapi import Request
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException

from .schema import Query

# A string of JSON, be it without its end: no attempt fails, so that the time is linear. What it holds is no structure.
_STRING = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"?', re.DOTALL)
_SPARE = 100
# Columns of an entry of a history, on average; a body of a megabyte has no more than 100,000 keys anyway.
_KEYS_OF_ENTRY = 10


def check_structure(body: bytes, max_histories: int, max_entries: int = 0) -> None:
    """
    Refuses bodies with more objects, lists or keys than `max_histories` queries have: a megabyte may hold 300,000 of them.

    Args:
        max_entries: entries of histories that may be objects, of a model with features.

    Raises:
        HTTPException: 422.

    Example:
        >>> check_structure(b'{"history": ["[[[[{{{{"], "top_k": 3}', max_histories=1)
        >>> check_structure(b"[" * 1000, max_histories=1)
        Traceback (most recent call last):
        ...
        starlette.exceptions.HTTPException: 422: the request holds 1000 lists and objects; ...
    """
    keys = len(Query.model_fields)
    most = max_histories * keys + _SPARE + max_entries
    most_keys = most + _KEYS_OF_ENTRY * max_entries
    if body.count(b"[") + body.count(b"{") <= most and body.count(b":") <= most_keys:
        return
    structure = _STRING.sub(b"", body)
    nested, named = structure.count(b"[") + structure.count(b"{"), structure.count(b":")
    for count, limit, what in ((nested, most, "lists and objects"), (named, most_keys, "keys")):
        if count > limit:
            raise HTTPException(
                422,
                f"the request holds {count} {what}; this server accepts 1 to {max_histories} histories per request",
            )


def route_class(max_histories: int, max_entries: Callable[[], int] = lambda: 0) -> type[APIRoute]:
    """The class of routes whose bodies are checked by [`check_structure`] before they are parsed; `max_entries` is asked for each."""

    class Checked(Request):
        async def json(self) -> Any:
            body = await self.body()
            check_structure(body, max_histories, max_entries())
            return json.loads(body)

    class CheckedRoute(APIRoute):
        def get_route_handler(self):
            handle = super().get_route_handler()

            async def checked(request: Request):
                return await handle(Checked(request.scope, request.receive))

            return checked

    return CheckedRoute
