"""The service behind the routes: answers queries, reloads its model, and shuts down gracefully."""

from __future__ import annotations

import asyncio
import json
import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

from onerec_hf.modeling.requests import RequestError, ResolvedRequest

from .batching import Batcher, QueueFull
from .metrics import ServingMetrics
from .models import BatchKey, ServedModel, SimilarKey, spell_key
from .turns import Aborted

if TYPE_CHECKING:
    from .schema import Query, SimilarQuery
    from .settings import ServingSettings

logger = logging.getLogger(__name__)

#: Logged, with a traceback, for an answer with status 500.
FAILED = "a request failed"
#: The detail of an answer with status 503 while the server stops.
STOPPING = "the server is stopping; send the request to another one"
# What each history costs besides its positions, and the cost of a request (of some ten default ones) from which it is split into short steps.
_BASE_COST, _COSTLY = 32, 1024
_IDS_AT_ONCE = 2_000
# Histories of the greatest length, all of whose entries are objects, that one request may hold.
_ENTRIES_AT_ONCE = 5
# Seconds for the rest of a request's body when the server stops.
_UPLOAD_GRACE = 2.0


class Refused(Exception):
    """A rejected request: HTTP status, detail, and the seconds after which to retry (or None)."""

    def __init__(self, status: int, detail: str, retry_after: float | None = None):
        super().__init__(detail)
        self.status, self.detail, self.retry_after = status, detail, retry_after


