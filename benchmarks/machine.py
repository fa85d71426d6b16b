"""What this machine can do at best, measured: copying memory, and multiplying matrices."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

COPY_BYTES = {"cpu": 2**28, "cuda": 2**31}  # Far more than any cache holds, and far longer than a launch.
SQUARE = {"cpu": 1024, "cuda": 8192}  # Sides of a square product at full rate.

Shape = tuple[int, int, int]
"""m, k, n of an (m, k) x (k, n) product: 2 m k n FLOPs."""


@dataclass(frozen=True)
class Rates:
    """The best rates found: bytes per second, read and written, and FLOPs per second of products."""

    bandwidth: float
    matmul: float


def synchronise(device: torch.device) -> None:
    """Wait until the device has done all it was given; a CPU always has."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def fastest(run: Callable[[], object], device: torch.device, seconds: float = 0.3, least: int = 3) -> float:
    """Return the shortest of several durations of ``run``, in seconds, after one that does not count.

    Args:
        run: what to time; the device is waited for before and after.
        seconds, least: repeat for this long, and at least this often.
    """
    run()
    synchronise(device)
    durations: list[float] = []
    end = time.perf_counter() + seconds
    while len(durations) < least or time.perf_counter() < end:
        begin = time.perf_counter()
        run()
        synchronise(device)
        durations.append(time.perf_counter() - begin)
    return min(durations)


def copy_bandwidth(device: torch.device, size: int) -> float:
    """Return bytes per second of copying ``size`` bytes, each read once and written once."""
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)  # Written, so that the pages are there.
    return 2 * size / fastest(lambda: target.copy_(source), device)


def matmul_rate(device: torch.device, dtype: torch.dtype, shapes: Iterable[Shape]) -> float:
    """Return the best FLOPs per second over products of these shapes."""
    best = 0.0
    for m, k, n in shapes:
        a = torch.randn(m, k, device=device).to(dtype)
        # As a linear layer's: the weight is (outputs, inputs).
        b = torch.randn(n, k, device=device).to(dtype)
        out = torch.empty(m, n, device=device, dtype=dtype)

        def product(a: torch.Tensor = a, b: torch.Tensor = b, out: torch.Tensor = out) -> None:
            torch.mm(a, b.t(), out=out)

        best = max(best, 2 * m * k * n / fastest(product, device))
    return best


def measure_rates(device: torch.device, dtype: torch.dtype, rows: Iterable[int], width: int) -> Rates:
    """Measure the machine at a model's own shapes, (rows, width) x (width, 4 width), and a large square one.

    Args:
        device, dtype: where, and of what type the products are.
        rows: how many positions the model's passes have.
        width: of the model.
    """
    kind = "cuda" if device.type == "cuda" else "cpu"
    side = SQUARE[kind]
    shapes = [*((count, width, 4 * width) for count in sorted(set(rows))), (side, side, side)]
    return Rates(copy_bandwidth(device, COPY_BYTES[kind]), matmul_rate(device, dtype, shapes))


def machine_name(device: torch.device) -> str:
    """Return the GPU's name, or the CPU's and the number of threads that compute."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"{_cpu_name()}, {threads} thread{'s' if threads > 1 else ''}"


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")  # Where there is one: elsewhere the platform knows the name.
    if info.is_file():
        for line in info.read_text(encoding="utf-8", errors="replace").splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                return value.strip()
    return platform.processor() or platform.machine()
