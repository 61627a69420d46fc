"""Examples laid side by side in sequences, and sequences in batches."""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Any

import torch
from jaxtyping import Int64
from torch import Tensor

from neo.data.place import Place
from neo.data.prompt import IGNORE, Example

# Sequences that are open at a time: more packs tighter, and looks at more of them per example.
NUM_OPEN = 64
# With packing off, so many batches are read and sorted by length before the first is given.
SORT_WINDOW = 16
# So many bad rows of each reason are kept to be shown.
NUM_SHOWN = 3


@dataclass(frozen=True)
class RowReport:
    """What was read: rows in all, of these truncated, and unusable ones by reason.

    `shown` holds, for each reason, the index and the fault of the first few rows.
    """

    rows: int = 0
    truncated: int = 0
    bad: Counter[str] = field(default_factory=Counter)
    shown: dict[str, tuple[tuple[int, str], ...]] = field(default_factory=dict)

    def __add__(self, other: "RowReport") -> "RowReport":
        return RowReport(
            rows=self.rows + other.rows,
            truncated=self.truncated + other.truncated,
            bad=self.bad + other.bad,
            shown={
                reason: (self.shown.get(reason, ()) + other.shown.get(reason, ()))[:NUM_SHOWN]
                for reason in {**self.shown, **other.shown}
            },
        )

    @property
    def num_bad(self) -> int:
        """How many rows could not be used, for whatever reason."""
        return sum(self.bad.values())

    def share(self, rank: int, world_size: int) -> "RowReport":
        """This rank's part of the counts; the parts of all ranks add up to the whole."""

        def part(number: int) -> int:
            return len(range(rank, number, world_size))

        return RowReport(
            rows=part(self.rows),
            truncated=part(self.truncated),
            bad=+Counter({reason: part(count) for reason, count in self.bad.items()}),
            shown={
                reason: mine
                for reason, rows in self.shown.items()
                if (mine := rows[rank::world_size])
            },
        )

    def plain(self) -> dict[str, Any]:
        """The same in types that a checkpoint may hold."""
        return {
            "rows": self.rows,
            "truncated": self.truncated,
            "bad": dict(self.bad),
            "shown": dict(self.shown),
        }

    @classmethod
    def from_plain(cls, plain: dict[str, Any]) -> "RowReport":
        """The report that `plain` was made of."""
        return cls(**plain | {"bad": Counter(plain["bad"])})


@dataclass(frozen=True)
class Batch:
    """Sequences of tokens, right-padded to the longest, with a report of the rows read for them.

    `position_ids` restart at 0 at every packed example, which is what keeps examples from seeing
    each other; `targets` are aligned with `input_ids`, with `IGNORE` where nothing is supervised.
    `row_ids` name the rows that lie in it, as `Example.row_id` does, sequence by sequence.
    `places` say where the readers stand behind it that gave it, and those that gave none before.
    """

    input_ids: Int64[Tensor, "batch length"]
    position_ids: Int64[Tensor, "batch length"]
    targets: Int64[Tensor, "batch length"]
    report: RowReport = field(default_factory=RowReport)
    num_rows: int = 0  # that lie in it, where the report counts those read for it and ahead of it
    row_ids: tuple[int, ...] = ()
    places: tuple[Place, ...] = ()
    # That lie in this batch and its fellows on all other ranks, and bad ones read for them.
    num_rows_all_ranks: int = 0
    taught: Any = None  # what a cache holds of the teacher for it; moves along with the tensors

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "Batch":
        """The same batch with its tensors on the device."""
        return replace(
            self,
            input_ids=self.input_ids.to(device, non_blocking=non_blocking),
            position_ids=self.position_ids.to(device, non_blocking=non_blocking),
            targets=self.targets.to(device, non_blocking=non_blocking),
            taught=self.taught and self.taught.to(device, non_blocking=non_blocking),
        )

    def pin_memory(self) -> "Batch":
        """The same batch in pinned memory, from which a copy to the GPU need not wait."""
        return replace(
            self,
            input_ids=self.input_ids.pin_memory(),
            position_ids=self.position_ids.pin_memory(),
            targets=self.targets.pin_memory(),
        )

    @property
    def num_supervised(self) -> int:
        """How many positions have a target."""
        return int((self.targets != IGNORE).sum())


Bins = list[tuple[int, list[Example]]]


def pack(
    examples: Iterable[Example],
    max_length: int,
    num_open: int = NUM_OPEN,
    bins: Bins | None = None,
) -> Iterator[list[Example]]:
    """Sequences of at most `max_length` tokens, each a list of whole examples.

    Best fit: an example goes to the fullest open sequence that has room. With `num_open` sequences
    open and room in none, the fullest is given out. The same examples give the same sequences.

    Args:
        examples: Read one by one.
        max_length: Tokens in a sequence at most.
        num_open: Sequences that are open at a time.
        bins: The open sequences with their lengths. Whenever a sequence is given out, they and it
            hold all examples read before; who begins with them goes on from there.
    """
    bins = [] if bins is None else bins
    for example in examples:
        length = len(example.input_ids)
        if length > max_length:
            raise ValueError(f"an example of {length} tokens exceeds max_length={max_length}")
        fitting = [i for i, (used, _) in enumerate(bins) if used + length <= max_length]
        if fitting:
            best = max(fitting, key=lambda i: bins[i][0])
            used, members = bins[best]
            members.append(example)
            bins[best] = (used + length, members)
            if used + length == max_length:
                yield bins.pop(best)[1]
            continue
        full = None
        if len(bins) == num_open:
            full = bins.pop(max(range(num_open), key=lambda i: bins[i][0]))[1]
        bins.append((length, [example]))
        if full is not None:
            yield full
    while bins:
        yield bins.pop(0)[1]


def collate(
    sequences: Sequence[Sequence[Example]], pad_id: int, packing: bool, report: RowReport
) -> Batch:
    """One batch of the sequences.

    Padding is never supervised. Packed, its positions restart, so that it is a segment of its own;
    unpacked, positions run on through it, so that nothing takes the sequence for a packed one.
    """
    length = max(sum(len(e.input_ids) for e in sequence) for sequence in sequences)
    ids = torch.full((len(sequences), length), pad_id, dtype=torch.int64)
    positions = torch.arange(length).repeat(len(sequences), 1)
    targets = torch.full((len(sequences), length), IGNORE, dtype=torch.int64)
    for row, sequence in enumerate(sequences):
        at = 0
        for example in sequence:
            size = len(example.input_ids)
            ids[row, at : at + size] = torch.tensor(example.input_ids)
            targets[row, at : at + size] = torch.tensor(example.targets)
            if packing:
                positions[row, at : at + size] = torch.arange(size)
            at += size
        if packing:
            positions[row, at:] = torch.arange(length - at)
    num_rows = sum(len(sequence) for sequence in sequences)
    row_ids = tuple(e.row_id for e in chain.from_iterable(sequences) if e.row_id is not None)
    return Batch(ids, positions, targets, report, num_rows, row_ids)


def empty_batch(pad_id: int, report: RowReport) -> Batch:
    """One padding token and nothing supervised: a carrier for a report without examples."""
    empty = collate([[Example([pad_id], [IGNORE])]], pad_id, False, report)
    return replace(empty, num_rows=0)
