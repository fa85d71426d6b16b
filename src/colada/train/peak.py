"""How fast a device could compute, against which training is measured: MFU."""

from __future__ import annotations

import re
import time
from functools import lru_cache

import torch

# Dense 16-bit tensor-core peaks from the makers' data sheets, FLOPs per second, by whole words of the
# name of the device; of those that match, the first counts.
_DATA_SHEETS = (
    (r"GB200", 2500e12),
    (r"B200", 2250e12),
    (r"GH200", 989e12),
    (r"H200 NVL", 836e12),
    (r"H200", 989e12),
    (r"H100 PCIe", 756e12),
    (r"H100 NVL", 835e12),
    (r"H100", 989e12),
    (r"MI300X", 1307e12),
    (r"A100", 312e12),
    (r"L40S", 362e12),
    (r"L40", 181e12),
    (r"L4", 121e12),
    (r"A10G", 70e12),
    (r"A10", 125e12),
    (r"RTX 4090$", 165e12),  # Not the 4090 D, nor the one for laptops.
)
_DATA_SHEETS_FLOAT16 = ((r"V100", 125e12), (r"T4", 65e12))  # Without bfloat16 units.


@lru_cache(maxsize=8)
def peak_flops(device: torch.device, dtype: torch.dtype) -> tuple[float, str]:
    """Return what MFU takes as the peak, in FLOPs per second, and where it is from.

    For 16-bit types on a known GPU "data sheet". Otherwise, as for float32, whose rate depends on
    whether TF32 is on, "measured": the best rate of square products, taken once a process in
    under half a second.
    """
    if device.type == "cuda":
        tables = {torch.bfloat16: _DATA_SHEETS, torch.float16: _DATA_SHEETS + _DATA_SHEETS_FLOAT16}
        name = torch.cuda.get_device_name(device)
        for words, peak in tables.get(dtype, ()):
            # A MIG slice is named like the whole.
            if re.search(rf"\b{words}(\b|$)", name) and "MIG" not in name:
                return peak, "data sheet"
    return _measured_rate(device, dtype), "measured"


def _measured_rate(device: torch.device, dtype: torch.dtype, seconds: float = 0.4) -> float:
    """Return the best rate of n x n products, n doubling from 256 while one more size fits in the time."""
    end, best, n = time.perf_counter() + seconds, 0.0, 256
    while True:
        a = torch.ones(n, n, device=device, dtype=dtype)
        durations = []
        for _ in range(3):
            begin = time.perf_counter()
            float((a @ a)[0, 0])  # Reading a number waits for the device.
            durations.append(time.perf_counter() - begin)
        best = max(best, 2 * n**3 / min(durations))
        if n == 8192 or time.perf_counter() + 3 * 8 * min(durations) > end:
            return best
        n *= 2


def mfu(flops: float, seconds: float, peak: float, ranks: int = 1) -> float:
    """Return the model FLOPs utilisation: useful ``flops`` done in ``seconds`` / (ranks * peak)."""
    return flops / (seconds * ranks * peak)
