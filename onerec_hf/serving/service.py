"""The service behind the routes: takes queries while it may, exchanges its model, and comes to an end."""

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
    """A request that is not answered: the HTTP status, why, and after how many seconds it may be sent again (or None)."""

    def __init__(self, status: int, detail: str, retry_after: float | None = None):
        super().__init__(detail)
        self.status, self.detail, self.retry_after = status, detail, retry_after


class RecommendationService:
    """
    Answers queries with the current model. To be used as an asynchronous context.

    Args:
        model: the first one.
        settings: limits.
        load: takes the version that is served and loads the model of a reload, or returns None where it is that one; called in a thread.
        unknown: "skip" or "error": what becomes of ids that the catalogue lacks, where a query does not say.
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
        self._users: dict[ServedModel, int] = {}  # requests that a model still has to answer
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
        One answer per query; `names` are those of their histories in messages.

        Raises:
            Refused: 422 for what cannot be answered, 503 while the queue is full or the server stops, 504 after the timeout.
        """
        if self.draining:
            raise Refused(503, "the server is stopping; send the request to another one", retry_after=1)
        if not 0 < len(queries) <= self.settings.max_histories:
            raise Refused(
                422, f"a request holds 1 to {self.settings.max_histories} histories on this server; got {len(queries)}"
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
            raise Refused(500, "the server failed at this request; its log says why") from None
        finally:
            for future in futures:
                future.cancel()
            self._users[model] -= 1
            self._forget(model)

    def _forget(self, model: ServedModel) -> None:
        """Frees a former model once nobody waits for its answers."""
        if model is not self.model and not self._users.get(model):
            self._users.pop(model, None)
            model.close()

    async def reload(self) -> tuple[bool, str, str]:
        """
        Loads the model anew, beside the present one, and puts it in its place: requests that came before are answered by the former
        model, later ones by the new one.

        Returns:
            Whether it is another model, its version, and the version before.

        Raises:
            Refused: 409 where the new model cannot be served; the present one goes on.
        """
        async with self._reloading:
            before = self.model
            started = time.monotonic()
            try:
                model = await asyncio.to_thread(self._load, before.version)
            except Exception as error:
                self.metrics.reload("refused")
                logger.error("reload: the model was not taken: %s; version %s goes on serving", error, before.version)
                raise Refused(
                    409, f"the model was not taken: {str(error)[:500]}; version {before.version} goes on serving"
                ) from error
            if model is None:
                self.metrics.reload("unchanged")
                return False, before.version, before.version
            self.model = model
            self.metrics.model(model.version)
            self.metrics.reload("taken")
            self._forget(before)
            seconds = time.monotonic() - started
            logger.info("reload: version %s in place of %s, after %.1f s", model.version, before.version, seconds)
            return True, model.version, before.version

    async def drain(self, timeout: float) -> bool:
        """
        Takes no new requests, waits until those taken are answered, and says whether all were. After `timeout` seconds the rest are
        refused.
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
