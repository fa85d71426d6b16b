"""Rows that hold text and a picture: their cells, their positions, and who sees whom in them.

A caption is drawn from rows ``[C | I | N]``: clean text, the noisy picture, which sees all of the text, and,
where captions are learnt too, noisy text, which does not see the picture. A picture is described by rows
``[P | I | C | N]``: prompt and picture, which see each other, then the clean and the noisy answer, which see
both.

Text keeps its positions; a picture takes one, the first after the text before it, for all its latents, and
the text after it begins with the next block: a KV cache needs no second kind of position. Where in a picture
a latent lies is told by ``img_pos`` and, with ``img_axial``, by rotary positions: half of the frequencies
turn by that position plus the row, half by it plus the column. B rows, L text latents, M latents of a
picture, which may be narrower than the text's.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from colada.errors import ColadaError
from colada.networks.config import DiTConfig
from colada.networks.dit import DiT, DualBlock
from colada.networks.packing import CellKind, Cells, Layout


def drawing_layout(
    lengths: Tensor, length: int, latents: int, block_size: int, alone: Tensor, captions: bool = True
) -> Layout:
    """Return the layout of rows ``[C length | I latents | N length]``, or without N.

    Args:
        lengths: int64 (B,), latents of each caption, in whole blocks; the rest is padding, which nobody sees.
        length: latents of a caption with its padding.
        latents: of a picture.
        block_size: of text.
        alone: bool (B,), pictures that do not see their caption.
        captions: whether rows have noisy captions.

    Raises:
        ColadaError: for lengths that are no whole blocks, or beyond ``length``.
    """
    _check_lengths(lengths, length, block_size)
    padding = _padding(lengths, length)
    cells = drawing_cells(lengths, length, latents, block_size, captions)
    hidden = torch.cat([padding, padding.new_zeros(len(lengths), latents), *[padding] * captions], 1)
    return Layout.of_cells(cells, block_size, length, hidden, alone)


def drawing_cells(
    lengths: Tensor, length: int, latents: int, block_size: int, captions: bool = True
) -> Cells:
    """Return the cells (B, n) of such rows."""
    rows = len(lengths)
    text = _text(rows, length, lengths.new_zeros(rows), block_size)
    picture = _picture(rows, latents, lengths, length // block_size, CellKind.DRAWN)
    return _joined(_as(text, CellKind.CLEAN, 0), picture, *[_as(text, CellKind.NOISY, 1)] * captions)


def describing_layout(
    prompts: Tensor, prompt: int, lengths: Tensor, length: int, latents: int, block_size: int
) -> Layout:
    """Return the layout of rows ``[P prompt | I latents | C length - block | N length]``.

    Args:
        prompts: int64 (B,), latents of each prompt, in whole blocks; the rest is padding, which nobody sees.
        prompt: latents of a prompt with its padding.
        lengths, length: the same of the answers.
        latents: of a picture.
        block_size: of text.

    Raises:
        ColadaError: for lengths that are no whole blocks, or beyond what there is.
    """
    _check_lengths(prompts, prompt, block_size)
    _check_lengths(lengths, length, block_size)
    clean, padding = length - block_size, _padding(lengths, length)
    shown = padding.new_zeros(len(lengths), latents)
    hidden = torch.cat([_padding(prompts, prompt), shown, padding[:, :clean], padding], 1)
    cells = describing_cells(prompts, prompt, lengths, length, latents, block_size)
    return Layout.of_cells(cells, block_size, prompt + latents + clean, hidden)


def describing_cells(
    prompts: Tensor, prompt: int, lengths: Tensor, length: int, latents: int, block_size: int
) -> Cells:
    """Return the cells (B, n) of such rows."""
    rows = len(lengths)
    before = _text(rows, prompt, prompts.new_zeros(rows), block_size)
    picture = _picture(rows, latents, prompts, 0, CellKind.SHOWN)
    answer = _text(rows, length, prompts + block_size, block_size)
    history = answer.at((slice(None), slice(length - block_size)))
    return _joined(
        _as(before, CellKind.PROMPT, 0),
        picture,
        _as(history, CellKind.CLEAN, 0),
        _as(answer, CellKind.NOISY, 1),
    )


def with_pictures(text: DiT, config: DiTConfig, generator: torch.Generator | None = None) -> DiT:
    """Return a copy of a text network that has pictures too, and draws nothing of use as yet.

    Args:
        text: whose weights it begins with, those of pictures in dual layers too.
        config: that of the text with pictures.
        generator: of the new weights.
    """
    dit = DiT(config)
    dit.init_weights(generator)
    dit.load_state_dict(text.state_dict(), strict=False)
    for block in dit.blocks[: config.dual_layers]:
        assert isinstance(block, DualBlock)
        state = {name: value for name, value in block.state_dict().items() if not name.startswith("image.")}
        block.image.load_state_dict(state)
    return dit.to(text.txt_in.proj.weight)


def widened(latents: Tensor, width: int) -> Tensor:
    """Return latents of pictures (..., P) as wide as text latents, filled up with 0: packed together."""
    return F.pad(latents, (0, width - latents.shape[-1]))


def _check_lengths(lengths: Tensor, length: int, block_size: int) -> None:
    if length % block_size or bool((lengths % block_size).any()) or bool((lengths > length).any()):
        values = f"lengths={lengths.tolist()} of at most {length} latents"
        raise ColadaError(f"{values}, expected multiples of block_size={block_size}")


def _text(rows: int, length: int, first: Tensor, block_size: int) -> Cells:
    """Return cells of text from a position on that each row has for itself; their blocks count from 0."""
    number = torch.arange(length, device=first.device).expand(rows, -1)
    zeros = torch.zeros_like(number)
    return Cells(first[:, None] + number, number // block_size, zeros, zeros)


def _picture(rows: int, latents: int, position: Tensor, block: int, kind: int) -> Cells:
    zeros = torch.zeros(rows, latents, dtype=torch.long, device=position.device)
    return Cells(position[:, None].expand(-1, latents), zeros + block, zeros + kind, zeros)


def _as(cells: Cells, kind: int, copy: int) -> Cells:
    return cells._replace(kind=torch.full_like(cells.kind, kind), copy=torch.full_like(cells.copy, copy))


def _joined(*parts: Cells) -> Cells:
    return Cells(*(torch.cat(columns, 1) for columns in zip(*parts, strict=True)))


def _padding(lengths: Tensor, length: int) -> Tensor:
    return torch.arange(length, device=lengths.device) >= lengths[:, None]
