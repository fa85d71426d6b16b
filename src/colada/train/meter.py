"""How fast a run is, and how much memory it takes."""

from __future__ import annotations

import resource
import sys
import time

import torch

from colada.train.cost import mfu, peak_flops
from colada.train.parallel import Ranks


class Meter:
    """Tokens per second, MFU and memory since the last reading.

    Args:
        precision: of the matrix products.
    """

    def __init__(self, ranks: Ranks, precision: torch.dtype) -> None:
        self._ranks = ranks
        self._peak, _ = peak_flops(ranks.device, precision)
        self.restart()

    def restart(self) -> None:
        """Begin to measure anew."""
        self._begin, self._tokens, self._flops = time.perf_counter(), 0, 0.0

    def count(self, tokens: int, flops: float) -> None:
        """Add a step: its tokens and useful FLOPs, over all ranks."""
        self._tokens += tokens
        self._flops += flops

    def read(self) -> dict[str, float]:
        """Return tokens/s over all ranks, MFU, and this rank's largest memory in GB; measure anew."""
        seconds = max(1e-9, time.perf_counter() - self._begin)
        device = self._ranks.device
        if device.type == "cuda":
            memory = torch.cuda.max_memory_allocated(device)
        else:
            memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            memory *= 1 if sys.platform == "darwin" else 1024
        values = {
            "tokens_per_s": self._tokens / seconds,
            "mfu": mfu(self._flops, seconds, self._peak, self._ranks.size),
            "memory_gb": memory / 1e9,
        }
        self.restart()
        return values
