"""What the commands that load a model share: their options, and the model these name."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from colada.errors import ColadaError

if TYPE_CHECKING:
    import torch

    from colada.language_model import LanguageModel
    from colada.model import ColaDLM

ModelOption = Annotated[
    str | None,
    typer.Option(
        "--model",
        "-m",
        metavar="WHERE",
        help="Model directory, or hub id of the form owner/name. Default: the bundled model.",
    ),
]
RevisionOption = Annotated[
    str | None, typer.Option(help="Branch, tag or commit of a hub model. Default: its main branch.")
]
DtypeOption = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="Compute in float32, bfloat16 or float16. Default: as stored; the bundled model float32.",
    ),
]
DeviceOption = Annotated[str, typer.Option(metavar="NAME", help="Where to compute: cpu, cuda, cuda:1, mps.")]
QuantiseOption = Annotated[
    str | None,
    typer.Option(metavar="NAME", help="Layers in int8, or fp8 on GPUs that have it; less exact."),
]


def load_model(
    model: str | None, revision: str | None, dtype: str | None, device: str, quantise: str | None = None
) -> LanguageModel:
    """Load the model that the options name, of whatever architecture.

    Raises:
        ColadaError: for an unknown type or device, if the model cannot be loaded, or not be quantised.
    """
    import torch

    from colada.device import find_device
    from colada.flow import choose
    from colada.model import ColaDLM, load

    dtypes: dict[str, torch.dtype] = {
        name: getattr(torch, name) for name in ("float32", "bfloat16", "float16")
    }
    wanted = choose("dtype", dtype, dtypes) if dtype is not None else None
    place = find_device(device)
    loaded = load(model, revision=revision, device=place, dtype=wanted)
    if quantise is None:
        return loaded
    if not isinstance(loaded, ColaDLM):
        raise ColadaError(f"quantise={quantise!r} with {loaded.origin}: expected a Cola DLM")
    return loaded.quantise(quantise)


def load_cola(model: str | None, revision: str | None, dtype: str | None, device: str) -> ColaDLM:
    """Load the Cola DLM that the options name, for what only such a model can do.

    Raises:
        ColadaError: as :func:`load_model`; or for a model of another architecture.
    """
    from colada.language_model import ARCHITECTURES
    from colada.model import ColaDLM

    loaded = load_model(model, revision, dtype, device)
    if not isinstance(loaded, ColaDLM):
        raise ColadaError(f"{loaded.origin} is {ARCHITECTURES[loaded.arch]}, expected a Cola DLM here")
    return loaded
