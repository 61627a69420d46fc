"""The rows that a cache is to hold, cut into shards, and the batches that a shard gives.

What a shard holds, and how its rows lie in batches, depends on the shard alone: neither on the
process that works on it nor on what was done before.
"""

import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any

import numpy as np

from neo.data.datamodule import DataModule
from neo.data.order import RowTable
from neo.data.packing import SORT_WINDOW, Batch, RowReport, collate, pack
from neo.data.prompt import IGNORE, Example
from neo.data.reader import RowFailed, RowStream
from neo.data.rows import BadRow
from neo.data.validation import is_held_out, row_key
from neo.teachers.shards import RowKey


@dataclass(frozen=True)
class Span:
    """Consecutive rows of one part.

    Args:
        number: Among all shards.
        part: 0 for the rows of a run's table or stream, 1 for validation rows of their own.
        start: The first, counted in the order of row ids.
        stop: One past the last; a stream may end before it.
    """

    number: int
    part: int
    start: int
    stop: int

    @property
    def name(self) -> str:
        """Of its files."""
        return f"shard-{self.number:05d}"


@dataclass(frozen=True)
class SpanRows:
    """What was read of a span.

    Args:
        span: Which.
        examples: In the order of row ids, without bad rows.
        report: Of all rows read, held out ones left out.
        num_read: Rows read, held out ones too; fewer than the span has where the stream has ended.
    """

    span: Span
    examples: list[Example]
    report: RowReport
    num_read: int

    @property
    def is_last(self) -> bool:
        """Whether the stream ended here."""
        return self.num_read < self.span.stop - self.span.start


