"""The batches that come of rows in their order, from any place in an epoch on."""

from collections import Counter, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain, islice
from typing import Any

import numpy as np
import torch
from torch.utils.data import IterableDataset, get_worker_info

from neo.data.encoded import EncodedRows
from neo.data.order import Rows, Shard, permutation, stream_ids, stream_order, table_order
from neo.data.packing import (
    NUM_SHOWN,
    SORT_WINDOW,
    Batch,
    Bins,
    RowReport,
    collate,
    empty_batch,
    pack,
)
from neo.data.place import Place, Rest
from neo.data.prompt import Example, PromptEncoder
from neo.data.rows import BadRow
from neo.data.validation import is_held_out, row_key

# So many readers per rank can say which row they are at.
MAX_WORKERS = 1024

Group = Sequence[Sequence[Example]]


class RowFailed(RuntimeError):
    """A row on which reading or encoding broke down, which no check of rows has foreseen."""


class DataChanged(ValueError):
    """The rows are not those that were there when the checkpoint was written."""


@dataclass
class Tally:
    """Counts rows until somebody takes the report."""

    report: RowReport = field(default_factory=RowReport)

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

    Attributes:
        rest: Where an epoch is gone on with; other epochs are read from their beginning.
        at: For each worker, the id of the row it works on now; -1 before the first.
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
        self.rest: Rest | None = None
        # in shared memory: workers that live for several epochs have copies of everything else,
        # and one that dies can say nothing more
        self.epoch = torch.zeros(1, dtype=torch.int64).share_memory_()
        self.at = torch.full((MAX_WORKERS,), -1, dtype=torch.int64).share_memory_()
        self.encoded = EncodedRows(encoder, schema, keep=indices is not None)

    def set_epoch(self, epoch: int) -> None:
        """Makes the next pass the one of this epoch, in all workers."""
        self.epoch[0] = epoch

    def rest_of(self, epoch: int) -> Rest | None:
        """Where this epoch is gone on with; None for its beginning."""
        return self.rest if self.rest is not None and self.rest.epoch == epoch else None

    def __iter__(self) -> Iterator[Batch]:
        info = get_worker_info()
        process, num_workers = (info.id, info.num_workers) if info else (0, 1)
        epoch = int(self.epoch[0])
        rest = self.rest_of(epoch) or Rest(epoch)
        # torch asks its first process first, whoever's turn it is
        worker = (process + rest.next_worker) % num_workers
        at = self.at.numpy()[process : process + 1]
        try:
            yield from Reader(self, worker, num_workers, rest, at).batches()
        except Exception as error:
            if isinstance(error, DataChanged):
                raise
            who = f"data worker {process} of {num_workers}: " if info else ""
            where = f"row {int(at[0])}" if at[0] >= 0 else "the first row"
            raise RowFailed(
                f"{who}{where} cannot be read: {type(error).__name__}: {error}. If the row is at "
                "fault, correct it or take it out of the data"
            ) from error

    def order(self, epoch: int, done: np.ndarray | None, num_pulled: int) -> np.ndarray:
        """The ids of an epoch's rows in their order, of all shards; of a stream the first rows."""
        how: Any = {"shuffle": self.shuffle, "seed": self.seed, "epoch": epoch, "done": done}
        if self.indices is None:
            return stream_ids(num_pulled, **how)
        return table_order(self.indices, Shard(), **how)


