"""Where every row of a cache lies, found by its number among millions."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from neo.teachers.shards import RECORD, key_numbers


class RowTable:
    """The records of rows by their numbers (`shards.key_numbers`); of a row's, the first counts.

    What it holds does not change: `with_more` makes another, so that a thread may look rows up
    while another adds some. The two share room for records: only the newest may be added to.
    """

    def __init__(self) -> None:
        # Records stand as they came; there is room behind the first `_num` of them.
        self._records = np.zeros(0, dtype=RECORD)
        self._shards = np.zeros(0, dtype=np.int32)
        self._num = 0
        self._numbers = np.zeros(0, dtype=np.int64)  # ascending
        self._places = np.zeros(0, dtype=np.int64)  # of their records

    def __len__(self) -> int:
        return len(self._numbers)

    def find(self, number: int) -> tuple[Any, int] | None:
        """The record of a row, and the number of its shard; None where it is not there."""
        at = int(np.searchsorted(self._numbers, number))
        if at == len(self._numbers) or self._numbers[at] != number:
            return None
        place = self._places[at]
        return self._records[place], int(self._shards[place])

    def holds(self, numbers: np.ndarray) -> np.ndarray:
        """Which of these rows are there."""
        if not len(self._numbers):
            return np.zeros(len(numbers), dtype=bool)
        at = np.searchsorted(self._numbers, numbers)
        return self._numbers[np.minimum(at, len(self._numbers) - 1)] == numbers

    def in_order(self) -> np.ndarray:
        """The records of all rows, in the order in which they came."""
        return self._records[np.sort(self._places)]

    def with_more(self, records: Sequence[np.ndarray], shards: Sequence[int]) -> "RowTable":
        """A table that has these records, too.

        Args:
            records: Some of each shard.
            shards: Their numbers.
        """
        added = np.concatenate([np.zeros(0, dtype=RECORD), *records])
        numbers = key_numbers(added["part"], added["row_id"])
        order = np.argsort(numbers, kind="stable")
        numbers = numbers[order]
        new = ~self.holds(numbers)
        new[1:] &= numbers[1:] != numbers[:-1]
        numbers, places = numbers[new], order[new] + self._num
        table = RowTable()
        table._num = self._num + len(added)
        table._records, table._shards = self._with_room(len(added))
        table._records[self._num : table._num] = added
        lengths = [len(each) for each in records]
        table._shards[self._num : table._num] = np.repeat(np.array(shards, dtype=np.int32), lengths)
        at = np.searchsorted(self._numbers, numbers)
        table._numbers = np.insert(self._numbers, at, numbers)
        table._places = np.insert(self._places, at, places)
        return table

    def _with_room(self, num: int) -> tuple[np.ndarray, np.ndarray]:
        """The records and their shards with room for more, copied only where there is none."""
        if self._num + num <= len(self._records):
            return self._records, self._shards
        room = self._num // 2 + num
        records, shards = np.zeros(self._num + room, RECORD), np.zeros(self._num + room, np.int32)
        records[: self._num] = self._records[: self._num]
        shards[: self._num] = self._shards[: self._num]
        return records, shards