class RecommendationService:
    """
    Answers queries with the current model. Use as an asynchronous context manager.

    Args:
        model: the initial model.
        settings: limits.
        load: loads the model for a reload, given the served version; returns None if it has not changed. Called in a thread, which is left
            alone if it takes longer than `settings.reload_timeout`.
        unknown: "skip" or "error": handling of unknown ids in queries without the option.
    """

    def __init__(
        self,
        model: ServedModel,
        settings: ServingSettings,
        load: Callable[[str], ServedModel | None],
        unknown: str = "skip",
    ):
        self.model, self.settings, self.unknown = model, settings, unknown
        self._load = load
        self._reloading = asyncio.Lock()
        self._loading: list[threading.Thread] = []
        self._users: dict[ServedModel, int] = {}  # number of open requests per model
        self._stopping = asyncio.Event()
        self.uploads: set[asyncio.Timeout] = set()  # of requests whose body has not arrived
        self.in_flight = 0
        self.metrics = ServingMetrics(lambda: self.batcher.queue_length)
        self.metrics.model(model.version)
        self.batcher = Batcher(
            _answer,
            max_batch_size=settings.max_batch_size,
            max_wait=settings.max_wait_ms / 1000,
            max_queue=settings.max_queue,
            cost=_cost,
            max_cost=settings.max_queue_cost,
            costly=_COSTLY,
            max_seconds=settings.timeout,
            on_batch=self.metrics.batch,
        )

    async def __aenter__(self) -> RecommendationService:
        await self.batcher.__aenter__()
        return self

    async def __aexit__(self, *exc) -> None:
        await self.batcher.__aexit__(*exc)
        self.model.close()

    @property
    def draining(self) -> bool:
        """Whether the server is stopping."""
        return self._stopping.is_set()

    @property
    def max_entries(self) -> int:
        """Entries of a request's histories that may be objects: none for a model without features, which would read nothing of them."""
        return 0 if self.model.recommender.schema is None else _ENTRIES_AT_ONCE * self.settings.max_history_items

    @property
    def is_loading(self) -> bool:
        """Whether a thread still loads a model, be it for a reload that was given up."""
        return any(thread.is_alive() for thread in self._loading)

    async def recommend(self, queries: Sequence[Query], names: Sequence[str]) -> list[bytes]:
        """
        Returns one answer per query as JSON; `names` name their histories in error messages.

        Raises:
            Refused: 422 for invalid queries, 503 if the queue is full or the service ends, 504 after the timeout.
        """
        if not 0 < len(queries) <= self.settings.max_histories:
            raise Refused(
                422,
                f"this server accepts 1 to {self.settings.max_histories} histories per request; got {len(queries)}",
            )
        with self._used_model() as model:
            return await self._answers(await self._prepared(model, queries, names))

    async def similar(self, query: SimilarQuery) -> list[bytes]:
        """
        Returns the similar items of each item of the query as JSON.

        Raises:
            Refused: as [`recommend`].
        """
        with self._used_model() as model:
            try:
                prepared = model.prepare_similar(query, self.settings)
            except RequestError as error:
                raise Refused(422, error.reason) from None
            return await self._answers([(key, (item, None)) for key, item in prepared])

    @contextmanager
    def _used_model(self) -> Iterator[ServedModel]:
        """The current model, which stays open as long as the block lasts."""
        model = self.model
        self._users[model] = self._users.get(model, 0) + 1
        try:
            yield model
        finally:
            self._users[model] -= 1
            self._forget(model)

    async def _prepared(
        self, model: ServedModel, queries: Sequence[Query], names: Sequence[str]
    ) -> list[tuple[BatchKey, tuple[ResolvedRequest, Any]]]:
        def prepare():
            found = []
            for query, name in zip(queries, names, strict=True):
                key, request = model.prepare(query, name, self.settings, self.unknown)
                found.append((key, (request, query.user_id)))
            return found

        ids = sum(len(query.history) + len(query.exclude) + len(query.allow or ()) for query in queries)
        try:
            # Small requests are not worth a thread; large ones would hold up all others.
            return prepare() if ids < _IDS_AT_ONCE else await asyncio.to_thread(prepare)
        except RequestError as error:
            raise Refused(422, error.message(spell_key)) from None

    async def _answers(self, prepared: list[tuple[Any, tuple[Any, Any]]]) -> list[bytes]:
        """Answers of entries: a key, and what it answers with the user's id."""
        try:
            futures = self.batcher.submit(prepared)
        except QueueFull as full:
            raise Refused(503, f"{full.reason}; try again later", full.retry_after) from None
        self.metrics.unknown_items(sum(request.skipped for _, (request, _) in prepared))
        try:
            return await asyncio.wait_for(asyncio.gather(*futures), self.settings.timeout)
        except TimeoutError:
            raise Refused(
                504, f"no answer within {self.settings.timeout:g} seconds", self.batcher.seconds_ahead
            ) from None
        except Aborted:
            raise Refused(503, "the server stopped before this request was answered", retry_after=1) from None
        except Exception:
            logger.exception(FAILED)
            raise Refused(500, "internal error; see the server's log") from None
        finally:
            for future in futures:
                future.cancel()

    def _forget(self, model: ServedModel) -> None:
        """Closes a replaced model after its last request."""
        if model is not self.model and not self._users.get(model):
            self._users.pop(model, None)
            model.close()

    async def reload(self) -> tuple[bool, str, str]:
        """
        Loads the model again and replaces the current one. The current model answers earlier requests, the new one later requests.

        Returns:
            whether the model changed, its version, and the previous version.

        Raises:
            Refused: 409 if the new model cannot be served, or is not loaded within `settings.reload_timeout`; the current one continues. 503 if
                the server is stopping.
        """
        async with self._reloading:
            before = self.model
            started = time.monotonic()
            try:
                model = await self._loaded(before.version)
            except Exception as error:
                if self.draining:
                    raise Refused(503, "the server is stopping") from error
                self.metrics.reload("refused")
                logger.error("reload failed: %s; version %s is still served", error, before.version)
                raise Refused(
                    409, f"reload failed: {str(error)[:500]}; version {before.version} is still served"
                ) from error
            if model is None:
                self.metrics.reload("unchanged")
                return False, before.version, before.version
            self.model = model
            self.metrics.model(model.version)
            self.metrics.reload("taken")
            self._forget(before)
            seconds = time.monotonic() - started
            logger.info("reload: version %s replaces %s after %.1f s", model.version, before.version, seconds)
            return True, model.version, before.version

    async def _loaded(self, version: str) -> ServedModel | None:
        """
        What `load` returns, unless it takes too long or the server stops. Its thread is a daemon: nothing waits for a load that hangs.

        Raises:
            TimeoutError: it is not there within `settings.reload_timeout`.
        """
        loop = asyncio.get_running_loop()
        found: asyncio.Future[ServedModel | None] = loop.create_future()

        def settle(model: ServedModel | None, error: Exception | None) -> None:
            if not found.done():
                found.set_result(model) if error is None else found.set_exception(error)
            elif model is not None:  # too late
                model.close()

        def load() -> None:
            model, failed = None, None
            try:
                model = self._load(version)
            except Exception as error:
                failed = error
            with suppress(RuntimeError):  # the loop has ended
                loop.call_soon_threadsafe(settle, model, failed)

        thread = threading.Thread(target=load, name="reload", daemon=True)
        self._loading = [each for each in self._loading if each.is_alive()] + [thread]
        thread.start()
        stopping = loop.create_task(self._stopping.wait())
        try:
            await asyncio.wait(
                {found, stopping}, timeout=self.settings.reload_timeout, return_when=asyncio.FIRST_COMPLETED
            )
            if found.done():
                return found.result()
        finally:
            stopping.cancel()
            found.cancel()
        raise TimeoutError(f"the model is not loaded after {self.settings.reload_timeout:g} seconds")

    async def drain(self, timeout: float) -> bool:
        """
        Rejects new requests and waits for open ones, for those whose body has not arrived a few seconds only. After `timeout` seconds the rest
        are discarded. Returns whether all were answered.
        """
        self._stopping.set()
        for upload in self.uploads:
            upload.reschedule(asyncio.get_running_loop().time() + _UPLOAD_GRACE)
        end = time.monotonic() + timeout
        while self.in_flight and time.monotonic() < end:
            await asyncio.sleep(0.01)
        if not self.in_flight:
            return True
        self.batcher.abort()
        return False


def _cost(key: BatchKey | SimilarKey, item: tuple[Any, Any]) -> float:
    return _BASE_COST + key.cost(item[0])


def _answer(key: BatchKey | SimilarKey, items: list[tuple[Any, Any]], step: Callable[[], None]) -> list[bytes]:
    """Answers as JSON: to encode many of them takes longer than the event loop may stand still."""
    answers = key.answer([request for request, _ in items], step)
    of_users = [{} if user is None else {"user_id": user} for _, user in items]
    return [
        json.dumps(user | answer, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()
        for user, answer in zip(of_users, answers, strict=True)
    ]