class CacheRows:
    """All rows of a run's data: those to train on and those to validate on.

    Args:
        data: Of the run.

    Raises:
        ValueError: A stream is not told how many rows to read.
    """

    def __init__(self, data: DataModule) -> None:
        self.data = data.data
        train = data.train_stream(alone=True)
        val = data.val_stream()
        self.streams: dict[int, RowStream] = {0: train}
        own_table = isinstance(train.rows, RowTable)
        self.ids: dict[int, np.ndarray] = {}  # of the parts that are tables, ascending
        if own_table:
            assert train.indices is not None
            self.ids[0] = np.sort(train.indices)
        elif train.max_rows is None:
            raise ValueError(
                "data.max_rows=null: must be a number for a cache of a stream, which would be read "
                "to an end that nobody knows"
            )
        if val is not None:
            assert val.indices is not None  # they are a table, whatever the others are
            if data.val_part:
                self.streams[1], self.ids[1] = val, np.sort(val.indices)
            else:
                self.ids[0] = np.union1d(self.ids[0], val.indices)

    @property
    def encoder(self) -> Any:
        """Of both parts."""
        return self.streams[0].encoder

    @property
    def pad_id(self) -> int:
        """What fills sequences up."""
        return self.streams[0].pad_id

    @property
    def is_stream(self) -> bool:
        """Whether rows are read one after another, up to an end that may come sooner."""
        return 0 not in self.ids

    def num_rows(self, part: int) -> int:
        """Of a part; of a stream at most."""
        if part in self.ids:
            return len(self.ids[part])
        limit = self.streams[part].max_rows
        assert limit is not None
        return limit

    @property
    def num_rows_in_all(self) -> int:
        """Of all parts; with a stream at most."""
        return sum(self.num_rows(part) for part in self.streams)

    def digest(self) -> str:
        """Names the set of rows, not what stands in them."""
        named = hashlib.sha256()
        for part in self.streams:
            if part in self.ids:
                named.update(self.ids[part].astype("<i8").tobytes())
            else:
                named.update(f"the first {self.num_rows(part)} of a stream".encode())
            named.update(b"|")
        return named.hexdigest()[:16]

    def spans(self, rows_per_shard: int) -> list[Span]:
        """All shards; the last of a part has fewer rows."""
        found: list[Span] = []
        for part in self.streams:
            num = self.num_rows(part)
            for start in range(0, num, rows_per_shard):
                found.append(Span(len(found), part, start, min(num, start + rows_per_shard)))
        return found

    def read(self, spans: Sequence[Span]) -> Iterator[SpanRows]:
        """The rows of these spans, which ascend; a stream ends with the first that it leaves short.

        Raises:
            RowFailed: A row on which reading or encoding broke down.
        """
        for part in self.streams:
            own = [span for span in spans if span.part == part]
            if part in self.ids:
                yield from (self._table(span) for span in own)
            else:
                yield from self._stream(own)

    def _table(self, span: Span) -> SpanRows:
        ids = self.ids[span.part][span.start : span.stop].tolist()
        return self._encoded(span, ((row_id, None) for row_id in ids))

    def _stream(self, spans: Sequence[Span]) -> Iterator[SpanRows]:
        rows: Iterator[Any] = iter(self.streams[0].rows)
        at = 0
        for span in spans:
            at += sum(1 for _ in islice(rows, span.start - at))
            if at < span.start:
                return  # another process has the shard in which the stream ends
            numbered = zip(
                range(span.start, span.stop), islice(rows, span.stop - span.start), strict=False
            )
            read = self._encoded(span, numbered)
            at += read.num_read
            yield read
            if read.is_last:
                return

    def _encoded(self, span: Span, rows: Iterator[tuple[int, Any]]) -> SpanRows:
        stream = self.streams[span.part]
        examples: list[Example] = []
        bad: Counter[str] = Counter()
        shown: dict[str, tuple[tuple[int, str], ...]] = {}
        num_read = num_held_out = 0
        for row_id, given in rows:
            num_read += 1
            try:
                row = given
                if span.part in self.ids and row_id not in stream.encoded:
                    row = stream.rows[row_id]  # type: ignore[index]  # a table
                share = 0.0 if span.part in self.ids else stream.held_out
                if share and is_held_out(row_key(row, stream.schema), share):
                    num_held_out += 1
                    continue
                examples.append(stream.encoded.encode(row_id, row))
            except BadRow as error:
                bad[error.reason] += 1
                told = shown.get(error.reason, ())
                shown[error.reason] = (*told, (row_id, error.detail))[:3]
            except Exception as error:
                raise RowFailed(
                    f"row {row_id} cannot be read: {type(error).__name__}: {error}. If the row is "
                    "at fault, correct it or take it out of the data"
                ) from error
        truncated = sum(example.truncated for example in examples)
        report = RowReport(num_read - num_held_out, truncated, bad, shown)
        return SpanRows(span, examples, report, num_read)

    def sample(self, num: int) -> list[SpanRows]:
        """So many rows of each part, or all of them: spread evenly, of a stream the first."""
        found: list[SpanRows] = []
        for part in self.streams:
            total = self.num_rows(part)
            if part not in self.ids:
                found += self._stream([Span(0, part, 0, min(num, total))])
                continue
            places = np.unique(np.linspace(0, total - 1, min(num, total)).astype(np.int64))
            ids = self.ids[part][places].tolist()
            span = Span(0, part, 0, len(ids))
            found.append(self._encoded(span, ((row_id, None) for row_id in ids)))
        return found

    def examples(self, row_ids: Sequence[int]) -> list[Example]:
        """Those of rows of part 0 that can be used."""
        return examples_of(self.streams[0], row_ids)

    def batches(self, examples: Sequence[Example]) -> Iterator[tuple[Batch, list[Example]]]:
        """The examples in batches as a run lays them, with those that lie in each, in their order.

        With packing off they are sorted by length first, window by window.
        """
        size = self.data.batch_size
        if self.data.packing:
            sequences = list(pack(examples, self.data.max_length))
        else:
            window = size * SORT_WINDOW
            sequences = [
                [example]
                for start in range(0, len(examples), window)
                for example in sorted(
                    examples[start : start + window], key=lambda e: len(e.input_ids)
                )
            ]
        for start in range(0, len(sequences), size):
            group = sequences[start : start + size]
            batch = collate(group, self.pad_id, self.data.packing, RowReport())
            yield batch, list(chain.from_iterable(group))


def examples_of(stream: RowStream, row_ids: Sequence[int]) -> list[Example]:
    """Those of rows that can be used, in ascending order; of a stream all before the last are read.

    Args:
        stream: A table of rows, or rows one after another.
        row_ids: Ascending.
    """
    if stream.indices is not None:
        return [stream.encoded.encode(i, stream.rows[i]) for i in row_ids]  # type: ignore[index]
    wanted = set(row_ids)
    numbered = enumerate(islice(iter(stream.rows), max(wanted, default=-1) + 1))
    return [stream.encoded.encode(i, row) for i, row in numbered if i in wanted]


def keys_of(part: int, examples: Sequence[Example]) -> list[tuple[RowKey, int]]:
    """What names the rows, each with its number of supervised tokens."""
    return [(RowKey(part, _row_id(example)), num_supervised(example)) for example in examples]


def num_supervised(example: Example) -> int:
    """How many positions of the example have a target."""
    return sum(target != IGNORE for target in example.targets)


def _row_id(example: Example) -> int:
    assert example.row_id is not None
    return example.row_id
