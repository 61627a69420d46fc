import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from neo.data.order import Shard, first_columns, stream_ids, stream_order, table_order

SHARDS = st.tuples(st.integers(1, 4), st.integers(1, 3))


class Streamed:
    """Rows that can only be read from the beginning."""

    def __init__(self, rows):
        self.rows = rows

    def __iter__(self):
        return iter(self.rows)


@given(st.integers(0, 60), SHARDS, st.booleans(), st.integers(0, 3))
def test_ranks_and_workers_read_each_row_of_a_table_once(num, shards, shuffle, epoch):
    count = shards[0] * shards[1]
    read = [
        table_order(np.arange(num), Shard(i, count), shuffle=shuffle, seed=3, epoch=epoch)
        for i in range(count)
    ]
    assert sorted(np.concatenate(read).tolist()) == list(range(num))
    assert max(map(len, read)) - min(map(len, read)) <= 1


@given(st.integers(0, 60), SHARDS, st.booleans(), st.integers(0, 3), st.integers(1, 25))
def test_ranks_and_workers_read_each_row_of_a_stream_once(num, shards, shuffle, epoch, block):
    count = shards[0] * shards[1]
    rows = [f"row {i}" for i in range(num)]
    read = [
        list(stream_order(rows, Shard(i, count), shuffle=shuffle, seed=3, epoch=epoch, block=block))
        for i in range(count)
    ]
    assert sorted(pair for part in read for pair in part) == sorted(enumerate(rows))
    assert max(map(len, read)) - min(map(len, read)) <= 1


def test_the_order_is_fixed_by_the_seed_and_another_in_every_epoch():
    def orders(seed, epoch):
        settings = {"shuffle": True, "seed": seed, "epoch": epoch}
        table = table_order(np.arange(50), Shard(), **settings).tolist()
        stream = [i for i, _ in stream_order(range(50), Shard(), block=20, **settings)]
        return table, stream

    assert orders(1, 0) == orders(1, 0)
    for other in (orders(1, 1), orders(2, 0)):
        assert all(a != b for a, b in zip(orders(1, 0), other, strict=True))


def test_columns_are_those_of_the_first_rows_together():
    rows = [{"messages": 1}, {"messages": 2, "source": "x"}]
    assert first_columns(rows) == ["messages", "source"]
    assert first_columns(Streamed(rows)) == ["messages", "source"]


@given(st.integers(0, 60), st.sets(st.integers(0, 60)), st.booleans(), st.integers(1, 25))
def test_what_is_left_of_an_epoch_keeps_its_order_and_is_dealt_out_once(num, done, shuffle, block):
    how = {"shuffle": shuffle, "seed": 3, "epoch": 1}
    mask = np.zeros(max(done, default=-1) + 1, dtype=bool)
    mask[list(done)] = True
    indices = np.arange(0, 2 * num, 2)
    rows = [f"row {i}" for i in range(num)]
    for count in (1, 3):
        shards = [Shard(i, count) for i in range(count)]
        table = [table_order(indices, shard, **how, done=mask).tolist() for shard in shards]
        stream = [
            [i for i, _ in stream_order(rows, shard, **how, done=mask, block=block)]
            for shard in shards
        ]
        for dealt in (table, stream):
            assert max(map(len, dealt)) - min(map(len, dealt)) <= 1
        whole = table_order(indices, Shard(), **how).tolist()
        dealt = [table[i % count][i // count] for i in range(sum(map(len, table)))]
        assert dealt == [i for i in whole if i not in done]
        whole = [i for i, _ in stream_order(rows, Shard(), **how, block=block)]
        dealt = [stream[i % count][i // count] for i in range(sum(map(len, stream)))]
        assert dealt == [i for i in whole if i not in done]
        assert dealt == stream_ids(num, **how, done=mask, block=block).tolist()