class Reader:
    """One pass of one worker through its share of what is left of an epoch."""

    def __init__(
        self, stream: RowStream, worker: int, num_workers: int, rest: Rest, at: np.ndarray
    ) -> None:
        self.stream, self.worker, self.at = stream, worker, at
        self.shard = Shard(stream.rank * num_workers + worker, stream.world_size * num_workers)
        self.epoch, self.tally = rest.epoch, Tally()
        self.num_read = self.num_pulled = self._pulled = self.window = 0
        self.ready: deque[Group] = deque()
        self.bins: Bins = []
        self.rows = self._stream(rest) if stream.indices is None else self._table(rest)
        if (place := rest.places.get(worker)) is not None:
            self._take_place(place)

    def batches(self) -> Iterator[Batch]:
        """All batches that are left, each with this reader's place behind it."""
        pad_id, packing = self.stream.pad_id, self.stream.packing
        groups = self._groups()
        group = next(groups, None)
        if group is None and self.tally.report.rows:
            empty = empty_batch(pad_id, self.tally.take())
            yield replace(empty, places=(self._place(None),))
        while group is not None:
            # One batch stays behind, so that the last can carry the report of the last rows.
            following = next(groups, None)
            batch = collate(group, pad_id, packing, self.tally.take())
            yield replace(batch, places=(self._place(following),))
            group = following

    def _place(self, following: Group | None) -> Place:
        groups = [*([] if following is None else [following]), *self.ready]
        held = chain(chain.from_iterable(groups), (members for _, members in self.bins))
        return Place(
            worker=self.worker,
            num_read=self.num_read,
            num_pulled=self.num_pulled,
            window=self.window,
            ready=tuple(tuple(map(_ids, group)) for group in groups),
            bins=tuple(_ids(members) for _, members in self.bins),
            num_truncated=sum(example.truncated for example in chain.from_iterable(held)),
        )

    def _take_place(self, place: Place) -> None:
        """Goes where a reader stood: reads up to there, and encodes what it held."""
        held = place.held
        found = {index: row for index, row in islice(self.rows, place.num_read) if index in held}
        if (self.num_read, self.num_pulled) != (place.num_read, place.num_pulled):
            raise DataChanged(
                f"cannot resume: a reader had read {place.num_read} rows of epoch {self.epoch}, "
                f"which reached row {place.num_pulled} of the stream, and now finds "
                f"{self.num_read} up to row {self.num_pulled}. Has the data at data.path changed "
                "since the checkpoint? rerun=true begins anew"
            )

        def again(ids: Sequence[int]) -> list[Example]:
            examples = []
            for index in ids:
                try:
                    examples.append(self._encode(index, found[index]))
                except BadRow as error:
                    raise DataChanged(
                        f"cannot resume: row {index} could be trained on when the checkpoint was "
                        f"written, and now it is {error}. Has the data at data.path changed? "
                        "rerun=true begins anew"
                    ) from error
            return examples

        self.window = place.window
        self.ready.extend([again(ids) for ids in group] for group in place.ready)
        members = [again(ids) for ids in place.bins]
        self.bins += [(sum(len(e.input_ids) for e in m), m) for m in members]

    def _table(self, rest: Rest) -> Iterator[tuple[int, Any]]:
        stream = self.stream
        assert stream.indices is not None
        order = table_order(
            stream.indices,
            self.shard,
            shuffle=stream.shuffle,
            seed=stream.seed,
            epoch=self.epoch,
            done=rest.done,
        )
        for index in order.tolist():
            self.num_read += 1
            yield index, None  # looked up when it is encoded

    def _stream(self, rest: Rest) -> Iterator[tuple[int, Any]]:
        stream = self.stream
        for number, row in stream_order(
            self._pull(),
            self.shard,
            shuffle=stream.shuffle,
            seed=stream.seed,
            epoch=self.epoch,
            done=rest.done,
        ):
            self.num_read += 1
            self.num_pulled = self._pulled
            yield number, row

    def _pull(self) -> Iterator[Any]:
        """The rows of the stream; counts them."""
        rows: Any = iter(self.stream.rows)
        self.at[0] = 0
        for row in islice(rows, self.stream.max_rows):
            self._pulled += 1
            self.at[0] = self._pulled  # which comes next, if it comes
            yield row

    def _encode(self, row_id: int, row: Any) -> Example:
        self.at[0] = row_id
        stream: Any = self.stream
        if stream.indices is not None and row_id not in stream.encoded:
            row = stream.rows[row_id]
        return self.stream.encoded.encode(row_id, row)

    def _examples(self) -> Iterator[Example]:
        """What the rows from here on become, counted."""
        share = self.stream.held_out
        for index, row in self.rows:
            if share and is_held_out(row_key(row, self.stream.schema), share):
                continue
            try:
                example = self._encode(index, row)
            except BadRow as error:
                self.tally.refuse(index, error)
                continue
            self.tally.read(example.truncated)
            yield example

    def _groups(self) -> Iterator[Group]:
        """The sequences of one batch after another."""
        stream, size, examples = self.stream, self.stream.batch_size, self._examples()
        while self.ready:
            yield self.ready.popleft()
        if stream.packing:
            sequences = pack(examples, stream.encoder.max_length, bins=self.bins)
            while group := list(islice(sequences, size)):
                yield group
            return
        while members := list(islice(examples, size * stream.sort_window)):
            if stream.sort_window > 1:
                members.sort(key=lambda example: len(example.input_ids))
            groups = [
                [[example] for example in members[i : i + size]]
                for i in range(0, len(members), size)
            ]
            if stream.shuffle:
                key = (stream.seed, self.epoch, self.window, self.shard.index)
                groups = [groups[i] for i in permutation(len(groups), *key)]
            self.window += 1
            self.ready.extend(groups)
            while self.ready:
                yield self.ready.popleft()


def _ids(examples: Sequence[Example]) -> tuple[int, ...]:
    assert all(example.row_id is not None for example in examples)
    return tuple(example.row_id for example in examples if example.row_id is not None)
