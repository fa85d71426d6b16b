"""Training rows: every one a pure function of (seed, number), against plain counting."""

from collections.abc import Sequence

import numpy as np
import pytest
import torch

from colada.data.order import MIX_PERIOD, Permutation, apportion
from colada.data.rows import FILLING, Batch, MixedRows, Rows, SampleRows, SingleRows, StreamRows, batch, pack
from colada.data.stream import TokenStream
from colada.errors import ColadaError

PAD = 0


def counting(size: int, starts: Sequence[int] = (0,)) -> TokenStream:
    """A stream whose ids are their own places, from 1, in two parts."""
    ids = np.arange(1, size + 1, dtype=np.uint32)
    return TokenStream([ids[: size // 3], ids[size // 3 :]], np.array(starts, dtype=np.int64))


def samples(sizes: Sequence[int], prompts: Sequence[int] | None = None, first: int = 1) -> TokenStream:
    """A stream of samples of these sizes, every id different, from ``first``."""
    starts = np.cumsum([0, *sizes[:-1]])
    own = None if prompts is None else np.array(prompts)
    return TokenStream(
        [np.arange(first, sum(sizes) + first, dtype=np.uint32)], starts, own, "record {}".format
    )


def ids(rows: Rows, numbers: Sequence[int]) -> list[list[int]]:
    return [rows.row(number).ids[0].tolist() for number in numbers]


# --- a random order in no memory -----------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 16, 17, 63, 64, 65, 1000])
def test_a_permutation_holds_every_number_once(size: int) -> None:
    order = Permutation(size, 3, 7)
    assert sorted(order[n] for n in range(size)) == list(range(size))
    with pytest.raises(IndexError):
        order[size]


@pytest.mark.parametrize("size", [2, 3, 4, 16, 17, 100])
def test_the_first_of_a_permutation_is_anywhere(size: int) -> None:
    for firsts in (
        [Permutation(size, seed, 1)[0] for seed in range(100 * size)],
        [Permutation(size, 3, epoch)[0] for epoch in range(100 * size)],
    ):
        counts = np.bincount(firsts, minlength=size)
        # Chi-square has the mean ``size - 1`` and twice that as its variance.
        assert ((counts - 100.0) ** 2 / 100).sum() < size - 1 + 5 * np.sqrt(2 * (size - 1))


def test_permutations_of_different_keys_look_random() -> None:
    places = np.array(
        [[Permutation(10, seed, epoch)[n] for n in range(10)] for seed in range(40) for epoch in range(25)]
    )
    # Each number is at each place about 100 times of 1000; chi-square over 100 cells, 81 degrees of freedom.
    counts = np.stack([np.bincount(column, minlength=10) for column in places.T])
    assert ((counts - 100.0) ** 2 / 100).sum() < 140
    assert len({tuple(row) for row in places.tolist()}) > 990
    assert [Permutation(10, 1, 2)[n] for n in range(10)] == [Permutation(10, 1, 2)[n] for n in range(10)]


# --- rows of a stream ----------------------------------------------------------------------------


@pytest.mark.parametrize("size", [33, 40, 63, 64, 65, 96, 1000, 1024, 1025])
def test_an_epoch_covers_the_stream_in_windows_that_do_not_overlap(size: int) -> None:
    rows = StreamRows(counting(size), 32, seed=5, align=0.0)
    for epoch in range(3):
        taken = ids(rows, range(epoch * rows.per_epoch, (epoch + 1) * rows.per_epoch))
        assert all(row == list(range(row[0], row[0] + 32)) for row in taken)
        flat = sorted(token for row in taken for token in row)
        assert len(set(flat)) == len(flat) == rows.per_epoch * 32
        assert size - len(flat) < 64


@pytest.mark.parametrize(("size", "offsets"), [(9, 2), (12, 5), (15, 8), (16, 8), (17, 8), (24, 8), (100, 8)])
def test_an_epoch_begins_anywhere_in_the_first_row(size: int, offsets: int) -> None:
    def begins(seed: int) -> list[int]:
        rows = StreamRows(counting(size), 8, seed=seed, align=0.0)
        epochs = (range(n * rows.per_epoch, (n + 1) * rows.per_epoch) for n in range(200))
        return [min(row[0] - 1 for row in ids(rows, epoch)) for epoch in epochs]

    assert set(begins(5)) == set(range(offsets))  # all that leave room for a row
    assert begins(5) != begins(6)


def test_epochs_and_seeds_are_in_different_orders() -> None:
    rows = StreamRows(counting(2000), 32, seed=5, align=0.0)
    epochs = [ids(rows, range(n * rows.per_epoch, (n + 1) * rows.per_epoch)) for n in range(3)]
    other = ids(StreamRows(counting(2000), 32, seed=6, align=0.0), range(rows.per_epoch))
    firsts = [[row[0] // 32 for row in epoch] for epoch in [*epochs, other]]
    assert len({tuple(first) for first in firsts}) == 4
    assert len({epoch[0][0] % 32 for epoch in epochs}) > 1  # another offset


@pytest.mark.parametrize("packing", ["stream", "samples", "mixed"])
def test_a_row_does_not_depend_on_what_was_asked_before(packing: str) -> None:
    def make() -> Rows:
        stream = StreamRows(counting(700, range(0, 700, 23)), 16, seed=1)
        held = SampleRows(samples([5, 9, 30, 16, 3] * 9), 16, 4, seed=1, pad_id=PAD)
        other = SampleRows(samples([7, 12] * 9), 16, 4, seed=2, pad_id=PAD)
        return {"stream": stream, "samples": held, "mixed": MixedRows([(held, 2.0), (other, 1.0)], 3)}[
            packing
        ]

    forwards = ids(make(), range(150))
    rows = make()
    assert ids(rows, range(149, -1, -1)) == forwards[::-1]
    assert ids(make(), [77]) == [forwards[77]]
    together = batch(rows, range(10, 34))
    apart = [batch(make(), range(n, n + 8)) for n in (10, 18, 26)]
    assert torch.equal(together.ids, torch.cat([part.ids for part in apart]))
    assert together.ids.tolist() == forwards[10:34]


def test_aligned_rows_begin_where_a_sample_does() -> None:
    # Often a row begins with a sample already; the last two samples have no room for a row after them.
    starts = [0, *range(4, 400, 5), 468, 469, 480]
    rows = StreamRows(counting(500, starts), 32, seed=2, align=1.0)
    plain = StreamRows(counting(500, starts), 32, seed=2, align=0.0)
    begins = [(ids(plain, [n])[0][0] - 1, ids(rows, [n])[0][0] - 1) for n in range(6 * rows.per_epoch)]
    for begin, moved in begins:
        assert moved == min([start for start in starts if begin <= start <= 468], default=468)
    assert any(begin == moved for begin, moved in begins)
    assert any(begin > 400 for begin, _ in begins)


def test_the_share_of_aligned_rows_is_about_right() -> None:
    starts = list(range(0, 4000, 37))
    rows = StreamRows(counting(4000, starts), 16, seed=2, align=0.3)
    plain = StreamRows(counting(4000, starts), 16, seed=2, align=0.0)
    number = 2 * rows.per_epoch
    moved = sum(ids(rows, [n]) != ids(plain, [n]) for n in range(number))
    assert moved / number == pytest.approx(0.3 * 36 / 37, abs=0.06)


def test_rows_are_copies() -> None:
    rows = StreamRows(counting(100), 8, seed=0)
    before = ids(rows, [3])
    rows.row(3).ids.zero_()
    assert ids(rows, [3]) == before


def test_too_short_a_stream_names_both_numbers() -> None:
    with pytest.raises(ColadaError, match=r"^books: train has 32 ids, expected at least 33 for rows of 32$"):
        StreamRows(counting(32), 32, seed=0, name="books: train")
    assert StreamRows(counting(33), 32, seed=0).row(5).ids.shape == (1, 32)


def test_a_row_says_where_it_is_from() -> None:
    stream = samples([10] * 20)
    rows = StreamRows(stream, 8, seed=0, align=0.0, name="books")
    begin = int(rows.row(4).ids[0, 0]) - 1
    assert rows.describe(4) == f"books, tokens {begin} to {begin + 7}, from record {begin // 10}"


# --- rows of whole samples -----------------------------------------------------------------------

SIZES = [3, 16, 7, 1, 40, 9, 12, 33, 5, 5, 8, 15, 2, 31]


def test_an_epoch_holds_every_token_of_every_sample_once() -> None:
    rows = SampleRows(samples(SIZES), 16, 4, seed=3, pad_id=PAD)
    for epoch in range(2):
        taken = batch(rows, range(epoch * rows.per_epoch, (epoch + 1) * rows.per_epoch))
        assert sorted(taken.ids[taken.ids != PAD].tolist()) == list(range(1, sum(SIZES) + 1))


def test_epochs_have_the_same_rows_in_different_orders() -> None:
    rows = SampleRows(samples([5, 9, 30, 16, 3] * 9), 16, 4, seed=3, pad_id=PAD)
    first, second = (ids(rows, range(n * rows.per_epoch, (n + 1) * rows.per_epoch)) for n in range(2))
    assert first != second
    assert sorted(first) == sorted(second)


def test_seeds_put_different_samples_together() -> None:
    def contents(seed: int) -> list[list[int]]:
        rows = SampleRows(samples([5, 9, 30, 16, 3] * 9), 16, 4, seed=seed, pad_id=PAD)
        return sorted(sorted(row) for row in ids(rows, range(rows.per_epoch)))

    assert contents(3) == contents(3) != contents(4)


def test_samples_are_padded_to_whole_blocks_and_never_mixed() -> None:
    stream = samples(SIZES)
    rows = SampleRows(stream, 16, 4, seed=3, pad_id=PAD)
    owner = np.repeat(np.arange(len(SIZES)), SIZES)
    seen = 0
    for n in range(rows.per_epoch):
        row = rows.row(n)
        assert row.sample is not None
        assert row.trained is not None
        tokens, sample, trained = row.ids[0], row.sample[0], row.trained[0]
        numbers = sample[sample != FILLING].unique().tolist()
        assert numbers == list(range(len(numbers)))
        for number in numbers:
            (at,) = torch.nonzero(sample == number, as_tuple=True)
            own = tokens[at]
            real = own[own != PAD]
            assert len(at) == -(-len(real) // 4) * 4
            assert at[0] % 4 == 0
            assert at.tolist() == list(range(int(at[0]), int(at[-1]) + 1))
            assert own[len(real) :].tolist() == [PAD] * (len(at) - len(real))
            assert len(set(owner[real.numpy() - 1])) == 1
            assert bool(trained[at].all())  # padding of the last block too
            seen += 1
        filling = sample == FILLING
        assert bool((tokens[filling] == PAD).all())
        assert not bool(trained[filling].any())
    # A sample longer than a row is cut into rows.
    assert seen == sum(-(-size // 16) for size in SIZES)


def test_prompts_are_not_trained_and_long_ones_leave_their_sample_out() -> None:
    sizes, prompts = [10, 8, 40, 30, 6, 20], [4, 0, 20, 7, 5, 16]
    rows = SampleRows(samples(sizes, prompts), 16, 4, seed=0, pad_id=PAD)
    everything = batch(rows, range(rows.per_epoch))
    assert everything.trained is not None
    assert everything.sample is not None
    begins = np.cumsum([0, *sizes[:-1]]) + 1
    kept = {0: 10, 1: 8, 3: 16, 4: 6}  # Two prompts fill a row; of the fourth, a row is kept.
    expected = sorted(token for n, size in kept.items() for token in range(begins[n], begins[n] + size))
    assert sorted(everything.ids[everything.ids != PAD].tolist()) == expected
    untrained = everything.ids[~everything.trained & (everything.sample != FILLING)]
    prompt = sorted(token for n in kept for token in range(begins[n], begins[n] + prompts[n]))
    assert sorted(untrained.tolist()) == prompt


def test_samples_that_leave_nothing_to_train_are_refused() -> None:
    with pytest.raises(
        ColadaError, match=r"^chats has nothing to train on in rows of 8: the prompts of its 2"
    ):
        SampleRows(samples([20, 30], [9, 25]), 8, 4, seed=0, pad_id=PAD, name="chats")
    with pytest.raises(ColadaError, match=r"in rows of 8: no samples$"):
        SampleRows(TokenStream([], np.empty(0, np.int64)), 8, 4, seed=0, pad_id=PAD)


def test_rows_of_samples_are_whole_blocks() -> None:
    with pytest.raises(ColadaError, match=r"^chats: rows of 18 ids, expected whole blocks of 4$"):
        SampleRows(samples([16, 16]), 18, 4, seed=0, pad_id=PAD, name="chats")


def test_a_row_of_samples_says_where_they_are_from() -> None:
    rows = SampleRows(samples(SIZES), 16, 4, seed=0, pad_id=PAD, name="chats")
    ends = np.cumsum(SIZES)
    for n in range(rows.per_epoch):
        row = rows.row(n)
        assert row.sample is not None
        first = int(np.searchsorted(ends, int(row.ids[0, 0])))
        assert rows.describe(n) == f"chats, {int(row.sample.max()) + 1} samples from record {first}"


def best_fit_decreasing(sizes: Sequence[int], capacity: int) -> list[list[int]]:
    """The plain algorithm: items by size, each into the fullest bin that has room."""
    bins: list[list[int]] = []
    for size in sorted(sizes, reverse=True):
        fitting = [own for own in bins if sum(own) + size <= capacity]
        if fitting:
            max(fitting, key=sum).append(size)
        else:
            bins.append([size])
    return bins


def test_packing_is_best_fit_decreasing() -> None:
    rng = np.random.default_rng(0)
    for _ in range(40):
        capacity = int(rng.integers(1, 20))
        sizes = rng.integers(1, capacity + 1, int(rng.integers(1, 120)))
        bins = pack(sizes, capacity)
        # Which of two equally full bins gets an item is left open.
        fullness = sorted(np.bincount(bins, sizes).astype(int).tolist())
        assert fullness == sorted(map(sum, best_fit_decreasing(sizes.tolist(), capacity)))
        assert max(fullness) <= capacity


def test_equal_sizes_are_packed_in_the_order_given() -> None:
    assert pack(np.array([2, 3, 2, 3, 2, 2]), 4).tolist() == [2, 0, 2, 1, 3, 3]


# --- mixtures ------------------------------------------------------------------------------------


def test_a_mixture_has_its_shares_and_takes_each_source_in_turn() -> None:
    sources = [
        SampleRows(samples([16] * 50, first=1 + 1000 * n), 16, 4, seed=n, pad_id=PAD) for n in range(3)
    ]
    rows = MixedRows(list(zip(sources, (1.0, 2.0, 5.0), strict=True)), 9)
    orders = []
    taken = [0, 0, 0]
    for period in range(3):
        order = []
        for number in range(period * MIX_PERIOD, (period + 1) * MIX_PERIOD):
            row = rows.row(number).ids
            part = int(row[0, 0]) // 1000  # whose ids these are
            assert torch.equal(row, sources[part].row(taken[part]).ids)
            order.append(part)
            taken[part] += 1
        assert np.bincount(order).tolist() == [512, 1024, 2560]  # eighths of 4096
        assert len(set(order[:30])) == 3  # in random order, not in stretches
        orders.append(tuple(order))
    assert len(set(orders)) == 3
    assert rows.per_epoch == 150
    other = MixedRows(list(zip(sources, (1.0, 2.0, 5.0), strict=True)), 10)
    assert [int(other.row(n).ids[0, 0]) // 1000 for n in range(30)] != list(orders[0][:30])


def test_a_row_of_a_mixture_says_where_it_is_from() -> None:
    sources = [
        StreamRows(samples([64], first=1 + 1000 * n), 16, seed=n, name=f"source {n}") for n in range(2)
    ]
    rows = MixedRows([(own, 1.0) for own in sources], 0)
    for n in range(20):
        begin = int(rows.row(n).ids[0, 0]) - 1
        where = f"source {begin // 1000}, tokens {begin % 1000} to {begin % 1000 + 15}, from record 0"
        assert rows.describe(n) == where


def test_a_source_of_hardly_any_weight_has_a_row_a_period() -> None:
    sources = [StreamRows(samples([64], first=1 + 1000 * n), 16, seed=n) for n in range(2)]
    rows = MixedRows([(sources[0], 1e-9), (sources[1], 1.0)], 0)
    parts = [int(rows.row(number).ids[0, 0]) // 1000 for number in range(2 * MIX_PERIOD)]
    assert [parts[:MIX_PERIOD].count(0), parts[MIX_PERIOD:].count(0)] == [1, 1]


def test_shares_are_whole_numbers_and_nobody_gets_none() -> None:
    assert apportion([1, 3], 4096) == [1024, 3072]
    assert apportion([0.5, 0.2, 0.3], 100) == [50, 20, 30]
    assert apportion([1e-9, 1, 1e-9], 100) == [1, 98, 1]
    assert apportion([5.4, 1.6], 7) == [5, 2]  # to the nearest
    rng = np.random.default_rng(0)
    for _ in range(50):
        weights = rng.uniform(0.5, 5, int(rng.integers(1, 9)))
        whole = apportion(weights.tolist(), 100)
        assert sum(whole) == 100
        assert whole == pytest.approx(100 * weights / weights.sum(), abs=1)


# --- batches -------------------------------------------------------------------------------------


def test_a_batch_of_documents_and_conversations() -> None:
    documents = SampleRows(samples([5, 9, 12]), 16, 4, seed=0, pad_id=PAD)
    chats = SampleRows(samples([10, 11], [3, 5], first=101), 16, 4, seed=0, pad_id=PAD)
    rows = MixedRows([(documents, 1.0), (chats, 1.0)], 0)
    some = batch(rows, range(12))
    assert some.sample is not None
    assert some.trained is not None
    assert len(some) == 12
    untrained = set[int]()
    for n in range(12):
        alone = rows.row(n)
        assert alone.sample is not None
        assert alone.trained is not None
        assert torch.equal(some.ids[n], alone.ids[0])
        assert torch.equal(some.sample[n], alone.sample[0])
        assert torch.equal(some.trained[n], alone.trained[0])
        untrained |= set(alone.ids[~alone.trained].tolist())
    # Of the documents everything is trained, of the conversations all but the prompts.
    assert untrained - {PAD} == {101, 102, 103, 111, 112, 113, 114, 115}


def test_parts_and_copies_of_a_batch_keep_all_it_has() -> None:
    rows = SampleRows(samples([5, 9, 12, 7], [2, 0, 4, 3]), 16, 4, seed=0, pad_id=PAD)
    whole = batch(rows, range(6))
    # The meta device has no values, but shows that each tensor was moved.
    part, moved = whole.rows(2, 5), whole.to(torch.device("meta"))
    for name in ("ids", "sample", "trained"):
        values = getattr(whole, name)
        assert torch.equal(getattr(part, name), values[2:5])
        assert getattr(moved, name).device.type == "meta"
        assert getattr(moved, name).shape == values.shape
        assert getattr(moved, name).dtype == values.dtype
    plain = Batch(whole.ids)
    for some in (plain.rows(0, 2), plain.to(torch.device("cpu"))):
        assert some.sample is None
        assert some.trained is None


@pytest.mark.parametrize("first", [0, 1])
def test_rows_of_one_sample_and_of_several_are_not_batched(first: int) -> None:
    kinds: list[Rows] = [
        StreamRows(samples([64]), 16, seed=0),
        SampleRows(samples([16]), 16, 4, seed=0, pad_id=PAD),
    ]
    rows = MixedRows([(kinds[first], 1.0), (kinds[1 - first], 1.0)], 0)
    with pytest.raises(TypeError):
        batch(rows, range(30))


def test_single_samples_have_rows_of_their_own_and_groups_stay_together() -> None:
    sizes, prompts = [5, 7, 9, 3, 6, 4], [2, 2, 6, 1, 1, 1]
    starts = np.cumsum([0, *sizes[:-1]])
    ids = np.arange(100, 100 + sum(sizes), dtype=np.uint16)
    stream = TokenStream([ids], starts.astype(np.int64), np.array(prompts))
    rows = SingleRows(stream, 8, 4, seed=3, pad_id=0, group=2, room=3)
    assert (rows.length, rows.per_epoch) == (8, 2)  # The second group has a prompt that leaves two.
    seen = []
    for number in range(2):
        pair = rows.row(number)
        assert pair.sample is not None
        assert pair.trained is not None
        first = int(pair.ids[0, 0]) - 100
        at = starts.tolist().index(first)
        seen.append(at)
        for row, sample in enumerate((at, at + 1)):
            size, end = sizes[sample], -(-sizes[sample] // 4) * 4
            assert pair.ids[row, :size].tolist() == list(
                range(100 + starts[sample], 100 + starts[sample] + size)
            )
            assert not pair.ids[row, size:].any()
            assert pair.sample[row].tolist() == [0] * end + [-1] * (8 - end)
            assert pair.trained[row].nonzero().flatten().tolist() == list(range(prompts[sample], end))
    assert sorted(seen) == [0, 4]
    assert torch.equal(rows.row(7).ids, rows.row(7).ids)
    with pytest.raises(ColadaError, match="none of 6 prompts leaves room"):
        SingleRows(stream, 8, 4, seed=3, pad_id=0, group=2, room=8)
