"""Colada: Cola DLM, the continuous latent diffusion language model.

>>> import colada
>>> model = colada.load()
>>> model.generate("Once upon a time")[0].text  # doctest: +SKIP
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from colada.config import DiTConfig, TextVAEConfig
    from colada.dit import DiT
    from colada.errors import ColadaError
    from colada.model import ColaDLM, load
    from colada.vae import TextVAE

__version__ = "0.1.0"
__all__ = ["ColaDLM", "ColadaError", "DiT", "DiTConfig", "TextVAE", "TextVAEConfig", "__version__", "load"]

_HOMES = {
    "ColaDLM": "colada.model",
    "ColadaError": "colada.errors",
    "DiT": "colada.dit",
    "DiTConfig": "colada.config",
    "TextVAE": "colada.vae",
    "TextVAEConfig": "colada.config",
    "load": "colada.model",
}


def __getattr__(name: str) -> Any:
    # Imported on first use: `colada --help` should not wait for torch.
    if name in _HOMES:
        from importlib import import_module

        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'colada' has no attribute {name!r}")
