from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from neo.data.validation import held_out_rows, is_held_out, row_key, split_table, table_keys


def rows_of(names):
    return [{"prompt": f"q{name}", "completion": "a"} for name in names]


@given(
    st.lists(st.integers(0, 12), min_size=1, max_size=60),
    st.floats(0.01, 0.9),
    st.one_of(st.none(), st.integers(1, 20)),
)
def test_no_conversation_is_on_both_sides_and_every_row_on_one(names, share, max_rows):
    rows = rows_of(names)
    keys = table_keys(rows, np.arange(len(rows)), "prompt_completion")
    wanted = min(max(1, round(share * len(rows))), max_rows or len(rows))
    if len(set(names)) < 2 or min(Counter(names).values()) > wanted:
        with pytest.raises(ValueError, match=r"data.val_share"):
            split_table(keys, share, max_rows)
        return
    train, val = split_table(keys, share, max_rows)
    assert sorted(train + val) == list(range(len(rows)))
    assert not {names[i] for i in train} & {names[i] for i in val}
    assert 1 <= len(val) <= wanted


def test_distinct_rows_give_exactly_the_share():
    keys = table_keys(rows_of(range(100)), np.arange(100), "prompt_completion")
    assert [len(part) for part in split_table(keys, 0.1, None)] == [90, 10]
    assert [len(part) for part in split_table(keys, 0.1, 4)] == [96, 4]
    assert [len(part) for part in split_table(keys, 0.001, None)] == [99, 1]


def test_the_split_does_not_depend_on_the_order_of_rows():
    rows = rows_of(range(50))
    sides = []
    for order in (rows, rows[::-1]):
        keys = table_keys(order, np.arange(50), "prompt_completion")
        sides.append({order[i]["prompt"] for i in split_table(keys, 0.2, None)[1]})
    assert sides[0] == sides[1]


def test_equal_conversations_have_one_key_whatever_else_the_row_holds():
    one = {"prompt": "q", "completion": "a", "id": 1}
    two = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}
    assert row_key(one, "prompt_completion") == row_key(two, "messages") is not None
    assert row_key({**one, "completion": "b"}, "prompt_completion") != row_key(two, "messages")


def test_bad_rows_stay_in_training_where_they_are_counted():
    rows = [*rows_of(range(10)), {"prompt": "no answer"}]
    keys = table_keys(rows, np.arange(11), "prompt_completion")
    assert keys[10] is None
    assert 10 in split_table(keys, 0.9, None)[0]
    assert not is_held_out(None, 0.99)


@pytest.mark.parametrize("names", [[1], [1, 1, 1, 1]])
def test_one_conversation_alone_cannot_be_split(names):
    keys = table_keys(rows_of(names), np.arange(len(names)), "prompt_completion")
    with pytest.raises(ValueError, match=r"data.val_share=0.5: .* 1 distinct .* data.val_share=0 "):
        split_table(keys, 0.5, None)


def test_a_stream_holds_out_its_share_and_reads_no_further_than_it_must():
    read = []

    def rows():
        for row in rows_of(range(2000)):
            read.append(row)
            yield row

    held = held_out_rows(rows(), "prompt_completion", 0.1, None, None)
    assert 150 < len(held) < 250
    read.clear()
    assert held_out_rows(rows(), "prompt_completion", 0.1, 5, None) == held[:5]
    assert len(read) < 200
    read.clear()
    few = held_out_rows(rows(), "prompt_completion", 0.1, None, 100)
    assert few == held[: len(few)]
    assert len(read) == 100


def test_a_stream_that_gives_no_validation_rows_says_so():
    with pytest.raises(ValueError, match=r"data.val_share=1e-09: no row of the stream"):
        held_out_rows(rows_of(range(10)), "prompt_completion", 1e-9, 5, None)
