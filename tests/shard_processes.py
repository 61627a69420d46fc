"""What other processes do to a cache in tests; it imports little, so that they start at once."""

from neo.teachers.shard_writers import GrowingShard
from neo.teachers.shards import RowKey


def blob_of(row_id):
    return row_id.to_bytes(8, "little") * 50


def add_many(folder, name, start, num_rows):
    """Adds the rows from 0 on, when all are there."""
    with GrowingShard(folder, name) as shard:
        start.wait()
        for row_id in range(num_rows):
            shard.add(RowKey(0, row_id), 1, row_id, blob_of(row_id))


def add_until_killed(folder, name):
    with GrowingShard(folder, name) as shard:
        for row_id in range(10**6):
            shard.add(RowKey(0, row_id), 1, row_id, blob_of(row_id))
