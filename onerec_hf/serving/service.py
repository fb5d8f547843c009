"""The service behind the routes: answers queries, reloads its model, and shuts down gracefully."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from onerec_hf.modeling.requests import RequestError, ResolvedRequest

from .batching import Aborted, Batcher, QueueFull
from .metrics import ServingMetrics
from .models import BatchKey, ServedModel, spell_key

if TYPE_CHECKING:
    from .schema import Query
    from .settings import ServingSettings

logger = logging.getLogger(__name__)


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
        load: loads the model for a reload, given the served version; returns None if it has not changed. Called in a thread.
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
        self._users: dict[ServedModel, int] = {}  # number of open requests per model
        self.draining = False
        self.in_flight = 0
        self.metrics = ServingMetrics(lambda: self.batcher.queue_length)
        self.metrics.model(model.version)
        self.batcher = Batcher(
            _answer,
            max_batch_size=settings.max_batch_size,
            max_wait=settings.max_wait_ms / 1000,
            max_queue=settings.max_queue,
            on_batch=self.metrics.batch,
        )

    async def __aenter__(self) -> RecommendationService:
        await self.batcher.__aenter__()
        return self

    async def __aexit__(self, *exc) -> None:
        await self.batcher.__aexit__(*exc)
        self.model.close()

    async def recommend(self, queries: Sequence[Query], names: Sequence[str]) -> list[dict[str, Any]]:
        """
        Returns one answer per query; `names` name their histories in error messages.

        Raises:
            Refused: 422 for invalid queries, 503 if the queue is full or the server is stopping, 504 after the timeout.
        """
        if self.draining:
            raise Refused(503, "the server is stopping; send the request to another one", retry_after=1)
        if not 0 < len(queries) <= self.settings.max_histories:
            raise Refused(
                422,
                f"this server accepts 1 to {self.settings.max_histories} histories per request; got {len(queries)}",
            )
        model = self.model
        try:
            prepared = [
                model.prepare(query, name, self.settings, self.unknown)
                for query, name in zip(queries, names, strict=True)
            ]
        except RequestError as error:
            raise Refused(422, error.message(spell_key)) from None
        try:
            futures = self.batcher.submit(prepared)
        except QueueFull as full:
            raise Refused(
                503, f"the queue of {self.settings.max_queue} histories is full; try again later", full.retry_after
            ) from None
        self.metrics.unknown_items(sum(request.skipped for _, request in prepared))
        self._users[model] = self._users.get(model, 0) + 1
        try:
            return await asyncio.wait_for(asyncio.gather(*futures), self.settings.timeout)
        except TimeoutError:
            raise Refused(
                504, f"no answer within {self.settings.timeout:g} seconds", self.batcher.seconds_ahead
            ) from None
        except Aborted:
            raise Refused(503, "the server stopped before this request was answered", retry_after=1) from None
        except Exception:
            logger.exception("a request failed")
            raise Refused(500, "internal error; see the server's log") from None
        finally:
            for future in futures:
                future.cancel()
            self._users[model] -= 1
            self._forget(model)

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
            Refused: 409 if the new model cannot be served; the current one continues.
        """
        async with self._reloading:
            before = self.model
            started = time.monotonic()
            try:
                model = await asyncio.to_thread(self._load, before.version)
            except Exception as error:
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

    async def drain(self, timeout: float) -> bool:
        """
        Rejects new requests and waits for open ones. After `timeout` seconds the rest are discarded. Returns whether all were answered.
        """
        self.draining = True
        end = time.monotonic() + timeout
        while self.in_flight and time.monotonic() < end:
            await asyncio.sleep(0.01)
        if not self.in_flight:
            return True
        self.batcher.abort()
        return False


def _answer(key: BatchKey, requests: list[ResolvedRequest]) -> list[dict[str, Any]]:
    return key.model.answer(key, requests)
