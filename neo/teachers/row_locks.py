"""Who computes which row: locks that processes take on single rows of a cache."""

import errno
import fcntl
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from neo.teachers.durable import CacheError
from neo.teachers.shards import RowKey, key_number

LOCKS = "locks"


class RowLocks:
    """Locks on rows, a byte each of the file `locks`; one that dies releases its own.

    They keep processes apart, not threads of one. A process has one `RowLocks` of a cache: with the
    second file that it closes, the system releases all of its locks (POSIX record locks).

    Args:
        folder: Of the cache.
    """

    def __init__(self, folder: Path | str) -> None:
        self.file = Path(folder) / LOCKS
        self._descriptor = os.open(self.file, os.O_RDWR | os.O_CREAT, 0o644)

    @contextmanager
    def held(self, keys: Sequence[RowKey], wait: bool = True) -> Iterator[list[RowKey]]:
        """Within it the rows are this process's; gives those it got, in ascending order.

        Rows are taken in one order by all, so that no two processes wait for each other. A process
        that holds rows must not ask for more.

        Args:
            keys: Rows.
            wait: For those that others hold; else they are left out.

        Raises:
            CacheError: The file system has no locks.
        """
        numbers = {key_number(key): key for key in keys}
        got: list[int] = []
        try:
            for number in sorted(numbers):
                if self._take(number, wait):
                    got.append(number)
            yield [numbers[number] for number in got]
        finally:
            for number in got:
                fcntl.lockf(self._descriptor, fcntl.LOCK_UN, 1, number)

    def _take(self, number: int, wait: bool) -> bool:
        try:
            how = fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB
            fcntl.lockf(self._descriptor, how, 1, number)
        except OSError as error:
            if not wait and error.errno in (errno.EACCES, errno.EAGAIN):
                return False
            raise CacheError(
                f"{self.file}: cannot be locked: {error.strerror}; put the cache on a file system "
                "with POSIX locks"
            ) from error
        return True

    def close(self) -> None:
        """Releases everything."""
        os.close(self._descriptor)
