"""What `/metrics` tells Prometheus. No label has a client's data."""

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)
_TOKEN_SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1)


class Metrics:
    """In a registry of its own. `decoded` and `compressed` are the scheduler's, `memory_event` the store's."""

    def __init__(self) -> None:
        self._registry = registry = CollectorRegistry()
        self._gauges: dict[str, Gauge] = {}

        def counter(name: str, what: str, *labels: str) -> Counter:
            return Counter(f"voco_{name}", what, labels, registry=registry)

        self._requests = counter("requests", "requests that were answered, by their HTTP status", "route", "status")
        self._rejected = counter("rejected", "requests that were sent away with 429", "route")
        self._cancelled = counter("cancelled", "requests whose client went away")
        self._events = counter("memory_events", "look-ups in the store, and what it did, by level", "level", "what")
        self._prompt_tokens = counter("prompt_tokens", "places of prompts")
        self._cached_tokens = counter("cached_tokens", "places of prompts that came from memories")
        self._tokens = counter("completion_tokens", "tokens of answers")
        self._images = counter("compressed_images", "images that were compressed")
        self._compress = Histogram(
            "voco_compress_seconds", "of a batch of images", buckets=_SECONDS, registry=registry
        )  # fmt: skip
        self._first = Histogram(
            "voco_time_to_first_token_seconds", "from a request to its answer's first token", buckets=_SECONDS,
            registry=registry,
        )  # fmt: skip
        self._per_token = Histogram(
            "voco_time_per_token_seconds", "of an answer's tokens after the first, its mean", buckets=_TOKEN_SECONDS,
            registry=registry,
        )  # fmt: skip

    def watch(self, name: str, what: str, value: Callable[[], float], **labels: str) -> None:
        """A gauge that is read when it is asked for."""
        if name not in self._gauges:
            self._gauges[name] = Gauge(f"voco_{name}", what, tuple(labels), registry=self._registry)
        gauge = self._gauges[name]
        (gauge.labels(**labels) if labels else gauge).set_function(value)

    def text(self) -> bytes:
        return generate_latest(self._registry)

    def answered(self, route: str, status: int) -> None:
        self._requests.labels(route, str(status)).inc()
        if status == 429:
            self._rejected.labels(route).inc()

    def cancelled(self) -> None:
        self._cancelled.inc()

    def prompt(self, tokens: int, cached: int) -> None:
        self._prompt_tokens.inc(tokens)
        self._cached_tokens.inc(cached)

    def first_token(self, seconds: float) -> None:
        self._first.observe(seconds)

    def per_token(self, seconds: float) -> None:
        self._per_token.observe(seconds)

    def decoded(self, tokens: int, seconds: float) -> None:
        self._tokens.inc(tokens)

    def compressed(self, images: int, seconds: float) -> None:
        self._images.inc(images)
        self._compress.observe(seconds)

    def memory_event(self, level: str, what: str) -> None:
        self._events.labels(level, what).inc()
