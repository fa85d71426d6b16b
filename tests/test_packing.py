"""Packing: who sees whom, and how ragged samples are grouped."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from colada.layers import attend
from colada.packing import Layout, block_causal, pad_to_multiple, two_copy
from helpers import tiny_dit, tiny_vae


@pytest.mark.parametrize("block", [1, 2, 3, 4, 16])
@pytest.mark.parametrize("keys", [1, 2, 4, 5, 12, 17])
def test_block_causal_is_the_definition_for_every_number_of_queries(keys: int, block: int) -> None:
    for queries in range(keys + 1):
        mask = block_causal(queries, keys, block)
        assert mask.shape == (queries, keys)
        for row, i in enumerate(range(keys - queries, keys)):
            for j in range(keys):
                assert bool(mask[row, j]) == (j // block <= i // block)


@pytest.mark.parametrize(("blocks", "block"), [(1, 1), (1, 4), (2, 1), (2, 3), (3, 4), (5, 2)])
def test_two_copy_is_the_definition(blocks: int, block: int) -> None:
    length = blocks * block
    # Written out: every position of the row as (is it noisy, its block).
    cells = [(False, p // block) for p in range(length - block)] + [(True, p // block) for p in range(length)]
    mask = two_copy(length, block)
    assert mask.shape == (len(cells), len(cells))
    for (row, (noisy_query, i)), (column, (noisy_key, j)) in itertools.product(
        enumerate(cells), enumerate(cells)
    ):
        sees = {  # (query is noisy, key is noisy)
            (False, False): j <= i,
            (False, True): False,
            (True, False): j < i,
            (True, True): j == i,
        }
        assert bool(mask[row, column]) == sees[noisy_query, noisy_key], (row, column)


@pytest.mark.parametrize(
    ("lengths", "history"),
    [
        ([4, 8, 4, 12], None),
        ([0, 5, 0, 5, 3], None),
        ([4, 4, 4], [0, 8, 0]),
        ([0, 3, 2, 3], [4, 0, 8, 4]),
        ([7], None),
        ([], None),
        ([0, 0], [0, 3]),
    ],
)
def test_groups_hold_every_sample_with_positions_once_and_agree_on_shape(
    lengths: list[int], history: list[int] | None
) -> None:
    layout = Layout(lengths, 4, history)
    history = history or [0] * len(lengths)
    assert len(layout) == sum(lengths)
    found = sorted(sample for group in layout.groups for sample in group.samples)
    assert found == [sample for sample, length in enumerate(lengths) if length > 0]
    packed = [(sample, i) for sample, length in enumerate(lengths) for i in range(length)]
    for group in layout.groups:
        cells = [(sample, i) for sample in group.samples for i in range(group.length)]
        index = range(len(packed)) if group.index is None else group.index.tolist()
        assert [packed[at] for at in index] == cells
        for sample in group.samples:
            assert (lengths[sample], history[sample]) == (group.length, history[group.samples[0]])
    shapes = {(lengths[g.samples[0]], history[g.samples[0]]) for g in layout.groups}
    assert len(shapes) == len(layout.groups)


def test_positions_count_on_from_each_samples_history() -> None:
    layout = Layout([3, 0, 2], 4, [0, 9, 5])
    assert layout.positions.tolist() == [0, 1, 2, 5, 6]


def test_group_masks_are_the_definition_or_left_out_when_all_is_visible() -> None:
    block = 4
    layout = Layout([4, 8, 3, 4], block, [0, 4, 6, 8])
    lengths, history = [4, 8, 3, 4], [0, 4, 6, 8]
    for group in layout.groups:
        n, h = lengths[group.samples[0]], history[group.samples[0]]
        sees = [[j // block <= (h + i) // block for j in range(n + h)] for i in range(n)]
        if all(map(all, sees)):
            assert group.mask is None
        else:
            assert group.mask is not None
            assert group.mask.tolist() == sees
    assert any(group.mask is None for group in layout.groups)
    assert any(group.mask is not None for group in layout.groups)


def test_two_copy_layout_repeats_the_positions_of_both_copies() -> None:
    layout = Layout.two_copy(2, 6, 2)
    assert layout.positions.tolist() == [0, 1, 2, 3, 0, 1, 2, 3, 4, 5] * 2
    assert layout.lengths == (10, 10)
    (group,) = layout.groups
    assert group.samples == (0, 1)
    assert group.mask is not None
    assert group.mask.shape == (10, 10)


def test_no_mask_is_larger_than_its_longest_sample_squared() -> None:
    lengths = [4, 8, 12] * 30
    layout = Layout(lengths, 4)
    for group in layout.groups:
        assert group.mask is None or group.mask.shape == (group.length, group.length)
    rows = Layout.two_copy(50, 8, 4)
    assert all(group.mask is not None and group.mask.numel() == 12 * 12 for group in rows.groups)


class _Largest(TorchDispatchMode):
    """Sees the size of every tensor that any operation makes."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return out


def test_a_pass_over_many_samples_never_makes_a_tensor_of_the_packed_batch_squared() -> None:
    dit, vae = tiny_dit(), tiny_vae()
    lengths = [8, 4] * 60
    total = sum(lengths)
    with torch.no_grad(), _Largest() as largest:
        dit(torch.randn(total, 8), torch.tensor(300.0), dit.layout(lengths))
        vae.encode(torch.randint(0, 50, (total,)), lengths)
        dit(torch.randn(60 * 12, 8), torch.tensor(300.0), dit.two_copy_layout(60, 8))
    assert total < largest.elements < total**2 // 4


def test_a_mask_first_made_in_inference_mode_can_be_trained_through() -> None:
    with torch.inference_mode():
        Layout([21], 7)
        Layout.two_copy(1, 21, 7)
    for layout in (Layout([21], 7), Layout.two_copy(1, 21, 7)):
        q = torch.randn(len(layout), 2, 4, requires_grad=True)
        attend(q, q, q, layout).square().sum().backward()
        assert q.grad is not None
        assert bool((q.grad != 0).any())


@pytest.mark.parametrize("count", range(9))
def test_padding_fills_up_to_the_next_multiple_and_no_further(count: int) -> None:
    ids = list(range(1, count + 1))
    padded = pad_to_multiple(ids, 4, 99)
    assert padded[:count] == ids
    assert set(padded[count:]) <= {99}
    assert len(padded) % 4 == 0
    assert len(padded) - count < 4
