"""Where to compute."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from colada.errors import ColadaError


def find_device(name: str, key: str = "device") -> torch.device:
    """Return a device by name, once something could be put there.

    Raises:
        ColadaError: naming ``key``, if there is no such device here.
    """
    try:
        place = torch.device(name)
    except RuntimeError:
        raise ColadaError(f"{key}={name!r}, expected 'cpu', 'cuda', 'cuda:1' or the like") from None
    try:
        torch.empty(0, device=place)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).partition("\n")[0]
        raise ColadaError(f"{key}={name!r} cannot be used: {reason}") from None
    return place


class _Unallocated(TorchFunctionMode):
    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.empty:
            return func(*args, **{**kwargs, "device": "meta"})
        if getattr(func, "__module__", "") == "torch.nn.init":
            return kwargs["tensor"] if "tensor" in kwargs else args[0]
        return func(*args, **kwargs)


def unallocated() -> _Unallocated:
    """Return a context in which networks are made without memory for their parameters, and uninitialised.

    Unlike ``torch.device("meta")`` it initialises nothing, which on that device costs the import of torch's
    compiler (0.7 s), and leaves buffers real.
    """
    return _Unallocated()


def keep_freed_memory() -> None:
    """Let this process keep the memory that it frees, for its next step.

    glibc gives large blocks back to the system at once, which then clears every page of the next ones: a
    fifth of a training step on a CPU. Where the C library is another one, nothing is changed.
    """
    if sys.platform != "linux":
        return
    library = ctypes.CDLL(None)
    if hasattr(library, "gnu_get_libc_version"):
        trim_threshold, mmap_threshold = -1, -3  # mallopt(3)
        library.mallopt(mmap_threshold, 1 << 30)
        library.mallopt(trim_threshold, (1 << 31) - 1)


def memory_of(device: torch.device) -> int | None:
    """Return a device's memory in bytes, as far as this process may use it; None where that is not known."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    if device.type != "cpu" or not hasattr(os, "sysconf"):
        return None
    bounds = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    for name in ("memory.max", "memory/memory.limit_in_bytes"):  # cgroups, of either version
        try:
            bounds.append(int(Path("/sys/fs/cgroup", name).read_text()))
        except (OSError, ValueError):  # There is no such group, or its bound is "max".
            continue
    return min(bounds)
