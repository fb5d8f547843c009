"""The FastAPI application: routes and error responses."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Coroutine, Sequence
from contextlib import asynccontextmanager
from typing import Annotated, Any

from fastapi import Body, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.responses import HTMLResponse, JSONResponse, Response

from onerec_hf import __version__

from .bodies import route_class
from .docs_page import POLICY, page
from .gate import Gate
from .metrics import CONTENT_TYPE
from .schema import Answer, Problem, Queries, Query, Readiness, Reloaded, SimilarAnswer, SimilarQuery
from .service import RecommendationService, Refused

_ID_LISTS = ("history", "exclude", "allow", "candidates", "similar_to")


def create_app(service: RecommendationService, token: str | None = None) -> FastAPI:
    """
    Creates the application of a service and runs the service during its lifespan.

    Args:
        token: if given, all routes except `/health`, `/ready`, `/openapi.json` and `/docs` require `Authorization: Bearer TOKEN`. `/reload` requires
            a token.
    """

    @asynccontextmanager
    async def lifespan(app: FastAPI):
        async with service:
            yield

    app = FastAPI(
        title="onerec-hf serve",
        version=__version__,
        description="Histories in, recommended items or sessions out.",
        lifespan=lifespan,
        docs_url=None,  # FastAPI's pages load external scripts
        redoc_url=None,
        redirect_slashes=False,  # a redirect would lead to whatever host the request names
    )
    app.router.route_class = route_class(service.settings.max_histories, lambda: service.max_entries)
    app.add_middleware(Gate, service=service, token=token)
    app.add_exception_handler(Refused, _refused)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _http_error)
    problems: dict[int | str, dict[str, Any]] = {
        status: {"model": Problem, "description": text}
        for status, text in (
            (400, "Invalid JSON."),
            (401, "Missing or wrong token."),
            (413, "Too large."),
            (422, "Wrong types, unknown keys, exceeded limits, an empty history, or no item to recommend."),
            (503, "The queue is full, or the server is stopping; retry after `Retry-After` seconds."),
            (504, "No answer in time."),
        )
    }

    @app.post("/recommend", response_model=Answer | list[Answer], response_model_exclude_none=True, responses=problems)
    async def recommend(request: Request, query: Annotated[Queries, Body()]) -> Response:
        """Answers one query, or a list of queries with a list of answers in the same order."""
        if isinstance(query, Query):
            answers = await _while_connected(request, service.recommend([query], ["history"]))
            content = answers[0]
        else:
            names = [f"history of query {number}" for number in range(len(query))]
            content = b"[" + b",".join(await _while_connected(request, service.recommend(query, names))) + b"]"
        return Response(content, media_type="application/json")

    @app.post("/similar", response_model=list[SimilarAnswer], response_model_exclude_none=True, responses=problems)
    async def similar(request: Request, query: SimilarQuery) -> Response:
        """Answers with the most similar items of each item, a list in the order of the request."""
        answers = await _while_connected(request, service.similar(query))
        return Response(b"[" + b",".join(answers) + b"]", media_type="application/json")

    @app.get("/health")
    async def health() -> Response:
        """200 while the process works; 500 if it must be restarted."""
        if not service.batcher.alive:
            return JSONResponse({"detail": "the computation has stopped; restart the server"}, status_code=500)
        return JSONResponse({"status": "ok"})

    @app.get("/ready", response_model=Readiness)
    async def ready() -> Response:
        """200 while requests are accepted, 503 while the server is stopping."""
        status = "stopping" if service.draining else "ready"
        return JSONResponse(
            {"status": status, "model": service.model.version}, status_code=503 if service.draining else 200
        )

    @app.get("/docs", include_in_schema=False)
    async def docs() -> Response:
        return HTMLResponse(page(app.openapi()), headers={"Content-Security-Policy": POLICY})

    @app.get("/metrics", response_class=Response)
    async def metrics() -> Response:
        """Metrics in Prometheus text format."""
        return Response(service.metrics.text(), media_type=CONTENT_TYPE)

    @app.post("/reload", response_model=Reloaded, responses={409: {"model": Problem}})
    async def reload() -> Response:
        """Reloads the model's folder and serves the new model; 409 if it cannot be served, and the current model continues."""
        if token is None:
            raise Refused(
                403,
                "reloading over HTTP requires a token; start the server with --token_file, or send the process SIGHUP",
            )
        reloaded, version, previous = await service.reload()
        return JSONResponse({"reloaded": reloaded, "model": version, "previous": previous})

    return app


async def _while_connected(request: Request, answers: Coroutine[Any, Any, list[bytes]]) -> list[bytes]:
    """
    The answers, which are given up when the client goes.

    Raises:
        Refused: it has gone.
    """
    answering, leaving = asyncio.ensure_future(answers), asyncio.ensure_future(request.receive())
    try:
        await asyncio.wait({answering, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not answering.done() and leaving.result()["type"] == "http.disconnect":
            raise Refused(499, "the client has closed the connection")
        return await answering
    finally:
        answering.cancel()
        leaving.cancel()


def problem(status: int, detail: str, headers: dict[str, str] | None = None) -> JSONResponse:
    """`{"detail": ...}`; characters that are invalid in JSON are escaped."""
    return JSONResponse({"detail": detail.encode("utf-8", "backslashreplace").decode()}, status, headers)


async def _refused(request: Request, error: Any) -> Response:
    headers = {}
    if error.retry_after is not None:
        headers["Retry-After"] = str(max(1, math.ceil(error.retry_after)))
    return problem(error.status, error.detail, headers)


async def _http_error(request: Request, error: Any) -> Response:
    headers = dict(error.headers or {})
    if error.status_code in (408, 413):
        headers["Connection"] = "close"  # the rest of the body is not read
    return problem(error.status_code, str(error.detail), headers)


async def _invalid(request: Request, error: Any) -> Response:
    first = error.errors()[0]
    if first["type"] == "json_invalid":
        return problem(400, f"the request body is not valid JSON: {first['ctx']['error']}")
    if not request.headers.get("content-type", "").startswith("application/json"):
        return problem(415, "the request is not JSON; send the header Content-Type: application/json")
    return problem(422, explain(first, SimilarQuery if request.url.path == "/similar" else Query))


def explain(error: dict[str, Any], model: type[BaseModel] = Query) -> str:
    """
    Formats a pydantic error in one line, without the request's content.

    Args:
        model: of the request.

    Example:
        >>> explain({"type": "int_type", "loc": ("body", "many", 0, "history", 3, "int"), "msg": "Input should be a valid integer"})
        'query 0: history[3] must be an item id (integer or string), or an object such as {"item": id, "like": true}'
        >>> explain({"type": "missing", "loc": ("body", "one", "history"), "msg": "Field required"})
        'history: Field required'
    """
    where: Sequence[Any] = [part for part in error["loc"] if part not in ("body", "one", "many")]
    query = f"query {where[0]}: " if where and isinstance(where[0], int) else ""
    where = where[1:] if query else where
    if len(where) > 1 and where[0] in _ID_LISTS:
        entry = ', or an object such as {"item": id, "like": true}' if where[0] == "history" else ""
        return f"{query}{where[0]}[{where[1]}] must be an item id (integer or string){entry}"
    if not where and model is SimilarQuery:
        return 'send an object like {"similar_to": [item ids]}'
    if not where:
        return f'{query}send an object like {{"history": [item ids]}}, or a list of them'
    name = ".".join(str(part)[:40] for part in where)
    if error["type"] == "extra_forbidden":
        return f"{query}unknown key {name!r}; use {', '.join(model.model_fields)}"
    return f"{query}{name}: {error['msg']}"
