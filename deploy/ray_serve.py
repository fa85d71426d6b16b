"""Colada on a Ray cluster: ``serve run deploy.ray_serve:app``, in a clone with the extra and ``ray[serve]``.

Each replica is a process with an engine thread of its own, as ``colada serve`` is one. Deadlines and the
limit of what waits stay the replica's: Ray's own cancellation of requests is not relied on.
"""

from __future__ import annotations

import os
from typing import Any

from ray import serve

from colada.serve.admission import Limits, Policy
from colada.serve.app import create_app
from colada.serve.models import open_served

LIMITS = Limits()
MODEL = os.environ.get("COLADA_MODEL")  # A directory or a hub id; the bundled one if there is none.
KEYS = list(filter(None, os.environ.get("COLADA_API_KEYS", "").split(",")))


def build() -> Any:
    """Return the app, within the replica: it has a thread, which does not travel."""
    served = lambda: open_served(None, MODEL, None)  # noqa: E731
    return create_app(lambda: {(one := served()).name: one}, LIMITS, Policy(keys=KEYS, hosts=("*",)))


@serve.deployment(
    num_replicas=int(os.environ.get("COLADA_REPLICAS", "2")),
    max_ongoing_requests=LIMITS.slots + LIMITS.waiting,
    ray_actor_options={"num_cpus": 1},  # "num_gpus": 1 for one process a GPU; then load with device="cuda".
    graceful_shutdown_timeout_s=LIMITS.drain,
)
@serve.ingress(build)
class Colada:
    """A replica."""


app = Colada.bind()
