"""Which tokens of a batch are of which row, and what names a row's content."""

from collections.abc import Sequence
from typing import NamedTuple
from zlib import crc32

import numpy as np
import torch

from neo.data.packing import Batch
from neo.data.prompt import IGNORE


class Segment(NamedTuple):
    """A row of a batch, as far as anything in it is supervised.

    Args:
        row_id: As in `Example.row_id`.
        sequence: Which of the batch's sequences it lies in.
        start: Of its first token there.
        stop: One past its last supervised token; what follows asks nothing.
        num_tokens: Supervised ones.
        content: Of its ids and targets, by `content_of`.
    """

    row_id: int
    sequence: int
    start: int
    stop: int
    num_tokens: int
    content: int


def segments(batch: Batch) -> list[Segment]:
    """The rows of a batch, in the order of its supervised tokens. On the CPU."""
    found: list[Segment] = []
    names = iter(batch.row_ids)
    ids, targets = (x.numpy().astype("<i4") for x in (batch.input_ids, batch.targets))
    starts = (batch.position_ids == 0).numpy()
    for sequence in range(len(ids)):
        begins = np.flatnonzero(starts[sequence])
        supervised = np.flatnonzero(targets[sequence] != IGNORE)
        # of each, the segment that it lies in; padding is a segment without any
        owners = np.searchsorted(begins, supervised, side="right") - 1
        for owner in np.unique(owners):
            own = supervised[owners == owner]
            start, stop = int(begins[owner]), int(own[-1]) + 1
            content = _content(ids[sequence, start:stop], targets[sequence, start:stop])
            found.append(Segment(next(names), sequence, start, stop, len(own), content))
    if next(names, None) is not None:
        raise ValueError(f"a batch of {len(batch.row_ids)} rows has tokens of {len(found)} alone")
    return found


def content_of(input_ids: Sequence[int], targets: Sequence[int]) -> int:
    """A CRC-32 of all that a teacher sees of a row and is asked about it.

    Of the ids and then of the targets as little-endian 32-bit integers, both up to the last
    supervised position.

    Example:
        >>> content_of([5, 6, 7], [6, -100, -100]) == content_of([5, 8], [6, -100])
        True
    """
    ids, aims = (np.asarray(x, dtype="<i4") for x in (input_ids, targets))
    stop = int(np.flatnonzero(aims != IGNORE)[-1]) + 1
    return _content(ids[:stop], aims[:stop])


def rows_alone(batch: Batch, chosen: Sequence[Segment], pad_id: int) -> Batch:
    """A batch of some rows of another one, each in a sequence of its own.

    Their supervised tokens come in the order of `chosen`.
    """
    length = max(segment.stop - segment.start for segment in chosen)
    ids = torch.full((len(chosen), length), pad_id, dtype=torch.int64)
    targets = torch.full((len(chosen), length), IGNORE, dtype=torch.int64)
    for row, segment in enumerate(chosen):
        span = slice(segment.start, segment.stop)
        size = segment.stop - segment.start
        ids[row, :size] = batch.input_ids[segment.sequence, span]
        targets[row, :size] = batch.targets[segment.sequence, span]
    positions = torch.arange(length).repeat(len(chosen), 1)
    names = tuple(segment.row_id for segment in chosen)
    return Batch(ids, positions, targets, num_rows=len(chosen), row_ids=names)


def _content(ids: np.ndarray, targets: np.ndarray) -> int:
    return crc32(targets.tobytes(), crc32(ids.tobytes()))
