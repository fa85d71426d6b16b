"""What the commands that load a model share: their options, and the model these name."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    import torch

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
) -> ColaDLM:
    """Load the model that the options name.

    Raises:
        ColadaError: for an unknown type or device, or if the model cannot be loaded.
    """
    import torch

    from colada.device import find_device
    from colada.flow import choose
    from colada.model import load

    dtypes: dict[str, torch.dtype] = {
        name: getattr(torch, name) for name in ("float32", "bfloat16", "float16")
    }
    wanted = choose("dtype", dtype, dtypes) if dtype is not None else None
    place = find_device(device)
    loaded = load(model, revision=revision, device=place, dtype=wanted)
    return loaded.quantise(quantise) if quantise is not None else loaded
