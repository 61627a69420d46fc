"""Which rows are read in which order.

The order is a function of seed and epoch alone, dealt out to the readers row by row. Nothing is
drawn from a buffer whose state would have to be saved, so a reader is found again by counting.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any, Protocol, runtime_checkable

import numpy as np

# Streams are shuffled in blocks of so many rows, each of which is held in memory once per worker.
BLOCK = 10_000


@runtime_checkable
class RowTable(Protocol):
    """Rows that can be counted and read in any order: a list, or a `datasets.Dataset`."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int, /) -> Any: ...


Rows = RowTable | Iterable[Mapping[str, Any]]


@dataclass(frozen=True)
class Shard:
    """This reader's part: every `count`-th row, beginning with number `index`."""

    index: int = 0
    count: int = 1

    def take(self, order: np.ndarray) -> np.ndarray:
        """The places of this shard; all shards together take each place once."""
        return order[self.index :: self.count]


def permutation(num: int, *key: int) -> np.ndarray:
    """The numbers below `num` in an order fixed by the key (seed, epoch, block)."""
    return np.random.default_rng(key).permutation(num)


def not_done(ids: np.ndarray, done: np.ndarray | None) -> np.ndarray:
    """Those ids that the mask does not hold, in their order."""
    if done is None:
        return ids
    known = ids < len(done)
    return ids[~(known & done[np.where(known, ids, 0)])] if len(done) else ids


def table_order(
    indices: np.ndarray,
    shard: Shard,
    *,
    shuffle: bool,
    seed: int,
    epoch: int,
    done: np.ndarray | None = None,
) -> np.ndarray:
    """The shard's indices in the order of this epoch; those that are done are left out first."""
    places = permutation(len(indices), seed, epoch) if shuffle else np.arange(len(indices))
    return shard.take(not_done(indices[places], done))


def stream_order(
    rows: Iterable[Any],
    shard: Shard,
    *,
    shuffle: bool,
    seed: int,
    epoch: int,
    done: np.ndarray | None = None,
    block: int | None = None,
) -> Iterator[tuple[int, Any]]:
    """The shard's rows of a stream with their numbers, shuffled within blocks, less those done.

    Every shard reads the whole stream and keeps its part, so that no row is lost or doubled
    whatever files the stream is made of.
    """
    iterator, size = iter(rows), block or BLOCK
    start = dealt = 0
    for number in range(2**62):
        members = list(islice(iterator, size))
        if not members:
            return
        ids = not_done(_block(number, len(members), size, shuffle, seed, epoch), done)
        # where the strides of this block begin depends on the rows before it
        for row_id in Shard((shard.index - dealt) % shard.count, shard.count).take(ids).tolist():
            yield row_id, members[row_id - start]
        start += len(members)
        dealt += len(ids)


def stream_ids(
    num_pulled: int,
    *,
    shuffle: bool,
    seed: int,
    epoch: int,
    done: np.ndarray | None = None,
    block: int | None = None,
) -> np.ndarray:
    """The numbers of the first rows of a stream in the order of `stream_order`, of all shards."""
    size = block or BLOCK
    blocks = [
        _block(number, min(size, num_pulled - start), size, shuffle, seed, epoch)
        for number, start in enumerate(range(0, num_pulled, size))
    ]
    return not_done(np.concatenate([np.zeros(0, dtype=np.int64), *blocks]), done)


def _block(number: int, num: int, size: int, shuffle: bool, seed: int, epoch: int) -> np.ndarray:
    """The ids of the rows of a block, which may be shorter than `size` if it is the last."""
    places = permutation(num, seed, epoch, number) if shuffle else np.arange(num)
    return number * size + places


def first_columns(rows: Rows, num: int = 100) -> list[str]:
    """The columns of a `datasets.Dataset`, or the keys that the first rows have between them."""
    names = getattr(rows, "column_names", None)
    if names is None:
        first = (
            (rows[i] for i in range(min(num, len(rows))))
            if isinstance(rows, RowTable)
            else islice(iter(rows), num)
        )
        keys = chain.from_iterable(row for row in first if isinstance(row, Mapping))
        names = dict.fromkeys(map(str, keys))
    return list(names)
