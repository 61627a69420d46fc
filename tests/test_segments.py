"""Whose the tokens of a batch are, packed and padded."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from neo.data.packing import RowReport, collate, empty_batch
from neo.data.prompt import IGNORE, Example
from neo.data.segments import content_of, rows_alone, segments

PAD = 0


def example(name: int, prompt: int, answer: int, after: int = 0) -> Example:
    ids = [100 * (name + 1) + i for i in range(prompt + answer + after)]
    targets = [IGNORE] * (prompt - 1) + ids[prompt : prompt + answer] + [IGNORE] * (after + 1)
    return Example(ids, targets, row_id=name)


SEQUENCES = st.lists(
    st.lists(
        st.tuples(st.integers(1, 4), st.integers(1, 3), st.integers(0, 2)), min_size=1, max_size=3
    ),
    min_size=1,
    max_size=4,
)  # fmt: skip


@given(SEQUENCES, st.booleans())
def test_each_row_owns_its_tokens_in_order_and_keeps_its_content(shapes, packing):
    names = iter(range(99))
    sequences = [[example(next(names), *shape) for shape in row] for row in shapes]
    if not packing:
        sequences = [[e] for row in sequences for e in row]
    batch = collate(sequences, PAD, packing, RowReport())
    found = segments(batch)
    examples = [e for row in sequences for e in row]
    assert [s.row_id for s in found] == [e.row_id for e in examples]
    assert [s.content for s in found] == [content_of(e.input_ids, e.targets) for e in examples]
    counts = [sum(t != IGNORE for t in e.targets) for e in examples]
    assert [s.num_tokens for s in found] == counts
    aims = batch.targets[batch.targets != IGNORE].split(counts)
    assert [a.tolist() for a in aims] == [[t for t in e.targets if t != IGNORE] for e in examples]


@given(SEQUENCES)
def test_rows_taken_out_of_a_batch_are_the_same_rows(shapes):
    names = iter(range(99))
    sequences = [[example(next(names), *shape) for shape in row] for row in shapes]
    batch = collate(sequences, PAD, True, RowReport())
    chosen = segments(batch)[::2]
    alone = rows_alone(batch, chosen, PAD)
    again = segments(alone)
    assert [s.content for s in again] == [s.content for s in chosen]
    assert alone.row_ids == tuple(s.row_id for s in chosen)


def test_the_content_tells_ids_targets_and_their_order_apart():
    one = content_of([1, 2, 3], [2, 3, IGNORE])
    for ids, targets in (([1, 4, 3], [4, 3, IGNORE]), ([1, 2, 3], [IGNORE, 3, IGNORE])):
        assert content_of(ids, targets) != one
    assert content_of([1, 2, 3, 9], [2, 3, IGNORE, IGNORE]) == one  # nothing is asked of the last


def test_an_empty_batch_has_no_rows_and_one_with_too_many_names_is_refused():
    assert segments(empty_batch(PAD, RowReport())) == []
    batch = collate([[example(0, 2, 2)]], PAD, True, RowReport())
    object.__setattr__(batch, "row_ids", (0, 1))
    with pytest.raises(ValueError, match="a batch of 2 rows has tokens of 1 alone"):
        segments(batch)
    assert torch.equal(batch.targets, batch.to("cpu").targets)
