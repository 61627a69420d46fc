"""What was consumed of an epoch, and how it is gone on with by as many readers or by others."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from neo.data.packing import Batch, RowReport
from neo.data.place import Place, Rest, consumed_ids


class Epoch:
    """The part of an epoch that this rank has consumed, and where its readers stand behind it.

    Attributes:
        number: Of the epoch, from 0.
        num_batches: How many of its batches were consumed, on each rank alike.
        report: What was read for them on this rank.
        rest: What it was gone on with, if it was not read from its beginning.
    """

    def __init__(self, number: int = 0, num_batches: int = 0, rest: Rest | None = None) -> None:
        self.number, self.num_batches, self.rest = number, num_batches, rest
        self.report = RowReport()
        self.next_worker = rest.next_worker if rest is not None else 0
        self._places: dict[int, Place] = dict(rest.places) if rest is not None else {}

    def consume(self, batch: Batch, num_readers: int) -> None:
        """Counts a batch; readers work ahead, and stand where it says that they stood behind it."""
        self.num_batches += 1
        self.report = self.report + batch.report
        for place in batch.places:
            self._places[place.worker] = place
            self.next_worker = (place.worker + 1) % num_readers

    def of_rank(self) -> dict[str, Any]:
        """This rank's part of a checkpoint."""
        return {
            "next_worker": self.next_worker,
            "places": [asdict(place) for place in self._places.values()],
            "report": self.report.plain(),
        }

    def plain(self, ranks: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """A checkpoint of the epoch, from the parts of all ranks.

        It holds a bit per row only where an epoch was shared out anew, of those consumed before.
        """
        done = self.rest.done if self.rest is not None else None
        return {
            "epoch": self.number,
            "batches": self.num_batches,
            "done": None if done is None else np.packbits(done).tobytes(),
            "ranks": list(ranks),
        }


def resumed(
    state: Mapping[str, Any],
    rank: int,
    world_size: int,
    order: Callable[[int, np.ndarray | None, int], np.ndarray] | None,
) -> Epoch:
    """The epoch of a checkpoint for one of the ranks that go on with it.

    Args:
        state: What `plain` gave, and `readers` that say how many each rank had.
        rank: Of this process.
        world_size: How many ranks go on.
        order: None if the same readers go on, each from where it stood. For others, how the ids of
            an epoch are ordered, given its number, which are done, and how many the stream gave.
            What was not consumed is shared out anew, so each row still lies in one batch; rows
            that were read and lay in no batch are read again, and so they are not counted yet.
    """
    number, before = state["epoch"], None
    if state["done"] is not None:
        before = np.unpackbits(np.frombuffer(state["done"], dtype=np.uint8)).astype(bool)
    if order is None:
        part = state["ranks"][rank]
        places = {plain["worker"]: Place(**plain) for plain in part["places"]}
        rest = Rest(number, before, places, part["next_worker"])
        epoch = Epoch(number, state["batches"], rest)
        epoch.report = RowReport.from_plain(part["report"])
        return epoch
    num_readers, report = state["readers"]["data.num_workers"], RowReport()
    readers = []
    for index, part in enumerate(state["ranks"]):
        report = report + RowReport.from_plain(part["report"])
        for place in (Place(**plain) for plain in part["places"]):
            readers.append((index * num_readers + place.worker, place))
            report = report + RowReport(rows=-len(place.held), truncated=-place.num_truncated)
    num_pulled = max((place.num_pulled for _, place in readers), default=0)
    ids = consumed_ids(
        readers, order(number, before, num_pulled), len(state["ranks"]) * num_readers
    )
    done = np.zeros(max(ids.max(initial=-1) + 1, 0 if before is None else len(before)), dtype=bool)
    done[ids] = True
    if before is not None:
        done[: len(before)] |= before
    epoch = Epoch(number, state["batches"], Rest(number, done))
    epoch.report = report.share(rank, world_size)
    return epoch
