"""Packing: who sees whom, and how ragged samples are grouped."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention
from torch.utils._python_dispatch import TorchDispatchMode

from colada.errors import ColadaError
from colada.networks import layers, packing
from colada.networks.layers import attend
from colada.networks.packing import (
    CellKind,
    Cells,
    Group,
    Layout,
    block_causal,
    pad_to_multiple,
    sees,
    two_copy,
    two_copy_cells,
)
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


def written_out(length: int, block: int, copies: int) -> list[tuple[int, int]]:
    """Every cell of a training row as (its copy, its position); copy 0 is clean."""
    clean = [(0, p) for p in range(length - block if copies else length)]
    return clean + [(copy, p) for copy in range(1, copies + 1) for p in range(length)]


def may_see(query: tuple[int, int], key: tuple[int, int], block: int) -> bool:
    (query_copy, i), (key_copy, j) = query, key
    i, j = i // block, j // block
    return {  # (query is noisy, key is noisy)
        (False, False): j <= i,
        (False, True): False,
        (True, False): j < i,
        (True, True): j == i and query_copy == key_copy,
    }[query_copy > 0, key_copy > 0]


@pytest.mark.parametrize("copies", [0, 1, 3])
@pytest.mark.parametrize(("blocks", "block"), [(1, 1), (1, 4), (2, 1), (2, 3), (3, 4), (5, 2)])
def test_two_copy_is_the_definition(blocks: int, block: int, copies: int) -> None:
    cells = written_out(blocks * block, block, copies)
    mask = two_copy(blocks * block, block, copies)
    assert mask.tolist() == [[may_see(query, key, block) for key in cells] for query in cells]


Cell = tuple[str, int, int]  # kind, block, copy


def task_cells(task: str, blocks: int, block: int, picture: int, copies: int) -> list[Cell]:
    """The cells of a text, of a picture drawn after its caption, and of an answer about a picture."""
    clean = [("CLEAN", p // block, 0) for p in range(blocks * block)]
    noisy = [("NOISY", p // block, copy + 1) for copy in range(copies) for p in range(blocks * block)]
    if task == "text":
        return clean + noisy
    if task == "text to picture":
        drawn = [("DRAWN", blocks, copy + 1) for copy in range(copies) for _ in range(picture)]
        return clean + drawn + noisy
    return [("PROMPT", 0, 0)] * 3 + [("SHOWN", 1, 0)] * picture + clean + noisy


def may_see_in(task: str, query: Cell, key: Cell) -> bool:
    """The sources' table, a row after the other."""
    (asking, own, own_copy), (asked, other, other_copy) = query, key
    drawing = task == "text to picture"
    if asking in ("PROMPT", "SHOWN"):
        return asked in ("PROMPT", "SHOWN")
    if asking == "DRAWN":
        return asked == "CLEAN" or (asked == "DRAWN" and own_copy == other_copy)
    if asked in ("PROMPT", "SHOWN"):
        return not drawing
    if asked == "DRAWN":
        return False
    if asking == "CLEAN":
        return asked == "CLEAN" and other <= own
    if asked == "CLEAN":
        return other < own
    return other == own and own_copy == other_copy


@pytest.mark.parametrize("task", ["text", "text to picture", "picture to text"])
@pytest.mark.parametrize("block", [1, 4, 16])
@pytest.mark.parametrize("copies", [1, 2])
def test_who_sees_whom_is_the_sources_table(task: str, block: int, copies: int) -> None:
    row = task_cells(task, 3, block, 5, copies)
    table = torch.tensor([(number, b, getattr(CellKind, kind), c) for number, (kind, b, c) in enumerate(row)])
    cells = Cells(*table.unbind(1))
    mask = sees(cells.at((slice(None), None)), cells)
    assert mask.tolist() == [[may_see_in(task, query, key) for key in row] for query in row]


def test_a_row_that_is_no_multiple_of_the_block_is_refused() -> None:
    with pytest.raises(ColadaError, match=r"rows of 10 positions.*block_size=4"):
        two_copy(10, 4)


