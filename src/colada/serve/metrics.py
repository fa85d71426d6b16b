"""What is counted of a server, for Prometheus; labels are from fixed sets only."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Info, generate_latest

SECONDS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 60, 120, 300, 600)


class Metrics:
    """All counters of an app, in a registry of its own."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"colada_{name}", text, labels, registry=registry)

        def gauge(name: str, text: str, *labels: str) -> Gauge:
            return Gauge(f"colada_{name}", text, labels, registry=registry)

        def seconds(name: str, text: str) -> Histogram:
            return Histogram(f"colada_{name}_seconds", text, buckets=SECONDS, registry=registry)

        self.answers = counter("requests", "Requests answered.", "endpoint", "status")
        self.finished = counter("choices", "Choices finished.", "model", "finish")
        self.tokens = counter("tokens", "Tokens of finished requests.", "model", "kind")
        self.blocks = counter("blocks", "Blocks written.", "model")
        self.cancelled = counter("cancelled", "Requests that were not written to their ends.", "why")
        self.rejected = counter("rejected", "Requests refused.", "why")
        self.replaced = counter("guesses_replaced", "Guesses that were not read in time.")
        self.restarts = counter("engine_restarts", "Sessions made anew after a failure.")
        self.places = gauge("choices_open", "Choices accepted and not finished.")
        self.latents = gauge("latents_open", "Latents that they take.")
        self.watchers = gauge("watchers", "Requests that are sent guesses.")
        self.lag = gauge(
            "loop_lag_seconds", "By how much the event loop was late, at most, in the last second."
        )
        self.heartbeat = gauge("engine_heartbeat_seconds", "Since the engine's last step.")
        self.steps = seconds("step", "A solver step of the engine, or the end of a round.")
        self.first = seconds("first_block", "From a request's acceptance to its first text.")
        self.between = seconds("block_interval", "Between two blocks of a choice.")
        self.whole = seconds("request", "A request.")
        self.info = Info("colada", "What is served.", registry=registry)

    def watch(self, gauge: Gauge, value: Callable[[], float]) -> None:
        """Let a gauge be what a function returns when it is asked for."""
        gauge.set_function(value)

    def render(self) -> bytes:
        """Return Prometheus' text."""
        return generate_latest(self.registry)

    def round(self, model: str, seconds: float, blocks: int) -> None:
        """Count a step of the engine."""
        self.steps.observe(seconds)
        self.blocks.labels(model).inc(blocks)

    def restarted(self) -> None:
        """Count a session that was made anew."""
        self.restarts.inc()
