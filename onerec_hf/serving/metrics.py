"""Server metrics in Prometheus text format."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
_SIZES = (1, 2, 4, 8, 16, 32, 64, 128)


class ServingMetrics:
    """
    Metrics of one server.

    Args:
        queue_length: returns the number of waiting histories.

    Example:
        >>> metrics = ServingMetrics(queue_length=lambda: 3)
        >>> metrics.request("/recommend", 200, seconds=0.02)
        >>> [line for line in metrics.text().decode().splitlines() if line.startswith(("onerec_requests_total", "onerec_queue"))]
        ['onerec_requests_total{path="/recommend",status="200"} 1.0', 'onerec_queue_length 3.0']
    """

    def __init__(self, queue_length: Callable[[], int]):
        self.registry = registry = CollectorRegistry()
        self._requests = Counter("onerec_requests", "Answered requests.", ["path", "status"], registry=registry)
        self._seconds = Histogram(
            "onerec_request_seconds", "Seconds from request headers to the end of the response.", ["path"],
            buckets=_SECONDS, registry=registry,
        )  # fmt: skip
        self._batch_size = Histogram("onerec_batch_size", "Histories per batch.", buckets=_SIZES, registry=registry)
        self._batch_seconds = Histogram(
            "onerec_batch_seconds", "Computation time per batch, in seconds.", buckets=_SECONDS, registry=registry
        )
        Gauge("onerec_queue_length", "Waiting histories.", registry=registry).set_function(queue_length)
        self.in_flight = Gauge("onerec_in_flight_requests", "Unanswered requests to /recommend.", registry=registry)
        self._unknown = Counter(
            "onerec_unknown_items", "Ids in requests that are not in the catalogue.", registry=registry
        )
        self._reloads = Counter("onerec_model_reloads", "Reloads by result.", ["result"], registry=registry)
        self._model = Gauge(
            "onerec_model_info", "1 for the version of the served model.", ["version"], registry=registry
        )

    def request(self, path: str, status: int, seconds: float) -> None:
        self._requests.labels(path, str(status)).inc()
        self._seconds.labels(path).observe(seconds)

    def batch(self, size: int, seconds: float) -> None:
        self._batch_size.observe(size)
        self._batch_seconds.observe(seconds)

    def unknown_items(self, count: int) -> None:
        self._unknown.inc(count)

    def reload(self, result: str) -> None:
        """`result`: "taken", "unchanged" or "refused"."""
        self._reloads.labels(result).inc()

    def model(self, version: str) -> None:
        self._model.clear()
        self._model.labels(version).set(1)

    def text(self) -> bytes:
        """All metrics in Prometheus text format."""
        return generate_latest(self.registry)
