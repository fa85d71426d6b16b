"""Rows without the cells that no wanted output follows from: the same outputs and gradients, less work."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from colada.networks import dit as dit_module
from colada.networks.dit import DiT
from colada.networks.ragged import needed_cells
from colada.train.flow_matching import Pinned, place, predict
from helpers import tiny_dit
from test_packing import may_see, written_out

SAMPLE = torch.tensor(
    [[0] * 12 + [1] * 8 + [-1] * 4, [0] * 24, [0] * 8 + [1] * 8 + [2] * 8, [0] * 4 + [-1] * 20]
)
PINNED = torch.tensor(
    [[1] * 6 + [0] * 6 + [1] * 4 + [0] * 4 + [1] * 4, [1] * 20 + [0] * 4, [0] * 24, [1] * 24]
).bool()
"""Four rows of six blocks: samples with prompts and filling, a long prompt, none, and nothing else."""


@pytest.mark.parametrize("with_samples", [False, True])
@pytest.mark.parametrize("with_alone", [False, True])
def test_a_cell_is_needed_if_a_wanted_block_sees_it(with_samples: bool, with_alone: bool) -> None:
    copies, block = 2, 4
    needed = ~PINNED.unflatten(1, (-1, block)).all(2)
    alone = torch.rand(4, copies, 6, generator=torch.Generator().manual_seed(3)) < 0.4
    kept, _ = needed_cells(
        needed, block, copies, SAMPLE if with_samples else None, alone if with_alone else None
    )
    cells = written_out(24, block, copies)
    for row in range(4):
        wanted = [(c, p) for c, p in cells if c and needed[row, p // block]]

        def hidden(query: tuple[int, int], key: tuple[int, int], row: int = row) -> bool:
            apart = with_samples and SAMPLE[row, query[1]] != SAMPLE[row, key[1]]
            lonely = with_alone and key[0] == 0 and bool(alone[row, query[0] - 1, query[1] // block])
            return bool(apart) or lonely

        seen = [
            key
            for key in cells
            if any(may_see(query, key, block) and not hidden(query, key) for query in wanted)
        ]
        expected = {*wanted, *(key for key in seen if key[0] == 0)}
        assert [cell in expected for cell in cells] == kept[row].tolist()


def outputs(dit: DiT, patch: int, with_samples: bool, with_alone: bool) -> tuple[Tensor, list[Tensor]]:
    """The outputs of copies that are not pinned, and the gradients of their weighted sum."""
    g = torch.Generator().manual_seed(5)
    clean, noise = torch.randn(4, 24, 8, generator=g), torch.randn(4, 2, 24, 8, generator=g)
    times = (1000 * torch.rand(4, 2, 6, generator=g)).repeat_interleave(4, 2)
    alone = torch.rand(4, 2, 6, generator=g) < 0.4
    pinned = Pinned(PINNED, torch.randn(4, 24, 8, generator=g))
    sample = SAMPLE if with_samples else None
    output = predict(
        *(dit, place(noise, pinned), times, clean, pinned, sample),
        alone=alone if with_alone else None,
    )
    free = output[(~PINNED)[:, None].expand(4, 2, 24)]
    weights = torch.randn(free.shape, generator=g)
    return free.detach(), list(torch.autograd.grad((free * weights).sum(), list(dit.parameters())))


@pytest.mark.parametrize("patch", [1, 2])
@pytest.mark.parametrize("with_samples", [False, True])
@pytest.mark.parametrize("with_alone", [False, True])
def test_what_is_left_out_changes_neither_outputs_nor_gradients(
    monkeypatch: pytest.MonkeyPatch, patch: int, with_samples: bool, with_alone: bool
) -> None:
    dit = tiny_dit(patch_size=patch)
    packed: list[int] = []
    made: Callable[..., Tensor] = dit.embed

    def embed(latents: Tensor, guess: Tensor | None = None) -> Tensor:
        packed.append(len(latents))
        return made(latents, guess)

    monkeypatch.setattr(dit, "embed", embed)
    own, gradients = outputs(dit, patch, with_samples, with_alone)
    monkeypatch.setattr(dit_module, "MOST_CELLS", 0)
    whole, expected = outputs(dit, patch, with_samples, with_alone)
    assert packed[0] < 0.7 * packed[1] == 0.7 * 4 * (20 + 2 * 24)
    torch.testing.assert_close(own, whole, rtol=1e-4, atol=1e-5)
    for one, other in zip(gradients, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


def test_what_would_save_nothing_is_not_made_ragged() -> None:
    dit = tiny_dit()
    assert dit.needed_layout(torch.ones(2, 6).bool(), 2) is None
    assert dit.needed_layout(torch.zeros(2, 6).bool(), 2) is None
    some = torch.eye(6)[:2].bool()
    assert dit.needed_layout(some, 2) is not None
    for block in dit.blocks:
        block.compile()
    assert dit.needed_layout(some, 2) is None
