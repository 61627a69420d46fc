from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from neo.data.packing import Batch, RowReport, collate, empty_batch, pack
from neo.data.prompt import IGNORE, Example

PAD = 7777


def example(length: int, name: int = 0) -> Example:
    """Ids that tell example and place; the second half is supervised."""
    ids = [name * 1000 + i for i in range(length)]
    targets = [ids[i + 1] if i >= length // 2 and i + 1 < length else IGNORE for i in range(length)]
    return Example(ids, targets, row_id=name)


LENGTHS = st.lists(st.integers(1, 50), max_size=80)


@given(LENGTHS, st.integers(1, 5))
def test_each_example_is_in_one_sequence_whole_and_no_sequence_is_too_long(lengths, num_open):
    examples = [example(length, name) for name, length in enumerate(lengths)]
    sequences = list(pack(iter(examples), 50, num_open))
    packed = [e for sequence in sequences for e in sequence]
    assert sorted(e.input_ids for e in packed) == sorted(e.input_ids for e in examples)
    assert all(sum(len(e.input_ids) for e in sequence) <= 50 for sequence in sequences)


@given(LENGTHS)
def test_no_two_open_sequences_would_fit_in_one(lengths):
    sequences = list(pack(map(example, lengths), 50, num_open=100))
    sizes = sorted(sum(len(e.input_ids) for e in sequence) for sequence in sequences)
    assert len(sizes) < 2 or sizes[0] + sizes[1] > 50


def test_an_example_goes_to_the_fullest_sequence_that_has_room():
    sequences = pack(map(example, [6, 7, 3, 4]), 10)
    assert [[len(e.input_ids) for e in s] for s in sequences] == [[7, 3], [6, 4]]


def test_a_bounded_number_of_sequences_is_open():
    read = []

    def reading():
        for name in range(20):
            read.append(name)
            yield example(9, name)

    next(pack(reading(), 10, num_open=4))
    assert len(read) == 5


def test_an_example_that_is_too_long_is_refused():
    with pytest.raises(ValueError, match="11 tokens exceeds max_length=10"):
        list(pack([example(11)], 10))


def test_positions_restart_at_every_packed_example_and_at_the_padding():
    batch = collate([[example(3), example(2)], [example(4)]], PAD, True, RowReport())
    assert batch.position_ids.tolist() == [[0, 1, 2, 0, 1], [0, 1, 2, 3, 0]]


def test_a_batch_names_the_rows_that_lie_in_it():
    sequences = [[example(3, 7), example(2, 4)], [Example([1], [IGNORE])], [example(4, 9)]]
    batch = collate(sequences, PAD, True, RowReport())
    assert (batch.row_ids, batch.num_rows) == ((7, 4, 9), 4)
    assert batch.to("meta").row_ids == (7, 4, 9)
    assert empty_batch(PAD, RowReport()).row_ids == ()


def test_positions_run_on_without_packing():
    batch = collate([[example(3)], [example(5)]], PAD, False, RowReport())
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 4]] * 2


@pytest.mark.parametrize("packing", [True, False])
def test_padding_stands_at_the_right_and_is_never_supervised(packing):
    batch = collate([[example(2)], [example(5)]], PAD, packing, RowReport())
    assert batch.input_ids[0].tolist() == [0, 1, PAD, PAD, PAD]
    assert batch.targets[0].tolist() == [IGNORE] * 5
    assert batch.input_ids[1].tolist() == example(5).input_ids
    assert batch.num_supervised == 2


@given(st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=4), min_size=1, max_size=4))
def test_every_supervised_token_is_in_the_batch_once_and_stays_with_its_input(lengths):
    names = iter(range(100))
    sequences = [[example(length, next(names)) for length in row] for row in lengths]
    batch = collate(sequences, PAD, True, RowReport())
    pairs = zip(batch.input_ids.flatten().tolist(), batch.targets.flatten().tolist(), strict=True)
    wanted = [
        pair
        for sequence in sequences
        for e in sequence
        for pair in zip(e.input_ids, e.targets, strict=True)
        if pair[1] != IGNORE
    ]
    assert Counter(p for p in pairs if p[1] != IGNORE) == Counter(wanted)


def test_an_empty_batch_carries_a_report_and_nothing_else():
    report = RowReport(rows=3, bad=Counter(empty=3))
    batch = empty_batch(PAD, report)
    assert batch.input_ids.tolist() == [[PAD]]
    assert batch.num_supervised == 0
    assert batch.report == report


def test_reports_add_up_and_show_the_first_three_of_a_reason():
    one = RowReport(2, 1, Counter(empty=1), {"empty": ((0, "a"), (1, "b"))})
    two = RowReport(
        5, 0, Counter(empty=2, template=1), {"empty": ((2, "c"), (3, "d")), "template": ((4, "e"),)}
    )
    total = one + two
    assert (total.rows, total.truncated, total.num_bad) == (7, 1, 4)
    assert total.bad == Counter(empty=3, template=1)
    assert total.shown == {"empty": ((0, "a"), (1, "b"), (2, "c")), "template": ((4, "e"),)}
    assert one.rows == 2


@given(st.integers(0, 9), st.integers(0, 9), st.integers(0, 9), st.integers(1, 4))
def test_the_shares_of_a_report_add_up_to_it_and_differ_by_one_at_most(rows, cut, bad, ranks):
    shown = tuple((i, "x") for i in range(min(bad, 3)))
    report = RowReport(rows, cut, +Counter(empty=bad), {"empty": shown} if shown else {})
    shares = [report.share(rank, ranks) for rank in range(ranks)]
    total = sum(shares, start=RowReport())
    assert (total.rows, total.truncated, total.bad) == (rows, cut, report.bad)
    assert sorted(total.shown.get("empty", ())) == sorted(shown)
    for name in ("rows", "truncated", "num_bad"):
        numbers = [getattr(share, name) for share in shares]
        assert max(numbers) - min(numbers) <= 1
    assert RowReport.from_plain(report.plain()) == report


def test_packing_goes_on_from_its_open_sequences():
    lengths = [6, 7, 3, 9, 2, 5, 8, 4, 1, 6, 3]
    through = list(pack(map(example, lengths), 10, num_open=2))
    for stop in range(1, len(through)):
        bins, examples = [], iter([example(length) for length in lengths])
        sequences = pack(examples, 10, num_open=2, bins=bins)
        first = [next(sequences) for _ in range(stop)]
        assert first + list(pack(examples, 10, num_open=2, bins=bins)) == through


def test_a_batch_moves_whole():
    batch = collate([[example(3)]], PAD, True, RowReport(rows=1))
    moved = batch.to("meta")
    assert isinstance(moved, Batch)
    assert {t.device.type for t in (moved.input_ids, moved.position_ids, moved.targets)} == {"meta"}
    assert moved.report == batch.report
    assert batch.to(torch.device("cpu")).input_ids.equal(batch.input_ids)
