"""Where to compute."""

from __future__ import annotations

import torch

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
