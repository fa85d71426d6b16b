"""What is counted of a server, for Prometheus; labels are from fixed sets only."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

SECONDS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 60, 120, 300, 600)


class Metrics:
    """All counters of an app, in a registry of its own."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        shared: dict[str, Any] = {"namespace": "colada", "registry": registry}
        self.requests = Counter("requests", "Requests, by status.", ["endpoint", "status"], **shared)
        self.refusals = Counter("refusals", "Requests that failed or were refused.", ["code"], **shared)
        self.tokens = Counter("tokens", "Tokens of finished requests.", ["model", "kind"], **shared)
        self.choices = Counter("choices", "Choices finished.", ["model", "finish"], **shared)
        self.blocks = Counter("blocks", "Blocks written.", **shared)
        self.gauges = Gauge("open", "Choices, latents and watchers that have a place.", ["what"], **shared)
        self.lag = Gauge("loop_lag_seconds", "How late the event loop was at most in a second.", **shared)
        self.heartbeat = Gauge("engine_heartbeat_seconds", "Since the engine's last step.", **shared)
        seconds: dict[str, Any] = {"buckets": SECONDS, **shared}
        self.steps = Histogram("step_seconds", "A step of the engine.", **seconds)
        self.first = Histogram("first_block_seconds", "From acceptance to the first text.", **seconds)
        self.between = Histogram("block_interval_seconds", "Between two blocks of a choice.", **seconds)
        self.whole = Histogram("request_seconds", "A request.", **seconds)

    def watch(self, counts: Mapping[str, Callable[[], float]], heartbeat: Callable[[], float]) -> None:
        """Take what is open, and the time since the engine's last step, whenever somebody looks."""
        for what, count in counts.items():
            self.gauges.labels(what).set_function(count)
        self.heartbeat.set_function(heartbeat)

    def step(self, seconds: float, blocks: int) -> None:
        """Count a step of the engine."""
        self.steps.observe(seconds)
        self.blocks.inc(blocks)

    def request(self, endpoint: str, status: int, seconds: float, log: dict[str, Any]) -> None:
        """Count a request that has ended."""
        self.requests.labels("other" if status in (404, 405) else endpoint, status).inc()
        self.whole.observe(seconds)
        if "error" in log:
            self.refusals.labels(log["error"]).inc()
