"""Limits of a server: batch, queue and request sizes, and timeouts."""

from __future__ import annotations

from dataclasses import dataclass, fields


@dataclass(frozen=True)
class ServingSettings:
    """
    Limits of a server. Requests beyond a limit get an error response.

    Args:
        max_batch_size: histories per batch.
        max_wait_ms: milliseconds that the first history of a batch waits for others; 0 does not wait.
        max_queue: maximum number of waiting histories; requests beyond it get 503.
        timeout: seconds until a request gets 504.
        max_histories: histories per request.
        max_history_items: items per history. The model reads the latest ones, as in training; `exclude_seen` excludes all.
        max_list_items: items per `exclude` or `allow` list.
        max_top_k, max_beams, max_session_length: maximum values of a request.
        max_body_bytes: size of a request body.
        reload_timeout: seconds until a reload that has not loaded its model is given up.

    Raises:
        ValueError: a limit out of range.

    Example:
        >>> ServingSettings(max_batch_size=0)
        Traceback (most recent call last):
        ...
        ValueError: max_batch_size must be at least 1; got 0
    """

    max_batch_size: int = 32
    max_wait_ms: float = 2.0
    max_queue: int = 512
    timeout: float = 30.0
    max_histories: int = 64
    max_history_items: int = 2_000
    max_list_items: int = 10_000
    max_top_k: int = 100
    max_beams: int = 128
    max_session_length: int = 10
    max_body_bytes: int = 1 << 20
    reload_timeout: float = 300.0

    def __post_init__(self):
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name == "max_wait_ms":
                if not 0 <= value <= 10_000:
                    raise ValueError(f"max_wait_ms must be between 0 and 10000; got {value:g}")
            elif field.name in ("timeout", "reload_timeout"):
                if not 0 < value <= 3_600:
                    raise ValueError(f"{field.name} must be between 0 and 3600 seconds; got {value:g}")
            elif value < 1:
                raise ValueError(f"{field.name} must be at least 1; got {value}")
        if self.max_top_k > self.max_beams:
            raise ValueError(
                f"max_top_k={self.max_top_k} exceeds max_beams={self.max_beams}, but a request returns at most one session per beam; raise max_beams"
            )
        if self.max_histories > self.max_queue:
            raise ValueError(
                f"max_histories={self.max_histories} exceeds max_queue={self.max_queue}, so such a request could never be queued; raise max_queue"
            )

    @property
    def max_queue_cost(self) -> int:
        """Beams x items of all waiting histories: four requests of the largest size, which cost twice as much with `diversity`."""
        return 8 * self.max_histories * self.max_beams * self.max_session_length
