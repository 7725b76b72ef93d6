"""What Prometheus is told."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    generate_latest,
)

_SIZES = (1, 2, 4, 8, 16, 32, 64, 128)


class Metrics:
    """Counts of one server."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        self._requests = Counter(
            "vlv_requests", "Requests answered.", ["path", "status"], registry=self.registry
        )
        self._seconds = Histogram(
            "vlv_request_seconds", "From headers to answer.", ["path"], registry=self.registry
        )
        self._items = Histogram(
            "vlv_batch_items", "Items of a batch.", ["kind"], buckets=_SIZES, registry=self.registry
        )
        self._batch_seconds = Histogram(
            "vlv_batch_seconds", "Time of the model.", ["kind"], registry=self.registry
        )
        self._tokens = Counter(
            "vlv_caption_tokens", "Tokens of captions sent.", registry=self.registry
        )
        self._in_work = Gauge("vlv_requests_in_work", "Requests in work.", registry=self.registry)

    def watch_queue(self, count: Callable[[], int]) -> None:
        """Show how many items wait."""
        gauge = Gauge("vlv_queue_items", "Items that wait for the model.", registry=self.registry)
        gauge.set_function(count)

    def begin(self) -> None:
        """A request came in."""
        self._in_work.inc()

    def end(self, path: str, status: int, seconds: float) -> None:
        """It was answered."""
        self._in_work.dec()
        self._requests.labels(path, str(status)).inc()
        self._seconds.labels(path).observe(seconds)

    def batch(self, kind: str, count: int, seconds: float) -> None:
        """A batch was computed."""
        self._items.labels(kind).observe(count)
        self._batch_seconds.labels(kind).observe(seconds)

    def tokens(self, count: int) -> None:
        """So many tokens of captions were sent."""
        self._tokens.inc(count)

    def text(self) -> bytes:
        """All counts."""
        return generate_latest(self.registry)