def written_in_full(group: Group, cached: int = 0) -> torch.Tensor:
    """What each sample's queries see by a group's tiles: bool (samples, asking, cached + length)."""
    full = torch.zeros(len(group.samples), group.asking, cached + group.length, dtype=torch.bool)
    asked = torch.zeros(group.asking, dtype=torch.int)
    for tile in group.tiles:
        queries, keys = (
            torch.cat([torch.arange(*r) for r in ranges]) for ranges in (tile.queries, tile.keys)
        )
        seen = torch.ones(len(group.samples), len(queries), len(keys), dtype=torch.bool)
        if tile.mask is not None:
            assert isinstance(tile.mask, torch.Tensor)
            last = tile.mask.shape[-1]
            seen[:, :, len(keys) - last :] = tile.mask.reshape(-1, len(queries), last)
        full[:, queries[:, None], keys] = seen
        asked[queries] += 1
    assert bool((asked == 1).all())
    return full


SAMPLES = torch.tensor([[0, 0, 0, 0, 1, 1, -1, -1], [5, 5, 2, 2, 2, 2, 2, 2]])


@pytest.mark.parametrize("copies", [0, 1, 3])
def test_samples_of_a_row_do_not_see_each_other(copies: int) -> None:
    layout = Layout.rows(2, 8, 2, copies, SAMPLES)
    cells = written_out(8, 2, copies)
    assert layout.positions.tolist() == [p for _, p in cells] * 2
    (group,) = layout.groups
    assert group.samples == (0, 1)
    for row, visible in enumerate(written_in_full(group).tolist()):
        own = SAMPLES[row].tolist()
        assert visible == [
            [may_see(query, key, 2) and own[query[1]] == own[key[1]] for key in cells] for query in cells
        ]


@pytest.mark.parametrize("copies", [0, 1, 2])
@pytest.mark.parametrize(("length", "block"), [(4, 4), (64, 4), (100, 5), (96, 48), (600, 4)])
def test_tiles_of_training_rows_hold_what_the_definition_says_and_no_large_mask(
    length: int, block: int, copies: int
) -> None:
    layout = Layout.rows(1, length, block, copies)
    row = two_copy_cells(length, block, copies)
    expected = sees(row.at((slice(None), None)), row)
    assert torch.equal(written_in_full(layout.groups[0])[0], expected)
    clean = int((row.copy == 0).sum()) if copies else 0
    assert torch.equal(written_in_full(layout.noisy_groups[0])[0], expected[clean:])
    cells = layout.noisy
    assert (cells is None) == (clean == 0)
    assert cells is None or torch.equal(cells, torch.arange(clean, len(row.copy)))
    widest = max(block, 76) * (copies + 1)
    assert all(tile.mask is None or tile.mask.numel() <= widest**2 for tile in layout.groups[0].tiles)


