"""Where to compute."""

from __future__ import annotations

import ctypes
import functools
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, ParamSpec, TypeVar, cast

import torch
from torch.overrides import TorchFunctionMode

from colada.errors import ColadaError, one_of, shown

P = ParamSpec("P")
R = TypeVar("R")

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
"""In which networks compute."""


def find_device(name: str | torch.device, key: str = "device") -> torch.device:
    """Return a device by name, once something could be put there.

    Raises:
        ColadaError: naming ``key``, if there is no such device here.
    """
    try:
        if not isinstance(name, str | torch.device) or torch.device(name).type == "meta":
            raise ValueError(name)
        place = torch.device(name)
    except (RuntimeError, ValueError):
        raise ColadaError(f"{key}={shown(name)}, expected 'cpu', 'cuda', 'cuda:1' or the like") from None
    try:
        torch.empty(0, device=place)
    except (RuntimeError, AssertionError, ImportError) as error:  # NotImplementedError is a RuntimeError.
        reason = str(error).partition("\n")[0]
        raise ColadaError(f"{key}={str(name)!r} cannot be used: {reason}") from None
    return place


def check_dtype(dtype: object) -> None:
    """Raise ColadaError unless networks compute in it; None is whatever they are stored in."""
    if dtype is not None and not any(dtype is known for known in DTYPES):
        raise ColadaError(f"dtype={shown(dtype)}, {one_of(DTYPES)}")


# --- the state of torch around a call ------------------------------------------------------------


@contextmanager
def plain_torch(inference: bool = True) -> Iterator[None]:
    """Compute without gradients and as torch does at start, whatever the caller has set.

    Autocast, another default type or device would change results, or what a seed draws.
    """
    with ExitStack() as stack:
        for kind in ("cpu", "cuda"):
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        default = torch.get_default_dtype()
        if default != torch.float32:  # Of the whole process: touched only where it must be.
            torch.set_default_dtype(torch.float32)
            stack.callback(torch.set_default_dtype, default)
        if torch.get_default_device().type != "cpu":
            stack.enter_context(torch.device("cpu"))
        stack.enter_context(torch.inference_mode(inference))
        yield


def undisturbed(function: Callable[P, Iterator[R]]) -> Callable[P, Iterator[R]]:
    """Let each turn of a generator run in :func:`plain_torch`; whoever takes its items does not."""

    @functools.wraps(function)
    def turns(*args: P.args, **kwargs: P.kwargs) -> Iterator[R]:
        items = cast(Any, function(*args, **kwargs))
        try:
            while True:
                with plain_torch():
                    item = next(items, items)
                if item is items:
                    return
                yield item
        finally:
            items.close()

    return turns


# --- networks and memory -------------------------------------------------------------------------


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


def parameters_of(network: torch.nn.Module) -> int:
    """Return how many parameters a network has."""
    return sum(parameter.numel() for parameter in network.parameters())


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


def require_memory(needed_bytes: int, device: torch.device, what: str, share: float = 1.0) -> None:
    """Raise ColadaError if a share of a device's bytes (a CPU: unused ones) is less, saying what wants it."""
    known = [memory_of(device)]
    if device.type == "cpu" and sys.platform == "linux":
        entries = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        known.append(1024 * int(entries["MemAvailable"].split()[0]))
    most_bytes = min((size for size in known if size is not None), default=needed_bytes)
    if needed_bytes > share * most_bytes:
        size = f"{needed_bytes / 2**30:.1f} GiB of memory"
        bound = f"{'' if share == 1 else f'{share:.0%} of '}the {most_bytes / 2**30:.1f} that {device} has"
        raise ColadaError(f"{what} takes {size}, expected at most {bound}")


def on_device(
    values: Sequence[Any],
    device: torch.device,
    dtype: torch.dtype = torch.int64,
) -> torch.Tensor:
    """Return numbers, or nested lists of such, as a tensor on a device, without waiting for it."""
    tensor = torch.tensor(values, dtype=dtype)
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)
