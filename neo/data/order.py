"""Which rows are read in which order, and the batches that come of them.

The order is a function of seed, epoch and place alone. Nothing is drawn from a buffer whose state
would have to be saved, so an epoch that was left in the middle is resumed by reading it again.
"""

from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain, islice
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch.utils.data import IterableDataset, get_worker_info

from neo.data.packing import NUM_SHOWN, SORT_WINDOW, Batch, RowReport, collate, empty_batch, pack
from neo.data.prompt import Example, PromptEncoder
from neo.data.rows import BadRow, to_conversation
from neo.data.validation import is_held_out, row_key

# Streams are shuffled in blocks of so many rows, each of which is held in memory once per worker.
BLOCK = 10_000
# Encoded rows are kept for the next epoch up to so many tokens (16 bytes each) per worker.
NUM_KEPT_TOKENS = 4_000_000


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


def table_order(
    indices: np.ndarray, shard: Shard, *, shuffle: bool, seed: int, epoch: int
) -> np.ndarray:
    """The shard's indices in the order of this epoch."""
    places = permutation(len(indices), seed, epoch) if shuffle else np.arange(len(indices))
    return indices[shard.take(places)]


def stream_order(
    rows: Iterable[Any], shard: Shard, *, shuffle: bool, seed: int, epoch: int, block: int = BLOCK
) -> Iterator[tuple[int, Any]]:
    """The shard's rows of a stream with their numbers, shuffled within blocks.

    Every shard reads the whole stream and keeps its part, so that no row is lost or doubled
    whatever files the stream is made of.
    """
    iterator = iter(rows)
    start = 0
    for number in range(2**62):
        members = list(islice(iterator, block))
        if not members:
            return
        places = np.arange(len(members))
        if shuffle:
            places = permutation(len(members), seed, epoch, number)
        # where the strides of this block begin depends on the rows before it
        for place in Shard((shard.index - start) % shard.count, shard.count).take(places):
            yield start + int(place), members[place]
        start += len(members)


@dataclass
class Tally:
    """Counts rows until somebody takes the report."""

    report: RowReport

    def read(self, truncated: bool) -> None:
        """Counts a row that became an example."""
        self.report = self.report + RowReport(rows=1, truncated=int(truncated))

    def refuse(self, index: int, error: BadRow) -> None:
        """Counts a row that could not."""
        shown: dict[str, tuple[tuple[int, str], ...]] = {error.reason: ((index, error.detail),)}
        if len(self.report.shown.get(error.reason, ())) >= NUM_SHOWN:
            shown = {}
        self.report = self.report + RowReport(rows=1, bad=Counter([error.reason]), shown=shown)

    def take(self) -> RowReport:
        """The report since the last one."""
        report, self.report = self.report, RowReport()
        return report