@pytest.mark.parametrize(("length", "cached"), [(1000, 0), (1000, 6), (515, 1021), (256, 4)])
@pytest.mark.parametrize("block", [1, 4, 7, 300])
def test_tiles_of_long_samples_hold_the_definition_in_masks_of_a_bounded_size(
    length: int, cached: int, block: int
) -> None:
    (group,) = Layout([length], block, [cached]).groups
    assert torch.equal(written_in_full(group, cached)[0], block_causal(length, cached + length, block))
    assert all(
        tile.mask is None or tile.mask.numel() <= max(packing.TILE, 2 * block) ** 2 for tile in group.tiles
    )


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("copies", [0, 1, 3])
@pytest.mark.parametrize("dropped", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_the_block_mask_of_a_gpu_is_the_dense_mask(
    monkeypatch: pytest.MonkeyPatch, packed: bool, copies: int, dropped: bool
) -> None:
    # Several tiles of 128 cells, the last of them not full.
    length, block = 192, 16
    # The samples of the second row end with a tile.
    first, second = torch.arange(4).repeat_interleave(48), torch.arange(3).repeat_interleave(64)
    sample = torch.stack([first, second]) if packed else None
    generator = torch.Generator().manual_seed(1)
    alone = torch.rand(2, copies, length // block, generator=generator) < 0.3 if dropped and copies else None
    dense = Layout.rows(2, length, block, copies, sample, alone=alone)
    (group,) = dense.groups

    def on_cpu(*args: Any, device: str) -> BlockMask:
        return create_block_mask(*args, device="cpu")

    monkeypatch.setattr(packing, "create_block_mask", on_cpu)
    monkeypatch.setattr(layers, "_compiled_flex", lambda: flex_attention)
    flex = Layout._of_rows(2, length, block, copies, sample, torch.device("cpu"), True, alone)
    (tile,) = flex.groups[0].tiles
    mask = tile.mask
    assert isinstance(mask, BlockMask)
    assert flex.groups[0] == replace(group, tiles=(tile,))
    # A tile is computed if anything in it is visible.
    cells = group.length
    tiles = torch.nn.functional.pad(written_in_full(group)[:, None], [0, -cells % 128] * 2)
    tiles = tiles.unflatten(3, (-1, 128)).unflatten(2, (-1, 128)).any(5).any(3)
    assert torch.equal(mask.to_dense().expand(2, -1, -1, -1).bool(), tiles)
    assert not bool(tiles.all())
    q, k, v = torch.randn(3, len(dense), 2, 16, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(attend(q, k, v, flex), attend(q, k, v, dense), rtol=1e-5, atol=1e-5)
    noisy = dense.noisy
    if noisy is not None:  # The last layer's: the noisy cells ask alone.
        out = attend(q[noisy], k, v, flex)
        torch.testing.assert_close(out, attend(q, k, v, dense)[noisy], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(out, attend(q[noisy], k, v, dense), rtol=1e-5, atol=1e-5)
    with pytest.raises(ColadaError, match="heads of 8 channels, expected at least 16 on a GPU"):
        attend(q[..., :8], k[..., :8], v[..., :8], flex)


@pytest.mark.parametrize(
    ("lengths", "cached"),
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
    lengths: list[int], cached: list[int] | None
) -> None:
    layout = Layout(lengths, 4, cached)
    cached = cached or [0] * len(lengths)
    assert len(layout) == sum(lengths)
    found = sorted(sample for group in layout.groups for sample in group.samples)
    assert found == [sample for sample, length in enumerate(lengths) if length > 0]
    packed = [(sample, i) for sample, length in enumerate(lengths) for i in range(length)]
    for group in layout.groups:
        cells = [(sample, i) for sample in group.samples for i in range(group.length)]
        index = range(len(packed)) if group.index is None else group.index.tolist()
        assert [packed[at] for at in index] == cells
        for sample in group.samples:
            assert (lengths[sample], cached[sample]) == (group.length, cached[group.samples[0]])
    shapes = {(lengths[g.samples[0]], cached[g.samples[0]]) for g in layout.groups}
    assert len(shapes) == len(layout.groups)


def test_positions_count_on_from_each_samples_cached_positions() -> None:
    layout = Layout([3, 0, 2], 4, [0, 9, 5])
    assert layout.positions.tolist() == [0, 1, 2, 5, 6]


def test_groups_see_the_definition_and_have_no_mask_when_all_is_visible() -> None:
    block = 4
    layout = Layout([4, 8, 3, 4], block, [0, 4, 6, 8])
    lengths, cached = [4, 8, 3, 4], [0, 4, 6, 8]
    masks = []
    for group in layout.groups:
        n, h = lengths[group.samples[0]], cached[group.samples[0]]
        sees = [[j // block <= (h + i) // block for j in range(n + h)] for i in range(n)]
        assert written_in_full(group, h)[0].tolist() == sees
        (tile,) = group.tiles
        assert (tile.mask is None) == all(map(all, sees))
        masks.append(tile.mask)
    assert any(mask is None for mask in masks)
    assert any(mask is not None for mask in masks)


def test_two_copy_layout_repeats_the_positions_of_both_copies() -> None:
    layout = Layout.rows(2, 6, 2, copies=1)
    assert layout.positions.tolist() == [0, 1, 2, 3, 0, 1, 2, 3, 4, 5] * 2
    assert layout.lengths == (10, 10)
    (group,) = layout.groups
    assert group.samples == (0, 1)


def test_masks_of_many_samples_are_those_of_one() -> None:
    layout = Layout([4, 8, 12] * 30, 4)
    for group in layout.groups:
        for tile in group.tiles:
            assert tile.mask is None or tile.mask.shape == (group.length, group.length)
    for group in Layout.rows(50, 8, 4, copies=1).groups:
        assert all(tile.mask is not None and tile.mask.numel() <= 12 * 12 for tile in group.tiles)


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
        Layout.rows(1, 21, 7, copies=1)
    for layout in (Layout([21], 7), Layout.rows(1, 21, 7, copies=1)):
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
