"""What is counted of a server, for Prometheus; labels are from fixed sets only."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector

SECONDS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 60, 120, 300, 600)
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
CAUSES = {
    "client_gone": "client",
    "client_slow": "reader",
    "deadline": "deadline",
    "queue_timeout": "deadline",
    "shutting_down": "shutdown",
}
"""Errors of a request that take it back from the engine, and who is the cause."""


class Metrics:
    """All counters of an app, in a registry of its own."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        shared: dict[str, Any] = {"namespace": "colada", "registry": registry}
        self.info = Gauge(
            "info", "1, and what is served.", ["model", "version", "fingerprint", "dtype", "device"], **shared
        )
        self.requests = Counter("requests", "Requests, by status.", ["endpoint", "status"], **shared)
        self.refusals = Counter("refusals", "Requests that failed or were refused.", ["code"], **shared)
        self.cancelled = Counter("cancelled", "Requests taken back.", ["when", "why"], **shared)
        self.tokens = Counter("tokens", "Tokens of finished requests.", ["model", "kind"], **shared)
        self.choices = Counter("choices", "Choices finished.", ["model", "finish"], **shared)
        self.guesses = Counter("guesses", "Guesses sent, or replaced by newer ones.", ["what"], **shared)
        self.blocks = Counter("blocks", "Blocks written.", **shared)
        self.solver_steps = Counter("solver_steps", "Solver steps of all who were under way.", **shared)
        self.restarts = Counter("engine_restarts", "Rounds that failed, after which others began.", **shared)
        self.wakeups = Counter("wakeups", "Steps that told the event loop something.", **shared)
        self.open = Gauge("open", "Choices, latents and watchers that have a place.", ["what"], **shared)
        self.under_way = Gauge("choices_open", "Choices accepted.", ["model", "state"], **shared)
        self.lag = Gauge("loop_lag_seconds", "How late the event loop was at most in a second.", **shared)
        self.heartbeat = Gauge("engine_heartbeat_seconds", "Since the engine's last step.", **shared)
        self.rows = Histogram("rows_per_pass", "Rows of a solver step.", buckets=ROWS, **shared)
        seconds: dict[str, Any] = {"buckets": SECONDS, **shared}
        self.steps = Histogram("step_seconds", "A step of the engine.", **seconds)
        self.queue = Histogram("queue_seconds", "From acceptance of a choice to its beginning.", **seconds)
        self.first = Histogram("first_block_seconds", "From acceptance to the first text.", **seconds)
        self.between = Histogram("block_interval_seconds", "Between two blocks of a choice.", **seconds)
        self.whole = Histogram("request_seconds", "A request.", **seconds)

    def watch(self, counts: Mapping[str, Callable[[], float]], heartbeat: Callable[[], float]) -> None:
        """Take what is open, and the time since the engine's last step, whenever somebody looks."""
        for what, count in counts.items():
            self.open.labels(what).set_function(count)
        self.heartbeat.set_function(heartbeat)

    def pass_of(self, rows: int) -> None:
        """Count a solver step."""
        self.solver_steps.inc()
        self.rows.observe(rows)

    def request(self, endpoint: str, status: int, seconds: float, log: Mapping[str, Any]) -> None:
        """Count a request that has ended."""
        self.requests.labels("other" if status in (404, 405) else endpoint, status).inc()
        self.whole.observe(seconds)
        if "error" in log:
            self.refusals.labels(log["error"]).inc()

    def closed(self, begun: bool, replaced: int, log: Mapping[str, Any]) -> None:
        """Count what a request of text leaves unwritten, and guesses that were not sent."""
        self.guesses.labels("replaced").inc(replaced)
        if (why := CAUSES.get(log.get("error", ""))) is not None:
            self.cancelled.labels("running" if begun else "waiting", why).inc()
