"""Colada: Cola DLM, the continuous latent diffusion language model.

>>> import colada
>>> model = colada.load()
>>> model.generate("Once upon a time")[0].text  # doctest: +SKIP
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from colada.errors import ColadaError
    from colada.models.cola import ColaDLM
    from colada.models.load import load
    from colada.networks.config import DiTConfig, TextVAEConfig
    from colada.networks.dit import DiT
    from colada.networks.vae import TextVAE

__version__ = "0.1.0"
__all__ = ["ColaDLM", "ColadaError", "DiT", "DiTConfig", "TextVAE", "TextVAEConfig", "__version__", "load"]

_HOMES = {
    "ColaDLM": "colada.models.cola",
    "ColadaError": "colada.errors",
    "DiT": "colada.networks.dit",
    "DiTConfig": "colada.networks.config",
    "TextVAE": "colada.networks.vae",
    "TextVAEConfig": "colada.networks.config",
    "load": "colada.models.load",
}


def __getattr__(name: str) -> Any:
    # Imported on first use: `colada --help` should not wait for torch.
    if name in _HOMES:
        from importlib import import_module

        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'colada' has no attribute {name!r}")