class RowStream(IterableDataset[Batch]):
    """The batches of one epoch that this rank's share of the rows gives, split among its workers.

    Args:
        rows: A table, of which `indices` are read, or a stream, read whole up to `max_rows`.
        schema: One of `SCHEMAS`.
        held_out: For streams: the share of conversations to leave out, for validation.
        sort_window: With packing off, so many batches of rows are sorted by length together.
    """

    def __init__(
        self,
        rows: Rows,
        indices: np.ndarray | None,
        encoder: PromptEncoder,
        schema: str,
        *,
        batch_size: int,
        packing: bool,
        shuffle: bool,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        max_rows: int | None = None,
        held_out: float = 0.0,
        sort_window: int = SORT_WINDOW,
    ) -> None:
        self.rows, self.indices, self.encoder, self.schema = rows, indices, encoder, schema
        self.batch_size, self.packing, self.shuffle, self.seed = batch_size, packing, shuffle, seed
        self.rank, self.world_size = rank, world_size
        self.max_rows, self.held_out = max_rows, held_out
        self.sort_window = sort_window
        tokenizer = encoder.tokenizer
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
        self.pad_id = int(pad)
        # in shared memory: workers that live for several epochs have copies of everything else
        self.epoch = torch.zeros(1, dtype=torch.int64).share_memory_()
        self._kept: dict[int, tuple[array[int], array[int], bool] | BadRow] = {}
        self._num_kept_tokens = 0

    def set_epoch(self, epoch: int) -> None:
        """Makes the next pass the one of this epoch, in all workers."""
        self.epoch[0] = epoch

    def __iter__(self) -> Iterator[Batch]:
        worker = get_worker_info()
        num_workers = worker.num_workers if worker else 1
        shard = Shard(
            self.rank * num_workers + (worker.id if worker else 0), self.world_size * num_workers
        )
        tally = Tally(RowReport())
        # One batch stays behind, so that the last one can carry the report of the last rows.
        held: Sequence[Sequence[Example]] | None = None
        for sequences in self._groups(self._examples(shard, tally), shard):
            if held is not None:
                yield collate(held, self.pad_id, self.packing, tally.take())
            held = sequences
        if held is not None:
            yield collate(held, self.pad_id, self.packing, tally.take())
        elif tally.report.rows:
            yield empty_batch(self.pad_id, tally.take())

    def _read(self, shard: Shard) -> Iterator[tuple[int, Any]]:
        epoch = int(self.epoch[0])
        if self.indices is None:
            assert not isinstance(self.rows, RowTable)
            first = islice(iter(self.rows), self.max_rows)
            rows = stream_order(first, shard, shuffle=self.shuffle, seed=self.seed, epoch=epoch)
            for number, row in rows:
                if not (self.held_out and is_held_out(row_key(row, self.schema), self.held_out)):
                    yield number, row
            return
        assert isinstance(self.rows, RowTable)
        for index in table_order(
            self.indices, shard, shuffle=self.shuffle, seed=self.seed, epoch=epoch
        ):
            yield int(index), None if int(index) in self._kept else self.rows[int(index)]

    def _examples(self, shard: Shard, tally: Tally) -> Iterator[Example]:
        for index, row in self._read(shard):
            try:
                example = self._encode(index, row)
            except BadRow as error:
                tally.refuse(index, error)
                continue
            tally.read(example.truncated)
            yield example

    def _encode(self, index: int, row: Any) -> Example:
        kept = self._kept.get(index)
        if isinstance(kept, BadRow):
            raise BadRow(kept.reason, kept.detail)
        if kept is not None:
            return Example(kept[0].tolist(), kept[1].tolist(), kept[2], index)
        keep = self.indices is not None and self._num_kept_tokens < NUM_KEPT_TOKENS
        try:
            example = self.encoder.encode(to_conversation(row, self.schema))
            example = replace(example, row_id=index)
        except BadRow as error:
            if keep:
                self._kept[index] = BadRow(error.reason, error.detail)
            raise
        if keep:
            ids, targets = array("i", example.input_ids), array("i", example.targets)
            self._kept[index] = (ids, targets, example.truncated)
            self._num_kept_tokens += len(ids)
        return example

    def _groups(
        self, examples: Iterator[Example], shard: Shard
    ) -> Iterator[Sequence[Sequence[Example]]]:
        """The sequences of one batch after another."""
        size = self.batch_size
        if self.packing:
            sequences = pack(examples, self.encoder.max_length)
            while group := list(islice(sequences, size)):
                yield group
            return
        for window in range(2**62):
            members = list(islice(examples, size * self.sort_window))
            if not members:
                return
            if self.sort_window > 1:
                members.sort(key=lambda example: len(example.input_ids))
            groups = [
                [[example] for example in members[i : i + size]]
                for i in range(0, len(members), size)
            ]
            if self.shuffle:
                key = (self.seed, int(self.epoch[0]), window, shard.index)
                groups = [groups[i] for i in permutation(len(groups), *key)]
            yield from groups


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
