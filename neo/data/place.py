"""Where the readers of an epoch stand, small enough to travel with every batch."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import chain

import numpy as np

# The ids of the rows of a sequence, and of the sequences of a batch.
Ids = tuple[int, ...]


@dataclass(frozen=True)
class Place:
    """Where a reader stands behind a batch: what it has read, and what of it is still to be given.

    With the order of rows, which is a function of seed and epoch, this is all that a reader is:
    another one that takes this place gives the same batches from here on.

    Args:
        worker: Which of its rank's readers it is.
        num_read: Rows of its order, validation rows of a stream among them.
        num_pulled: Rows of the whole stream that came up to the last of these; 0 for a table.
        window: With packing off, how many windows of rows were sorted.
        ready: Batches that are complete, and not given out.
        bins: With packing, the sequences that are open, in the packer's order.
        num_truncated: How many rows in `ready` and `bins` were cut off.
    """

    worker: int
    num_read: int
    num_pulled: int = 0
    window: int = 0
    ready: tuple[tuple[Ids, ...], ...] = ()
    bins: tuple[Ids, ...] = ()
    num_truncated: int = 0

    @property
    def held(self) -> frozenset[int]:
        """The ids of rows that were read and lie in no batch yet."""
        return frozenset(chain.from_iterable(chain(chain.from_iterable(self.ready), self.bins)))


@dataclass(frozen=True, eq=False)
class Rest:
    """What is left of an epoch, for the readers of one rank to go on with.

    Args:
        done: A mask over row ids: no reader reads these; None for none.
        places: Of those readers that stand behind their beginning, by worker.
        next_worker: Whose turn it is.
    """

    epoch: int
    done: np.ndarray | None = None
    places: Mapping[int, Place] = field(default_factory=dict)
    next_worker: int = 0


def consumed_ids(
    places: Iterable[tuple[int, Place]], order: np.ndarray, num_readers: int
) -> np.ndarray:
    """The ids of all rows that were read and are held by no reader, in no particular order.

    Args:
        places: With the number of the reader among all of them.
        order: All rows of the epoch.
        num_readers: Among whom they were dealt out, each taking every so many-th.
    """
    parts = [np.zeros(0, dtype=np.int64)]
    for reader, place in places:
        read = order[reader::num_readers][: place.num_read]
        parts.append(read[~np.isin(read, list(place.held))] if place.held else read)
    return np.concatenate(parts)
