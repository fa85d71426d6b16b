"""What a run was made with: versions, commit, hardware."""

from __future__ import annotations

import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

import colada

_PACKAGES = ("numpy", "tokenizers", "safetensors", "pyarrow", "datasets")


def provenance(device: torch.device) -> dict[str, str]:
    """Return versions, the source's commit where it is a git checkout, and the device, by name."""
    versions = {"colada": colada.__version__, "python": platform.python_version()}
    versions["torch"] = torch.__version__  # What is installed may not say for which device it was built.
    for package in _PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    commit = _commit()
    if commit is not None:
        versions["commit"] = commit
    cuda = device.type == "cuda"
    versions["device"] = torch.cuda.get_device_name(device) if cuda else platform.machine()
    return versions


def _commit() -> str | None:
    """Return the commit of the package's own checkout, with "+" if files differ from it."""
    source = Path(colada.__file__).resolve().parents[1]

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments], cwd=source, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    try:
        if source != (Path(git("rev-parse", "--show-toplevel")) / "src").resolve():
            return None
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain", "--", ".") else "")
    except (OSError, subprocess.CalledProcessError):
        return None
